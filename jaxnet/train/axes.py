"""The roles of the axes of a result, from those of its operands."""

from __future__ import annotations

from math import prod
from typing import Any

from jaxnet.train.origin import added_by, by_vmap
from jaxnet.train.roles import ASKED, EXAMPLES, FILLED, GIVEN, ORDER, OTHER, Value

__all__ = ["is_elementwise", "is_reduction", "roles_of"]


def is_reduction(kind: str, params: dict[str, Any]) -> bool:
    """Whether an operation removes axes."""
    return "axes" in params and kind.startswith(("reduce_", "arg"))


def is_elementwise(operands: list[Value], shape: tuple[int, ...]) -> bool:
    """Whether operands have the shape of a result, up to broadcasting."""
    ranked = [v.shape for v in operands if v.shape]
    same_rank = all(len(s) == len(shape) for s in ranked)
    return same_rank and all(m in (1, n) for s in ranked for m, n in zip(s, shape, strict=True))


def roles_of(
    kind: str, params: dict[str, Any], operands: list[Value], shape: tuple[int, ...], equation: Any
) -> list[str]:
    """The roles of the axes of a result.

    Args:
      kind: the name of the operation.
      params: its parameters.
      operands: its operands.
      shape: the shape of the result.
      equation: the equation.
    """
    first = operands[0] if operands else None
    if first is None:
        return [OTHER] * len(shape)
    if kind == "broadcast_in_dim":
        kept = params["broadcast_dimensions"]
        origin = added_by(equation, len(shape), kept, first.reduced, first.squeezed is not None)
        roles = [origin.get(axis, ASKED) for axis in range(len(shape))]
        # `vmap` repeats the broadcasting of the operation itself before it adds its own axis.
        repeated = first.batched and by_vmap(equation)
        own = [FILLED if repeated and role == ASKED else role for role in first.roles]
        for axis, n, role in zip(kept, first.shape, own, strict=True):
            # The user's code may write the broadcast itself.
            roles[axis] = ASKED if n != shape[axis] and origin.get(axis) == ASKED else role
        return roles
    if kind == "reshape":
        origin = added_by(equation, len(shape), range(len(first.shape)), first.reduced, False)
        return _reshaped(first, shape, origin.get(len(shape) - 1, ASKED))
    if kind == "squeeze":
        return [role for axis, role in enumerate(first.roles) if axis not in params["dimensions"]]
    if kind == "transpose":
        return [first.roles[axis] for axis in params["permutation"]]
    if is_reduction(kind, params):
        return [role for axis, role in enumerate(first.roles) if axis not in params["axes"]]
    if kind == "dot_general":
        (summed_a, summed_b), (each_a, each_b) = params["dimension_numbers"]
        a, b = operands[:2]
        roles = [
            min(a.roles[i], b.roles[j], key=ORDER.index)
            for i, j in zip(each_a, each_b, strict=True)
        ]
        roles += [role for i, role in enumerate(a.roles) if i not in (*summed_a, *each_a)]
        free = [role for j, role in enumerate(b.roles) if j not in (*summed_b, *each_b)]
        return roles + [role if role in (EXAMPLES, OTHER) else GIVEN for role in free]
    same = [v for v in operands if len(v.shape) == len(shape)]
    if kind == "gather" or not same:
        axes = [axis for v in operands for axis in zip(v.shape, v.roles, strict=True)]
        sizes = {n for n, role in axes if role == EXAMPLES}
        return [EXAMPLES if n in sizes else OTHER for n in shape]
    return [_joined(axis, n, same) for axis, n in enumerate(shape)]


def _joined(axis: int, n: int, operands: list[Value]) -> str:
    """The role of an axis of size n in the result of an elementwise operation."""
    roles = {v.roles[axis] for v in operands}
    asked = ASKED in roles
    # An axis of a parameter says nothing about the axis that the user's code added to the examples.
    if asked and not any(v.roles[axis] == GIVEN and EXAMPLES in v.roles for v in operands):
        roles.discard(GIVEN)
    role = min(roles, key=ORDER.index)
    return role if role in (EXAMPLES, OTHER) or any(v.shape[axis] == n for v in operands) else OTHER


def _reshaped(source: Value, shape: tuple[int, ...], added: str) -> list[str]:
    """The roles of the axes after a reshape. Axes of size one get the role `added`, unless the
    source has some.
    """
    ones = [role for n, role in zip(source.shape, source.roles, strict=True) if n == 1]
    roles = [ones[-1] if ones else added] * len(shape)
    if prod(shape) == 0:
        return [OTHER] * len(shape)
    old = [axis for axis, n in enumerate(source.shape) if n != 1]
    new = [axis for axis, n in enumerate(shape) if n != 1]
    while new:
        # The smallest groups of axes with the same number of elements before and after.
        left, right = [old.pop(0)], [new.pop(0)]
        while (a := prod(source.shape[i] for i in left)) != (b := prod(shape[i] for i in right)):
            left, right = (left + [old.pop(0)], right) if a < b else (left, right + [new.pop(0)])
        found = [source.shape[i] for i in left if source.roles[i] == EXAMPLES]
        if len(left) == len(right) == 1:
            roles[right[0]] = source.roles[left[0]]
            continue
        holder = next((i for i in right if shape[i] in found), right[0])
        for i in right:
            roles[i] = EXAMPLES if found and i == holder else OTHER
    return roles
