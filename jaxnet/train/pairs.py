"""Refuse broadcasting that pairs every example with every other one, such as [B, 1] - [B], which is [B, B]."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

__all__ = ["all_pairs", "refuse_pairs"]

Function = TypeVar("Function", bound=Callable[..., Any])


class Pairs(NamedTuple):
    """An operation that pairs examples.

    Attributes:
      operation: its name.
      shapes: of the two operands that are paired.
      where: file and line of the call, "" if unknown.
    """

    operation: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    where: str


def all_pairs(function: Function) -> Function:
    """Declare that broadcasting inside this function pairs all examples on purpose.

    Wrap a loss, a metric or any function that they call. Pairs that the code writes explicitly, such as
    `x[:, None] - y[None, :]` and `z @ z.T`, need no declaration.

    Args:
      function: any function of arrays.

    Returns:
      The same function, with the same signature.

    Example:
      >>> ranking = all_pairs(lambda scores, labels: (scores[:, None] - labels) ** 2)
      >>> ranking(np.zeros(3), np.ones(3)).shape
      (3, 3)
    """

    @functools.wraps(function)
    def marked(*args, **kwargs):
        with jax.named_scope(_MARK):
            return function(*args, **kwargs)

    return marked  # pyright: ignore[reportReturnType]


def refuse_pairs(what: str, function: Callable, batch: Any, *rest: Any) -> None:
    """Raise if `function(batch, *rest)` pairs the examples of the batch by broadcasting, without declaring it.

    The function is traced, not run. Its batch is first made 3 and 5 times as long, so that the axis of examples
    cannot be mistaken for another axis that happens to have the same size. A function that accepts only the true
    size is traced with that.

    Args:
      what: how the error names the function, such as "train_step: the loss".
      function: a function of pytrees of arrays.
      batch: leaves [B, ...]; scalars are left alone.
      *rest: further arguments, whose sizes do not follow B.

    Raises:
      ValueError: an operation broadcasts examples against examples.
    """
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf)}
    if not sizes - {1}:
        return
    rest = jax.tree.map(_spec, rest)
    found: set[Pairs] | None = None
    for factor in _FACTORS:
        now = _pairs_at(factor, sizes, function, batch, rest)
        found = now if found is None else found & now
        if not found:
            return
    pairs = min(found or (), key=lambda p: (p.where, p.operation, p.shapes))
    a, b = (f"[{', '.join(map(str, shape))}]" for shape in pairs.shapes)
    place = f" ({pairs.where})" if pairs.where else ""
    raise ValueError(
        f"{what} broadcasts {a} against {b} in '{pairs.operation}'{place}, which pairs every example with every other "
        "one: give both one shape, with x[:, 0] or y[:, None]; if all pairs are meant, write y[None, :] or wrap the "
        "function in jaxnet.train.all_pairs"
    )


_MARK = "all_pairs"
_FACTORS = (3, 5)


def _pairs_at(factor: int, sizes: set[int], function: Callable, batch: Any, rest: Any) -> set[Pairs]:
    """The pairs in the trace for a batch that is `factor` times as long, with the true sizes."""
    longer = jax.tree.map(lambda leaf: _spec(leaf, factor), batch)
    try:
        return set(_pairs_in(_program(function, longer, rest), factor, {factor * size for size in sizes}))
    except Exception as error:
        refused = _refused_pairs(error, factor, {factor * size for size in sizes})
    # The trace with the true size decides. If it fails as well, the caller sees its error, which is better.
    try:
        program = _program(function, jax.tree.map(_spec, batch), rest)
    except Exception:
        return set()
    return refused or set(_pairs_in(program, 1, sizes))


def _program(function: Callable, batch: Any, rest: Any) -> Any:
    def arrays(batch, rest):
        return [leaf for leaf in jax.tree.leaves(function(batch, *rest)) if hasattr(leaf, "dtype")]

    # The error for pairs is more specific than JAX's error for rank promotion.
    with jax.numpy_rank_promotion("allow"):
        return jax.make_jaxpr(arrays)(batch, rest).jaxpr


def _spec(leaf: Any, factor: int = 1) -> Any:
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    shape = (leaf.shape[0] * factor, *leaf.shape[1:]) if leaf.shape else ()
    return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True))


def _pairs_in(program: Any, factor: int, sizes: set[int], place: str = "") -> Iterator[Pairs]:
    """The pairs in a program and in the programs that it calls."""
    made = {}
    for equation in program.eqns:
        if _MARK in str(equation.source_info.name_stack):
            continue
        here = _place(equation) or place
        for inner in _inner_programs(equation):
            yield from _pairs_in(inner, factor, sizes, here)
        if len(equation.outvars) == 1:
            made[equation.outvars[0]] = equation
            if shapes := _paired_shapes(equation, made, sizes):
                a, b = (tuple(_true_size(n, factor, sizes) for n in shape) for shape in shapes)
                yield Pairs(_name(equation), (a, b), here)


def _inner_programs(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


class Operand(NamedTuple):
    """An operand before JAX broadcast it for an operation.

    Attributes:
      sizes: one per axis of the result, 1 along the axes that broadcasting added.
      added: the axes that broadcasting added.
      shape: its shape before broadcasting.
      root: the variable with its values, perhaps in another shape.
    """

    sizes: tuple[int, ...]
    added: frozenset[int]
    shape: tuple[int, ...]
    root: Any


def _paired_shapes(equation: Any, made: dict, sizes: set[int]) -> tuple | None:
    """The shapes of two operands, one of which JAX broadcast along the examples of the other; None if there are none."""
    shape = getattr(equation.outvars[0].aval, "shape", ())
    examples = [axis for axis, size in enumerate(shape) if any(size % n == 0 for n in sizes if n > 1)]
    if len(examples) < 2 or len(equation.invars) < 2:
        return None
    ranked = [v for v in equation.invars if not hasattr(v, "val") and np.ndim(v.aval) == len(shape)]
    operands = [_operand(variable, equation, made) for variable in ranked]
    for short, long in ((a, b) for a in operands for b in operands):
        for i, j in ((i, j) for i in short.added for j in examples if shape[i] == shape[j] == short.sizes[j]):
            size = shape[i]
            pairs_before = any(other.sizes[i] == other.sizes[j] == size for other in operands)
            along_examples = long.sizes[i] == size and long.sizes[j] == 1 and j not in long.added
            if along_examples and not pairs_before and long.root is not short.root:
                return long.shape, short.shape
    return None


def _operand(variable: Any, equation: Any, made: dict) -> Operand:
    sizes, added, own, root = list(variable.aval.shape), set(), None, None
    # The axis of the result for each axis of the variable.
    axes = list(range(len(sizes)))
    while (maker := made.get(variable)) is not None and maker is not equation:
        name, arrays = maker.primitive.name, [v for v in maker.invars if not hasattr(v, "val") and np.shape(v.aval)]
        if name == "broadcast_in_dim" and own is None and _by_jax(maker, equation):
            kept, source_shape = maker.params["broadcast_dimensions"], np.shape(maker.invars[0].aval)
            added |= {axis for k, axis in enumerate(axes) if k not in kept}
            axes = [axes[k] for k in kept]
            for axis in added:
                sizes[axis] = 1
            for axis, size in zip(axes, source_shape, strict=True):
                sizes[axis] = size
        elif len(arrays) == 1 and arrays[0].aval.shape != variable.aval.shape:
            # The user's code gave it this shape.
            own = variable.aval.shape if own is None else own
            if name not in _RESHAPES:
                break
        elif root is None and name not in _RESHAPES:
            root = variable
        if len(arrays) != 1:
            break
        variable = arrays[0]
    return Operand(tuple(sizes), frozenset(added), variable.aval.shape if own is None else own, root or variable)


_RESHAPES = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims")


def _by_jax(broadcast: Any, equation: Any) -> bool:
    """Whether JAX added a broadcast as part of an operation, rather than the user's code."""
    frames = _frames(broadcast)
    return frames == _frames(equation) or any(name in _PROMOTING for _, name, _ in frames)


