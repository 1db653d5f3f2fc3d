"""The role of each axis of each value in a traced program, and the operations that pair examples by
broadcasting.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

from jaxnet.train.origin import added_by, by_vmap, calls, name_of, place_of
from jaxnet.train.roles import ASKED, EXAMPLES, FILLED, GIVEN, MARK, ORDER, OTHER, Found, Value

__all__ = ["pairs_in"]


def pairs_in(program: Any, batch_leaves: int, stretched: frozenset[int]) -> list[Found]:
    """The operations of a program that pair examples.

    Args:
      program: a jaxpr, whose first inputs are the leaves of the batch.
      batch_leaves: how many they are.
      stretched: sizes whose multiples are axes of examples; empty if only axes that descend from
        axis 0 of the batch are.
    """
    reader, values = _Reader(stretched), []
    for index, variable in enumerate(program.invars):
        shape = np.shape(variable.aval)
        roles = (
            (EXAMPLES, *[OTHER] * (len(shape) - 1))
            if shape and index < batch_leaves
            else (OTHER,) * len(shape)
        )
        values.append(reader.value(shape, roles, variable))
    reader.read(program, values, "", "", False)
    return reader.found


class _Reader:
    def __init__(self, stretched: frozenset[int]):
        self.stretched, self.found, self.numbers = stretched, [], {}

    def value(
        self, shape: Sequence[int], roles: Sequence[str], number: Hashable, **more: Any
    ) -> Value:
        settled = list(roles)
        for axis, (n, role) in enumerate(zip(shape, roles, strict=True)):
            if n == 1 and role in (EXAMPLES, OTHER):
                settled[axis] = GIVEN
            elif role == OTHER and any(n % size == 0 for size in self.stretched):
                settled[axis] = EXAMPLES
        return Value(tuple(shape), tuple(settled), number, **more)

    def read(
        self, program: Any, inputs: list[Value], name: str, place: str, quiet: bool
    ) -> list[Value]:
        """Find the pairs of a program; returns its outputs."""
        known: dict[Any, Value] = dict(zip(program.invars, inputs, strict=True))

        def get(variable: Any) -> Value:
            if hasattr(variable, "val"):
                shape = np.shape(variable.val)
                number = ("literal", str(variable.val)) if not shape else variable
                return self.value(shape, (OTHER,) * len(shape), number)
            if variable not in known:
                shape = np.shape(variable.aval)
                known[variable] = self.value(shape, (OTHER,) * len(shape), variable)
            return known[variable]

        for equation in program.eqns:
            operands = [get(variable) for variable in equation.invars]
            silent = quiet or MARK in str(equation.source_info.name_stack)
            called, here = name_of(equation, name), place_of(equation) or place
            results = self.call(equation, operands, called, here, silent)
            if results is None:
                results = self.results(equation, operands)
                shapes = None if silent else _paired(equation, operands)
                if shapes:
                    self.found.append(Found(called, here, shapes))
            known.update(zip(equation.outvars, results, strict=True))
        return [get(variable) for variable in program.outvars]

    def call(
        self, equation: Any, operands: list[Value], name: str, place: str, quiet: bool
    ) -> list[Value] | None:
        """The results of an equation that calls other programs; None if it calls none."""
        programs, kind, params = (
            list(_inner_programs(equation)),
            equation.primitive.name,
            equation.params,
        )
        if not programs:
            return None
        if kind == "scan":
            # Rows of xs and of ys lack the axis of the loop; constants and the carry have their
            # shapes inside, too.
            fixed = sum(
                np.shape(v.aval) == o.shape
                for v, o in zip(programs[0].invars, operands, strict=True)
            )
            pairs = zip(programs[0].outvars, equation.outvars, strict=True)
            carried = sum(
                np.shape(inside.aval) == np.shape(outside.aval) for inside, outside in pairs
            )
            rows = [
                self.value(v.shape[1:], v.roles[1:], ("row", v.number)) for v in operands[fixed:]
            ]
            outputs = self.read(programs[0], operands[:fixed] + rows, name, place, quiet)
            lead = EXAMPLES if any(v.roles[0] == EXAMPLES for v in operands[fixed:]) else OTHER
            made = []
            for k, (variable, v) in enumerate(zip(equation.outvars, outputs, strict=True)):
                roles = v.roles if k < carried else (lead, *v.roles)
                made.append(self.value(np.shape(variable.aval), roles, variable))
            return made
        if kind == "while":
            skip = params["cond_nconsts"]
            body, inputs = params["body_jaxpr"].jaxpr, operands[skip:]
            outputs = self.read(body, inputs, name, place, quiet)
            return [v._replace(number=o) for v, o in zip(outputs, equation.outvars, strict=True)]
        if kind == "cond":
            outputs = [self.read(branch, operands[1:], name, place, quiet) for branch in programs][
                -1
            ]
            return [v._replace(number=o) for v, o in zip(outputs, equation.outvars, strict=True)]
        outputs = None
        for inner in programs:
            same = [np.shape(v.aval) for v in inner.invars] == [v.shape for v in operands]
            inputs = operands if same else [self.fresh(variable) for variable in inner.invars]
            made = self.read(inner, inputs, name, place, quiet)
            if outputs is None and [v.shape for v in made] == [
                np.shape(o.aval) for o in equation.outvars
            ]:
                outputs = made
        return outputs or [self.fresh(variable) for variable in equation.outvars]

    def fresh(self, variable: Any) -> Value:
        shape = np.shape(variable.aval)
        return self.value(shape, (OTHER,) * len(shape), variable)

    def results(self, equation: Any, operands: list[Value]) -> list[Value]:
        kind, params, made = equation.primitive.name, equation.params, []
        for index, variable in enumerate(equation.outvars):
            shape = np.shape(getattr(variable, "aval", ()))
            roles = _roles(kind, params, operands, shape, equation)
            one, more = (operands[0] if len(operands) == 1 else None), {}
            if kind in _RESHAPES and operands:
                more["batched"] = by_vmap(equation)
                number, more["norm"], more["squeezed"] = (
                    operands[0].number,
                    operands[0].norm,
                    operands[0].squeezed,
                )
                if kind == "squeeze" and {"einsum", "wrapped"} & set(calls(equation)[-2:]):
                    more["squeezed"] = operands[0].shape if EXAMPLES in operands[0].roles else None
            else:
                number = self.number(kind, params, [v.number for v in operands], index, variable)
                if kind == "reduce_sum":
                    more["norm"] = (kind, params["axes"])
                elif one is not None and one.norm is not None and _is_elementwise(operands, shape):
                    more["norm"] = self.number(kind, params, [one.norm], index, variable)
                more["reduced"] = _is_reduction(kind, params)
            made.append(self.value(shape, roles, number, **more))
        return made

    def number(self, kind: str, params: dict, inputs: list, index: int, variable: Any) -> Hashable:
        if not inputs and kind != "iota":
            return variable
        key = (
            kind,
            tuple(sorted((k, str(v)) for k, v in params.items() if k not in _NO_MEANING)),
            tuple(inputs),
            index,
        )
        return self.numbers.setdefault(key, len(self.numbers))


_RESHAPES = ("broadcast_in_dim", "reshape", "squeeze")
_NO_MEANING = ("sharding", "out_sharding")


def _inner_programs(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def _is_reduction(kind: str, params: dict) -> bool:
    return "axes" in params and kind.startswith(("reduce_", "arg"))


def _is_elementwise(operands: list[Value], shape: tuple[int, ...]) -> bool:
    ranked = [v.shape for v in operands if v.shape]
    return all(
        len(s) == len(shape) and all(m in (1, n) for m, n in zip(s, shape, strict=True))
        for s in ranked
    )


def _roles(
    kind: str, params: dict, operands: list[Value], shape: tuple[int, ...], equation: Any
) -> list[str]:
    """The roles of the axes of a result."""
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
    if _is_reduction(kind, params):
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
        sizes = {
            n
            for v in operands
            for n, role in zip(v.shape, v.roles, strict=True)
            if role == EXAMPLES
        }
        return [EXAMPLES if n in sizes else OTHER for n in shape]
    return [_joined(axis, n, same) for axis, n in enumerate(shape)]


def _joined(axis: int, n: int, operands: list[Value]) -> str:
    roles = {v.roles[axis] for v in operands}
    asked = ASKED in roles
    # An axis of a parameter says nothing about the axis that the user's code added to the examples.
    if asked and not any(v.roles[axis] == GIVEN and EXAMPLES in v.roles for v in operands):
        roles.discard(GIVEN)
    role = min(roles, key=ORDER.index)
    return role if role in (EXAMPLES, OTHER) or any(v.shape[axis] == n for v in operands) else OTHER


def _reshaped(source: Value, shape: tuple[int, ...], added: str) -> list[str]:
    ones = [role for n, role in zip(source.shape, source.roles, strict=True) if n == 1]
    roles = [ones[-1] if ones else added] * len(shape)
    if prod(shape) == 0:
        return [OTHER] * len(shape)
    old = [axis for axis, n in enumerate(source.shape) if n != 1]
    new = [axis for axis, n in enumerate(shape) if n != 1]
    while new:
        # The smallest groups of axes with as many elements before and after.
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


def _paired(equation: Any, operands: list[Value]) -> tuple | None:
    """The shapes of two operands, one of which JAX broadcast along the examples of the other; None
    if there are none.
    """
    shape = np.shape(getattr(equation.outvars[0], "aval", ())) if len(equation.outvars) == 1 else ()
    if equation.primitive.name == "dot_general":
        return _paired_by_einsum(equation, operands)
    ranked = [v for v in operands if v.shape]
    if len(shape) < 2 or len(ranked) < 2 or not _is_elementwise(ranked, shape):
        return None
    for short, long in ((a, b) for a in ranked for b in ranked if a is not b and not _same(a, b)):
        for i, j in (
            (i, j)
            for i in range(len(shape))
            for j in range(len(shape))
            if i != j and shape[i] == shape[j] > 1
        ):
            filled = short.roles[i] == FILLED and short.roles[j] == EXAMPLES
            if not filled or long.roles[i] != EXAMPLES or long.roles[j] not in (GIVEN, OTHER):
                continue
            if not any(v.roles[i] == v.roles[j] == EXAMPLES for v in ranked):
                return _own_shape(long), _own_shape(short)
    return None


def _paired_by_einsum(equation: Any, operands: list[Value]) -> tuple | None:
    (summed, _), (each, _) = equation.params["dimension_numbers"]
    a, b = operands[:2]
    if (
        summed
        or each
        or "einsum" not in calls(equation)
        or EXAMPLES not in a.roles
        or EXAMPLES not in b.roles
    ):
        return None
    if a.number == b.number or not (a.squeezed or b.squeezed):
        return None
    return (a.squeezed or a.shape), (b.squeezed or b.shape)


def _same(a: Value, b: Value) -> bool:
    return a.number == b.number or (a.norm is not None and a.norm == b.norm)


def _own_shape(value: Value) -> tuple[int, ...]:
    """The shape before JAX broadcast it."""
    pairs = zip(value.shape, value.roles, strict=True)
    return tuple(n if role in (EXAMPLES, OTHER) else 1 for n, role in pairs if role != FILLED)
