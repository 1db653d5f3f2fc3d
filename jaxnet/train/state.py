"""The train state, and plain gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxnet import tree
from jaxnet.train.optimizers import check_optimizer
from jaxnet.train.words import describe

if TYPE_CHECKING:
    from jaxnet.train.optimizers import Optimizer

__all__ = ["TrainState", "check_params", "check_train_state", "copied", "sgd"]


class TrainState(NamedTuple):
    """All that training carries from step to step, as one pytree. It can be saved, restored or
    mapped over as a whole.

    Attributes:
      params: the network's parameters.
      state: the network's state, {} if it has none.
      opt: the optimizer's state, () for plain SGD.
      key: the PRNG key of the run. It never changes; each random number is drawn from it and the
        step.
      step: the number of steps done, int32 []. The epoch and the position in its order follow from
        it.
    """

    params: Any
    state: Any
    opt: Any
    key: jax.Array
    step: jax.Array

    @classmethod
    def create(
        cls, params: Any, optimizer: Optimizer, key: jax.Array, *, state: Any = None
    ) -> TrainState:
        """Start a run.

        Args:
          params: the network's parameters, a pytree of float arrays.
          optimizer: an optax transformation, or a learning rate (a number, or an optax schedule of
            the step) for plain SGD.
          key: the PRNG key; the order of the data and the noise in training follow from it.
          state: the state of a stateful network, `net.init_state(*inputs)`.

        Returns:
          The train state before step 0.

        Raises:
          TypeError: a parameter is not a real float, `optimizer` is not an optimizer, or `key` is
            not a PRNG key.
        """
        check_optimizer("TrainState.create", optimizer)
        check_params("TrainState.create", params)
        if not _is_key(key):
            raise TypeError(
                "TrainState.create: key must be a PRNG key such as jax.random.key(0), got "
                f"{describe(key)}"
            )
        # The counters of the optimizer and of the steps are copied to the device.
        with jax.transfer_guard("allow"):
            opt = optimizer.init(params) if hasattr(optimizer, "init") else ()  # pyright: ignore[reportAttributeAccessIssue]
            return cls(params, {} if state is None else state, opt, key, jnp.int32(0))


StepFunction: TypeAlias = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
"""One step of training, (train_state, batch) -> (train_state, metrics)."""


def sgd(params: Any, grads: Any, lr: Any) -> Any:
    """Take one step of plain gradient descent, w <- w - lr * dL/dw.

    Args:
      params: a pytree of float arrays.
      grads: the gradients, a pytree of the same structure.
      lr: the learning rate, a scalar.

    Returns:
      The new parameters, in the dtypes of `params`.

    Raises:
      TypeError: a parameter is complex or an integer array.

    Example:
      >>> sgd({"w": 1.0}, {"w": 0.5}, 0.1)
      {'w': 0.95}
    """
    leaves = jax.tree.leaves((params, grads))
    if any(jnp.iscomplexobj(leaf) or not _is_float(leaf) for leaf in leaves):
        check_params("sgd", params)
        check_params("sgd: gradients", grads)
    return jax.tree.map(lambda w, g: w - _like(lr, w) * g, params, grads)


def check_train_state(what: str, train_state: Any) -> None:
    """Raise TypeError unless this is a train state."""
    if train_state is TrainState or not all(
        hasattr(train_state, name) for name in TrainState._fields
    ):
        raise TypeError(
            f"{what}: needs a train state, as TrainState.create(params, optimizer, key) makes "
            f"it, got {describe(train_state)}"
        )


def check_params(what: str, params: Any) -> None:
    """Raise TypeError for parameters that are not real floating-point numbers."""
    for path, leaf in tree.flatten(params).items():
        number = isinstance(leaf, int | float | complex)
        dtype = jnp.result_type(leaf) if number else getattr(leaf, "dtype", type(leaf))
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"{what}: '{path}' is {dtype}, parameters are real; keep the real and the "
                "imaginary part as two of them"
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{what}: '{path}' is {describe(leaf)}, parameters are floats; cast it, or keep it "
                "in the state"
            )


def copied(leaf: Any) -> jax.Array:
    """A strongly typed copy of a leaf of a train state, on the same device."""
    leaf = jnp.asarray(leaf, getattr(leaf, "dtype", None))
    if getattr(leaf, "weak_type", False):
        # A resumed run has no weak types, and must compute the same bits.
        leaf = jax.lax.convert_element_type(leaf, leaf.dtype)
    where = leaf.sharding if leaf.committed else None
    # Unlike jnp.array(copy=True), this compiles nothing.
    return jax.device_put(leaf, where, may_alias=False)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, int | float) or (
        hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def _is_key(key: Any) -> bool:
    dtype = getattr(key, "dtype", None)
    return dtype is not None and (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32)


def _like(x: Any, w: Any) -> Any:
    """A learning rate in the dtype of the weight, so that float32 weights stay float32 beside a
    float64 rate.
    """
    return jnp.asarray(x, w.dtype) if hasattr(w, "dtype") else x
