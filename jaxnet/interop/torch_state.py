"""Convert PyTorch state dicts, from files and from memory, and back."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxnet.checkpoint import match
from jaxnet.checkpoint.container import opened
from jaxnet.checkpoint.format import CheckpointError
from jaxnet.checkpoint.opening import lazy
from jaxnet.checkpoint.words import shown
from jaxnet.interop.collect import Refused, by_path, collect, to_numpy
from jaxnet.interop.convert import STATE, Convention, Rename, convert, merged, unstacked
from jaxnet.interop.kinds import check_archive, kind_of_file, refused_kind

__all__ = ["from_torch", "read_tensors", "renamed_tensors", "to_torch"]

# `convert` maps `weight`, whose name here depends on its shape and on the template.
TORCH = Convention({f"running_{name}": name for name in STATE}, features_first=True)
TO_TORCH = {"kernel": "weight", "embedding": "weight", "scale": "weight"} | {
    n: f"running_{n}" for n in STATE
}

# Expanded and tied tensors repeat their bytes. All tensors may take at most this multiple of the
# file's size.
REPEATED = 64


def from_torch(
    source: Any,
    *,
    like: Any = None,
    rename: Rename = None,
    pattern: str | Iterable[str] | None = None,
    strict: bool = True,
    cast: bool = False,
) -> Any:
    """Read a PyTorch state dict.

        like = {"params": params, "state": state}
        variables = from_torch("net.pt", like=like, rename={"features": "body"})

    | PyTorch | here |
    |---|---|
    | `weight` [out, in, *window] of linear maps and convolutions | `kernel` [*window, in, out] |
    | `weight` of an embedding | `embedding`, as it is |
    | `weight` of a normalization (any vector) | `scale` |
    | `running_mean`, `running_var` | `mean`, `var`, in `state` |
    | `bias`, other names | the same, as they are |
    | integers (`num_batches_tracked`) | left out, unless `like` has them |

    The layout follows from the name of the target, because a shape cannot tell a square matrix from
    its transpose. A `weight` that is a matrix becomes an `embedding` if `like` has one at that
    path, or if `rename` gives the full path: {"wte.weight": "wte/embedding"}. Otherwise it becomes
    a kernel.

    Images in PyTorch are [N, C, H, W]: a dense layer after a flattened convolution expects its
    inputs in the order C, H, W, not H, W, C. docs/checkpoints.md shows how to reorder its kernel.

    Args:
      source: a safetensors file; a file of `torch.save`, which torch opens with
        `weights_only=True`, so nothing in it is executed; or a dict of tensors or arrays. The first
        bytes of a file determine its kind, not its name. Names in dicts, lists, tuples, namedtuples
        and dataclasses, as in training checkpoints, are joined by '.': the second of two models in
        a list is `models.1`.
      like: the variables to fill, {"params": params, "state": state} of arrays or
        `jax.ShapeDtypeStruct`s, as in `load`; "state" may be missing. Numbered modules (`blocks.0`,
        `blocks.1`, ...) are stacked if `like` has one with a leading axis, as `repeat` makes it.
        Without `like`, the result is nested dicts with the names of the modules.
      rename: {module or tensor of the source: path in the variables, without "params" and "state"},
        of which the longest match applies: {"state_dict.module": "", "layer1.0": "stage1/first"};
        or a function from path to path. Old names may have '.' or '/' between steps; a function
        receives '/'.
      pattern: a pattern of paths as in `load`, or several, each of which must match something. Only
        these arrays are converted, and `like` is the part of the variables that holds them. A
        pattern applies to the new paths or, if it matches none, to the paths of the source:
        pattern="model" reads one entry of a training checkpoint.
      strict: False (with `like`) to ignore arrays that `like` lacks. Every array of `like` must
        still be found.
      cast: as in `load`.

    Returns:
      {"params": ..., "state": ...}, or the parts of these that `like` has. Nothing shares memory
      with the source.

    Raises:
      CheckpointError: the file is damaged, holds objects other than tensors, or does not match the
        request (all differences in one error, with guesses at renamed arrays); or a tensor has no
        plain values (sparse, quantized, meta).
      ImportError: the file needs torch 2.6 or newer, which is the extra `jaxnet[torch]`.
      ValueError: `like` does not have the form of variables, or has the same path in both parts.
      OSError: the file cannot be opened.
    """
    if isinstance(source, (str, bytes, os.PathLike)):
        file, tensors = os.fsdecode(source), read_tensors(source)
    else:
        file = "the state dict"
        tensors = collect(file, source)
    leaves, rename = _slashed(file, tensors, rename)
    return convert(
        file,
        leaves,
        TORCH,
        like,
        rename=rename,
        pattern=_slashed_patterns(pattern),
        strict=strict,
        cast=cast,
    )


def to_torch(
    variables: Mapping[str, Any], *, rename: Rename = None, stacked: str | Iterable[str] = ()
) -> dict[str, Any]:
    """Make a PyTorch state dict, the exact inverse of `from_torch`.

        save("net.safetensors", to_torch(variables, rename={"body": "features"}))

    writes a file for `model.load_state_dict(safetensors.torch.load_file("net.safetensors"))`.

    Args:
      variables: {"params": params, "state": state}; "state" may be missing.
      rename: {path in the variables, without "params" and "state": module or tensor of the state
        dict}, of which the longest match applies, or a function from path to path. New names may
        have '.' or '/' between steps.
      stacked: paths of nodes that `repeat` stacked, which become numbered modules: "blocks" gives
        `blocks.0`, ... They must be listed, because a stack of matrices has the same shape as the
        kernel of a convolution.

    Returns:
      NumPy arrays by name. There is no `num_batches_tracked`; `load_state_dict` does without it.

    Raises:
      ValueError: `variables` do not have the form of variables, or a path in `stacked` is not a
        stack.
      CheckpointError: two arrays would have the same name, or an array has no values.
    """
    from jaxnet.checkpoint import arrays

    file = "the variables"
    nodes, leaves, whole = merged(file, "variables", variables, arrays.describe)
    if odd := [
        name for name, node in nodes.items() if node.kind not in ("jax", "numpy", "numpy_scalar")
    ]:
        raise ValueError(
            f"variables must be arrays of numbers: '{shown(whole[odd[0]])}' is of kind "
            f"{nodes[odd[0]].kind}"
        )
    leaves = {name: to_numpy(file, whole[name], x) for name, x in leaves.items()}
    for path in [stacked] if isinstance(stacked, str) else stacked:
        leaves = unstacked(leaves, path)
    names = match.renamed(file, leaves, rename or {})
    result = {}
    for name, path in names.items():
        last, x = name.rpartition("/")[2], leaves[name]
        if last == "kernel" and x.ndim > 1:
            x = x.transpose(x.ndim - 1, x.ndim - 2, *range(x.ndim - 2))
        # If the last step differs, `rename` has given the full name of the tensor.
        if path[-1:] == (last,):
            path = (*path[:-1], TO_TORCH.get(last, last))
        new = ".".join(path).replace("/", ".")
        if new in result:
            raise CheckpointError(
                file,
                name,
                f"another leaf is called '{shown(new)}' too: give one another name by `rename`",
            )
        result[new] = x.copy(order="C")
    return result


def read_tensors(path: str | os.PathLike[str] | bytes) -> dict[str, Any]:
    """All arrays of a state dict in a file by name, in the order of the file. `from_torch` lists
    the kinds of files.
    """
    with opened(path) as (file, fd, size):  # pyright: ignore[reportArgumentType]
        kind = kind_of_file(file, fd, size)
        if kind == "torch":
            return _collected(file, _loaded(file, fd, size), size)
        if kind == "keras":
            raise CheckpointError(file, None, refused_kind(kind))
    with lazy(file) as leaves:
        return {name: leaves[name] for name in leaves if hasattr(leaves[name], "dtype")}


def renamed_tensors(path: str | os.PathLike[str], rename: Rename) -> dict[str, Any]:
    """All arrays of a state dict in a file, unchanged, by their new names with '.' between
    steps.
    """
    file = os.fsdecode(path)
    tensors, rename = _slashed(file, read_tensors(path), rename)
    names = match.renamed(file, tensors, rename or {})
    return {
        ".".join(path).replace("/", "."): to_numpy(file, name, tensors[name])
        for name, path in names.items()
    }


def _loaded(file: str, fd: int, size: int) -> Any:
    """The content of a file that torch reads with `weights_only=True`."""
    torch = _torch(file)
    with os.fdopen(os.dup(fd), "rb") as source:
        if os.pread(fd, 2, 0) == b"PK":
            check_archive(file, source, size)
        source.seek(0)
        try:
            return torch.load(source, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as e:
            # Damage causes errors of many types.
            raise CheckpointError(file, None, _refusal(e)) from e


def _torch(file: str) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        text = (
            "needs torch to be opened: pip install 'jaxnet[torch]', or save it as safetensors "
            "where torch is"
        )
        raise ImportError(f"{shown(file, 5000)}: {text}") from e
    # CVE-2025-32434: before 2.6, files could run code despite weights_only=True.
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise ImportError(
            f"{shown(file, 5000)}: torch {torch.__version__} does not open files safely; from "
            "2.6 on it does: upgrade"
        )
    return torch


def _refusal(error: Exception) -> str:
    text = "torch cannot read it as tensors alone (weights_only=True)"
    if other := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
        text += (
            f": it holds an object of {other[1]}; save model.state_dict() alone, best as "
            "safetensors, or, if you trust"
        )
        return (
            f"{text} the file, read it inside `with torch.serialization.safe_globals([{other[1]}])`"
        )
    text += (
        ": it is damaged, or holds objects of other classes; save model.state_dict() alone, best "
        "as safetensors."
    )
    return f"{text} {type(error).__name__}: {shown((str(error).splitlines() or [''])[0], 3000)}"


def _collected(file: str, content: Any, size: int) -> dict[str, Any]:
    """The tensors of a file. Raises CheckpointError if they need far more memory than the size of
    the file.
    """
    tensors = collect(file, content)
    sizes = {name: x.nbytes for name, x in tensors.items() if not isinstance(x, Refused)}
    if (total := sum(sizes.values())) > (limit := REPEATED * size + (64 << 20)):
        name = max(sizes, key=lambda name: sizes[name])
        text = (
            f"the tensors take {total:,} bytes, of which this one takes {sizes[name]:,}; at most "
            f"{limit:,} are read from"
        )
        raise CheckpointError(
            file, name, f"{text} a file of {size:,} bytes: save expanded tensors as they are needed"
        )
    return tensors


def _slashed(file: str, tensors: dict[str, Any], rename: Rename) -> tuple[dict[str, Any], Rename]:
    """The tensors of a state dict by path, and `rename` with '/' between the steps of its old
    names.
    """
    if isinstance(rename, dict):
        rename = {old.replace(".", "/"): new for old, new in rename.items()}
    return by_path(file, tensors.items(), lambda name: name.replace(".", "/")), rename


def _slashed_patterns(pattern: str | Iterable[str] | None) -> str | list[str] | None:
    if pattern is None or isinstance(pattern, str):
        return pattern and pattern.replace(".", "/")
    return [each.replace(".", "/") for each in pattern]
