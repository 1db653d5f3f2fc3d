"""Parameters of other libraries, from and to: other names, and other layouts of the same arrays.

Every function here speaks of a network's variables as `{"params": params, "state": state}`. The tables below say what
a library calls the parameters of a layer; a table of renames says where the layers themselves go.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxnet.checkpoint import match, structure
from jaxnet.checkpoint.file import fit
from jaxnet.checkpoint.format import CheckpointError
from jaxnet.checkpoint.lazy import lazy
from jaxnet.checkpoint.structure import Node, Spec, leaf_name

PICKLES = (".pt", ".pth", ".th", ".bin", ".ckpt")  # files that torch opens; all others are safetensors
STATE = ("mean", "var")  # what of a layer is state where there is no template to say so

Rename = dict[str, str] | Callable[[str], str] | None


class Convention(NamedTuple):
    """How a library stores the arrays of a layer: ends of its names with ours (None: left out), and the layout."""

    names: dict[str, str | None]
    features_first: bool = False  # kernels are [out, in, *window], ours [*window, in, out]
    broadcast: bool = False  # vectors may have axes of size 1


FLAX = Convention({})
HAIKU = Convention(
    {"w": "kernel", "b": "bias", "offset": "bias", "embeddings": "embedding"}
    | {f"{name}_ema/{kind}": name if kind == "average" else None for name in STATE for kind in ("average", "hidden")},
    broadcast=True,
)
TORCH = Convention({f"running_{name}": name for name in STATE}, features_first=True)  # and `weight`: see _place
EQUINOX = Convention({}, features_first=True, broadcast=True)
TO_TORCH = {"kernel": "weight", "embedding": "weight", "scale": "weight"} | {n: f"running_{n}" for n in STATE}


def from_torch(
    source: str | os.PathLike[str] | Mapping[str, Any],
    like: Any = None,
    *,
    rename: Rename = None,
    strict: bool = True,
    cast: bool = False,
) -> Any:
    """Read a PyTorch state dict.

        variables = from_torch("net.pt", like={"params": params, "state": state}, rename={"features": "body"})

    | PyTorch | here |
    |---|---|
    | `weight` [out, in, *window] of linear maps and convolutions | `kernel` [*window, in, out] |
    | `weight` of an embedding | `embedding`, as it is |
    | `weight` of a normalisation (any vector) | `scale` |
    | `running_mean`, `running_var` | `mean`, `var`, in `state` |
    | `bias`, other names | the same, as they are |
    | integers (`num_batches_tracked`) | left out, unless `like` has them |

    The name of the target decides, not the shape, which cannot tell a square matrix from its transpose. A `weight` that
    is a matrix goes to an `embedding` if `like` has one there, or if `rename` names it in full: {"wte.weight":
    "wte/embedding"}; else it is a kernel.

    Args:
      source: a safetensors file; a file written by `torch.save` (`.pt`, `.pth`, `.th`, `.bin`, `.ckpt`), which torch
        opens with `weights_only=True`, so that nothing in it is executed; or a mapping from names to tensors or arrays.
        Of mappings in mappings, as in training checkpoints, names are joined by '.'.
      like: the variables to fill, {"params": params, "state": state} of arrays or `jax.ShapeDtypeStruct`s, as in
        `load`; "state" may be missing. Numbered modules (`blocks.0`, `blocks.1`, ...) are stacked where `like` has one
        with a leading axis, as `repeat` makes it. Without it, the modules are nested dicts by their own names.
      rename: {module or tensor of the source: path in the variables, without "params" and "state"}, of which the longest
        that fits counts: {"state_dict.module": "", "layer1.0": "stage1/first"}; or a function from path to path. Old
        names may have '.' or '/' between steps; a function is given '/'.
      strict, cast: as in `load`.

    Returns: {"params": ..., "state": ...}, or what `like` has of these. Nothing shares memory with the source.
    Raises:
      CheckpointError: the file is damaged, holds more than tensors, or is not what was asked for (all differences in
        one error, with guesses at what has been renamed).
      ImportError: the file needs torch, from 2.6 on, which is the extra `jaxnet[torch]`.
      ValueError: `like` is something else than variables, or has one path in both parts.
      OSError: the file cannot be opened.

    A convolution there is [N, C, H, W]: a dense layer that follows a flattened one expects its inputs in the order
    C, H, W, not H, W, C. docs/checkpoints.md shows how to reorder it.
    """
    if isinstance(source, Mapping):
        file, tensors = "the state dict", _joined(source)
    else:
        file, tensors = os.fsdecode(source), read_tensors(source)
    leaves, rename = _slashed(file, tensors, rename)
    return _convert(file, leaves, TORCH, like, rename, strict, cast)


def to_torch(
    variables: Mapping[str, Any], *, rename: Rename = None, stacked: str | Iterable[str] = ()
) -> dict[str, Any]:
    """Make a PyTorch state dict: the inverse of `from_torch`, exact.

        save("net.safetensors", to_torch(variables, rename={"body": "features"}))

    writes a file for `model.load_state_dict(safetensors.torch.load_file("net.safetensors"))`.

    Args:
      variables: {"params": params, "state": state}; "state" may be missing.
      rename: {path in the variables, without "params" and "state": module or tensor of the state dict}, of which the
        longest that fits counts, or a function from path to path. New names may have '.' or '/' between steps.
      stacked: paths of nodes that `repeat` has stacked, which become numbered modules: "blocks" gives `blocks.0`, ...
        They must be named, since a stack of matrices and the kernel of a convolution look alike.

    Returns: NumPy arrays by name. There is no `num_batches_tracked`; `load_state_dict` does without it.
    Raises:
      ValueError: `variables` are something else, or what is `stacked` is not.
      CheckpointError: two arrays would have one name, or one has no values.
    """
    from jaxnet.checkpoint import arrays

    file = "the variables"
    nodes, leaves, whole = _merged(file, "variables", variables, arrays.describe)
    if odd := [name for name, node in nodes.items() if node.kind not in ("jax", "numpy", "numpy_scalar")]:
        raise ValueError(f"variables must be arrays of numbers: '{whole[odd[0]]}' is of kind {nodes[odd[0]].kind}")
    leaves = {name: _numpy(x) for name, x in leaves.items()}
    for path in [stacked] if isinstance(stacked, str) else stacked:
        leaves = _unstacked(leaves, path)
    names = match.renamed(file, leaves, rename or {})
    result = {}
    for name, path in names.items():
        last, x = name.rpartition("/")[2], leaves[name]
        if last == "kernel" and x.ndim > 1:
            x = x.transpose(x.ndim - 1, x.ndim - 2, *range(x.ndim - 2))
        if path[-1:] == (last,):  # else the rename names the tensor in full
            path = (*path[:-1], TO_TORCH.get(last, last))
        new = ".".join(path).replace("/", ".")
        if new in result:
            raise CheckpointError(file, name, f"another leaf is called '{new}' too: give one another name by `rename`")
        result[new] = x.copy(order="C")
    return result


def from_flax(
    variables: Any, like: Any = None, *, rename: Rename = None, strict: bool = True, cast: bool = False
) -> Any:
    """Take the variables of a Flax network, whose names and layouts are ours: `kernel`, `bias`, `scale`, `embedding`.

    Of Linen's collections `params` and `batch_stats` are taken. What is called `mean` or `var` becomes state, unless
    `like` says otherwise; random keys are left out, as are integers that `like` does not have.

    Args:
      variables: what Linen's `init` returns, or an NNX module or `nnx.state(module)`.
      like, strict, cast: as in `from_torch`.
      rename: {path of a module or parameter in Flax, without the collection: path here}, or a function.

    Returns and raises: as `from_torch`.
    """
    if isinstance(variables, Mapping) and "params" in variables:
        leaves, statistics = (_flat(variables.get(name)) for name in ("params", "batch_stats"))
        if both := sorted(leaves.keys() & statistics.keys()):
            raise ValueError(f"the variables of Flax have '{both[0]}' in params and in batch_stats: rename one of them")
        leaves |= statistics
    else:
        leaves = {name.removesuffix("/value"): x for name, x in _flat(variables).items()}
    return _convert("the variables of Flax", leaves, FLAX, like, rename, strict, cast)


def from_haiku(
    params: Any,
    state: Any = None,
    like: Any = None,
    *,
    rename: Rename = None,
    strict: bool = True,
    cast: bool = False,
) -> Any:
    """Take the parameters, and the state, of a Haiku network.

    | Haiku | here |
    |---|---|
    | `w`, `b` | `kernel`, `bias` |
    | `scale`, `offset` | `scale`, `bias`, without axes of size 1 |
    | `embeddings` | `embedding` |
    | `mean_ema/average`, `var_ema/average` in the state | `mean`, `var`, in `state` |
    | a step `~` in the name of a module: `mlp/~/linear_0` | left out: `mlp/linear_0` |

    Args:
      params, state: what Haiku's `init` returns.
      like, strict, cast: as in `from_torch`.
      rename: {path of a module or parameter in Haiku, without '~': path here}, or a function.

    Returns and raises: as `from_torch`.
    """
    file = "the parameters of Haiku"
    leaves = _by_path(file, _flat(params) | _flat(state), lambda name: "/".join(s for s in name.split("/") if s != "~"))
    return _convert(file, leaves, HAIKU, like, rename, strict, cast)


def from_equinox(
    model: Any,
    state: Any = None,
    like: Any = None,
    *,
    rename: Rename = None,
    strict: bool = True,
    cast: bool = False,
) -> Any:
    """Take the parameters of an Equinox model and, from its state, the averages of batch norms.

    Names and layouts are those of PyTorch (`from_torch` has the table); vectors lose axes of size 1. A batch norm of
    mode "batch" has its averages corrected for their start at zero, as it does itself when it is used.

    Args:
      model: a module; `equinox.nn.State` as `state`, if there is one.
      like, strict, cast: as in `from_torch`.
      rename: {path of a module or array in the model, as in 'layers/0': path here}, or a function.

    Returns and raises: as `from_torch`. A dense layer behind a flattened convolution needs its inputs reordered, too.
    """
    leaves = _flat(model)
    if state is not None:
        leaves |= _averages(model, state)
    return _convert("the model of Equinox", leaves, EQUINOX, like, rename, strict, cast)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """All arrays of a state dict in a file, by name, in the order of the file; see `from_torch` for kinds of files."""
    file = os.fsdecode(path)
    if not file.endswith(PICKLES):
        with lazy(file) as leaves:
            return {name: leaves[name] for name in leaves if hasattr(leaves[name], "dtype")}
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        text = "needs torch to be opened: pip install 'jaxnet[torch]', or save it as safetensors where torch is"
        raise ImportError(f"{file}: {text}") from e
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # CVE-2025-32434: until then it could run code
        raise ImportError(f"{file}: torch {torch.__version__} does not open files safely; from 2.6 on it does: upgrade")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # damage shows in errors of many kinds
        text = "torch cannot read it as tensors alone (weights_only=True): it is damaged, or holds objects of other"
        text += " classes; save model.state_dict() alone, best as safetensors"
        raise CheckpointError(
            file, None, f"{text}. {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        ) from e
    if not isinstance(content, Mapping):
        text = f"it holds a {type(content).__name__}, expected a dict of tensors: save model.state_dict()"
        raise CheckpointError(file, None, text)
    return _joined(content)


def renamed_tensors(path: str | os.PathLike[str], rename: Rename) -> dict[str, Any]:
    """All arrays of a state dict in a file, as they are, by their new names with '.' between steps."""
    file = os.fsdecode(path)
    tensors, rename = _slashed(file, read_tensors(path), rename)
    names = match.renamed(file, tensors, rename or {})
    return {".".join(path).replace("/", "."): tensors[name] for name, path in names.items()}


def _slashed(file: str, tensors: dict[str, Any], rename: Rename) -> tuple[dict[str, Any], Rename]:
    """The tensors of a state dict by path, and the renames in paths, of which they may give the old ones with '.'."""
    if isinstance(rename, dict):
        rename = {old.replace(".", "/"): new for old, new in rename.items()}
    return _by_path(file, tensors, lambda name: name.replace(".", "/")), rename


def _by_path(file: str, leaves: dict[str, Any], path: Callable[[str], str]) -> dict[str, Any]:
    """The leaves by the paths of their names."""
    result = {}
    for name, x in leaves.items():
        if path(name) in result:
            raise CheckpointError(
                file, path(name), f"two arrays have this path, '{name}' and another: rename one there"
            )
        result[path(name)] = x
    return result


def _joined(tensors: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The arrays in mappings in mappings, their names joined by '.'; torch's tensors as NumPy arrays."""
    result = {}
    for key, x in tensors.items():
        if isinstance(x, Mapping):
            result |= _joined(x, f"{prefix}{key}.")
        elif hasattr(x, "dtype") and hasattr(x, "shape"):
            result[f"{prefix}{key}"] = _numpy(x)
    return result


