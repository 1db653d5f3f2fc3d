"""The order of the data: which rows a batch takes, as a pure function of any position."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["balanced", "check_order", "order_digest", "order_name", "shuffle", "shuffled"]

Order = Callable[[jax.Array, int, jax.Array, jax.Array], jax.Array]
"""(key of the run, number of examples n, epoch, positions in it [B]) -> rows of the data, int32 [B]
in 0 .. n-1.
"""


def shuffle(key: jax.Array, n: int, epoch: jax.Array, positions: jax.Array) -> jax.Array:
    """Go through all rows in each epoch, in a different random order: sampling without replacement.

    Args:
      key: the PRNG key of the run.
      n: the number of examples.
      epoch: the number of the epoch, an integer scalar.
      positions: positions in the epoch, int32 [B].

    Returns:
      The rows at these positions, int32 [B].
    """
    return shuffled(jax.random.fold_in(key, epoch), n, positions)


def balanced(labels: Any) -> Order:
    """Make an order in which all classes are equally frequent, however frequent they are in data.

    An epoch has n positions, as with every order; each of the C classes gets n / C of them. Each
    class is cycled through: examples of a rare class repeat equally often, and only a part of a
    frequent class appears in one epoch.

    Args:
      labels: integers [n], known when the loop is compiled.

    Returns:
      The order.

    Raises:
      TypeError: the labels are not integers of rank 1.
      ValueError: there are no labels; when the order is used, the data has another length.

    Example:
      >>> rows = balanced([0, 0, 0, 0, 0, 0, 0, 1])(jax.random.key(0), 8, 0, jnp.arange(8))
      >>> int((rows == 7).sum())
      4
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise TypeError(
            f"balanced: labels must be integers [n], got {labels.dtype}{list(labels.shape)}"
        )
    if not labels.size:
        raise ValueError("balanced: there are no labels; pass one per example")
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    # A hash of the rows mixes the examples of a class. Unlike NumPy's generators, it never changes
    # between versions.
    mixed = _hash(np.arange(len(labels), dtype=np.uint32) * np.uint32(0x9E3779B9) + np.uint32(1))
    members = np.lexsort((mixed, classes)).astype(np.int32)
    return _Balanced(members, np.cumsum(counts) - counts, counts, _digest([classes]))


@dataclasses.dataclass(frozen=True, eq=False)
class _Balanced:
    """The order that `balanced` returns. Its rows are always in range.

    Attributes:
      members: the rows of all classes, class by class, int32 [n].
      starts: the place of each class in `members`, [C].
      counts: the number of rows of each class, [C].
      digest: a digest of the labels.
    """

    members: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    digest: str

    def __call__(self, key: jax.Array, n: int, epoch: jax.Array, positions: jax.Array) -> jax.Array:
        if n != len(self.members):
            raise ValueError(
                f"balanced: made for {len(self.members)} labels, used on data with {n} examples; "
                "pass the labels of this data"
            )
        key, turn_key = jax.random.split(jax.random.fold_in(key, epoch))
        turn, group = jnp.divmod(shuffled(key, n, positions), len(self.counts))
        size = jnp.asarray(self.counts, jnp.int32)
        # In each class, another row begins in each epoch.
        first = jax.random.randint(turn_key, size.shape, 0, size)
        place = (first[group] + turn) % size[group]
        return jnp.asarray(self.members)[jnp.asarray(self.starts, jnp.int32)[group] + place]


