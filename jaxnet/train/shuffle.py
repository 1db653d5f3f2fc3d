"""A random order of the data that is never written down."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["shuffled"]


def shuffled(key: jax.Array, n: int, positions: jax.Array) -> jax.Array:
    """The places of `positions` under a random permutation of 0 .. n-1 that follows from the key.   int32 [B] -> int32 [B].

    The swap-or-not shuffle: in each round every x has a partner k - x (mod n), and a hash of the pair decides whether the
    two change places, which is a permutation whatever the hash. A position costs 24 + 2 log2(n) rounds of integer arithmetic
    and no memory, so that a training loop draws its next batch where it stands, without sorting all n indices first.

    Source: Hoang, Morris & Rogaway, "An Enciphering Scheme Based on a Card Shuffle", CRYPTO 2012; the hash is the finalizer
    of MurmurHash3 (Appleby).
    """
    rounds = 24 + 2 * max(n - 1, 1).bit_length()  # the tests count: fewer leave traces in small n
    words = jax.random.bits(key, (2 * rounds,)).reshape(2, rounds)  # drawn flat, they compile in half the time
    partners = (words[0] % jnp.uint32(n)).astype(jnp.int32)

    def turn(r, x):
        other = partners[r] - x
        other = jnp.where(other < 0, other + n, other)
        pair = jnp.maximum(x, other).astype(jnp.uint32)
        return jnp.where(_hash(pair ^ words[1, r]) >> 31 == 1, other, x)

    return jax.lax.fori_loop(0, rounds, turn, positions.astype(jnp.int32))


def _hash(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
