"""Refuse broadcasting that pairs every example with every other one: [B, 1] - [B] is [B, B]."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from jaxnet.train.origin import name_in
from jaxnet.train.roles import MARK, Found
from jaxnet.train.tracing import pairs_in

__all__ = ["all_pairs", "refuse_pairs"]

Function = TypeVar("Function", bound=Callable[..., Any])


def all_pairs(function: Function) -> Function:
    """Declare that broadcasting inside this function pairs all examples on purpose.

    Wrap a loss, a metric or any function that they call. Pairs that the code writes explicitly,
    such as `x[:, None] - y[None, :]` and `z @ z.T`, need no declaration.

    Args:
      function: any function of arrays.

    Returns:
      The same function, with the same signature.

    Example:
      >>> ranking = all_pairs(lambda scores, labels: (scores[:, None] - labels) ** 2)
      >>> ranking(np.zeros(3), np.ones(3)).shape
      (3, 3)
    """

    @functools.wraps(function)
    def marked(*args, **kwargs):
        with jax.named_scope(MARK):
            return function(*args, **kwargs)

    return marked  # pyright: ignore[reportReturnType]


def refuse_pairs(what: str, function: Callable[..., Any], batch: Any, *rest: Any) -> None:
    """Raise if `function(batch, *rest)` pairs the examples of the batch by broadcasting, without
    declaring it.

    The function is traced, not run. Its batch is first made 3 and 5 times as long, so that the axis
    of examples cannot be mistaken for another axis that happens to have the same size. A function
    that accepts only the true size is traced with that.

    Args:
      what: how the error names the function, such as "train_step: the loss".
      function: a function of pytrees of arrays.
      batch: leaves [B, ...]; scalars are left alone.
      *rest: further arguments, whose sizes do not depend on B.

    Raises:
      ValueError: an operation broadcasts examples against examples.
    """
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf)}
    if not sizes - {1}:
        return
    rest = jax.tree.map(_spec, rest)
    pairs = _pairs(sizes, function, batch, rest)
    if pairs is None:
        return
    a, b = (f"[{', '.join(map(str, shape))}]" for shape in pairs.shapes)
    place = f" ({pairs.where})" if pairs.where else ""
    raise ValueError(
        f"{what} broadcasts {a} against {b} in '{pairs.operation}'{place}, which pairs every "
        "example with every other one: give both one shape, with x[:, 0] or y[:, None]; if all "
        "pairs are meant, write y[None, :] or wrap the function in jaxnet.train.all_pairs"
    )


# The lengths of the batches that are traced, in units of the true length.
_FACTORS = (3, 5)


def _pairs(sizes: set[int], function: Callable[..., Any], batch: Any, rest: Any) -> Found | None:
    """The first operation that pairs examples, with the true shapes; None if there is none."""
    found = []
    for factor in _FACTORS:
        longer = frozenset(factor * size for size in sizes)
        specs = jax.tree.map(lambda leaf, k=factor: _spec(leaf, k), batch)
        try:
            found.append(_pairs_at(function, specs, rest, longer))
        except Exception as error:
            return _pairs_at_true_size(function, batch, rest, _refused_pairs(error, factor, longer))
        if not found[-1]:
            return None
    others = {(p.operation, p.where, tuple(map(len, p.shapes))): p for p in reversed(found[1])}
    for one in found[0]:
        other = others.get((one.operation, one.where, tuple(map(len, one.shapes))))
        if other is not None:
            return one._replace(shapes=tuple(map(_true_shape, one.shapes, other.shapes)))
    return None


def _pairs_at_true_size(
    function: Callable[..., Any], batch: Any, rest: Any, refused: Found | None
) -> Found | None:
    """The first operation that pairs examples in a trace with the true size. `refused` is what a
    longer trace has found.
    """
    # If this trace fails as well, the error of the true call is the better one.
    try:
        found = _pairs_at(function, jax.tree.map(_spec, batch), rest, frozenset())
    except Exception:
        return None
    return refused or next(iter(found), None)


def _true_shape(three: tuple[int, ...], five: tuple[int, ...]) -> tuple[int, ...]:
    """The shape for the true size, from those for 3 and 5 times the size."""
    return tuple(2 * a - b for a, b in zip(three, five, strict=True))


def _pairs_at(
    function: Callable[..., Any], batch: Any, rest: Any, stretched: frozenset[int]
) -> list[Found]:
    def arrays(batch, rest):
        return [leaf for leaf in jax.tree.leaves(function(batch, *rest)) if hasattr(leaf, "dtype")]

    # The error for pairs is more specific than JAX's error for rank promotion.
    with jax.numpy_rank_promotion("allow"):
        program = jax.make_jaxpr(arrays)(batch, rest).jaxpr
    return pairs_in(program, len(jax.tree.leaves(batch)), stretched)


def _spec(leaf: Any, factor: int = 1) -> Any:
    """The spec of a leaf whose leading axis is `factor` times as long."""
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    shape = (leaf.shape[0] * factor, *leaf.shape[1:]) if leaf.shape else ()
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)
    return jax.ShapeDtypeStruct(shape, dtype)


def _refused_pairs(error: Exception, factor: int, sizes: frozenset[int]) -> Found | None:
    """The pairs in an error about shapes: [B, C] and [B] broadcast only if B happens to equal C."""
    text = str(error).splitlines()[0] if str(error) else ""
    if "ncompatible shapes" not in text:
        return None
    listed = re.findall(r"\(([\d, ]+)\)", text)
    shapes = [tuple(map(int, re.findall(r"\d+", part))) for part in listed]
    for long in shapes:
        for short in shapes:
            if len(short) < len(long) and short[0] == long[0] and short[0] in sizes:
                a, b = ((shape[0] // factor, *shape[1:]) for shape in (long, short))
                return Found(name_in(error) or text.split(" ")[0].lower(), "", (a, b))
    return None