def _numpy(x: Any) -> Any:
    """An array on the host; NumPy knows only some of torch's types, so a tensor goes by its bytes."""
    import numpy as np

    from jaxnet.checkpoint import arrays

    if not hasattr(x, "detach"):
        return x if isinstance(x, np.ndarray) else arrays.fetch(x)
    import torch  # pyright: ignore[reportMissingImports]

    dtype = arrays.dtype_of(str(x.dtype).removeprefix("torch."))
    x = x.detach().cpu().resolve_conj().resolve_neg()
    return x.reshape(-1).view(torch.uint8).numpy().view(dtype).reshape(x.shape)


def _flat(tree: Any) -> dict[str, Any]:
    """The arrays of any pytree, by path, without random keys."""
    import jax
    import jax.numpy as jnp

    pairs = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in pairs}
    arrays = {name: x for name, x in named.items() if hasattr(x, "dtype") and hasattr(x, "shape")}
    return {name: x for name, x in arrays.items() if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)}


def _averages(model: Any, state: Any) -> dict[str, Any]:
    """The mean and var of each batch norm in a model of Equinox, by path."""
    import jax
    import jax.numpy as jnp

    def is_norm(x):
        return hasattr(x, "batch_state_index") and hasattr(x, "ema_state_index")

    result = {}
    for path, norm in jax.tree_util.tree_leaves_with_path(model, is_leaf=is_norm):
        if is_norm(norm):
            if norm.ema_state_index is not None:
                averages = state.get(norm.ema_state_index)
            else:
                count = state.get(norm.batch_counter)
                share = jnp.where(
                    count == 0, 1, 1 - norm.momentum**count
                )  # of batches; the rest is the zero at the start
                averages = [x / jnp.broadcast_to(share, x.shape) for x in state.get(norm.batch_state_index)]
            for name, x in zip(STATE, averages, strict=True):
                steps = (*path, jax.tree_util.GetAttrKey(name))
                result[jax.tree_util.keystr(steps, simple=True, separator="/")] = x
    return result


