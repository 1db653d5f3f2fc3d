"""Arrays in other dtypes: floats are rounded, all else must be exact."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxnet.checkpoint.format import Misfit
from jaxnet.checkpoint.structure import Spec
from jaxnet.checkpoint.words import shown

__all__ = ["Target", "cast", "dtype_of"]


class Target(NamedTuple):
    """How an array shall come back: kind and dtype as in Node, and sharding (None: where JAX puts
    arrays by default).
    """

    kind: str
    dtype: str
    sharding: Any = None


def dtype_of(name: str) -> np.dtype:
    """The dtype of this name, of NumPy or of ml_dtypes."""
    return np.dtype(getattr(ml_dtypes, name, name))


def cast(
    file: str, data: dict[str, np.ndarray], targets: dict[str, Target]
) -> dict[str, np.ndarray]:
    """Arrays in the dtypes of `targets`: floats rounded to floats, all else exact, or one Misfit
    for all that is not.
    """
    result, lines = {}, []
    for name, x in data.items():
        wanted = x.dtype if targets[name].kind == "key" else dtype_of(targets[name].dtype)
        result[name], lost, first = (x, 0, 0) if x.dtype == wanted else _cast(x, wanted)
        if lost:
            spec = Spec(x.dtype.name, x.shape)
            lines.append(
                f"{shown(name)}: {lost} of {x.size} values of {spec} do not fit {wanted}, the "
                f"first is {x.flat[first]!s}"
            )
    if lines:
        text = (
            "these leaves would change by more than rounding (load them in their own dtype and "
            "convert them yourself):"
        )
        raise Misfit(file, None, "\n  ".join([text, *lines]))
    return result


def _cast(x: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, int, int]:
    """An array in another dtype, how many values have not come through, and the flat index of the
    first of them.
    """
    # The array is cast in blocks, because the check takes float64s.
    result, lost, first, block = np.empty(x.shape, dtype), 0, 0, 1 << 20
    source, target = x.reshape(-1), result.reshape(-1)
    for start in range(0, x.size, block):
        part = slice(start, start + block)
        target[part], bad = _cast_block(source[part], dtype)
        first = first if lost or not bad.any() else start + int(bad.argmax())
        lost += int(bad.sum())
    return result, lost, first


def _cast_block(x: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    def is_a(kind, which=x.dtype):
        return jnp.issubdtype(which, kind)

    if is_a(np.complexfloating) or is_a(np.complexfloating, dtype):
        if not is_a(np.complexfloating, dtype):
            new, bad = _cast_block(np.real(x), dtype)
            return new, bad | (np.imag(x) != 0)
        part = np.dtype(np.float32 if dtype.name == "complex64" else np.float64)
        (real, bad), (imag, worse) = (_cast_block(y, part) for y in (np.real(x), np.imag(x)))
        new = np.empty(x.shape, dtype)
        new.real, new.imag = real, imag
        return new, bad | worse
    with np.errstate(all="ignore"):
        if is_a(np.floating) and is_a(np.floating, dtype):
            new = _rounded(x, dtype)
            before, after = x.astype(np.float64), new.astype(np.float64)
            fits = np.isfinite(after) & (abs(before) <= float(ml_dtypes.finfo(dtype).max))
            same = (after == before) | np.isnan(after) & np.isnan(before)
            return new, ~np.where(np.isfinite(before), fits, same)
        if is_a(np.floating):
            before = x.astype(np.float64)
            inside = _inside(before, dtype)
            return np.where(inside, before, 0).astype(dtype), ~inside | (before != np.trunc(before))
        whole = x.astype(
            np.dtype(f"{'u' * x.dtype.name.startswith(('u', 'bool'))}int{8 * x.dtype.itemsize}")
        )
        if is_a(np.floating, dtype):
            new = whole.astype(dtype)
            after = new.astype(np.float64)
            inside = _inside(after, whole.dtype)
            return new, ~inside | (np.where(inside, after, 0).astype(whole.dtype) != whole)
        low, high = _limits(dtype)
        return whole.astype(dtype), (whole < low) | (whole > high)


def _rounded(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Convert floats to another float dtype, rounding each number once, to the nearest.

    ml_dtypes converts float64 to its own dtypes through float32, which rounds twice. Rounding to
    odd in the first step makes the second step correct: a number that is not a float32 goes to the
    neighbor whose last bit is 1.

    Source: Boldo & Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd", 2008.
    """
    if dtype == ml_dtypes.float8_e8m0fnu:
        # Below the second smallest number, 2^-126, ml_dtypes always rounds up.
        x = np.where((x > 2.0**-127) & (x < 1.5 * 2.0**-127), x.dtype.type(2.0**-127), x)
    # NumPy's own conversions round once.
    if x.dtype != np.float64 or dtype in (np.float16, np.float32, np.float64):
        return x.astype(dtype)
    near = x.astype(np.float32)
    bits, wide = near.view(np.uint32), near.astype(np.float64)
    odd = (bits - (abs(wide) > abs(x))) | 1
    return (
        np.where((wide == x) | np.isnan(x), bits, odd)
        .astype(np.uint32)
        .view(np.float32)
        .astype(dtype)
    )


def _limits(dtype: np.dtype) -> tuple[int, int]:
    return (
        (0, 1)
        if dtype.name == "bool"
        else (int(ml_dtypes.iinfo(dtype).min), int(ml_dtypes.iinfo(dtype).max))
    )


def _inside(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Where float64 numbers lie in the range of an integer dtype, whose limits are powers of two
    and so exact.
    """
    low, high = _limits(dtype)
    return (x >= float(low)) & (x < float(high + 1))
