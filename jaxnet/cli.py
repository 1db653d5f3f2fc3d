"""The command line: `jaxnet inspect FILE`, `jaxnet verify FILE...`, `jaxnet diff A B`, `jaxnet convert IN OUT`.

A subcommand is two functions: one adds its parser, the other runs it and returns the exit code. What takes long to
import is imported in the latter.
"""

import argparse
import json
import math
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import jaxnet

if TYPE_CHECKING:
    from jaxnet.checkpoint import Info, Leaf
    from jaxnet.checkpoint.compare import Statistics

DESCRIPTION = "Tools for the checkpoints of jaxnet, a library for functional neural networks on JAX."
EPILOG = """examples:
  jaxnet inspect run/state.safetensors                     paths, shapes, types and sizes
  jaxnet inspect --stats --glob '**/kernel' model.safetensors
  jaxnet verify run/*.safetensors                          read all bytes and check them
  jaxnet diff old.safetensors new.safetensors              which leaves differ, and how far
  jaxnet convert net.pt net.safetensors                    PyTorch's names and layouts to jaxnet's, or back

exit codes: 0 all is well, or equal; 1 damaged or no checkpoint, or different, or not convertible; 2 the command is
wrong, or a file cannot be opened
"""
INSPECT = """Show what a checkpoint, or any other safetensors file, holds: path, shape, dtype, number of parameters
(elements) and bytes of every array, the Python values beside them, and the metadata. Only the header is read, and
checked, so that 10 GB take no longer than 10 kB."""
STATS = """also read the arrays, and show of their finite elements the least, the greatest, mean and standard deviation,
and how many others there are (NaN, infinities)"""
VERIFY = """Read every byte of the files and compare it with its checksum. Files of other programs have no checksums:
of them only the header and the length are checked."""
DIFF = """Compare two files leaf by leaf and show what only one of them has, which shapes and dtypes differ, and how far
apart the values are: how many elements have other bits, max |A - B|, and |A - B| / |A| in Euclidean norms. Containers
and metadata do not count. All bytes of common leaves are checked; a damaged file gives code 2, for nothing is known of
what it held."""

CONVERT = """Write a checkpoint anew: a state dict of PyTorch as a checkpoint of jaxnet with `params` and `state`, or the
other way round; or the weights of Keras (.keras, .h5) as a checkpoint of jaxnet. Kernels are transposed, names changed,
the numbers stay. The first bytes of IN tell its kind, not its name. Files of torch.save are opened by torch as tensors
alone, nothing in them is executed. OUT is safetensors. From one kind to the same, the file is copied, with other names if
--rename says so."""
RENAME = """the node or leaf OLD of IN is NEW in OUT, for instance 'state_dict.module=' or 'layer1.0=body/first'; paths of
jaxnet are without 'params/' and 'state/', unless both files are of jaxnet; may be repeated, the longest OLD that fits counts"""
ONLY = """to jaxnet: take only these leaves, for instance 'model' of a training checkpoint; may be repeated"""
LIKE = """a checkpoint of jaxnet with `params` and `state` that OUT must fit: it says which matrices are embeddings, and which
numbered modules `repeat` has stacked"""
STACKED = "to torch: a node that `repeat` has stacked and that becomes numbered modules; may be repeated"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. A wrong command raises SystemExit(2), as argparse does."""
    from jaxnet.checkpoint import CheckpointError

    _open_streams()
    try:
        args = _parser().parse_args(argv)
    finally:  # also after --help
        _say()
    try:
        return args.run(args)
    except (CheckpointError, OSError, ImportError, ValueError) as e:
        _complain(args.command, e)
        if args.command == "convert":
            return 1 if isinstance(e, CheckpointError) else 2
        return 1 if _is_damage(e) and args.command != "diff" else 2
    except KeyboardInterrupt:
        return 130
    except Exception:  # Python would exit with 1, which says that a file is damaged
        _complain(args.command, traceback.format_exc())
        return 2


def _open_streams() -> None:
    """Replace closed streams (`>&-`) by the empty device: else a file that is opened next would take what is printed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def _say(text: str | None = None) -> None:
    """Print a text, and all before it, at once; a reader that has seen enough (`head`) is no error."""
    try:
        if text is not None:
            print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _mute(sys.stdout)
    except OSError:  # a full disk
        _mute(sys.stdout)
        raise