_PROMOTING = {"promote_shapes", "broadcast_arrays", "_broadcast_arrays", "_where"}


def _frames(equation: Any) -> list[tuple[str, str, int]]:
    """The calls inside JAX that made an equation, from its innermost to the code that called JAX."""
    trace, frames = equation.source_info.traceback, []
    for frame in trace.frames if trace is not None else ():
        frames.append((frame.file_name, frame.function_name.rpartition(".")[2], frame.line_num))
        if not frame.file_name.startswith(_JAX):
            break
    return frames


_JAX = os.path.dirname(os.path.abspath(jax.__file__)) + os.sep


def _name(equation: Any) -> str:
    """The name of the operation in the user's code."""
    name, frames = equation.primitive.name, _frames(equation)
    if name in ("jit", "custom_jvp_call", "custom_vjp_call") and len(frames) > 1:
        name = next((name for _, name, _ in reversed(frames[:-1]) if name.isidentifier() and name[0] != "_"), name)
    return _NAMES.get(name, name)


_NAMES = {"select_n": "where", "sub": "subtract", "mul": "multiply", "eq": "equal", "ne": "not_equal", "max": "maximum"}
_NAMES |= {"div": "divide", "min": "minimum", "ge": "greater_equal", "gt": "greater", "lt": "less", "le": "less_equal"}


def _place(equation: Any) -> str:
    """The file and line of the innermost caller that is not in a library."""
    trace = equation.source_info.traceback
    for frame in trace.frames if trace is not None else ():
        if not re.search(r"[/\\](site-packages|jaxnet)[/\\]", frame.file_name) and not frame.file_name.startswith(_JAX):
            return f"{os.path.basename(frame.file_name)}:{frame.line_num}"
    return ""


def _true_size(size: int, factor: int, sizes: set[int]) -> int:
    return size // factor if any(size % n == 0 for n in sizes if n > 1) else size


def _refused_pairs(error: Exception, factor: int, sizes: set[int]) -> set[Pairs]:
    """The pairs in an error about shapes: [B, C] and [B] broadcast only if B happens to equal C."""
    text = str(error).splitlines()[0] if str(error) else ""
    if "ncompatible shapes" not in text:
        return set()
    shapes = [tuple(map(int, re.findall(r"\d+", part))) for part in re.findall(r"\(([\d, ]+)\)", text)]
    for long in shapes:
        for short in shapes:
            if len(short) < len(long) and short[0] == long[0] and short[0] in sizes:
                a, b = (tuple(_true_size(n, factor, sizes) for n in shape) for shape in (long, short))
                return {Pairs(text.split(" ")[0] if "got" in text else "broadcasting", (a, b), "")}
    return set()