def _merged(
    file: str, what: str, variables: Any, describe: Callable[[str, str, Any], Node]
) -> tuple[dict[str, Node], dict[str, Any], dict[str, str]]:
    """The leaves of params and state together: node, array and whole path by the path below params or state."""
    if not isinstance(variables, Mapping) or not {"params"} <= set(variables) <= {"params", "state"}:
        got = list(variables) if isinstance(variables, Mapping) else f"a {type(variables).__name__}"
        raise ValueError(f"{what} must be {{'params': params, 'state': state}} or {{'params': params}}, got {got}")
    template, leaves = structure.encode(file, dict(variables), functools.partial(describe, file))
    nodes = structure.leaves(template)
    short = {name: name.partition("/")[2] for name in nodes}
    if twice := [name for name in short if name.startswith("state/") and f"params/{short[name]}" in nodes]:
        raise ValueError(f"{what}: '{short[twice[0]]}' is in params and in state: rename one")
    whole = {below: name for name, below in short.items()}
    return {short[n]: x for n, x in nodes.items()}, {short[n]: x for n, x in leaves.items()}, whole


def _convert(
    file: str,
    source: dict[str, Any],
    convention: Convention,
    like: Any,
    rename: Rename,
    strict: bool,
    cast: bool,
) -> Any:
    """Variables from arrays by path in another library's convention."""
    import jax.numpy as jnp

    from jaxnet.checkpoint import arrays

    if like is None and (cast or not strict):
        raise ValueError(
            "cast=True and strict=False need variables `like`: they say how these and the source may differ"
        )
    nodes, templates, whole = {}, {}, {}
    if like is not None:
        nodes, templates, whole = _merged(file, "like", like, arrays.describe_template)
    source = {name: _numpy(x) for name, x in source.items()}
    moved = {leaf_name(path): name for name, path in match.renamed(file, source, rename or {}).items()}
    new = {path: _place(path, source[name].ndim, convention, nodes) for path, name in moved.items()}
    floats = {path for path, name in moved.items() if jnp.issubdtype(source[name].dtype, jnp.inexact)}
    new = {path: n for path, n in new.items() if n is not None and (path in floats or _in_stack(n, nodes)[0] in nodes)}
    match.renamed(file, new, new.__getitem__)  # an error if two of them meet
    found = _stack({name: _layout(source[moved[path]], name, convention) for path, name in new.items()}, nodes)
    kinds = {name: Node("jax", x.dtype.name) for name, x in found.items()}
    if like is None:
        values = arrays.place(file, kinds, found, {name: arrays.Target("jax", n.value) for name, n in kinds.items()})
        below = {name: structure.leaf_path(name) for name in found}
        paths = {name: ("state" if path and path[-1] in STATE else "params", *path) for name, path in below.items()}
        tree = structure.nest({path: kinds[name] for name, path in paths.items()})
        return {"params": {}, "state": {}} | structure.build(tree, {leaf_name(paths[n]): x for n, x in values.items()})
    specs = {name: Spec(x.dtype.name, x.shape) for name, x in found.items()}
    targets, kept = fit(file, "it", nodes, templates, specs, None, strict=strict, cast=cast)
    found = {name: found[name] for name in targets}
    values = arrays.place(file, kinds, arrays.cast(file, found, targets) if cast else found, targets) | kept
    return structure.refill(like, {whole[name]: x for name, x in values.items()})


