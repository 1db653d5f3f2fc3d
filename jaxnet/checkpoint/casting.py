"""Convert arrays to other dtypes: floats are rounded to floats, everything else is exact."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxnet.checkpoint.arrays import dtype_of
from jaxnet.checkpoint.errors import Misfit
from jaxnet.checkpoint.placement import Target
from jaxnet.checkpoint.structure import Spec
from jaxnet.checkpoint.words import shown

__all__ = ["cast"]

# Arrays are cast in blocks of this number of elements, because the check needs float64s.
BLOCK = 1 << 20


def cast(
    file: str, data: dict[str, np.ndarray], targets: dict[str, Target]
) -> dict[str, np.ndarray]:
    """Convert arrays to the dtypes of their targets.

    Args:
      file: how errors name the file.
      data: the arrays by name.
      targets: the targets by name.

    Returns:
      The arrays by name.

    Raises:
      Misfit: values overflow or would not be exact; the error lists all such arrays.
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
    """An array in another dtype, the number of values that do not fit, and the flat index of the
    first of them.
    """
    result, lost, first = np.empty(x.shape, dtype), 0, 0
    source, target = x.reshape(-1), result.reshape(-1)
    for start in range(0, x.size, BLOCK):
        part = slice(start, start + BLOCK)
        target[part], bad = _cast_block(source[part], dtype)
        first = first if lost or not bad.any() else start + int(bad.argmax())
        lost += int(bad.sum())
    return result, lost, first


def _cast_block(x: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Numbers in another dtype, and for each whether it does not fit."""
    if _is(x.dtype, np.complexfloating) or _is(dtype, np.complexfloating):
        return _cast_complex(x, dtype)
    with np.errstate(all="ignore"):
        if not _is(x.dtype, np.floating):
            return _cast_integers(x, dtype)
        if _is(dtype, np.floating):
            return _cast_floats(x, dtype)
        before = x.astype(np.float64)
        inside = _inside(before, dtype)
        return np.where(inside, before, 0).astype(dtype), ~inside | (before != np.trunc(before))


def _cast_complex(x: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """`_cast_block` from or to complex numbers."""
    if not _is(dtype, np.complexfloating):
        new, bad = _cast_block(np.real(x), dtype)
        return new, bad | (np.imag(x) != 0)
    part = np.dtype(np.float32 if dtype.name == "complex64" else np.float64)
    (real, bad), (imag, worse) = (_cast_block(y, part) for y in (np.real(x), np.imag(x)))
    new = np.empty(x.shape, dtype)
    new.real, new.imag = real, imag
    return new, bad | worse


def _cast_floats(x: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """`_cast_block` from floats to floats."""
    new = _rounded(x, dtype)
    before, after = x.astype(np.float64), new.astype(np.float64)
    fits = np.isfinite(after) & (abs(before) <= float(ml_dtypes.finfo(dtype).max))
    same = (after == before) | np.isnan(after) & np.isnan(before)
    return new, ~np.where(np.isfinite(before), fits, same)


def _cast_integers(x: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """`_cast_block` from integers and bools to all dtypes that are not complex."""
    unsigned = x.dtype.name.startswith(("u", "bool"))
    whole = x.astype(np.dtype(f"{'u' * unsigned}int{8 * x.dtype.itemsize}"))
    if not _is(dtype, np.floating):
        low, high = _limits(dtype)
        return whole.astype(dtype), (whole < low) | (whole > high)
    new = whole.astype(dtype)
    after = new.astype(np.float64)
    inside = _inside(after, whole.dtype)
    return new, ~inside | (np.where(inside, after, 0).astype(whole.dtype) != whole)


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
    bits = np.where((wide == x) | np.isnan(x), bits, odd).astype(np.uint32)
    return bits.view(np.float32).astype(dtype)


def _limits(dtype: np.dtype) -> tuple[int, int]:
    if dtype.name == "bool":
        return 0, 1
    info = ml_dtypes.iinfo(dtype)
    return int(info.min), int(info.max)


def _inside(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Whether float64 numbers lie in the range of an integer dtype.

    The limits of the range are powers of two, so they are exact in float64.
    """
    low, high = _limits(dtype)
    return (x >= float(low)) & (x < float(high + 1))


def _is(dtype: np.dtype, kind: type) -> bool:
    return jnp.issubdtype(dtype, kind)
