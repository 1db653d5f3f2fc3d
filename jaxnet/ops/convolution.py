"""Convolution as three bilinear maps that are each other's derivatives. Each has a fast form.

All three are partial derivatives of one trilinear form (one spatial axis, one group; N batch, C and
F features in and out):

    T(x, k, y) = sum over n, o, w, c, f of  x[n, o s + w d - lo, c]  k[w, c, f]  y[n, o, f]

    output  dT/dy (x, k)   the convolution: stride s, dilation d, padding lo before and hi after
    input   dT/dx (k, y)   pulls a cotangent y back to the input
    kernel  dT/dk (x, y)   pulls a cotangent y back to the kernel

A derivative of a partial derivative of T is another one, so the family is closed under
differentiation and transposition, and (by folding the new axis into an old one) under `vmap`.
Everything that JAX derives from a convolution is one of the three. Each is a JAX primitive. On a
CPU it is lowered to the forms of `convolution_cpu`, and elsewhere to the program that JAX itself
would write.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxnet.ops import convolution_cpu
from jaxnet.ops.geometry import Geometry, window_geometry
from jaxnet.ops.trilinear import ROLES, others, plain, shape_of

__all__ = ["convolve"]


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    precision: Any = None,
) -> jax.Array:
    """Convolve over the spatial axes.

    y[n, o, f] = sum over w, c of x[n, o s + w d - lo, c] kernel[w, c, f].

    It equals `jax.lax.conv_general_dilated` (no flip of the kernel) with all its derivatives, in
    both modes and of every order. On a CPU, they keep their speed inside `lax.scan` and
    `lax.while_loop`.

    Args:
      x: the input, [N, *spatial, C], with at least one spatial axis.
      kernel: the kernel, [*window, C / groups, F], in the dtype of x.
      strides: s, the step between windows; one int for all spatial axes, or one per axis.
      padding: "SAME" (ceil(size / stride) outputs, the odd zero at the end), "SAME_LOWER" (the odd
        zero at the start), "VALID" (no zeros), an int, or (before, after) per spatial axis.
      dilation: d, the step between the elements of a window; one int for all spatial axes, or one
        per axis.
      groups: the number of groups. Output features [i F / groups, (i+1) F / groups) use only input
        features [i C / groups, (i+1) C / groups).
      precision: as in `jax.lax.conv_general_dilated`; `jax.default_matmul_precision` by default.

    Returns:
      y [N, *outputs, F] in the dtype of x, with outputs = floor((size + before + after - (window -
      1) d - 1) / s) + 1.

    Raises:
      TypeError: the dtypes differ or have no gradient.
      ValueError: shapes or options do not fit.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if x.dtype != kernel.dtype or not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"convolve: x and kernel must have one floating dtype, got {x.dtype} and {kernel.dtype}"
        )
    rank = x.ndim - 2
    if rank < 1 or kernel.ndim != x.ndim:
        raise ValueError(
            "convolve: x must be [N, *spatial, C] and kernel [*window, C / groups, F] with the "
            f"same number of spatial axes, 1 or more, got shapes {x.shape} and {kernel.shape}"
        )
    channels, features = x.shape[-1], kernel.shape[-1]
    divides = groups >= 1 and channels % groups == 0 and features % groups == 0
    if not divides or kernel.shape[-2] * groups != channels:
        raise ValueError(
            "convolve: groups must divide the features of x and kernel, and kernel.shape[-2] be "
            f"x.shape[-1] / groups, got groups={groups} and shapes {x.shape} and {kernel.shape}"
        )
    # The lowering may run outside of the context that sets the precision, so it is read here.
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    window = kernel.shape[:-2]
    geometry = window_geometry(
        "convolve", x.shape, window, strides, padding, dilation, groups, precision
    )
    return bind("output", *equally_varying(x, kernel), geometry=geometry)


# The family

PRIMITIVES = {
    role: Primitive(f"convolve_{role}" if role != "output" else "convolve") for role in ROLES
}


def bind(role: str, a, b, *, geometry: Geometry):
    """The partial derivative of T with respect to `role`, at the two other operands in the order of
    ROLES.
    """
    return PRIMITIVES[role].bind(a, b, geometry=geometry)


def _transpose(role: str, wanted: str, cotangent, a, b, *, geometry: Geometry):
    """The map called `role` is linear in `wanted`, one of its operands; its transpose is the map
    called `wanted`.
    """
    operands = dict(zip(others(role), (a, b), strict=True)) | {role: cotangent}
    return bind(wanted, *(operands[r] for r in others(wanted)), geometry=geometry)


