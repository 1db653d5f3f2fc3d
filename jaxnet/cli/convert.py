"""The command that writes: `convert`."""

import argparse
import math
import os
from typing import Any

from jaxnet.cli.output import printable, say, to_json
from jaxnet.cli.text import as_json

__all__ = ["add_convert"]

CONVERT = """Convert a PyTorch state dict to a jaxnet checkpoint with `params` and `state`, or the
other way around; or convert Keras weights (.keras, .h5) to a jaxnet checkpoint. Kernels are
transposed and names are changed; the numbers stay the same. The kind of IN follows from its first
bytes, not from its name. torch opens files of torch.save as tensors only, so nothing in them is
executed. OUT is a safetensors file. If IN and OUT are of the same kind, the file is copied, with
the new names that --rename gives."""
RENAME = """the node or leaf OLD of IN becomes NEW in OUT, for instance 'state_dict.module=' or
'layer1.0=body/first'; paths in jaxnet omit 'params/' and 'state/', unless both files are jaxnet
checkpoints; may be repeated, the longest matching OLD wins"""
PATTERN = """to jaxnet: convert only these leaves, for instance 'model' of a training checkpoint;
may be repeated"""
LIKE = """a jaxnet checkpoint with `params` and `state` that OUT must match: it determines which
matrices are embeddings, and which numbered modules `repeat` stacks"""
STACKED = (
    "to torch: a node that `repeat` stacked and that becomes numbered modules; may be repeated"
)


def add_convert(commands: Any) -> None:
    """Add the parser of `convert`."""
    parser = commands.add_parser(
        "convert", help="from and to PyTorch, or other names", description=CONVERT
    )
    parser.add_argument("source", metavar="IN", help="a state dict of PyTorch, or a checkpoint")
    parser.add_argument("target", metavar="OUT", help="the safetensors file to write")
    text = (
        "torch, keras or jaxnet; by default the first bytes of IN decide, and safetensors of "
        "other programs are torch"
    )
    parser.add_argument(
        "--from", dest="kind", choices=["torch", "keras", "jaxnet"], metavar="KIND", help=text
    )
    text = "torch or, by default, jaxnet"
    parser.add_argument(
        "--to", default="jaxnet", choices=["torch", "jaxnet"], metavar="KIND", help=text
    )
    parser.add_argument(
        "--rename", action="append", default=[], metavar="OLD=NEW", type=_pair, help=RENAME
    )
    parser.add_argument("--pattern", action="append", default=[], metavar="PATTERN", help=PATTERN)
    parser.add_argument("--like", metavar="FILE", help=LIKE)
    parser.add_argument("--stacked", action="append", default=[], metavar="PATH", help=STACKED)
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--json", action="store_true", help="print what `inspect --json OUT` would")
    parser.set_defaults(run=_convert, parser=parser)


def _pair(text: str) -> tuple[str, str]:
    old, equal, new = text.partition("=")
    if not equal:
        raise argparse.ArgumentTypeError(f"'{text}' must be OLD=NEW, for instance 'layer1=body'")
    return old, new


def _convert(args: argparse.Namespace) -> int:
    import jax

    from jaxnet.checkpoint import inspect, places, save
    from jaxnet.interop.kinds import kind_of

    if places.is_url(args.target):
        args.parser.error(f"{args.target} is in an object store: convert to a file, and copy that")
    written_by = kind_of(args.source)
    info = inspect(args.source) if written_by == "safetensors" else None
    ours = info is not None and info.version is not None
    kind = args.kind or ("jaxnet" if ours else "keras" if written_by == "keras" else "torch")
    if kind == "jaxnet" and info is None:
        text = "a checkpoint of jaxnet is a safetensors file, and this is one of"
        args.parser.error(
            f"--from jaxnet: {text} {'torch.save' if written_by == 'torch' else 'Keras'}"
        )
    if args.like and (kind == "jaxnet" or args.to != "jaxnet"):
        args.parser.error("--like is for --from torch --to jaxnet, and for --from keras")
    if args.to != "jaxnet" and (kind == "keras" or args.pattern):
        args.parser.error("--from keras and --pattern are for --to jaxnet")
    if args.stacked and (kind, args.to) != ("jaxnet", "torch"):
        args.parser.error("--stacked is for --from jaxnet --to torch")
    if os.path.lexists(args.target) and not args.force:
        args.parser.error(f"{args.target} exists: --force replaces it")
    # Without x64, arrays of 64 bits would load as NumPy arrays.
    with jax.enable_x64(True):
        save(args.target, _converted(args, kind), metadata=info.metadata if info else None)
    info = inspect(args.target)
    if args.json:
        say(to_json(as_json(info, None)))
    else:
        parameters = sum(math.prod(leaf.shape) for leaf in info.leaves)
        text = (
            f"{info.path}: {len(info.leaves)} arrays, {parameters:,} parameters, {info.nbytes:,} "
            "bytes"
        )
        say(printable(text, keep=""))
    return 0


def _converted(args: argparse.Namespace, kind: str) -> Any:
    """The tree to write."""
    from jaxnet.checkpoint import load
    from jaxnet.interop import from_keras, from_torch, to_torch
    from jaxnet.interop.torch_state import renamed_state_dict

    rename = dict(args.rename)
    if (kind, args.to) == ("jaxnet", "jaxnet"):
        return load(args.source, rename=rename or None, pattern=args.pattern or None)
    if (kind, args.to) == ("torch", "torch"):
        return renamed_state_dict(args.source, rename)
    if kind != "jaxnet":
        read = from_torch if kind == "torch" else from_keras
        return read(
            args.source,
            like=_variables(args.like) if args.like else None,
            rename=rename,
            pattern=args.pattern or None,
        )
    try:
        return to_torch(_variables(args.source), rename=rename, stacked=args.stacked)
    except ValueError as e:
        args.parser.error(str(e))


def _variables(file: str) -> dict[str, Any]:
    """The params and the state of a checkpoint."""
    from jaxnet.checkpoint import CheckpointError, load

    tree = load(file)
    parts = {
        name: tree[name] for name in ("params", "state") if isinstance(tree, dict) and name in tree
    }
    if "params" not in parts:
        raise CheckpointError(file, None, f"it has no 'params' at its top; {_way_to_params(tree)}")
    return parts


def _way_to_params(tree: Any) -> str:
    """The command that gives a checkpoint `params` at its top."""
    import jax

    run = tree.get("train_state") if isinstance(tree, dict) else None
    if not (isinstance(run, dict) and "params" in run):
        return "if the whole tree is params, move it: jaxnet convert IN OUT --rename =params"
    # A network without state has an empty dict there, which no pattern matches.
    parts = ["params", *(["state"] if jax.tree.leaves(run.get("state")) else [])]
    options = " ".join(f"--pattern train_state/{name}" for name in parts)
    return (
        f"it is a run of fit, so convert its variables first: jaxnet convert IN NEW {options} "
        "--rename train_state="
    )
