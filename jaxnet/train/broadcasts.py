"""Find pairs of operands of which JAX broadcasts one along the examples of the other."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np

from jaxnet.train.axes import is_elementwise
from jaxnet.train.origin import calls
from jaxnet.train.roles import EXAMPLES, FILLED, GIVEN, OTHER, Value

__all__ = ["paired"]

Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def paired(equation: Any, operands: list[Value]) -> Shapes | None:
    """The shapes of two operands, one of which JAX broadcast along the examples of the other; None
    if there are none.
    """
    if equation.primitive.name == "dot_general":
        return _paired_by_einsum(equation, operands)
    if len(equation.outvars) != 1:
        return None
    shape = np.shape(getattr(equation.outvars[0], "aval", ()))
    ranked = [v for v in operands if v.shape]
    if len(shape) < 2 or len(ranked) < 2 or not is_elementwise(ranked, shape):
        return None
    axes = [(i, j) for i, j in permutations(range(len(shape)), 2) if shape[i] == shape[j] > 1]
    for short, long in permutations(ranked, 2):
        if _same(short, long):
            continue
        for i, j in axes:
            filled = short.roles[i] == FILLED and short.roles[j] == EXAMPLES
            if not filled or long.roles[i] != EXAMPLES or long.roles[j] not in (GIVEN, OTHER):
                continue
            if not any(v.roles[i] == v.roles[j] == EXAMPLES for v in ranked):
                return _own_shape(long), _own_shape(short)
    return None


def _paired_by_einsum(equation: Any, operands: list[Value]) -> Shapes | None:
    (summed, _), (each, _) = equation.params["dimension_numbers"]
    a, b = operands[:2]
    if summed or each or "einsum" not in calls(equation):
        return None
    if EXAMPLES not in a.roles or EXAMPLES not in b.roles:
        return None
    if a.number == b.number or not (a.squeezed or b.squeezed):
        return None
    return (a.squeezed or a.shape), (b.squeezed or b.shape)


def _same(a: Value, b: Value) -> bool:
    """Whether two values are one expression, or norms over the same axes."""
    return a.number == b.number or (a.norm is not None and a.norm == b.norm)


def _own_shape(value: Value) -> tuple[int, ...]:
    """The shape before JAX broadcast it."""
    pairs = zip(value.shape, value.roles, strict=True)
    return tuple(n if role in (EXAMPLES, OTHER) else 1 for n, role in pairs if role != FILLED)
