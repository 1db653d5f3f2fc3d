"""The recurrent layers of other libraries as the one kernel and the biases of the cells here.

PyTorch and Equinox keep a kernel for the input and one for the carry, Flax one per gate. Each
function replaces these arrays by `kernel` [D + H, gates * H] and `bias`, and leaves all others as
they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxnet.interop.collect import to_numpy

__all__ = ["joined_gates", "joined_halves", "reordered_gru"]

HALVES = re.compile(
    r"(?P<module>(?:.*/)?)(?P<what>weight_ih|weight_hh|weight_hr|bias_ih|bias_hh|bias|bias_n)"
    r"(?:_l(?P<layer>\d+)(?P<reverse>_reverse)?)?"
)
# The gates of Flax in the order of the columns here, and the only ones with a bias on h.
GATES = ("ifgo", "rzn")


def joined_halves(file: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves with each pair `weight_ih`, `weight_hh` joined, for PyTorch and Equinox.

    A module of one layer and direction has its arrays under its own name; several layers are
    numbered, and two directions are `forward` and `backward`, as `stacked` and `bidirectional` name
    them. The two biases of PyTorch become their sum, except that of the new carry of a GRU.

    Args:
      file: how errors name the source.
      leaves: the arrays by path.

    Returns:
      The arrays by path. The joined ones are `weight` [gates * H, D + H], `bias`, `hidden_bias` and
      `projection`.
    """
    import numpy as np

    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for name in leaves:
        if match := HALVES.fullmatch(name):
            place = match["module"], match["layer"] or "", match["reverse"] or ""
            cells.setdefault(place, {})[match["what"]] = name
    cells = {
        place: names for place, names in cells.items() if {"weight_ih", "weight_hh"} <= {*names}
    }
    used = {name for names in cells.values() for name in names.values()}
    result = {name: x for name, x in leaves.items() if name not in used}
    for place, names in cells.items():
        cell = {what: to_numpy(file, name, leaves[name]) for what, name in names.items()}
        path = _path(place, cells)
        both = [cell["weight_ih"], cell["weight_hh"]]
        result[f"{path}weight"] = np.concatenate(both, 1)
        result |= {f"{path}{name}": x for name, x in _biases(cell).items()}
        if "weight_hr" in cell:
            result[f"{path}projection"] = cell["weight_hr"].T
    return result


def joined_gates(file: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves with the gates of each LSTMCell, OptimizedLSTMCell and GRUCell of Flax joined.

    Args:
      file: how errors name the source.
      leaves: the arrays by path.

    Returns:
      The arrays by path. The joined ones are `kernel`, `bias` and `hidden_bias`.
    """
    import numpy as np

    result = dict(leaves)
    for gates in GATES:
        first = f"i{gates[0]}/kernel"
        for module in [n.removesuffix(first) for n in leaves if ("/" + n).endswith("/" + first)]:
            names = [f"{module}{side}{gate}/kernel" for side in "ih" for gate in gates]
            if not all(name in leaves for name in names):
                continue
            parts = [to_numpy(file, name, result.pop(name)) for name in names]
            rows = [np.concatenate(half, 1) for half in (parts[: len(gates)], parts[len(gates) :])]
            result[f"{module}kernel"] = np.concatenate(rows)
            side = "h" if gates == "ifgo" else "i"
            biases = [f"{module}{side}{gate}/bias" for gate in gates]
            if all(name in result for name in biases):
                vectors = [to_numpy(file, name, result.pop(name)) for name in biases]
                result[f"{module}bias"] = np.concatenate(vectors)
            if gates == "rzn" and f"{module}hn/bias" in result:
                result[f"{module}hidden_bias"] = result.pop(f"{module}hn/bias")
    return result


def reordered_gru(file: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves with the arrays `w_i`, `w_h`, `b` of each GRU of Haiku as those of `gru_cell` with
    reset_after=False.

    Args:
      file: how errors name the source.
      leaves: the arrays by path.

    Returns:
      The arrays by path. The joined ones are `kernel` and `bias`, with the columns r, -z, n instead
      of z, r, n.
    """
    import numpy as np

    result = dict(leaves)
    for module in [name.removesuffix("w_i") for name in leaves if f"/{name}".endswith("/w_i")]:
        names = [f"{module}{what}" for what in ("w_i", "w_h", "b")]
        if all(name in leaves for name in names):
            above, below, bias = (to_numpy(file, name, result.pop(name)) for name in names)
            for name, x in (("kernel", np.concatenate([above, below])), ("bias", bias)):
                z, r, n = np.split(x, 3, -1)
                # In Haiku, z is the share of the new carry, and 1 - sigmoid(z) = sigmoid(-z).
                result[f"{module}{name}"] = np.concatenate([r, -z, n], -1)
    return result


def _path(place: tuple[str, str, str], cells: Mapping[tuple[str, str, str], Any]) -> str:
    """Where the arrays of one layer and direction belong."""
    module, layer, reverse = place
    beside = [other for other in cells if other[0] == module]
    several = len({layer for _, layer, _ in beside}) > 1
    two = len({reverse for _, _, reverse in beside}) > 1
    direction = ("backward/" if reverse else "forward/") if two else ""
    return module + (f"{layer}/" if several else "") + direction


def _biases(cell: Mapping[str, Any]) -> dict[str, Any]:
    """The biases of one layer. Equinox has `bias`, and `bias_n` of a GRU."""
    result = {
        name: cell[old]
        for name, old in (("bias", "bias"), ("hidden_bias", "bias_n"))
        if old in cell
    }
    if "bias_ih" not in cell:
        return result
    first, second = cell["bias_ih"], cell["bias_hh"]
    rows, features = cell["weight_hh"].shape
    if rows == 3 * features:
        total = first + second
        total[2 * features :] = first[2 * features :]
        return {"bias": total, "hidden_bias": second[2 * features :]}
    return {"bias": first + second}