def _place(path: str, ndim: int, convention: Convention, wanted: Mapping[str, Any]) -> str | None:
    """Our name for an array of another library; None if it is left out."""
    for end, name in convention.names.items():
        if path == end or path.endswith(f"/{end}"):
            return None if name is None else path[: len(path) - len(end)] + name
    if convention.features_first and path.rpartition("/")[2] == "weight":
        module = path.removesuffix("weight")
        if ndim < 2:
            return f"{module}scale"
        embedding = f"{module}embedding"
        return embedding if ndim == 2 and _in_stack(embedding, wanted)[0] in wanted else f"{module}kernel"
    return path


def _layout(x: Any, name: str, convention: Convention) -> Any:
    """The array in our layout, with memory of its own."""
    last = name.rpartition("/")[2]
    if last == "kernel" and convention.features_first and x.ndim > 1:
        x = x.transpose(*range(2, x.ndim), 1, 0)
    if last in ("bias", "scale", *STATE) and convention.broadcast and x.ndim > 1 and x.size == max(x.shape):
        x = x.reshape(-1)
    return x.copy(order="C")


def _stack(leaves: dict[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Join `blocks/0/kernel`, `blocks/1/kernel`, ... to `blocks/kernel` where that is what is wanted."""
    import numpy as np

    result, groups = {}, {}
    for name, x in leaves.items():
        target, number = _in_stack(name, wanted)
        if number is None:
            result[name] = x
        else:
            groups.setdefault(target, {})[number] = name
    for target, names in groups.items():
        parts = [leaves[names[number]] for number in sorted(names)]
        if sorted(names) == list(range(len(names))) and len({(x.shape, x.dtype) for x in parts}) == 1:
            result[target] = np.stack(parts)
        else:  # not a stack: reported under their own names
            result |= {name: leaves[name] for name in names.values()}
    return result


def _in_stack(name: str, wanted: Mapping[str, Any]) -> tuple[str, int | None]:
    """The wanted name that this one has without one of its numbers, and that number."""
    steps = name.split("/")
    for i, step in enumerate(steps):
        short = "/".join(steps[:i] + steps[i + 1 :])
        if name not in wanted and step.isdecimal() and short in wanted:
            return short, int(step)
    return name, None


def _unstacked(leaves: dict[str, Any], path: str) -> dict[str, Any]:
    """The inverse of `_stack`, for the leaves below a path."""
    inside = {name: x for name, x in leaves.items() if name.startswith(f"{path}/") or not path}
    sizes = {x.shape[:1] for x in inside.values()}
    if len(sizes) != 1 or sizes == {()}:
        text = f"have first axes of sizes {sorted(s[0] if s else 1 for s in sizes)}" if sizes else "do not exist"
        raise ValueError(f"stacked: the leaves below '{path}' must share a leading axis, these {text}")
    rest = {name: x for name, x in leaves.items() if name not in inside}
    for name, x in inside.items():
        for number, part in enumerate(x):
            rest["/".join(step for step in (path, str(number), name[len(path) :].removeprefix("/")) if step)] = part
    return rest
