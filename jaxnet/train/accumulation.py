"""A batch in equal parts."""

from __future__ import annotations

from typing import Any

import jax

from jaxnet.train.sharding import in_parts

__all__ = ["one_part", "parts_of"]


def parts_of(leaf: jax.Array, parts: int) -> jax.Array:
    """A leaf [B, ...] in equal parts, [parts, B / parts, ...]."""
    _part(leaf, parts)
    return in_parts(leaf, parts)


def one_part(leaf: Any, parts: int) -> Any:
    """The spec of one part of a batch. A leaf without a leading axis is returned unchanged."""
    if not getattr(leaf, "ndim", 0):
        return leaf
    return jax.ShapeDtypeStruct((_part(leaf, parts), *leaf.shape[1:]), leaf.dtype)


def _part(leaf: Any, parts: int) -> int:
    if leaf.shape[0] % parts:
        raise ValueError(
            f"train_step: a batch of {leaf.shape[0]} does not divide into accumulate={parts} "
            "equal parts"
        )
    return leaf.shape[0] // parts