def _batch(role: str, operands, axes, *, geometry: Geometry):
    """`vmap`: T summed over a new axis of size B is again a T, with that axis folded into an old
    one.

    new in           folded into
    input, output    the batch: N' = B N
    kernel, output   output features: F' = B F per group (x is shared)
    input, kernel    input features: C' = B C per group (the sum over B is the contraction)
    all three        groups: G' = B G
    """
    g, names = geometry, others(role)
    size = next(a.shape[axis] for a, axis in zip(operands, axes, strict=True) if axis is not None)
    new = {name for name, axis in zip(names, axes, strict=True) if axis is not None} | {role}
    outer = 1 if len(new) == 3 else g.groups

    def fold(name, a):
        """[B, *old] -> [*folded]."""
        if new == {"input", "output"}:
            a = a.swapaxes(0, 1) if images_first else a
            return a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])
        if new == {"input", "kernel"} and name == "kernel":
            return jnp.moveaxis(a, 0, -3).reshape(*a.shape[1:-2], size * a.shape[-2], a.shape[-1])
        width = a.shape[-1] // outer
        a = jnp.moveaxis(a.reshape(*a.shape[:-1], outer, width), 0, -2)
        return a.reshape(*a.shape[:-3], outer * size * width)

    def unfold(name, a, shape):
        """The inverse of `fold`, [*folded] -> [B, *shape]."""
        if new == {"input", "output"}:
            if images_first:
                return a.reshape(shape[0], size, *shape[1:]).swapaxes(0, 1)
            return a.reshape(size, *shape)
        if new == {"input", "kernel"} and name == "kernel":
            return jnp.moveaxis(a.reshape(*shape[:-2], size, *shape[-2:]), -3, 0)
        a = a.reshape(*shape[:-1], outer, size, shape[-1] // outer)
        return jnp.moveaxis(a, -2, 0).reshape(size, *shape)

    # The new axis comes first in each operand that has one. `single` are the operands as `vmap`
    # shows them to its function.
    front = [
        a if axis is None else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(operands, axes, strict=True)
    ]
    images_first = any(
        _is_spread(a, 1) for name, a in zip(names, front, strict=True) if name in new
    )
    pairs = list(zip(names, front, strict=True))
    single = [jax.ShapeDtypeStruct(a.shape[name in new :], a.dtype) for name, a in pairs]
    folded = [fold(name, a) if name in new else a for name, a in pairs]
    geometry = g._replace(groups=g.groups * size) if len(new) == 3 else g
    result = bind(role, *folded, geometry=geometry)
    return unfold(role, result, shape_of(role, single[0], single[1], g)), 0


def _is_spread(a, axis: int) -> bool:
    """Whether the type of an array shards an axis. When two axes are joined, only the first may be
    sharded.
    """
    return jax.typeof(a).sharding.spec[axis] is not None


@functools.lru_cache(maxsize=4096)
def _type(role: str, a, b, geometry: Geometry):
    """The type of the result, by JAX's own rules for shardings and for mesh axes in `shard_map`."""

    def typed(a, b):
        if role == "output":
            return plain(role, a, b, geometry=geometry)
        shape = shape_of(role, a, b, geometry)
        if role == "kernel":
            return jnp.broadcast_to(a.sum() * b.sum(), shape)
        # The images are sharded like those of the cotangent.
        return lax.broadcast_in_dim(a.sum() * b.sum(range(1, b.ndim)), shape, (0,))

    return jax.make_jaxpr(typed)(a, b).out_avals[0]


@functools.lru_cache(maxsize=4096)
def _compiled(role: str, geometry: Geometry):
    return jax.jit(functools.partial(bind, role, geometry=geometry))


def _run(role: str, a, b, *, geometry: Geometry):
    """Compile this one map outside of `jit`. `jax.disable_jit` does not reach inside operations."""
    with jax.disable_jit(False):
        return _compiled(role, geometry)(a, b)


def _lowering(fn: Callable[..., Any]):
    """The lowering to `fn`, which is written for plain arrays. `_type` determines shardings and the
    axes of a mesh.
    """
    lower = mlir.lower_fun(fn, multiple_results=False)

    def rule(context, a, b, *, geometry):
        ins, outs = (
            [ShapedArray(t.shape, t.dtype) for t in types]
            for types in (context.avals_in, context.avals_out)
        )
        return lower(context.replace(avals_in=ins, avals_out=outs), a, b, geometry=geometry)

    return rule


def equally_varying(x, kernel):
    """In `shard_map`: mark both as varying over the same mesh axes, so that the gradient of the one
    that does not vary is summed over them.
    """

    def varying(a) -> frozenset:
        # Its attribute has different names in different releases of JAX.
        kind = jax.typeof(a)
        return getattr(kind, "vma", None) or getattr(
            getattr(kind, "manual_axis_type", None), "varying", frozenset()
        )

    axes = varying(x) | varying(kernel)
    return [
        lax.pcast(a, tuple(axes - varying(a)), to="varying") if axes - varying(a) else a
        for a in (x, kernel)
    ]


for _role, _primitive in PRIMITIVES.items():
    _first, _second = others(_role)
    _primitive.def_impl(functools.partial(_run, _role))
    _primitive.def_abstract_eval(lambda a, b, *, geometry, role=_role: _type(role, a, b, geometry))
    ad.defbilinear(
        _primitive,
        functools.partial(_transpose, _role, _first),
        functools.partial(_transpose, _role, _second),
    )
    batching.primitive_batchers[_primitive] = functools.partial(_batch, _role)
    mlir.register_lowering(_primitive, _lowering(functools.partial(plain, _role)))
    mlir.register_lowering(
        _primitive, _lowering(functools.partial(convolution_cpu.convolution, _role)), platform="cpu"
    )