def shuffled(key: jax.Array, n: int, positions: jax.Array) -> jax.Array:
    """Return the places of `positions` under a random permutation of 0 .. n-1.

    The permutation is the swap-or-not shuffle: in each round every x has a partner k - x (mod n),
    and a hash of the pair decides whether the two change places, which is a permutation whatever
    the hash. A position costs 24 + 2 log2(n) rounds of integer arithmetic and no memory, so a
    training loop draws its next batch at its step, without sorting all n indices first.

    Source: Hoang, Morris & Rogaway, "An Enciphering Scheme Based on a Card Shuffle", CRYPTO 2012.
    The hash, which also turns the key into a word for each round, is the finalizer of MurmurHash3
    (Appleby).

    Args:
      key: the PRNG key that determines the permutation.
      n: the number of places.
      positions: integers in 0 .. n-1, int32 [B].

    Returns:
      The places, int32 [B] in 0 .. n-1.
    """
    # The tests count: fewer rounds leave traces for small n.
    rounds = 24 + 2 * max(n - 1, 1).bit_length()
    seed = jax.random.key_data(key)
    words = _hash(jnp.arange(2 * rounds, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9) + seed[0])
    # The hash is faster than jax.random.bits, to run and to compile.
    words = _hash(words ^ seed[-1]).reshape(2, rounds)
    partners = (words[0] % jnp.uint32(n)).astype(jnp.int32)

    def turn(r, x):
        other = partners[r] - x
        other = jnp.where(other < 0, other + n, other)
        pair = jnp.maximum(x, other).astype(jnp.uint32)
        return jnp.where(_hash(pair ^ words[1, r]) >> 31 == 1, other, x)

    return jax.lax.fori_loop(0, rounds, turn, positions.astype(jnp.int32))


def _hash(h: Any) -> Any:
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def check_order(order: Order | None, n: int, batch_size: int) -> None:
    """Raise ValueError unless the rows of a user's order are integers within 0 .. n-1.

    The order is called for positions of the first three epochs, with a fixed key, because gathering
    in a compiled loop cannot raise and would take the nearest row. An order that depends on traced
    values is not checked.
    """
    if order is None or order is shuffle or isinstance(order, _Balanced):
        return
    spec = jax.eval_shape(
        lambda epoch, positions: order(jax.random.key(0), n, epoch, positions),
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    )
    if getattr(spec, "shape", None) != (batch_size,) or not jnp.issubdtype(spec.dtype, jnp.integer):
        raise ValueError(
            f"order: must return integers [{batch_size}], one row per position, got {spec}"
        )
    try:
        for epoch, rows in _first_rows(order, n, batch_size):
            if rows.min() < 0 or rows.max() >= n:
                wrong = int(rows[(rows < 0) | (rows >= n)][0])
                raise ValueError(
                    f"order: rows must be within 0 .. {n - 1}, got {wrong} in epoch {epoch}"
                )
    except jax.errors.JAXTypeError:
        return


def order_digest(order: Order | None, n: int, batch_size: int) -> str | None:
    """Return a digest of an order's labels or, for a user's function, of rows for a fixed key.

    It is None for an order that its name determines, and for one that cannot be called here.
    """
    if order is None or order is shuffle:
        return None
    if isinstance(order, _Balanced):
        return order.digest
    # `check_order` raises the errors of an order.
    with contextlib.suppress(Exception):
        return _digest(rows for _, rows in _first_rows(order, n, batch_size))
    return None


def order_name(order: Order | None) -> str:
    """The name of an order, the same in every process."""
    if order is None:
        return "None"
    if order is shuffle:
        return "shuffle"
    if isinstance(order, _Balanced):
        return "balanced"
    name = getattr(order, "__qualname__", type(order).__name__)
    return name.partition(".<locals>")[0]


def _digest(rows: Iterable[Any]) -> str:
    crc = 0
    for part in rows:
        crc = zlib.crc32(np.asarray(part).astype(np.int64).tobytes(), crc)
    return f"{crc:08x}"


def _first_rows(order: Order, n: int, batch_size: int) -> Iterable[tuple[int, np.ndarray]]:
    """Yield rows of an order for a fixed key, each with its epoch. Of large data it is a sample."""
    for epoch in range(3):
        for positions in _asked(n, batch_size):
            with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
                key = jax.random.key(0)
                rows = np.asarray(order(key, n, jnp.int32(epoch), jnp.asarray(positions)))
            yield epoch, rows


def _asked(n: int, batch_size: int) -> Sequence[np.ndarray]:
    """Positions at which to check an order, in batches: all of small data, or a sample of large
    data.
    """
    count = n // batch_size
    chosen = np.unique(np.linspace(0, count - 1, min(count, 8)).astype(np.int64)) * batch_size
    starts = [*chosen, n - batch_size]
    return [np.arange(start, start + batch_size, dtype=np.int32) for start in starts]
