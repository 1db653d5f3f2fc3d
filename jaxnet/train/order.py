"""The order of the data: which rows a batch takes, as a pure function that can be asked for any
position.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["balanced", "shuffle", "shuffled"]

Order = Callable[[jax.Array, int, jax.Array, jax.Array], jax.Array]
"""(key of the run, number of examples n, epoch, positions in it [B]) -> rows of the data, int32 [B]
in 0 .. n-1."""


def shuffle(key: jax.Array, n: int, epoch: jax.Array, positions: jax.Array) -> jax.Array:
    """Every epoch goes through all rows in a random order of its own: sampling without
    replacement.
    """
    return shuffled(jax.random.fold_in(key, epoch), n, positions)


def balanced(labels: Any) -> Order:
    """An order in which all classes are equally frequent, whatever their frequency in the data.

    An epoch has n positions, as ever; each of the C classes gets n / C of them. Within a class the
    examples take turns, so that those of a rare class come again equally often, and of a frequent
    one a part is left for other epochs.

    Args: labels: integers [n], known when the loop is compiled.
    Raises: TypeError if they are not integers of rank 1, ValueError if there are none.

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
        raise ValueError("balanced: there are no labels")
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    # A hash of the rows mixes the examples of a class. Unlike NumPy's generators, it never changes
    # between versions.
    mixed = _hash(np.arange(len(labels), dtype=np.uint32) * np.uint32(0x9E3779B9) + np.uint32(1))
    members = np.lexsort((mixed, classes)).astype(np.int32)
    starts = np.cumsum(counts) - counts

    def order(key, n, epoch, positions):
        if n != len(labels):
            raise ValueError(
                f"balanced: made for {len(labels)} labels, used on data with {n} examples"
            )
        key, turn_key = jax.random.split(jax.random.fold_in(key, epoch))
        turn, group = jnp.divmod(shuffled(key, n, positions), len(counts))
        size = jnp.asarray(counts, jnp.int32)
        first = jax.random.randint(turn_key, size.shape, 0, size)  # who begins, in each class
        place = (first[group] + turn) % size[group]
        return jnp.asarray(members)[jnp.asarray(starts, jnp.int32)[group] + place]

    # `check_order` skips orders with this attribute, and `order_digest` reads the other.
    order.in_range = True  # pyright: ignore[reportFunctionMemberAccess]
    order.digest = _digest([classes])  # pyright: ignore[reportFunctionMemberAccess]
    return order


def shuffled(key: jax.Array, n: int, positions: jax.Array) -> jax.Array:
    """The places of `positions` under a random permutation of 0 .. n-1 that follows from the key.

    int32 [B] -> int32 [B].

    The swap-or-not shuffle: in each round every x has a partner k - x (mod n), and a hash of the
    pair decides whether the two change places, which is a permutation whatever the hash. A position
    costs 24 + 2 log2(n) rounds of integer arithmetic and no memory, so that a training loop draws
    its next batch where it stands, without sorting all n indices first.

    Source: Hoang, Morris & Rogaway, "An Enciphering Scheme Based on a Card Shuffle", CRYPTO 2012;
    the hash, which also makes the key into a word for each round, is the finalizer of MurmurHash3
    (Appleby).
    """
    rounds = 24 + 2 * max(n - 1, 1).bit_length()  # the tests count: fewer leave traces in small n
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
    if order is None or order is shuffle or getattr(order, "in_range", False):
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
    for epoch in range(3):
        for positions in _asked(n, batch_size):
            try:
                with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
                    rows = np.asarray(
                        order(jax.random.key(0), n, jnp.int32(epoch), jnp.asarray(positions))
                    )
            except jax.errors.JAXTypeError:
                return
            if rows.min() < 0 or rows.max() >= n:
                wrong = int(rows[(rows < 0) | (rows >= n)][0])
                raise ValueError(
                    f"order: rows must be within 0 .. {n - 1}, got {wrong} in epoch {epoch}"
                )


def order_digest(order: Order | None, n: int, batch_size: int) -> str | None:
    """A digest of an order's labels or, for a function of one's own, of rows that it gives for a
    fixed key.

    None for an order that its name determines, and for one that cannot be called here.
    """
    if order is None or order is shuffle:
        return None
    if digest := getattr(order, "digest", None):
        return digest
    asked = [(epoch, positions) for epoch in range(3) for positions in _asked(n, batch_size)]
    # `check_order` raises the errors of an order.
    with contextlib.suppress(Exception):
        with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
            key = jax.random.key(0)
            return _digest(
                [
                    order(key, n, jnp.int32(epoch), jnp.asarray(positions))
                    for epoch, positions in asked
                ]
            )
    return None


def _digest(rows: Sequence[Any]) -> str:
    crc = 0
    for part in rows:
        crc = zlib.crc32(np.asarray(part).astype(np.int64).tobytes(), crc)
    return f"{crc:08x}"


def _asked(n: int, batch_size: int) -> list[np.ndarray]:
    """Positions at which to check an order, in batches: all of small data, or a sample of large
    data.
    """
    count = n // batch_size
    chosen = np.unique(np.linspace(0, count - 1, min(count, 8)).astype(np.int64)) * batch_size
    return [
        np.arange(start, start + batch_size, dtype=np.int32) for start in [*chosen, n - batch_size]
    ]
