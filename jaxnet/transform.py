"""Walk a network: see what flows through it, exchange parts of it, count what it costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxnet import tree
from jaxnet.core import Layer, abstractly, as_layer, call, check_state, describe, specs_of

__all__ = ["capture", "replace", "summary", "walk"]


def walk(net: Layer) -> Iterator[tuple[str, Layer]]:
    """All layers of a network with their paths, parents first; the network itself is at ''.

    A layer that shares the path of its parent (inside `repeat`, `remat`, `cast`, `residual`) follows it with the same
    path.
    """
    yield "", net
    for name, child in net.children.items():
        for path, layer in walk(child):
            yield _join(name, path), layer


def replace(net: Layer, pattern: str, new: Layer | Callable) -> Layer:
    """The network with every layer whose path matches exchanged, parents before children.

    Args:
      pattern: a path with wildcards as in `jaxnet.tree`, matched against the layer's own path; `**/norm` is every norm.
      new: a Layer, or a function (path, layer) -> layer. Parameters keep their paths, so that a layer that needs the
        same ones takes over trained params as they are.

    Raises: KeyError if no layer matches.
    """
    net = as_layer(net)
    matched = []

    def visit(path: str, layer: Layer) -> Layer:
        if _matches(path, pattern):
            matched.append(path)
            return new if isinstance(new, Layer) else as_layer(new(path, layer), f"replace: the new layer at '{path}'")
        return _rebuilt(layer, lambda name, child: visit(_join(path, name), child))

    result = visit("", net)
    if not matched:
        raise KeyError(_no_layer(net, pattern))
    return result


def capture(net: Layer, pattern: str = "**") -> Callable:
    """`net.apply` with what every layer gives: (params, *inputs, ...) -> (result, {path: output}).

    A pure function, for `jax.jit`, `jax.grad` and `jax.vmap` as `net.apply` is. Outputs inside `repeat` are stacked,
    [n, ...]. At the path of `repeat` are the outputs of its copies. Where a layer is called twice, the second output is
    at 'path:1', the third at 'path:2'. What shares the path of its parent (the inside of `residual` or `cast`) is
    covered by the parent's output. The network's own output is at ''. What a body calls inside a raw JAX transform is
    left out.

    Args: pattern: only the layers whose own path matches, with the wildcards of `jaxnet.tree`.
    Raises: KeyError if no layer matches.

    >>> import jax.numpy as jnp
    >>> from jaxnet import chain
    >>> net = chain(double=lambda x: 2 * x, square=lambda x: x * x)
    >>> capture(net)({}, jnp.float32(3))[1]
    {'': Array(36., dtype=float32), 'double': Array(6., dtype=float32), 'square': Array(36., dtype=float32)}
    """
    net = as_layer(net)
    if not any(_matches(path, pattern) for path, _ in walk(net)):
        raise KeyError(_no_layer(net, pattern))
    tapped = _tap(net, "", lambda path: _matches(path, pattern), lambda path, index, layer, args, outputs: outputs)

    def apply(params, *inputs, state=None, key=None, train=False, **named):
        check_state(net.label, state, stateful=net.init_state is not None)
        start = {} if state is None else state
        outputs, new_state = call(tapped, params, start, key, train, inputs, named)
        new_state, seen = _untap(net, new_state)
        return (outputs if net.init_state is None else (outputs, new_state)), dict(sorted(seen.items()))

    return apply


class Row(NamedTuple):
    """One layer of a `summary`. Sizes and FLOPs include its children, and all copies under `repeat`."""

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
            cells.append((row.path or ".", *row[1:3], *(f"{number:,}" if number else "" for number in row[3:])))
        totals = f"{self.parameters:,} parameters, {self.bytes:,} bytes, {self.flops:,} FLOPs a call"
        if self.state_bytes:
            totals += f", {self.state_bytes:,} bytes of state"
        return f"{tree.align(cells, left=3)}\n{totals}"


def summary(net: Layer, *inputs: Any, train: bool = False, **named: Any) -> Summary:
    """Path, layer, output, parameters, bytes and FLOPs of every layer for these inputs, without running anything.

    Shared weights are counted once. FLOPs are those of one call as the program is written: 2 a multiply-add in a matrix
    product or convolution, 1 an output element of other arithmetic, 1 an input element of a reduction; moving data is
    free. A `while` loop counts one turn, a `cond` its dearest branch. The output of a layer inside `repeat` is that of
    one copy.

    >>> from jaxnet import dense
    >>> summary(dense(3), jax.ShapeDtypeStruct((8, 2), "float32"))
    path  layer     output         parameters  bytes  FLOPs
    -------------------------------------------------------
    .     dense(3)  float32[8, 3]           9     36    120
    9 parameters, 36 bytes, 120 FLOPs a call
    """
    net = as_layer(net)
    inputs, named = specs_of((inputs, named))
    calls: dict[str, dict[int, tuple]] = {}

    def note(path, index, layer, args, outputs):
        calls.setdefault(path, {})[index] = (layer, specs_of(args), specs_of(outputs))  # traced again, written again

    tapped = _tap(net, "", lambda path: True, note)

    def run(*inputs, **named):
        init_key, key = jax.random.split(jax.random.key(0))
        params = net.init(init_key, *inputs, **named)
        state = net.init_state(*inputs, **named) if net.init_state else {}
        call(tapped, params, state, key if train else None, train, inputs, named)
        return params, state

    params, state = abstractly(run)(*inputs, **named)
    rows = []
    for path, (layer, copies) in _outermost(net).items():
        known = calls.get(path, {}).values()  # none where it is called inside a raw transform: its parent has the FLOPs
        flops = copies * sum(_flops(layer, args, train) for layer, args, _ in known)
        output = next((describe(outputs) for *_, outputs in known), "")
        try:
            own = tree.get(params, path)
        except KeyError:
            own = {}
        rows.append(Row(path, _title(layer), output, tree.count(own), tree.bytes_of(own), flops))
    return Summary(rows, tree.count(params), tree.bytes_of(params), tree.bytes_of(state), rows[0].flops)


# Taps: layers that also bring out what passes through them, in the channel that exists for that, their state


class _Carried(NamedTuple):
    """What passed through a tapped layer, call by call, and the state of the layer itself."""

    taken: tuple
    state: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Tapped(Layer):
    plain: Layer | None = None  # what a body calls in its place inside a raw transform, out of which nothing comes


def _tap(layer: Layer, path: str, chosen: Callable, take: Callable, covered: bool = False) -> Layer:
    """The network whose new state also holds what `take` makes of the calls of the chosen layers.

    `take` gets (path, index of the call, layer, (inputs, named), outputs). Where parent and child share a path, the
    parent speaks for both, but for `repeat`, where each copy speaks for itself.
    """

    def visit(name, child):
        return _tap(child, _join(path, name), chosen, take, name == "" and (covered or layer.repeats is None))

    inside, speaks = _rebuilt(layer, visit), chosen(path) and not covered and layer.repeats is None
    if inside is layer and not speaks:
        return layer

    def apply(params, *inputs, state=None, key=None, train=False, **named):
        before, own = state if isinstance(state, _Carried) else ((), state)
        outputs, new = call(inside, params, own if inside.init_state else None, key, train, inputs, named)
        if not speaks:
            return outputs, new
        return outputs, _Carried((*before, take(path, len(before), layer, (inputs, named), outputs)), new)

    def init_state(*inputs, **named):
        return layer.init_state(*inputs, **named) if layer.init_state else {}

    return _Tapped(
        layer.init, apply, init_state, label=layer.label, random=layer.random, outputs=layer.outputs, plain=layer
    )


def _untap(layer: Layer, state: Any, path: str = "") -> tuple[Any, dict[str, Any]]:
    """Separate the state of the plain network from what the taps put around it."""
    seen = {}
    if isinstance(state, _Carried):
        seen = {f"{path}:{i}" if i else path: outputs for i, outputs in enumerate(state.taken)}
        state = state.state
    if "" in layer.children:
        state, below = _untap(layer.children[""], state, path)
        return state, seen | below
    if not layer.children or not isinstance(state, dict):
        return state, seen
    plain = {}
    for name, value in state.items():
        own, below = _untap(layer.children[name], value, _join(path, name))
        seen |= below
        if layer.children[name].init_state is not None:
            plain[name] = own
    return plain, seen


def _rebuilt(layer: Layer, visit: Callable[[str, Layer], Layer]) -> Layer:
    """The layer with visit(name, child) for each child; the very same one where nothing changes."""
    if layer.rebuild is None:
        return layer
    children = {name: visit(name, child) for name, child in layer.children.items()}
    same = all(children[name] is child for name, child in layer.children.items())
    return layer if same else layer.rebuild(children)


def _outermost(layer: Layer, path: str = "", copies: int = 1) -> dict[str, tuple[Layer, int]]:
    """By path: the layer, the outermost where several share it, and how many copies of its inside one call runs."""
    found: dict[str, tuple[Layer, int]] = {}
    inner_copies = copies * (layer.repeats or 1)
    for name, child in layer.children.items():
        found |= _outermost(child, _join(path, name), inner_copies)
    innermost = found.get(path, (layer, inner_copies))
    return {path: (layer, innermost[1] if layer.repeats else copies)} | {p: f for p, f in found.items() if p != path}


def _title(layer: Layer) -> str:
    return f"{layer.label}({_title(layer.children[''])})" if "" in layer.children else layer.label


def _matches(path: str, pattern: str) -> bool:
    return tree.matches(path, pattern, below=False)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path and name else path or name


def _no_layer(net: Layer, pattern: str) -> str:
    known = list(dict.fromkeys(path for path, _ in walk(net)))
    names = ", ".join(known[1:13]) or "not named"
    return f"no layer matches '{pattern}'; the layers are {names}{' ...' if len(known) > 13 else ''}"


# FLOPs of a program as it is written


def _flops(layer: Layer, args: tuple, train: bool) -> int:
    inputs, named = args

    def start(key, *inputs, **named):
        return layer.init(key, *inputs, **named), layer.init_state(*inputs, **named) if layer.init_state else None

    params, state = abstractly(start)(jax.random.key(0), *inputs, **named)

    def run(params, state, key, *inputs, **named):
        return call(layer, params, state, key if train else None, train, inputs, named)[0]

    trace = abstractly(run, lambda fn, arrays: jax.make_jaxpr(fn)(arrays))
    return _count_flops(trace(params, state, jax.random.key(0), *inputs, **named).jaxpr)


def _count_flops(jaxpr) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation) -> int:
    name = equation.primitive.name
    size = sum(math.prod(v.aval.shape) for v in equation.outvars)
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, spec = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
        return 2 * size * math.prod(kernel) // kernel[spec[0]]
    if name in _CONVOLUTIONS:
        operands = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
        kernel, output = (operands[i] for i in _CONVOLUTIONS[name])
        return 2 * math.prod(output) * math.prod(kernel) // kernel[-1]
    if name.startswith("reduce_window"):
        return size * math.prod(equation.params["window_dimensions"])
    if name in _ARITHMETIC:
        return size
    if name in _REDUCTIONS:
        return math.prod(equation.invars[0].aval.shape)
    import jax.extend.core  # not above: it takes 16 ms

    inner = [_count_flops(getattr(j, "jaxpr", j)) for j in jax.extend.core.jaxprs_in_params(equation.params)]
    if not inner:
        return 0
    return max(inner) if name == "cond" else sum(inner) * equation.params.get("length", 1)


# The primitives of jaxnet.ops: where kernel and output are among their operands, and last, their result.
_CONVOLUTIONS = {"convolve": (1, 2), "convolve_input": (0, 1), "convolve_kernel": (2, 1)}
_ARITHMETIC = frozenset(
    "add sub mul div rem max min neg abs sign pow integer_pow sqrt rsqrt cbrt exp exp2 expm1 log log1p tanh logistic "
    "sin cos tan asin acos atan atan2 sinh cosh asinh acosh atanh erf erfc erf_inv square floor ceil round lgamma "
    "digamma cumsum cumprod cummax cummin cumlogsumexp add_any".split()
)
_REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod argmax argmin".split())
