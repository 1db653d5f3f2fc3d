"""Arithmetic in a narrow dtype, float16 or bfloat16, with float32 sums over many examples.

The gradient of a parameter that many examples share is a sum over them. In bfloat16 a sum of ones
stops at 256, and in float16 at 2,048, because the next one is rounded away. Therefore the layers
add biases, apply scales and gather rows in float32, and `cast` does not change the parameters in
`Layer.wide`. Their gradients never pass through the narrow dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding, PartitionSpec

__all__ = [
    "Mixed",
    "add_bias",
    "affine",
    "cast_floats",
    "computed_dtype",
    "is_float",
    "narrowed",
    "rows",
    "scores",
    "widened",
]


@jax.tree_util.register_pytree_with_keys_class
class Mixed(dict[str, Any]):
    """The parameters of one layer under `cast`: a dict with the dtype in which the layer computes.

    Args:
      items: the parameters by name.
      dtype: the dtype.
    """

    def __init__(self, items: Mapping[str, Any], dtype: Any):
        super().__init__(items)
        self.dtype: Any = jnp.dtype(dtype)

    def tree_flatten_with_keys(self) -> Any:
        """Flatten for `jax.tree_util`.

        Returns:
          (pairs of key and parameter, static facts).
        """
        leaves, facts = self.tree_flatten()
        return list(zip(map(jax.tree_util.DictKey, facts[0]), leaves, strict=True)), facts

    def tree_flatten(self) -> Any:
        """Flatten for `jax.tree_util`.

        Returns:
          (parameters, static facts).
        """
        names = sorted(self)
        return [self[name] for name in names], (tuple(names), self.dtype)

    @classmethod
    def tree_unflatten(cls, facts: Any, leaves: Any) -> Mixed:
        """Rebuild for `jax.tree_util`.

        Args:
          facts: the static facts of `tree_flatten`.
          leaves: the parameters.

        Returns:
          The dict.
        """
        names, dtype = facts
        return cls(dict(zip(names, leaves, strict=True)), dtype)


def narrowed(layer: Any, params: Any, dtype: Any) -> Any:
    """Cast the parameters of a network to a dtype, except those in `Layer.wide`.

    Args:
      layer: the network.
      params: its parameters.
      dtype: a float dtype.

    Returns:
      The parameters. Those of a layer with wide parameters are a `Mixed`.
    """
    if "" in layer.children:
        return narrowed(layer.children[""], params, dtype)
    if not isinstance(params, Mapping) or not (layer.children or layer.wide):
        return cast_floats(params, dtype)
    if layer.children:
        children = layer.children
        return {
            name: narrowed(children[name], p, dtype) if name in children else cast_floats(p, dtype)
            for name, p in params.items()
        }
    kept = {name: p for name, p in params.items() if name in layer.wide and _is_wider(p, dtype)}
    return Mixed({**cast_floats(dict(params), dtype), **kept}, dtype)


def cast_floats(tree: Any, dtype: Any) -> Any:
    """Cast the float arrays of a tree. Everything else stays as it is.

    Args:
      tree: any pytree.
      dtype: a float dtype.

    Returns:
      The tree.
    """
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if is_float(x) else x, tree)


def is_float(x: Any) -> bool:
    """Tell whether a value is an array of real floating-point numbers.

    Args:
      x: any value; an array may have any shape [...].

    Returns:
      True if it is one.
    """
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def computed_dtype(params: Any, param: Any) -> Any:
    """Find the dtype in which a layer computes.

    Args:
      params: the parameters of the layer.
      param: one of them.

    Returns:
      The dtype of `cast` if the layer is under `cast`, else the dtype of `param`.
    """
    return params.dtype if isinstance(params, Mixed) else param.dtype


def widened(x: Any) -> jax.Array:
    """Cast an array to at least float32, which is exact.

    Args:
      x: floats, [...].

    Returns:
      The same numbers, [...].
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def add_bias(y: jax.Array, bias: Any) -> jax.Array:
    """Add a bias: y + bias, in the dtype of y.

    A narrow sum is rounded once, and the gradient of the bias is summed in float32.

    Args:
      y: the addend, [..., F].
      bias: the bias, [F].

    Returns:
      The sum, [..., F].
    """
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return (y.astype(wide) + jnp.broadcast_to(bias.astype(wide), y.shape)).astype(y.dtype)


