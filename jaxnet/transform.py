"""Walk a network: see what flows through it, exchange parts of it, count what it costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnet import tree
from jaxnet.core import (
    Layer,
    abstractly,
    as_layer,
    check_state,
    describe,
    run,
    show_inputs,
    specs_of,
    start_state,
    tap,
)
from jaxnet.flops import flops_of

__all__ = ["capture", "replace", "summary", "walk"]


def walk(net: Layer) -> Iterator[tuple[str, Layer]]:
    """All layers of a network with their paths, parents first; the network itself is at ''.

    A layer that shares the path of its parent (inside `repeat`, `remat`, `cast`, `residual`,
    `scan`, `vmap`) follows it with the same path.
    """
    yield "", net
    for name, child in net.children.items():
        for path, layer in walk(child):
            yield _join(name, path), layer


def replace(net: Layer, pattern: str | Sequence[str], new: Layer | Callable[..., Any]) -> Layer:
    """The network with every layer whose path matches exchanged, parents before children.

    Args:
      net: a layer.
      pattern: a path with wildcards as in `jaxnet.tree`, matched against the layer's own path, or
        several; `**/norm` is every norm.
      new: a Layer, or a function (path, layer) -> layer. Parameters keep their paths, so that a
        layer that needs the same ones takes over trained params as they are. If the function
        returns a layer unchanged, the search goes on inside that layer.

    Returns:
      The new network. `net` is unchanged.

    Raises:
      KeyError: no layer matches a pattern.
    """
    net = as_layer(net)
    patterns = _patterns(net, pattern)
    if not callable(new):
        raise TypeError(
            f"replace: new must be a Layer or a function (path, layer) -> layer, got {new!r}"
        )

    def visit(path: str, layer: Layer) -> Layer:
        if any(_matches(path, p) for p in patterns):
            made = (
                new
                if isinstance(new, Layer)
                else as_layer(new(path, layer), f"replace: the new layer at '{path}'")
            )
            if made is not layer:
                return made
        return _rebuilt(layer, lambda name, child: visit(_join(path, name), child))

    return visit("", net)


def capture(net: Layer, pattern: str | Sequence[str] = "**") -> Callable[..., Any]:
    """`net.apply` with what every layer gives: (params, *inputs, ...) -> (result, {path: output}).

    The result is a pure function, which works under `jax.jit`, `jax.grad` and `jax.vmap` like
    `net.apply`. Outputs inside `repeat`, `scan` and `vmap` are stacked, [n, ...]. The path of
    `repeat` has the outputs of its copies. If a layer is called twice, the second output is at
    'path:1', the third at 'path:2'. For a layer that shares the path of its parent (inside
    `residual` or `cast`), the output of the parent is captured. The output of the network is at ''.

    It also returns loss terms and metrics of inner layers: the body calls an identity child, `aux`
    by convention, with the value, and `capture(net, "**/aux")` returns it.

    Args:
      net: a layer.
      pattern: the layers whose own path matches, with the wildcards of `jaxnet.tree`, or several
        patterns.

    Returns:
      A function with the arguments of `net.apply` that returns (the result of `net.apply`, outputs
      by path).

    Raises:
      KeyError: no layer matches a pattern.
      RuntimeError: when called, a selected layer ran inside a raw JAX transform, which its output
        cannot leave. The default pattern leaves such layers out.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxnet import chain
      >>> net = chain(double=lambda x: 2 * x, square=lambda x: x * x)
      >>> _, outputs = capture(net)({}, jnp.float32(3))
      >>> {path: float(x) for path, x in outputs.items()}
      {'': 36.0, 'double': 6.0, 'square': 36.0}
    """
    net = as_layer(net)
    patterns = _patterns(net, pattern)

    def apply(params, *inputs, state=None, key=None, train=False, **named):
        check_state(net.label, state, stateful=net.init_state is not None)
        ran: set[tuple[str, bool]] = set()
        chosen = lambda path: any(_matches(path, p) for p in patterns)  # noqa: E731
        tapped = _tap(net, "", chosen, lambda layer, args, outputs: outputs, ran)
        start = {} if state is None else state
        outputs, new_state, taken = run(tapped, params, start, key, train, inputs, named)
        lost = sorted({path for path, comes_out in ran if not comes_out or path not in taken})
        if lost and pattern != "**":
            raise RuntimeError(_lost(lost))
        seen = {
            f"{path}:{i}" if i else path: value
            for path, values in taken.items()
            for i, value in enumerate(values)
        }
        return (outputs if net.init_state is None else (outputs, new_state)), dict(
            sorted(seen.items())
        )

    show_inputs(apply, net.apply)
    return apply


class Row(NamedTuple):
    """One layer of a `summary`. Sizes and FLOPs include its children, and all copies under
    `repeat`.
    """

    path: str
    layer: str
    output: str
    parameters: int
    bytes: int
    flops: int


class Summary(NamedTuple):
    """What a network is made of, as plain data; prints as a table."""

    rows: list[Row]
    parameters: int
    bytes: int
    state_bytes: int
    flops: int

    def __repr__(self) -> str:
        cells: list[tuple[str, ...]] = [("path", "layer", "output", "parameters", "bytes", "FLOPs")]
        for row in self.rows:
            cells.append(
                (
                    row.path or ".",
                    *row[1:3],
                    *(f"{number:,}" if number else "" for number in row[3:]),
                )
            )
        totals = (
            f"{self.parameters:,} parameters, {self.bytes:,} bytes, {self.flops:,} FLOPs a call"
        )
        if self.state_bytes:
            totals += f", {self.state_bytes:,} bytes of state"
        return f"{tree.align(cells, left=3)}\n{totals}"


def summary(net: Layer, *inputs: Any, train: bool = False, **named: Any) -> Summary:
    """Path, layer, output, parameters, bytes and FLOPs of every layer for these inputs, without
    running anything.

    Shared weights are counted once. FLOPs are those of one call as the program is written: 2 a
    multiply-add in a matrix product or convolution, 1 an output element of other arithmetic, 1 an
    input element of a reduction; moving data is free. A `while` loop counts one turn, a `cond` its
    dearest branch. The output of a layer inside `repeat` is that of one copy.

    >>> from jaxnet import dense
    >>> summary(dense(3), jax.ShapeDtypeStruct((8, 2), "float32"))
    path  layer     output         parameters  bytes  FLOPs
    -------------------------------------------------------
    .     dense(3)  float32[8, 3]           9     36    120
    9 parameters, 36 bytes, 120 FLOPs a call
    """
    net = as_layer(net)
    inputs, named = specs_of((inputs, named))
    tapped = _tap(net, "", lambda path: True, _note, set())

    def start_and_run(*inputs, **named):
        init_key, state_key, key = jax.random.split(jax.random.key(0), 3)
        params = net.init(init_key, *inputs, **named)
        state = start_state(net, state_key, inputs, named) if net.init_state else {}
        return (
            params,
            state,
            run(tapped, params, state, key if train else None, train, inputs, named)[2],
        )

    params, state, notes = abstractly(start_and_run)(*inputs, **named)
    rows = []
    for path, layer in _outermost(net).items():
        # There are no notes if it is called inside a raw transform: its parent counts the FLOPs.
        known = notes.get(path, ())
        flops = sum(
            math.prod(turns.shape) * flops_of(note.layer, note.args, train) for note, turns in known
        )
        output = next((describe(note.outputs) for note, _ in known), "")
        try:
            own = tree.get(params, path)
        except KeyError:
            own = {}
        rows.append(Row(path, _title(layer), output, tree.count(own), tree.bytes_of(own), flops))
    return Summary(
        rows, tree.count(params), tree.bytes_of(params), tree.bytes_of(state), rows[0].flops
    )


# Taps


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Note:
    """The specs of one call of a layer: a pytree without leaves, which passes unchanged through any
    transform.
    """

    layer: Layer
    args: Any
    outputs: Any


def _note(layer: Layer, args: Any, outputs: Any) -> tuple[_Note, jax.Array]:
    """The specs of a call, and a number. Transforms stack the number, so its shape tells how often
    the call ran.
    """
    return _Note(layer, specs_of(args), specs_of(outputs)), jnp.zeros(())


def _tap(
    net: Layer,
    path: str,
    chosen: Callable[[str], bool],
    take: Callable[..., Any],
    ran: set[tuple[str, bool]],
) -> Layer:
    """The network whose selected layers also return `take(layer, (inputs, named), outputs)` of each
    call.

    If parent and child share a path, the parent is captured, except for `repeat`, whose copies are
    captured instead. `ran` receives the path of each selected layer that was called, with whether
    its value can be captured.
    """

    def visit(path: str, layer: Layer, covered: bool) -> Layer:
        speaks = chosen(path) and not covered and layer.repeats is None

        def inside(name, child):
            return visit(
                _join(path, name), child, name == "" and (covered or layer.repeats is None)
            )

        rebuilt = _rebuilt(layer, inside)
        if not speaks:
            return rebuilt
        return tap(
            rebuilt,
            layer,
            lambda args, outputs: take(layer, args, outputs),
            lambda comes_out: ran.add((path, comes_out)),
        )

    return visit(path, net, False)


def _lost(paths: list[str]) -> str:
    names = ", ".join(f"'{path}'" for path in paths)
    return (
        f"capture: {names} ran inside a raw JAX transform (scan, vmap, checkpoint, ...), which "
        "captured outputs cannot leave; use jaxnet.scan, vmap, repeat or remat there, or choose "
        "other layers"
    )


def _rebuilt(layer: Layer, visit: Callable[[str, Layer], Layer]) -> Layer:
    """The layer with visit(name, child) for each child; the very same one where nothing changes."""
    if layer.rebuild is None:
        return layer
    children = {name: visit(name, child) for name, child in layer.children.items()}
    same = all(children[name] is child for name, child in layer.children.items())
    return layer if same else layer.rebuild(children)


def _outermost(layer: Layer, path: str = "") -> dict[str, Layer]:
    """The layer at each path, the outermost if several share it, parents first."""
    found = {path: layer}
    for name, child in layer.children.items():
        found |= _outermost(child, _join(path, name))
    return found | {path: layer}


def _title(layer: Layer) -> str:
    return f"{layer.label}({_title(layer.children[''])})" if "" in layer.children else layer.label


def _matches(path: str, pattern: str) -> bool:
    return tree.matches(path, pattern, below=False)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path and name else path or name


def _patterns(net: Layer, pattern: str | Sequence[str]) -> tuple[str, ...]:
    """The patterns as a tuple. Raises KeyError if one of them matches no layer."""
    patterns = (pattern,) if isinstance(pattern, str) else tuple(pattern)
    known = list(dict.fromkeys(path for path, _ in walk(net)))
    for p in patterns or ("no pattern",):
        if not any(_matches(path, p) for path in known):
            names = ", ".join(known[1:13]) or "not named"
            raise KeyError(
                f"no layer matches '{p}'; the layers are {names}{' ...' if len(known) > 13 else ''}"
            )
    return patterns


# FLOPs of a program as it is written
