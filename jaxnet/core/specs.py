"""Shapes and dtypes without values, and abstract evaluation, which finds those of results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "abstractly",
    "as_jax",
    "describe",
    "dtype_of",
    "is_array",
    "key_spec",
    "specs_of",
    "stand_in",
    "trace_state",
]


def abstractly(
    fn: Callable[..., Any], trace: Callable[..., Any] = jax.eval_shape
) -> Callable[..., Any]:
    """Make a function that traces `fn` and returns the specs of its outputs.

    Array inputs are abstract, and all other inputs are static.

    Args:
      fn: the function to trace.
      trace: (function, arrays) -> result. The default returns the specs of the outputs. It may be
        another transformation that accepts only arrays, such as one that returns the jaxpr.

    Returns:
      A function with the arguments of `fn`.
    """

    def traced(*inputs, **named):
        leaves, tree = jax.tree.flatten((inputs, named))
        dynamic = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

        def run(arrays):
            filled = list(leaves)
            for i, array in zip(dynamic, arrays, strict=True):
                filled[i] = array
            inputs, named = jax.tree.unflatten(tree, filled)
            return fn(*inputs, **named)

        return trace(run, [leaves[i] for i in dynamic])

    return traced


@functools.cache
def _key_spec(impl: str) -> Any:
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl))


def key_spec() -> Any:
    """The spec of a key of the default generator. A real key would become part of the traced
    program.
    """
    return _key_spec(jax.config.jax_default_prng_impl)  # pyright: ignore[reportAttributeAccessIssue]


def specs_of(tree: Any) -> Any:
    """Replace each array of a tree by its spec.

    Args:
      tree: any pytree.

    Returns:
      The tree with a `jax.ShapeDtypeStruct` for each array. Other leaves stay as they are.
    """
    return jax.tree.map(lambda x: _spec(x) if is_array(x) else x, tree)


def as_jax(tree: Any) -> Any:
    """Convert NumPy arrays in a tree to JAX arrays, in a dtype that JAX has, as `jax.jit` does."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, dtype_of(x)) if isinstance(x, np.ndarray | np.generic) else x, tree
    )


def stand_in(spec: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros of this spec. A weak type stays weak, so the zeros promote as the real output does."""
    if spec.weak_type:
        weak = jnp.full(spec.shape, np.zeros((), spec.dtype).item())
        if weak.dtype == spec.dtype:
            return weak
    return jnp.zeros(spec.shape, spec.dtype)


def describe(tree: Any) -> str:
    """Describe the shapes and dtypes of a value as text, for errors.

    Args:
      tree: any pytree.

    Returns:
      The text.

    Example:
      >>> describe({"a": jnp.zeros((4, 3))})
      "{'a': float32[4, 3]}"
    """

    class Word(str):
        __repr__ = str.__str__

    def word(x):
        if not is_array(x):
            return Word(type(x).__name__)
        return Word(f"{x.dtype}[{', '.join(map(str, x.shape))}]")

    return repr(jax.tree.map(word, tree))


def trace_state() -> Any:
    """The current JAX transform, as a value to compare."""
    # This import takes 16 ms, so it is not at the top of the module.
    import jax.extend.core

    return jax.extend.core.get_opaque_trace_state()


def dtype_of(x: Any) -> Any:
    """The dtype that JAX gives an array: float32 for NumPy's float64 if x64 is off."""
    try:
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):
            return x.dtype
        return jax.dtypes.canonicalize_dtype(x.dtype)
    except TypeError as error:
        kind = f"{type(x).__module__}.{type(x).__name__}"
        raise TypeError(
            f"inputs must be arrays of JAX or NumPy, got a {kind}; convert it, as in np.asarray(x)"
        ) from error


def is_array(x: Any) -> bool:
    """Tell whether a value has a shape and a dtype.

    Args:
      x: any value. Arrays of any library and any shape [...], tracers and `jax.ShapeDtypeStruct`
        have a shape and a dtype.

    Returns:
      True if it has both.
    """
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _spec(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, dtype_of(x), weak_type=getattr(x, "weak_type", False))
