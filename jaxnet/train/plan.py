"""Plans: which data each step of a compiled call uses."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.train.order import Order, check_order, shuffle
from jaxnet.train.sharding import gathered, zeros_like_spec
from jaxnet.train.uneven import Uneven

__all__ = ["Batching", "Plan", "RowPlan", "StackPlan", "planned", "planned_ahead", "take"]

# The rows that are drawn together, enough for the arithmetic to be vectorised.
_DRAWN = 1 << 13
# This number separates the keys of the data's order from those of the steps, which are small
# numbers.
_ORDER = 0x6F726465


class Batching(NamedTuple):
    """How examples become batches.

    Attributes:
      n: the number of examples.
      batch_size: examples per batch.
      order: the order of the rows of an epoch.
      drop_last: whether the last n % batch_size examples of an epoch are left out.
    """

    n: int
    batch_size: int
    order: Order | None
    drop_last: bool

    @classmethod
    def of(cls, n: int, batch_size: Any, order: Order | None, drop_last: bool) -> Batching:
        """Check the batch size. Raises ValueError if it is not an int in 1 .. n."""
        batch_size = size_of("batch_size", batch_size)
        if batch_size > n:
            raise ValueError(
                f"batch_size {batch_size} is larger than the data, {n} examples; use at most {n}"
            )
        return cls(n, batch_size, order, drop_last)

    @property
    def epoch_steps(self) -> int:
        """The number of batches per epoch."""
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    @property
    def rest(self) -> int:
        """The length of a shorter last batch; 0 if all batches have one length."""
        return 0 if self.drop_last else self.n % self.batch_size


class Plan(Protocol):
    """The data of the steps of one compiled call."""

    def batch(self, i: Any) -> Any:
        """The batch of step i of the call, leaves [B, ...]."""
        ...


class StackPlan(NamedTuple):
    """Batches that are stacked along a leading axis of steps.

    Attributes:
      batches: leaves [steps, B, ...].
      first: the index of the call's first step, int32 [].
    """

    batches: Any
    first: Any

    def batch(self, i: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[self.first + i], self.batches)


class RowPlan(NamedTuple):
    """Rows that are gathered from data on the device.

    Attributes:
      data: the arrays, leaves [N, ...].
      rows: as `planned` returns them, from the call's first step on.
    """

    data: Any
    rows: Any

    def batch(self, i: Any) -> Any:
        return take(self.data, jax.tree.map(lambda leaf: leaf[i], self.rows))


def planned(key: jax.Array, step: jax.Array, steps: int, batching: Batching) -> Any:
    """Draw the rows of the next steps.

    Args:
      key: the PRNG key of the run.
      step: the number of steps done, int32 [].
      steps: the number of steps to draw.
      batching: how examples become batches.

    Returns:
      int32 [steps, B], or `Uneven` if the last batch of an epoch is shorter. None if every step
      takes all rows, because their order does not matter then.
    """
    n, batch_size, order, _ = batching
    epoch_steps, rest = batching.epoch_steps, batching.rest
    if batch_size == n and (order is None or order is shuffle):
        return None
    check_order(order, n, batch_size)
    key = jax.random.fold_in(_threefry(key), _ORDER)

    def rows_of(count):
        epoch, batch = jnp.divmod(count, epoch_steps)
        positions = batch * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
        if rest:
            positions = jnp.minimum(positions, n - 1)
        rows = positions if order is None else order(key, n, epoch, positions)
        return Uneven(rows, batch == epoch_steps - 1, rest) if rest else rows

    return jax.vmap(rows_of)(step + jnp.arange(steps, dtype=jnp.int32))


def planned_ahead(
    key: jax.Array, step: jax.Array, count: jax.Array | int, size: int, batching: Batching
) -> Any:
    """Draw the rows of the next `count` steps, in a plan with room for `size` of them.

    They are drawn in blocks, so that a short call does not draw the whole plan; see `planned`.
    """
    block = min(size, max(1, _DRAWN // batching.batch_size))
    blocks = -(-size // block)

    def draw(i):
        return planned(key, step + i * block, block, batching)

    def add(i, plan):
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * block, axis=0)
        return jax.tree.map(put, plan, draw(i))

    one = jax.eval_shape(draw, jnp.int32(0))
    room = jax.tree.map(lambda x: zeros_like_spec(x, blocks), one)
    room = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), room)
    return jax.lax.fori_loop(0, -(-count // block), add, room)


def take(data: Any, rows: Any) -> Any:
    """Gather the batch for the rows of one step."""
    if rows is None:
        return data
    if isinstance(rows, Uneven):
        return Uneven(take(data, rows.batch), rows.last, rows.rest)
    return jax.tree.map(lambda leaf: gathered(leaf, rows), data)


def _threefry(key: jax.Array) -> jax.Array:
    """The key, or a key of JAX's default generator made of it. With other generators, a vmapped
    draw may differ from separate draws.
    """
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    words = jax.random.key_data(key)
    return jax.random.wrap_key_data(jnp.stack([words[0], words[-1]]), impl="threefry2x32")
