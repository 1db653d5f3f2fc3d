"""The parameters of attention in other libraries, by jaxnet's names and shapes.

A module of attention is recognized by the names of all its arrays. Its projections are called
`query`, `keys`, `values` and `out` here, each a dense layer with a kernel [in, out].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["of_equinox", "of_flax", "of_haiku", "of_torch"]

PARTS = ("query", "keys", "values")


def of_torch(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Split the fused projections of `torch.nn.MultiheadAttention`.

    Args:
      leaves: the tensors by path.

    Returns:
      The tensors by path: `in_proj_weight` as `query/weight`, `keys/weight` and `values/weight`,
      `out_proj` as `out`. Everything else is unchanged.
    """
    found = _modules(leaves, "in_proj_weight", "out_proj/weight")
    found |= _modules(leaves, "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj/weight")
    separate = {f"{name[0]}_proj_weight": f"{name}/weight" for name in PARTS}

    def rename(end: str, x: Any) -> dict[str, Any]:
        if end in ("in_proj_weight", "in_proj_bias"):
            size = x.shape[0] // 3
            thirds = [x[i * size : (i + 1) * size] for i in range(3)]
            kind = end.removeprefix("in_proj_")
            return {f"{name}/{kind}": third for name, third in zip(PARTS, thirds, strict=True)}
        if end.startswith("out_proj/"):
            return {end.replace("out_proj", "out", 1): x}
        return {separate.get(end, end): x}

    return _renamed(leaves, found, rename)


def of_flax(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Join the axes of heads and features of Flax's `MultiHeadDotProductAttention`.

    Args:
      leaves: the arrays by path.

    Returns:
      The arrays by path: `query/kernel` [C, H, D] as [C, H D], `out/kernel` [H, D, F] as [H D, F],
      `key` as `keys` and `value` as `values`. Everything else is unchanged.
    """
    kernels = [f"{name}/kernel" for name in ("query", "key", "value", "out")]
    found = {
        module
        for module in _modules(leaves, *kernels)
        if len(leaves[f"{module}query/kernel"].shape) >= 3
    }
    names = {"key": "keys", "value": "values", "query_ln": "query_norm", "key_ln": "keys_norm"}

    def rename(end: str, x: Any) -> dict[str, Any]:
        part, _, rest = end.partition("/")
        if part in ("query", "key", "value"):
            x = x.reshape(*x.shape[:-2], -1)
        elif end == "out/kernel":
            x = x.reshape(*x.shape[:-3], -1, x.shape[-1])
        return {f"{names.get(part, part)}/{rest}" if rest else end: x}

    return _renamed(leaves, found, rename)


def of_haiku(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the projections of Haiku's `MultiHeadAttention`.

    Args:
      leaves: the arrays by path.

    Returns:
      The arrays by path: `key` as `keys`, `value` as `values`, `linear` as `out`. Everything else
      is unchanged.
    """
    names = {"key": "keys", "value": "values", "linear": "out"}
    found = _modules(leaves, "query/w", "key/w", "value/w", "linear/w")
    return _renamed(leaves, found, _by_part(names))


def of_equinox(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the projections of Equinox's `MultiheadAttention`.

    Args:
      leaves: the arrays by path.

    Returns:
      The arrays by path: `query_proj` as `query`, `key_proj` as `keys`, `value_proj` as `values`,
      `output_proj` as `out`. Everything else is unchanged.
    """
    names = {
        "query_proj": "query",
        "key_proj": "keys",
        "value_proj": "values",
        "output_proj": "out",
    }
    return _renamed(
        leaves, _modules(leaves, *[f"{name}/weight" for name in names]), _by_part(names)
    )


def _modules(leaves: Mapping[str, Any], first: str, *others: str) -> set[str]:
    """The modules, as the starts of paths, that have an array at each of these ends."""
    starts = {path[: -len(first)] for path in leaves if path == first or path.endswith(f"/{first}")}
    arrays = {path for path, x in leaves.items() if hasattr(x, "shape")}
    return {start for start in starts if {start + end for end in (first, *others)} <= arrays}


def _renamed(
    leaves: Mapping[str, Any], modules: set[str], rename: Callable[[str, Any], dict[str, Any]]
) -> dict[str, Any]:
    """The leaves, with those of the modules as `rename(end of the path, leaf)` gives them."""
    result = {}
    for path, x in leaves.items():
        start = max((m for m in modules if path.startswith(m)), key=len, default=None)
        if start is None or not hasattr(x, "shape"):
            result[path] = x
        else:
            result |= {start + end: part for end, part in rename(path[len(start) :], x).items()}
    return result


def _by_part(names: Mapping[str, str]) -> Callable[[str, Any], dict[str, Any]]:
    def rename(end: str, x: Any) -> dict[str, Any]:
        part, slash, rest = end.partition("/")
        return {names.get(part, part) + slash + rest: x}

    return rename
