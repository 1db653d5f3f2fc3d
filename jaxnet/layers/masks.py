"""Masks of attention: which keys a query may attend to.

A mask is a value that `&` combines: `causal() & window(128) & padding(lengths) & segments(ids)`. An
array of bools is a mask too, and so is an array of floats, which is added to the scores. The parts
keep their structure, so that a fused attention can leave out what they hide.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.core import describe, is_array

__all__ = ["Mask", "as_mask", "causal", "padding", "segments", "window"]

STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """Which keys each query may attend to. All parts must allow a pair.

    A mask is also a function that returns itself, so it is a child of attention that `replace`
    exchanges: `replace(net, "**/mask", causal())`.

    Attributes:
      causal: hide the keys behind the query.
      before: the number of keys before the query that it may attend to; None for all.
      after: the number of keys behind the query that it may attend to; None for all.
      filled: hide the keys at negative positions, which are the empty places of a cache.
      lengths: the number of valid keys of each sequence, [...], or None.
      segments: pairs of integers for queries and keys, ([..., T], [..., S]). A query attends to the
        keys of its own segment.
      allowed: bools, [..., heads or 1, T, S], or None.
      bias: floats that are added to the scores, [..., heads or 1, T, S], or None.
    """

    causal: bool = dataclasses.field(default=False, metadata=STATIC)
    before: int | None = dataclasses.field(default=None, metadata=STATIC)
    after: int | None = dataclasses.field(default=None, metadata=STATIC)
    filled: bool = dataclasses.field(default=False, metadata=STATIC)
    lengths: Any = None
    segments: tuple[Any, ...] = ()
    allowed: Any = None
    bias: Any = None

    def __call__(self, *_: Any) -> Mask:
        """Return the mask itself."""
        return self

    def __and__(self, other: Any) -> Mask:
        """Combine two masks: a pair must be allowed by both, and biases are added."""
        other = as_mask(other)
        return Mask(
            self.causal or other.causal,
            _both(min, self.before, other.before),
            _both(min, self.after, other.after),
            self.filled or other.filled,
            _both(jnp.minimum, self.lengths, other.lengths),
            (*self.segments, *other.segments),
            _both(jnp.logical_and, self.allowed, other.allowed),
            _both(jnp.add, self.bias, other.bias),
        )

    __rand__ = __and__

    def __repr__(self) -> str:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        shown = [
            f"{name}={describe(value) if is_array(value) else value}"
            for name, value in fields.items()
            if value is not None and value is not False and value != ()
        ]
        return f"Mask({', '.join(shown)})"

    def pairs(self, queries: Any, keys: Any) -> Any:
        """Compute which pairs are allowed.

        Args:
          queries: the positions of the queries, integers [T] or [..., T].
          keys: the positions of the keys, integers [S] or [..., S].

        Returns:
          Bools, which broadcast to [..., heads, T, S]; None if all pairs are allowed.
        """
        q, k = jnp.expand_dims(queries, -1), jnp.expand_dims(keys, -2)
        parts = []
        if self.causal or self.before is not None or self.after is not None:
            q, k = _aligned(q, k)
            ahead = k - q
            parts += [_heads(ahead <= 0)] if self.causal else []
            parts += [] if self.before is None else [_heads(ahead >= -self.before)]
            parts += [] if self.after is None else [_heads(ahead <= self.after)]
        if self.filled:
            parts.append(_heads(k >= 0))
        if self.lengths is not None:
            lengths = jnp.expand_dims(self.lengths, (-1, -2))
            lengths, k = _aligned(lengths, jnp.expand_dims(keys, -2))
            parts.append(_heads(k < lengths))
        for of_queries, of_keys in self.segments:
            parts.append(_heads(jnp.expand_dims(of_queries, -1) == jnp.expand_dims(of_keys, -2)))
        if self.allowed is not None:
            parts.append(self.allowed)
        return (
            functools.reduce(lambda a, b: jnp.logical_and(*_aligned(a, b)), parts)
            if parts
            else None
        )


def causal() -> Mask:
    """Let a query attend to itself and to the keys before it.

    Returns:
      The mask, of pairs [T, S].

    Example:
      >>> causal() & window(3)
      Mask(causal=True, before=3, after=3)
    """
    return _CAUSAL


def window(before: int, after: int | None = None) -> Mask:
    """Let a query attend to the nearest keys only.

    Mistral's window of n tokens, which counts the query itself, is `causal() & window(n - 1)`.

    Args:
      before: the number of keys before the query.
      after: the number of keys behind it; `before` by default.

    Returns:
      The mask, of pairs [T, S].

    Raises:
      ValueError: a number is not an integer of at least 0.
    """
    before = size_of("window: before", before, 0)
    after = before if after is None else size_of("window: after", after, 0)
    return _window(before, after)


def padding(lengths: Any) -> Mask:
    """Hide the keys behind the end of each sequence. A sequence of length 0 gives zeros.

    Args:
      lengths: the number of valid keys of each sequence, integers [...].

    Returns:
      The mask, of pairs [..., T, S].

    Raises:
      TypeError: the lengths are not an array of integers.
    """
    return Mask(lengths=_integers("padding: lengths", lengths))


def segments(queries: Any, keys: Any = None) -> Mask:
    """Let a query attend to the keys of its own segment: several sequences packed into one.

    Args:
      queries: the segment of each query, integers [..., T].
      keys: the segment of each key, integers [..., S]; those of the queries by default.

    Returns:
      The mask, of pairs [..., T, S].

    Raises:
      TypeError: the segments are not arrays of integers.
    """
    queries = _integers("segments", queries)
    return Mask(segments=((queries, queries if keys is None else _integers("segments", keys)),))


def as_mask(mask: Any) -> Mask:
    """Convert an array to a mask.

    Args:
      mask: a Mask; bools, True where a query may attend, or floats that are added to the scores,
        [..., heads or 1, T, S]; None for a mask that hides nothing.

    Returns:
      The mask, of pairs [..., T, S].

    Raises:
      TypeError: it is anything else.
      ValueError: an array has fewer than two axes.
    """
    if isinstance(mask, Mask) or mask is None:
        return mask or Mask()
    if not is_array(mask) or not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.floating)):
        got = describe(mask) if is_array(mask) else repr(mask)
        raise TypeError(
            "mask: it must be a Mask such as causal(), or an array of bools (True: may attend) or "
            f"of floats (added to the scores), got {got}"
        )
    if len(mask.shape) < 2:
        raise ValueError(f"mask: an array must be [..., heads or 1, T, S], got {describe(mask)}")
    return Mask(allowed=mask) if mask.dtype == bool else Mask(bias=mask)


_CAUSAL = Mask(causal=True)


@functools.cache
def _window(before: int, after: int) -> Mask:
    return Mask(before=before, after=after)


def _both(combine, a, b):
    if a is None or b is None:
        return b if a is None else a
    return combine(*_aligned(a, b)) if is_array(a) and is_array(b) else combine(a, b)


def _aligned(a, b):
    """Two arrays with the same number of axes, for a broadcast."""
    rank = max(a.ndim, b.ndim)
    return tuple(x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (a, b))


def _heads(pairs):
    """Pairs [..., T, S] with an axis for the heads, [..., 1, T, S]; [T, S] stays as it is."""
    return pairs if pairs.ndim == 2 else jnp.expand_dims(pairs, -3)


def _integers(label: str, values: Any):
    values = values if is_array(values) else jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"{label} must be integers, got {describe(values)}")
    return values