def _mute(stream: Any) -> None:
    """Send what is still to come nowhere, so that Python's own flush at the end does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from jaxnet.checkpoint.words import shown

        super().error(shown(message, 3000))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="jaxnet", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"jaxnet {jaxnet.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_inspect(commands)
    _add_verify(commands)
    _add_diff(commands)
    _add_convert(commands)
    return parser


def _add_inspect(commands: Any):
    parser = commands.add_parser("inspect", help="show what a checkpoint holds", description=INSPECT)
    parser.add_argument("file", metavar="FILE", help="a checkpoint, or any *.safetensors file")
    parser.add_argument("--stats", action="store_true", help=STATS)
    text = "show only these leaves: a pattern of paths like 'head' or '**/bias'; may be repeated"
    parser.add_argument("--glob", action="append", metavar="PATTERN", help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from jaxnet.checkpoint import inspect

    info = inspect(args.file)
    if args.glob:
        from jaxnet.checkpoint.match import select

        names = select(args.file, [*(leaf.path for leaf in info.leaves), *info.scalars], args.glob)
        scalars = {path: x for path, x in info.scalars.items() if path in names}
        info = info._replace(leaves=tuple(leaf for leaf in info.leaves if leaf.path in names), scalars=scalars)
    statistics = _statistics(info) if args.stats else None
    if args.json:
        _say(_json(_as_json(info, statistics)))
    else:
        _say(_printable(_as_text(info, statistics)))
    return 0


def _statistics(info: "Info") -> dict[str, "Statistics | None"]:
    from jaxnet.checkpoint import lazy
    from jaxnet.checkpoint.compare import statistics

    with lazy(info.path) as leaves:
        return {leaf.path: statistics(leaves[leaf.path]) for leaf in info.leaves}


def _add_verify(commands: Any):
    parser = commands.add_parser("verify", help="check every byte of checkpoints", description=VERIFY)
    parser.add_argument("files", metavar="FILE", nargs="+", help="a checkpoint, or any *.safetensors file")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of lines")
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    from jaxnet.checkpoint import CheckpointError, verify

    results, code = [], 0
    for file in args.files:
        try:
            info = verify(file)
            state, reason = ("good", None) if info.version else ("unchecked", "it has no checksums: another program's")
            results.append({"path": file, "state": state, "reason": reason})
        except (CheckpointError, OSError, ImportError, ValueError) as e:
            state = "damaged" if _is_damage(e) else "unreadable"
            code = max(code, 1 if state == "damaged" else 2)
            results.append({"path": file, "state": state, "reason": str(e)})
            if not args.json:
                _complain(args.command, e)
        if not args.json:
            _say(_printable(f"{file}: {state}", keep=""))
    if args.json:
        _say(_json(results))
    return code


def _add_diff(commands: Any):
    parser = commands.add_parser("diff", help="compare two checkpoints", description=DIFF)
    parser.add_argument("a", metavar="A", help="a checkpoint, or any *.safetensors file")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("--json", action="store_true", help="print one JSON list, of what differs, instead of a table")
    parser.set_defaults(run=_diff)


def _diff(args: argparse.Namespace) -> int:
    from jaxnet.checkpoint.compare import differences

    found = differences(args.a, args.b)
    if args.json:
        lines = [x._asdict() | {"largest": _exact(x.largest), "relative": _exact(x.relative)} for x in found]
        _say(_json(lines))
    elif found:
        head = ("path", "differs", "A", "B", "elements", "max |A-B|", "relative")
        rows = [(x.path, x.what, _cut(x.a or "-", 40), _cut(x.b or "-", 40), *map(_short, x[4:])) for x in found]
        _say(_printable(_table(head, rows)))
    else:
        _say("the leaves are equal, bit for bit")
    return 1 if found else 0


def _add_convert(commands: Any):
    parser = commands.add_parser("convert", help="from and to PyTorch, or other names", description=CONVERT)
    parser.add_argument("source", metavar="IN", help="a state dict of PyTorch, or a checkpoint")
    parser.add_argument("target", metavar="OUT", help="the safetensors file to write")
    text = "torch, keras or jaxnet; by default what the first bytes of IN say, and torch for safetensors of others"
    parser.add_argument("--from", dest="kind", choices=["torch", "keras", "jaxnet"], metavar="KIND", help=text)
    text = "torch or, by default, jaxnet"
    parser.add_argument("--to", default="jaxnet", choices=["torch", "jaxnet"], metavar="KIND", help=text)
    parser.add_argument("--rename", action="append", default=[], metavar="OLD=NEW", type=_pair, help=RENAME)
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help=ONLY)
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
        args.parser.error(f"--from jaxnet: {text} {'torch.save' if written_by == 'torch' else 'Keras'}")
    if args.like and (kind == "jaxnet" or args.to != "jaxnet"):
        args.parser.error("--like is for --from torch --to jaxnet, and for --from keras")
    if args.to != "jaxnet" and (kind == "keras" or args.only):
        args.parser.error("--from keras and --only are for --to jaxnet")
    if args.stacked and (kind, args.to) != ("jaxnet", "torch"):
        args.parser.error("--stacked is for --from jaxnet --to torch")
    if os.path.lexists(args.target) and not args.force:
        args.parser.error(f"{args.target} exists: --force replaces it")
    with jax.enable_x64(True):  # else arrays of 64 bits would come as NumPy's
        save(args.target, _converted(args, kind), metadata=info.metadata if info else None)
    info = inspect(args.target)
    if args.json:
        _say(_json(_as_json(info, None)))
    else:
        parameters = sum(math.prod(leaf.shape) for leaf in info.leaves)
        text = f"{info.path}: {len(info.leaves)} arrays, {parameters:,} parameters, {info.nbytes:,} bytes"
        _say(_printable(text, keep=""))
    return 0


def _converted(args: argparse.Namespace, kind: str) -> Any:
    """The tree to write."""
    from jaxnet.checkpoint import load
    from jaxnet.interop import from_keras, from_torch, to_torch
    from jaxnet.interop.torch_state import renamed_tensors

    rename = dict(args.rename)
    if (kind, args.to) == ("jaxnet", "jaxnet"):
        return load(args.source, rename=rename or None, only=args.only or None)
    if (kind, args.to) == ("torch", "torch"):
        return renamed_tensors(args.source, rename)
    if kind != "jaxnet":
        read = from_torch if kind == "torch" else from_keras
        return read(args.source, _variables(args.like) if args.like else None, rename=rename, only=args.only or None)
    try:
        return to_torch(_variables(args.source), rename=rename, stacked=args.stacked)
    except ValueError as e:
        args.parser.error(str(e))


def _variables(file: str) -> dict[str, Any]:
    """What a checkpoint holds of params and state."""
    from jaxnet.checkpoint import CheckpointError, load

    tree = load(file)
    parts = {name: tree[name] for name in ("params", "state") if isinstance(tree, dict) and name in tree}
    if "params" not in parts:
        text = "it has no 'params' at its top; if all of it are, move it there: jaxnet convert IN OUT --rename =params"
        raise CheckpointError(file, None, text)
    return parts


def _is_damage(error: Exception) -> bool:
    """Whether the file is at fault, not the command or what keeps the file from being opened."""
    from jaxnet.checkpoint.format import CheckpointError, Misfit

    return isinstance(error, CheckpointError) and not isinstance(error, Misfit)


def _complain(command: str, error: Exception | str) -> None:
    try:
        print(f"jaxnet {command}: {_printable(str(error))}", file=sys.stderr, flush=True)
    except OSError:  # nobody reads it
        _mute(sys.stderr)


def _json(value: Any) -> str:
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as Python writes them: a file may hold 1e999, which Python reads as infinity."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return _exact(value) if isinstance(value, float) else value


def _as_json(info: "Info", statistics: "dict[str, Statistics | None] | None") -> dict[str, Any]:
    """A dict for JSON; values that JSON cannot hold exactly (numbers, bytes) as Python writes them."""
    from jaxnet.checkpoint.structure import show

    leaves: list[dict[str, Any]] = [x._asdict() | {"parameters": math.prod(x.shape)} for x in info.leaves]
    if statistics is not None:
        for leaf in leaves:
            found = statistics[leaf["path"]]
            leaf["stats"] = {name: _exact(x) for name, x in found._asdict().items()} if found else None
    scalars = {path: {"type": type(x).__name__, "value": show(x)} for path, x in info.scalars.items()}
    total = sum(leaf["parameters"] for leaf in leaves)
    return info._asdict() | {"leaves": leaves, "scalars": scalars, "parameters": total}


def _as_text(info: "Info", statistics: "dict[str, Statistics | None] | None") -> str:
    from jaxnet.checkpoint.runs import about_run
    from jaxnet.checkpoint.structure import show

    ours = f"jaxnet checkpoint, format {info.version}"
    kind = "safetensors file of another program" if info.version is None else ours
    groups: dict[str, list[Leaf]] = {}
    for leaf in info.leaves:
        groups.setdefault(leaf.path.partition("/")[0], []).append(leaf)
    large = {name: leaves for name, leaves in groups.items() if len(leaves) > 1 and len(groups) > 1}
    rows = [_row(x.path, str(list(x.shape)), x.dtype, [x]) for x in info.leaves]
    sums = [_row(f"{name}/*", f"{len(leaves)} arrays", "", leaves) for name, leaves in large.items()]
    sums.append(_row("total", f"{len(rows)} arrays", "", info.leaves))
    head = ("path", "shape", "dtype", "parameters", "bytes")
    if statistics is not None:
        head += ("min", "max", "mean", "std", "non-finite")
        found = [statistics[x.path] or (None,) * 5 for x in info.leaves]
        rows = [(*row, *map(_short, numbers)) for row, numbers in zip(rows, found, strict=True)]
        sums = [(*row, *[""] * 5) for row in sums]
    parts = [_printable(f"{info.path}: {kind}, {info.nbytes:,} bytes", keep="")]
    parts.append(_table(head, [*rows, None, *sums]))
    if info.scalars:
        values = [(path, type(x).__name__, _cut(show(x))) for path, x in info.scalars.items()]
        parts.append(_table(("path", "type", "value"), values))
    if about := about_run(info):
        parts.append(about)
    metadata = {key: x for key, x in info.metadata.items() if key != "fit" or about is None}
    if metadata:
        parts.append(f"metadata: {json.dumps(metadata, indent=2, ensure_ascii=False)}")
    return "\n\n".join(parts)


def _row(path: str, shape: str, dtype: str, leaves: "Sequence[Leaf]") -> tuple[str, ...]:
    parameters, nbytes = sum(math.prod(x.shape) for x in leaves), sum(x.nbytes for x in leaves)
    return path, shape, dtype, f"{parameters:,}", f"{nbytes:,}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...] | None]) -> str:
    """Columns in line, those of numbers to the right; None is a ruled line."""
    cells = [[_printable(cell, keep="") for cell in row] if row else None for row in (head, None, *rows)]
    widths = [max(map(len, column)) for column in zip(*filter(None, cells), strict=True)]
    lines = []
    for row in cells:
        row = row or ["-" * width for width in widths]
        right = [name not in ("path", "shape", "dtype", "type", "value", "differs", "A", "B") for name in head]
        padded = [x.rjust(w) if r else x.ljust(w) for x, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _short(x: float | None) -> str:
    return "-" if x is None else f"{x:,}" if isinstance(x, int) else f"{x:.4g}"


def _exact(x: float | None) -> float | str | None:
    """A number as JSON can hold it: NaN and infinities as Python writes them."""
    return x if x is None or math.isfinite(x) else repr(x)


def _cut(text: str, width: int = 80) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _printable(text: str, keep: str = "\n") -> str:
    """Names come from files: no control characters for the terminal, and nothing that its encoding lacks."""
    from jaxnet.checkpoint.words import printable

    text, encoding = printable(text, keep), sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


if __name__ == "__main__":
    sys.exit(main())
