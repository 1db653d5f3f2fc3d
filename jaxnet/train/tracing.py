"""Read a traced program, and find the operations that pair examples by broadcasting."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxnet.train.axes import is_elementwise, is_reduction, roles_of
from jaxnet.train.broadcasts import paired
from jaxnet.train.origin import by_vmap, calls, name_of, place_of
from jaxnet.train.roles import EXAMPLES, GIVEN, MARK, OTHER, Found, Value

__all__ = ["pairs_in"]


def pairs_in(program: Any, batch_leaves: int, stretched: frozenset[int]) -> list[Found]:
    """Find the operations of a program that pair examples.

    Args:
      program: a jaxpr, whose first inputs are the leaves of the batch.
      batch_leaves: the number of these leaves.
      stretched: sizes whose multiples are axes of examples; empty if only axes that descend from
        axis 0 of the batch are.

    Returns:
      The operations, in the order of the program.
    """
    reader, values = _Reader(stretched), []
    for index, variable in enumerate(program.invars):
        shape = np.shape(variable.aval)
        roles = [OTHER] * len(shape)
        if shape and index < batch_leaves:
            roles[0] = EXAMPLES
        values.append(reader.value(shape, roles, variable))
    reader.read(program, values, "", "", False)
    return reader.found


class _Reader:
    """Follow the roles of axes through a program.

    Attributes:
      found: the operations that pair examples.
    """

    def __init__(self, stretched: frozenset[int]):
        self.stretched = stretched
        self.found: list[Found] = []
        self._numbers: dict[Hashable, int] = {}

    def value(
        self, shape: Sequence[int], roles: Sequence[str], number: Hashable, **more: Any
    ) -> Value:
        """A value, whose roles follow from its sizes in part."""
        settled = list(roles)
        for axis, (n, role) in enumerate(zip(shape, roles, strict=True)):
            if n == 1 and role in (EXAMPLES, OTHER):
                settled[axis] = GIVEN
            elif role == OTHER and any(n % size == 0 for size in self.stretched):
                settled[axis] = EXAMPLES
        return Value(tuple(shape), tuple(settled), number, **more)

    def fresh(self, variable: Any) -> Value:
        """A value of unknown origin."""
        shape = np.shape(variable.aval)
        return self.value(shape, (OTHER,) * len(shape), variable)

    def read(
        self, program: Any, inputs: list[Value], name: str, place: str, quiet: bool
    ) -> list[Value]:
        """Find the pairs of a program; return its outputs.

        Args:
          program: a jaxpr.
          inputs: its inputs.
          name: the name of the call that the program is in.
          place: the file and line of this call.
          quiet: whether pairs are declared.
        """
        known: dict[Any, Value] = dict(zip(program.invars, inputs, strict=True))

        def get(variable: Any) -> Value:
            if hasattr(variable, "val"):
                shape = np.shape(variable.val)
                number = ("literal", str(variable.val)) if not shape else variable
                return self.value(shape, (OTHER,) * len(shape), number)
            if variable not in known:
                known[variable] = self.fresh(variable)
            return known[variable]

        for equation in program.eqns:
            operands = [get(variable) for variable in equation.invars]
            silent = quiet or MARK in str(equation.source_info.name_stack)
            called, here = name_of(equation, name), place_of(equation) or place
            results = self.call(equation, operands, called, here, silent)
            if results is None:
                results = self.results(equation, operands)
                shapes = None if silent else paired(equation, operands)
                if shapes:
                    self.found.append(Found(called, here, shapes))
            known.update(zip(equation.outvars, results, strict=True))
        return [get(variable) for variable in program.outvars]

    def call(
        self, equation: Any, operands: list[Value], name: str, place: str, quiet: bool
    ) -> list[Value] | None:
        """The results of an equation that calls other programs; None if it calls none."""
        programs, kind = list(_inner_programs(equation)), equation.primitive.name
        where = name, place, quiet
        if not programs:
            return None
        if kind == "scan":
            return self.scan(equation, programs[0], operands, *where)
        if kind == "while":
            body = equation.params["body_jaxpr"].jaxpr
            outputs = self.read(body, operands[equation.params["cond_nconsts"] :], *where)
            return _renumbered(outputs, equation.outvars)
        if kind == "cond":
            branches = [self.read(branch, operands[1:], *where) for branch in programs]
            return _renumbered(branches[-1], equation.outvars)
        outputs, wanted = None, [np.shape(variable.aval) for variable in equation.outvars]
        for inner in programs:
            same = [np.shape(v.aval) for v in inner.invars] == [v.shape for v in operands]
            inputs = operands if same else [self.fresh(variable) for variable in inner.invars]
            made = self.read(inner, inputs, *where)
            if outputs is None and [v.shape for v in made] == wanted:
                outputs = made
        return outputs or [self.fresh(variable) for variable in equation.outvars]

    def scan(
        self,
        equation: Any,
        body: Any,
        operands: list[Value],
        name: str,
        place: str,
        quiet: bool,
    ) -> list[Value]:
        """The results of a loop. Rows of its inputs and of its outputs lack the axis of the loop;
        constants and the carry have the same shapes inside.
        """
        ins = zip(body.invars, operands, strict=True)
        outs = zip(body.outvars, equation.outvars, strict=True)
        fixed = sum(np.shape(inside.aval) == outside.shape for inside, outside in ins)
        carried = sum(np.shape(inside.aval) == np.shape(outside.aval) for inside, outside in outs)
        rows = [self.value(v.shape[1:], v.roles[1:], ("row", v.number)) for v in operands[fixed:]]
        outputs = self.read(body, operands[:fixed] + rows, name, place, quiet)
        lead = EXAMPLES if any(v.roles[0] == EXAMPLES for v in operands[fixed:]) else OTHER
        made = []
        for k, (variable, v) in enumerate(zip(equation.outvars, outputs, strict=True)):
            roles = v.roles if k < carried else (lead, *v.roles)
            made.append(self.value(np.shape(variable.aval), roles, variable))
        return made

    def results(self, equation: Any, operands: list[Value]) -> list[Value]:
        """The results of an equation that calls no program."""
        kind, params, made = equation.primitive.name, equation.params, []
        for index, variable in enumerate(equation.outvars):
            shape = np.shape(getattr(variable, "aval", ()))
            roles = roles_of(kind, params, operands, shape, equation)
            more: dict[str, Any] = {}
            if kind in _RESHAPES and operands:
                (source, *_), number = operands, operands[0].number
                more = {"batched": by_vmap(equation), "norm": source.norm}
                more["squeezed"] = source.squeezed
                if kind == "squeeze" and {"einsum", "wrapped"} & set(calls(equation)[-2:]):
                    more["squeezed"] = source.shape if EXAMPLES in source.roles else None
            else:
                number = self.number(kind, params, [v.number for v in operands], index, variable)
                norm = operands[0].norm if len(operands) == 1 else None
                if kind == "reduce_sum":
                    more["norm"] = (kind, params["axes"])
                elif norm is not None and is_elementwise(operands, shape):
                    more["norm"] = self.number(kind, params, [norm], index, variable)
                more["reduced"] = is_reduction(kind, params)
            made.append(self.value(shape, roles, number, **more))
        return made

    def number(
        self,
        kind: str,
        params: dict[str, Any],
        inputs: list[Hashable],
        index: int,
        variable: Any,
    ) -> Hashable:
        """A number that is equal for equal expressions."""
        if not inputs and kind != "iota":
            return variable
        settings = sorted((k, str(v)) for k, v in params.items() if k not in _NO_MEANING)
        key = kind, tuple(settings), tuple(inputs), index
        return self._numbers.setdefault(key, len(self._numbers))


_RESHAPES = ("broadcast_in_dim", "reshape", "squeeze")
_NO_MEANING = ("sharding", "out_sharding")


def _renumbered(values: list[Value], variables: Sequence[Any]) -> list[Value]:
    return [v._replace(number=variable) for v, variable in zip(values, variables, strict=True)]


def _inner_programs(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part
