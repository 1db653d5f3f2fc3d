"""The origin of an equation in a traced program: the user's code or JAX, its name, its line."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import jax

from jaxnet.train.roles import ASKED, FILLED, GIVEN

__all__ = ["added_by", "by_vmap", "calls", "name_in", "name_of", "place_of"]

_JAX = os.path.dirname(os.path.abspath(jax.__file__)) + os.sep


def calls(equation: Any) -> list[str]:
    """The functions of JAX that made an equation, from the innermost outwards, and then "" for the
    code that called JAX.
    """
    trace, names = equation.source_info.traceback, []
    for frame in trace.frames if trace is not None else ():
        if not frame.file_name.startswith(_JAX):
            return [*names, ""]
        names.append(frame.function_name.rpartition(".")[2])
    return names


def added_by(
    equation: Any, rank: int, kept: Sequence[int], reduced: bool, squeezed: bool
) -> dict[int, str]:
    """Return the role of each axis that a broadcast or a reshape adds or lengthens.

    Args:
      equation: the broadcast or reshape.
      rank: the rank of its result.
      kept: the axes of the result that its operand has.
      reduced: whether its operand is the result of a reduction.
      squeezed: whether JAX took axes of size one out of its operand.
    """
    names = [name for name in calls(equation) if name]
    outermost, axes = (names[-1] if names else ""), range(rank)
    if _PROMOTING & set(names):
        return dict.fromkeys(axes, FILLED)
    if _INDEXING & set(names) or outermost in _SHAPING:
        return dict.fromkeys(axes, ASKED)
    added = {axis: ASKED for axis in axes if axis not in kept}
    if by_vmap(equation):
        if not _in_vectorize(equation):
            return added
        return {axis: GIVEN if squeezed and axis == rank - 1 else FILLED for axis in axes}
    if reduced:
        # The reduction keeps its axes.
        return dict.fromkeys(axes, GIVEN)
    leading = list(kept) == list(range(rank - len(kept), rank))
    return dict.fromkeys(axes, FILLED) if leading else added


_PROMOTING = {
    "promote_shapes",
    "broadcast_arrays",
    "_broadcast_arrays",
    "_where",
    "atleast_2d",
    "atleast_3d",
}
_INDEXING = {"_getitem", "rewriting_take", "_reshape"}
_SHAPING = {"expand_dims", "reshape", "broadcast_to", "broadcast_in_dim", "full", "zeros", "ones"}


def by_vmap(equation: Any) -> bool:
    """Whether `vmap` made an equation."""
    return any(name.endswith("_batcher") for name in calls(equation))


def _in_vectorize(equation: Any) -> bool:
    trace = equation.source_info.traceback
    return any(
        f.file_name.startswith(_JAX) and f.file_name.endswith("vectorize.py") for f in trace.frames
    )


def name_of(equation: Any, outer: str) -> str:
    """Return the name of an operation in the user's code.

    Args:
      equation: the operation.
      outer: the name of the call that it is in, or "".
    """
    names, kind = calls(equation), str(equation.primitive.name)
    if outer and not (names and names[-1] == ""):
        return outer
    own = _public([name for name in reversed(names) if name])
    if own:
        return own
    if kind in _CALLS:
        name = str(equation.params.get("name", ""))
        return name if name.isidentifier() and name[0] != "_" and name not in _WRAPPERS else outer
    return str(_NAMES.get(kind, kind))


def name_in(error: Exception) -> str:
    """Return the name of the function of JAX that raised an error."""
    names, trace = [], error.__traceback__
    while isinstance(trace, TracebackType):
        code, trace = trace.tb_frame.f_code, trace.tb_next
        names = [*names, code.co_name] if code.co_filename.startswith(_JAX) else []
    operator = next((name for name in names if name.startswith("_operator_")), "")
    name = _public(names) or operator.removeprefix("_operator_")
    return _NAMES.get(name, name)


def _public(names: list[str]) -> str:
    return next((n for n in names if n.isidentifier() and n[0] != "_" and n not in _WRAPPERS), "")


_CALLS = ("jit", "custom_jvp_call", "custom_vjp_call", "checkpoint", "scan", "while", "cond")
_WRAPPERS = set(
    "reraise_with_filtered_traceback cache_miss call_wrapped op meth wrapper wrapped fn fun f bind "
    "bind_with_trace process_primitive current deferring_binary_op process_custom_jvp_call "
    "process_custom_vjp_call process_call".split()
)
# The names of operations in `jax.numpy`, by primitive.
_NAMES = {
    "select_n": "where",
    "sub": "subtract",
    "mul": "multiply",
    "div": "divide",
    "eq": "equal",
    "ne": "not_equal",
    "max": "maximum",
    "min": "minimum",
    "ge": "greater_equal",
    "gt": "greater",
    "lt": "less",
    "le": "less_equal",
}


def place_of(equation: Any) -> str:
    """The file and line of the innermost caller that is not in a library."""
    trace = equation.source_info.traceback
    for frame in trace.frames if trace is not None else ():
        library = re.search(r"[/\\](site-packages|jaxnet)[/\\]", frame.file_name)
        if not library and not frame.file_name.startswith(_JAX):
            return f"{os.path.basename(frame.file_name)}:{frame.line_num}"
    return ""
