"""Where an equation of a traced program comes from: the user's code or JAX, its name, its line."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import jax

__all__ = ["added_by", "by_vmap", "calls", "name_in", "name_of", "place_of"]

_JAX = os.path.dirname(os.path.abspath(jax.__file__)) + os.sep


def calls(equation: Any) -> list[str]:
    """The functions of JAX that made an equation, from its innermost to the code that called JAX,
    "" for that.
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
    """The role of each axis that a broadcast or a reshape adds or lengthens.

    Args:
      equation: the broadcast or reshape.
      rank: of its result.
      kept: the axes of the result that its operand has.
      reduced: whether its operand is the result of a reduction.
      squeezed: whether JAX took axes of size one out of its operand.
    """
    names = [name for name in calls(equation) if name]
    outermost, axes = (names[-1] if names else ""), range(rank)
    if _PROMOTING & set(names):
        return dict.fromkeys(axes, "filled")
    if _INDEXING & set(names) or outermost in _SHAPING:
        return dict.fromkeys(axes, "asked")
    if by_vmap(equation):
        if not _in_vectorize(equation):
            return {axis: "asked" for axis in axes if axis not in kept}
        return {axis: "given" if squeezed and axis == rank - 1 else "filled" for axis in axes}
    if reduced:
        # The reduction keeps its axes.
        return dict.fromkeys(axes, "given")
    leading = list(kept) == list(range(rank - len(kept), rank))
    return (
        dict.fromkeys(axes, "filled")
        if leading
        else {axis: "asked" for axis in axes if axis not in kept}
    )


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
    """The name of the operation in the user's code; `outer` is the name of the call that the
    equation is in.
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
    """The name of the function of JAX that raised an error."""
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
_WRAPPERS = {
    "reraise_with_filtered_traceback",
    "cache_miss",
    "call_wrapped",
    "op",
    "meth",
    "wrapper",
    "wrapped",
    "fn",
}
_WRAPPERS |= {
    "bind",
    "bind_with_trace",
    "process_primitive",
    "current",
    "fun",
    "f",
    "deferring_binary_op",
    "process_custom_jvp_call",
    "process_custom_vjp_call",
    "process_call",
}
_NAMES = {
    "select_n": "where",
    "sub": "subtract",
    "mul": "multiply",
    "eq": "equal",
    "ne": "not_equal",
    "max": "maximum",
}
_NAMES |= {
    "div": "divide",
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
        if not re.search(
            r"[/\\](site-packages|jaxnet)[/\\]", frame.file_name
        ) and not frame.file_name.startswith(_JAX):
            return f"{os.path.basename(frame.file_name)}:{frame.line_num}"
    return ""
