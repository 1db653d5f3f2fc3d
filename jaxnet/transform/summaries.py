"""The layers of a network as a table: outputs, sizes, FLOPs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnet import tree
from jaxnet.core import Layer, abstractly, as_layer, describe, run, specs_of, start_state
from jaxnet.flops import flops_of
from jaxnet.transform.capturing import with_taps
from jaxnet.transform.walking import join_names
from jaxnet.tree.sizes import align

__all__ = ["Row", "Summary", "summary"]


class Row(NamedTuple):
    """One layer of a `summary`. Sizes and FLOPs include its children, and all copies under
    `repeat`.

    Attributes:
      path: the path of the layer, '' for the network.
      layer: its label.
      output: the shapes and dtypes of its output, as text.
      parameters: the number of its parameters.
      bytes: the bytes of its parameters.
      flops: the FLOPs of one call.
    """

    path: str
    layer: str
    output: str
    parameters: int
    bytes: int
    flops: int


class Summary(NamedTuple):
    """The layers of a network as plain data. It prints as a table.

    Attributes:
      rows: one row per layer, parents first.
      parameters: the number of parameters.
      bytes: the bytes of the parameters.
      state_bytes: the bytes of the state.
      flops: the FLOPs of one call.
    """

    rows: list[Row]
    parameters: int
    bytes: int
    state_bytes: int
    flops: int

    def __repr__(self) -> str:
        cells: list[tuple[str, ...]] = [("path", "layer", "output", "parameters", "bytes", "FLOPs")]
        for row in self.rows:
            numbers = [f"{number:,}" if number else "" for number in row[3:]]
            cells.append((row.path or ".", row.layer, row.output, *numbers))
        totals = f"{self.parameters:,} parameters, {self.bytes:,} bytes, "
        totals += f"{self.flops:,} FLOPs per call"
        if self.state_bytes:
            totals += f", {self.state_bytes:,} bytes of state"
        return f"{align(cells, left=3)}\n{totals}"


def summary(net: Layer, *inputs: Any, train: bool = False, **named: Any) -> Summary:
    """List path, output, parameters, bytes and FLOPs of every layer, without running the network.

    Shared weights are counted once. FLOPs are those of one call, as the program is written: 2 per
    multiply-add in a matrix product or convolution, 1 per output element of other arithmetic, and 1
    per input element of a reduction; moving data is free. A `while` loop counts one turn, and a
    `cond` its most expensive branch. The output of a layer inside `repeat` is that of one copy.

    Args:
      net: a layer.
      *inputs: its inputs, or `jax.ShapeDtypeStruct` for them.
      train: True for training.
      **named: its inputs by name.

    Returns:
      The summary, which prints as a table.

    Example:
      >>> from jaxnet import dense
      >>> summary(dense(3), jax.ShapeDtypeStruct((8, 2), "float32"))
      path  layer     output         parameters  bytes  FLOPs
      -------------------------------------------------------
      .     dense(3)  float32[8, 3]           9     36    120
      9 parameters, 36 bytes, 120 FLOPs per call
    """
    net = as_layer(net)
    inputs, named = specs_of((inputs, named))
    tapped = with_taps(net, "", lambda path: True, _note, set())

    def start_and_run(*inputs, **named):
        init_key, state_key, key = jax.random.split(jax.random.key(0), 3)
        params = net.init(init_key, *inputs, **named)
        state = start_state(net, state_key, inputs, named) if net.init_state else {}
        seen = run(tapped, params, state, key if train else None, train, inputs, named)[2]
        return params, state, seen

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
    sizes = tree.count(params), tree.bytes_of(params), tree.bytes_of(state)
    return Summary(rows, *sizes, rows[0].flops)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Note:
    """The specs of one call of a layer. As a pytree without leaves, it passes unchanged through any
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


def _outermost(layer: Layer, path: str = "") -> dict[str, Layer]:
    """The layer at each path, the outermost if several share it, parents first."""
    found = {path: layer}
    for name, child in layer.children.items():
        found |= _outermost(child, join_names(path, name))
    return found | {path: layer}


def _title(layer: Layer) -> str:
    return f"{layer.label}({_title(layer.children[''])})" if "" in layer.children else layer.label