def affine(x: jax.Array, kernel: jax.Array, bias: Any, precision: Any = None) -> jax.Array:
    """Compute an affine map: x kernel + bias, in the dtype of x.

    A narrow result is rounded once, not twice. In bfloat16, XLA itself leaves out the rounding
    between the product and the sum.

    Args:
      x: the input, [N, D].
      kernel: the matrix, [D, F].
      bias: the bias, [F].
      precision: the precision of the product, as in `jax.numpy.matmul`.

    Returns:
      The result, [N, F].
    """
    if x.dtype == jnp.float16:
        return _narrow_affine(precision, x, kernel, bias)
    return add_bias(jnp.matmul(x, kernel, precision=precision), bias)


def rows(table: jax.Array, ids: jax.Array, dtype: Any = None, **options: Any) -> jax.Array:
    """Gather rows of a table: table[ids].

    The gradients of a row that occurs many times are summed in float32. The result is sharded like
    the ids and, along the features, like the table.

    Args:
      table: the table, [rows, features].
      ids: integers, [...].
      dtype: the dtype of the result; that of the table by default.
      **options: as in `table.at[ids].get`.

    Returns:
      The rows, [..., features].
    """
    if sharding := _rows_sharding(table, ids):
        options["out_sharding"] = sharding
    return widened(table).at[ids].get(**options).astype(dtype or table.dtype)


def scores(x: jax.Array, table: jax.Array) -> jax.Array:
    """Multiply with each row of a table: x table^T, in the dtype of x.

    The product and the gradient of x have narrow operands if x is narrow. The gradient of the table
    is summed in float32, as in `rows`.

    Args:
      x: the vectors, [..., features].
      table: the table, [rows, features].

    Returns:
      The products, [..., rows].
    """
    flat = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    if x.dtype == table.dtype:
        y = jnp.matmul(flat, table.T)
    else:
        y = _narrow_scores(flat, table)
    return y.reshape(*x.shape[:-1], table.shape[0])


def _rows_sharding(table: jax.Array, ids: jax.Array) -> NamedSharding | None:
    """The sharding of `rows` if an explicit mesh axis shards the table or the ids. JAX cannot infer
    it.
    """
    of_table, of_ids = jax.typeof(table).sharding, jax.typeof(ids).sharding
    spec = (*of_ids.spec, *of_table.spec[1:])
    if all(axis is None for axis in spec):
        return None
    return NamedSharding(of_table.mesh if of_ids.mesh.empty else of_ids.mesh, PartitionSpec(*spec))


# JAX's derivative of a product with a float32 result would multiply float32 matrices. This explicit
# derivative uses the dtype of x, so every product in the backward pass has narrow operands.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _narrow_affine(precision, x, kernel, bias):
    y = jnp.matmul(x, kernel, precision=precision, preferred_element_type=jnp.float32)
    return (y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)).astype(x.dtype)


def _narrow_affine_jvp(precision, primals, tangents):
    x, kernel, bias = primals
    dx, dkernel, dbias = tangents
    multiply = functools.partial(jnp.matmul, precision=precision)
    y = _narrow_affine(precision, x, kernel, bias)
    terms = []
    if not _is_zero(dx):
        terms.append(widened(multiply(dx, kernel)))
    if not _is_zero(dkernel):
        terms.append(widened(multiply(x, dkernel)))
    if not _is_zero(dbias):
        terms.append(jnp.broadcast_to(widened(dbias), y.shape).astype(jnp.float32))
    return y, functools.reduce(jnp.add, terms).astype(y.dtype)


_narrow_affine.defjvp(_narrow_affine_jvp, symbolic_zeros=True)


@jax.custom_jvp
def _narrow_scores(x, table):
    return jnp.matmul(x, table.astype(x.dtype).T)


def _narrow_scores_jvp(primals, tangents):
    (x, table), (dx, dtable) = primals, tangents
    terms = []
    if not _is_zero(dx):
        terms.append(widened(jnp.matmul(dx, table.astype(dx.dtype).T)))
    if not _is_zero(dtable):
        terms.append(jnp.matmul(widened(x), dtable.T.astype(jnp.float32)))
    return _narrow_scores(x, table), functools.reduce(jnp.add, terms).astype(x.dtype)


_narrow_scores.defjvp(_narrow_scores_jvp, symbolic_zeros=True)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _is_wider(x: Any, dtype: Any) -> bool:
    return is_float(x) and jnp.promote_types(x.dtype, dtype) == x.dtype
