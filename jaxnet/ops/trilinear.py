"""The trilinear form T(x, k, y) of a convolution: its operands, and a map per operand.

Each map is named by the operand that it returns. The head of `convolution` has the equations.
"""

from __future__ import annotations

import jax
from jax import lax

from jaxnet.ops.geometry import Geometry

ROLES = ("input", "kernel", "output")


def others(role: str) -> list[str]:
    """The operands that the map takes, in their order."""
    return [r for r in ROLES if r != role]


def shape_of(role: str, a, b, g: Geometry) -> tuple[int, ...]:
    """The shape of the operand that the map returns, given the two others."""
    if role == "output":
        return (a.shape[0], *g.outputs, b.shape[-1])
    if role == "input":
        return (b.shape[0], *g.sizes, a.shape[-2] * g.groups)
    return (*g.window, a.shape[-1] // g.groups, b.shape[-1])


def plain(role: str, a, b, *, geometry: Geometry):
    """The map as JAX itself writes it: a convolution, or the transpose that autodiff makes of
    it.
    """
    if role == "output":
        return lax_convolution(a, b, geometry)
    spec = jax.ShapeDtypeStruct(shape_of(role, a, b, geometry), a.dtype)
    if role == "input":
        return jax.linear_transpose(lambda x: lax_convolution(x, a, geometry), spec)(b)[0]
    return jax.linear_transpose(lambda k: lax_convolution(a, k, geometry), spec)(b)[0]


def lax_convolution(x, kernel, g: Geometry, **options):
    """x [N, *spatial, C], kernel [*window, C / groups, F] -> [N, *outputs, F] by JAX's own
    convolution.
    """
    n = g.rank
    # The positions of N, C, *spatial and of F, C, *window.
    image, weight = (0, n + 1, *range(1, n + 1)), (n + 1, n, *range(n))
    return lax.conv_general_dilated(
        x,
        kernel,
        g.strides,
        g.padding,
        rhs_dilation=g.dilation,
        dimension_numbers=lax.ConvDimensionNumbers(image, weight, image),
        feature_group_count=g.groups,
        precision=g.precision,
        **options,
    )
