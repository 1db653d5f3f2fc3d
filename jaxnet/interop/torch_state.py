"""Convert PyTorch state dicts, from files and from memory, and back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from jaxnet.checkpoint import renaming
from jaxnet.checkpoint.errors import CheckpointError
from jaxnet.checkpoint.renaming import Rename
from jaxnet.checkpoint.request import checked_request
from jaxnet.checkpoint.words import shown
from jaxnet.interop import attention
from jaxnet.interop.collect import by_path, collect, to_numpy
from jaxnet.interop.convert import Convention, convert
from jaxnet.interop.recurrent import joined_halves
from jaxnet.interop.stacks import unstacked
from jaxnet.interop.torch_file import read_state_dict
from jaxnet.interop.variables import STATE, variables_of

__all__ = ["from_torch", "renamed_state_dict", "to_torch"]

# `convert` maps `weight`, whose name here depends on its shape and on the template.
TORCH = Convention({f"running_{name}": name for name in STATE}, features_first=True)
TO_TORCH = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
TO_TORCH |= {name: f"running_{name}" for name in STATE}


def from_torch(
    source: Any,
    *,
    like: Any = None,
    rename: Rename | None = None,
    pattern: str | Iterable[str] | None = None,
    strict: bool = True,
    cast: bool = False,
) -> dict[str, Any]:
    """Read a PyTorch state dict.

        like = {"params": params, "state": state}
        variables = from_torch("net.pt", like=like, rename={"features": "body"})

    | PyTorch | here |
    |---|---|
    | `weight` [out, in, *window] of linear maps and convolutions | `kernel` [*window, in, out] |
    | `weight` of an embedding | `embedding`, as it is |
    | `weight` of a normalization (any vector) | `scale` |
    | `running_mean`, `running_var` | `mean`, `var`, in `state` |
    | `in_proj_weight`, `in_proj_bias` of `MultiheadAttention` | `query`, `keys`, `values` |
    | `out_proj` of `MultiheadAttention` | `out` |
    | `weight_ih`, `weight_hh` of LSTM, GRU and RNN | `kernel` [D + H, gates H], both transposed |
    | `bias_ih`, `bias_hh` of these | `bias`, their sum; a GRU's second of n is `hidden_bias` |
    | `weight_hr` of an LSTM | `projection`, transposed |
    | `bias`, other names | the same, as they are |
    | integers (`num_batches_tracked`) | left out, unless `like` has them |

    The layout follows from the name of the target, because a shape cannot tell a square matrix from
    its transpose. A `weight` that is a matrix becomes an `embedding` if `like` has one at that
    path, or if `rename` gives the full path: {"wte.weight": "wte/embedding"}. Otherwise it becomes
    a kernel.

    Several layers of an LSTM, GRU or RNN are numbered, and two directions are `forward` and
    `backward`, as in `stacked` and `bidirectional`.

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
    request = checked_request(like, pattern, rename, strict, cast)
    if isinstance(source, (str, bytes, os.PathLike)):
        file, tensors = os.fsdecode(source), read_state_dict(source)
    else:
        file = "the state dict"
        tensors = collect(file, source)
    leaves, rename = _slashed(file, tensors, rename)
    leaves = joined_halves(file, leaves)
    patterns = request.patterns and [pattern.replace(".", "/") for pattern in request.patterns]
    request = request._replace(rename=rename, patterns=patterns)
    return convert(file, attention.of_torch(leaves), TORCH, request)


def to_torch(
    variables: Mapping[str, Any], *, rename: Rename | None = None, stacked: str | Iterable[str] = ()
) -> dict[str, Any]:
    """Make a PyTorch state dict, the exact inverse of `from_torch` except for recurrent layers.

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
    nodes, leaves, whole = variables_of(file, "variables", variables, arrays.describe)
    for name, node in nodes.items():
        if node.kind not in ("jax", "numpy", "numpy_scalar"):
            raise ValueError(
                f"variables must be arrays of numbers: '{shown(whole[name])}' is of kind "
                f"{node.kind}"
            )
    leaves = {name: to_numpy(file, whole[name], x) for name, x in leaves.items()}
    for path in [stacked] if isinstance(stacked, str) else stacked:
        leaves = unstacked(leaves, path)
    names = renaming.renamed(file, leaves, rename or {})
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
            text = f"another leaf is called '{shown(new)}' too: give one another name by `rename`"
            raise CheckpointError(file, name, text)
        result[new] = x.copy(order="C")
    return result


def renamed_state_dict(path: str | os.PathLike[str], rename: Rename | None) -> dict[str, Any]:
    """Rename the arrays of a state dict in a file.

    Args:
      path: the file; `from_torch` lists the kinds.
      rename: as in `from_torch`.

    Returns:
      The unchanged arrays by their new names, with '.' between the steps.

    Raises:
      CheckpointError: as `from_torch`.
      ImportError: as `from_torch`.
      OSError: as `from_torch`.
    """
    file = os.fsdecode(path)
    tensors, rename = _slashed(file, read_state_dict(path), rename)
    names = renaming.renamed(file, tensors, rename or {})
    return {
        ".".join(path).replace("/", "."): to_numpy(file, name, tensors[name])
        for name, path in names.items()
    }


def _slashed(
    file: str, tensors: dict[str, Any], rename: Rename | None
) -> tuple[dict[str, Any], Rename | None]:
    """The tensors of a state dict by path, and `rename` with '/' between the steps of old names."""
    if isinstance(rename, dict):
        rename = {old.replace(".", "/"): new for old, new in rename.items()}
    return by_path(file, tensors.items(), lambda name: name.replace(".", "/")), rename
