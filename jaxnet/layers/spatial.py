"""Options and inputs of layers with windows over the spatial axes of [..., *spatial, features]."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxnet.checks import size_of
from jaxnet.core import check_input, describe

__all__ = [
    "ENDLESS",
    "check_spatial",
    "over_batch",
    "pads_along",
    "sizes_along",
    "spatial_window",
    "telling_how_read",
]

# The size of an axis that every window fits into.
ENDLESS = 2**30


def spatial_window(
    name: str, what: str, window: int | Sequence[int]
) -> tuple[tuple[int, ...], str]:
    """The window along each spatial axis (an int is for images), and its text in labels. Errors
    name the argument `what`.
    """
    try:
        if np.ndim(window) == 0:
            sizes = (size_of(name, window),) * 2
        else:
            sizes = tuple(size_of(name, size) for size in window)  # pyright: ignore[reportGeneralTypeIssues]
        if not sizes:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}: {what} must be a positive int, or one for each spatial axis as in (3,), "
            f"got {window!r}"
        ) from None
    return sizes, str(sizes[0] if sizes == sizes[:1] * 2 else sizes)


def sizes_along(what: str, value: Any, rank: int, minimum: int = 1) -> tuple[int, ...]:
    """One int of at least `minimum` per spatial axis, from one for all axes or a sequence."""
    try:
        values = (value,) * rank if np.ndim(value) == 0 else tuple(value)
        if len(values) != rank:
            raise ValueError
        return tuple(size_of(what, v, minimum) for v in values)
    except (TypeError, ValueError):
        kind = "a positive int" if minimum == 1 else f"an int of at least {minimum}"
        axes = "the spatial axis" if rank == 1 else f"each of the {rank} spatial axes"
        raise ValueError(f"{what} must be {kind}, or one for {axes}, got {value!r}") from None


def pads_along(what: str, padding: Any, rank: int) -> str | tuple[tuple[int, int], ...]:
    """A named padding unchanged; numbers as (before, after) per spatial axis."""
    if isinstance(padding, str):
        return padding
    try:
        pairs = ((padding, padding),) * rank if np.ndim(padding) == 0 else tuple(padding)
        if len(pairs) != rank:
            raise ValueError
        return tuple((size_of(what, lo, 0), size_of(what, hi, 0)) for lo, hi in pairs)
    except (TypeError, ValueError):
        raise ValueError(
            f"{what} must be 'SAME', 'VALID', an int or (before, after), neither negative, for "
            f"each of the {rank} spatial axes, got {padding!r}"
        ) from None


def check_spatial(
    label: str, x: Any, rank: int, *, width: int | None = None, **checks: Any
) -> None:
    """`check_input` for x [..., *spatial, C]. An error about C also tells how the axes were
    interpreted.
    """
    check_input(label, x, **checks)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(
            f"{label}: the input must be real, got {describe(x)}; pass real and imaginary part "
            "as channels"
        )
    if len(x.shape) <= rank:
        names = {1: "length", 2: "height, width", 3: "depth, height, width"}
        axes = names.get(rank, f"{rank} spatial axes")
        raise ValueError(f"{label}: the input must be [..., {axes}, features], got {describe(x)}")
    with telling_how_read(x, rank):
        check_input(label, x, width=width, kind=object)


@contextlib.contextmanager
def telling_how_read(x: Any, rank: int) -> Iterator[None]:
    """Add the interpretation of the axes of x to an error: [32, 28, 28] is 1 image of 32x28 with 28
    channels.
    """
    try:
        yield
    except ValueError as error:
        *batch, channels = x.shape[: -rank - 1] + x.shape[-1:]
        number, size = math.prod(batch), "x".join(map(str, x.shape[-rank - 1 : -1]))
        thing = {1: "sequence", 2: "image", 3: "volume"}.get(rank, f"array of {rank} spatial axes")
        things, s = f"{thing}{'s' * (number != 1)}", "s" * (channels != 1)
        read = f"{number} {things} of {size} with {channels} channel{s}"
        raise ValueError(f"{error}; the input was read as {read}") from None


def over_batch(fn: Callable[..., Any], x, rank: int):
    """Apply fn, which expects one batch axis [N, *spatial, C], to any number of batch axes."""
    batch, image = x.shape[: -rank - 1], x.shape[-rank - 1 :]
    y = fn(x.reshape(math.prod(batch), *image))
    return y.reshape(*batch, *y.shape[1:])
