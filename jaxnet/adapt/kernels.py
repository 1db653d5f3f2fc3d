"""A layer whose kernel is computed in each call, from other parameters and from state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.core import Layer, abstractly, around, as_layer, describe, fold, specs_of, start_state
from jaxnet.mixed import Mixed, is_float

__all__ = ["KernelChange", "along", "dtype_in", "fan_matrix", "with_kernel"]


@dataclasses.dataclass(frozen=True, eq=False)
class KernelChange:
    """How to compute a kernel.

    Attributes:
      label: the name of the changed layer in `repr` and in errors.
      name: the name of the kernel in the parameters of the layer.
      compute: (own, kernel, train, dtype) -> (kernel, new state). `own` has the added parameters
        and state by name, and `kernel` is None if it is not a parameter any more.
      params: (key, kernel) -> the added parameters.
      state: (key, kernel or its spec) -> the added state; None for a stateless change.
      names: the names of the added parameters and state.
      draws: whether `state` draws random numbers.
      stays: False if the kernel is not a parameter any more.
    """

    label: str
    name: str
    compute: Callable[..., tuple[Any, dict[str, Any]]]
    params: Callable[..., dict[str, Any]] = lambda key, kernel: {}
    state: Callable[..., dict[str, Any]] | None = None
    names: tuple[str, ...] = ()
    draws: bool = False
    stays: bool = True


def with_kernel(inner: Any, change: KernelChange, rebuild: Callable[[Layer], Layer]) -> Layer:
    """The layer `inner` with another kernel. Parameters, state and path are its own, and the added
    ones are beside the kernel.
    """
    inner = as_layer(inner, change.label)

    def init(key, *inputs, **named):
        params = inner.init(key, *inputs, **named)
        kernel = _kernel_of(change, params)
        left = params if change.stays else _without(params, (change.name,))
        return {**left, **change.params(fold(key, change.label), kernel)}

    def init_state(*inputs, key=None, **named):
        if change.draws and key is None:
            raise ValueError(
                f"{change.label}: the state begins with random numbers: pass key= to init_state"
            )
        inputs, named = specs_of((inputs, named))
        own = start_state(inner, key, inputs, named) if inner.init_state else {}
        specs = abstractly(inner.init)(jax.random.key(0), *inputs, **named)
        drawn = fold(key, f"/{change.label}") if change.draws else None
        return {**own, **change.state(drawn, _kernel_of(change, specs))}  # pyright: ignore[reportOptionalCall]

    def inside(params, state, train, dtype):
        """(params, state) of `inner`, and the new added state."""
        state = state or {}
        own = {
            name: tree[name] for tree in (params, state) for name in change.names if name in tree
        }
        kernel = _kernel_of(change, params) if change.stays else None
        new, moved = change.compute(own, kernel, train, dtype)
        used = _without(params, change.names)
        left = _without(state, change.names) if inner.init_state else None
        return _like(params, {**used, change.name: new}), left, moved

    def call(run, params, state, key, /, *inputs, **named):
        dtype = dtype_in((inputs, named, params))
        used, left, moved = inside(params, state, run.train, dtype)
        outputs, left, seen = run(used, left, key, *inputs, **named)
        new = None if change.state is None and left is None else {**(left or {}), **moved}
        return outputs, new, seen

    def folded(params, state):
        used, left, _ = inside(params, state, False, dtype_in(params) or jnp.float32)
        return dict(used), left

    made = around(
        inner,
        call,
        label=change.label,
        rebuild=rebuild,
        init=init,
        init_state=init_state if change.state else None,
        stateful=change.state is not None,
    )
    return dataclasses.replace(made, folded=folded)


def dtype_in(tree: Any) -> Any:
    """The dtype of the first float array of a tree, or None."""
    return next((leaf.dtype for leaf in jax.tree.leaves(tree) if is_float(leaf)), None)


def fan_matrix(kernel: Any, axis: int) -> Any:
    """A kernel as a matrix [inputs, outputs], with the outputs along `axis`."""
    moved = jnp.moveaxis(kernel, axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def along(vector, kernel, axis: int):
    """A vector along one axis of the kernel, in its shape."""
    shape = [1] * kernel.ndim
    shape[axis] = vector.shape[0]
    return jnp.broadcast_to(vector.reshape(shape), kernel.shape)


def _kernel_of(change: KernelChange, params: Any) -> Any:
    if not isinstance(params, Mapping) or change.name not in params:
        raise ValueError(
            f"{change.label}: the layer must have a parameter '{change.name}', got "
            f"{describe(params)}; choose the layer by its path with jaxnet.replace, or its "
            "parameter with name="
        )
    kernel = params[change.name]
    if len(kernel.shape) < 2:
        raise ValueError(
            f"{change.label}: '{change.name}' must have at least 2 axes, got {describe(kernel)}"
        )
    return kernel


def _without(tree: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: leaf for name, leaf in tree.items() if name not in names}


def _like(params: Any, new: dict[str, Any]) -> Any:
    return Mixed(new, params.dtype) if isinstance(params, Mixed) else new
