"""The contents of a file as tables and as a dict for JSON."""

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxnet.cli.output import exact, printable

if TYPE_CHECKING:
    from jaxnet.checkpoint import Info, Leaf
    from jaxnet.checkpoint.compare import Statistics

__all__ = ["as_json", "as_text", "cut", "short", "table"]


def as_json(info: "Info", statistics: "dict[str, Statistics | None] | None") -> dict[str, Any]:
    """The contents as a dict for JSON. Values that JSON cannot hold exactly become strings, as
    Python writes them.
    """
    from jaxnet.checkpoint.scalars import show

    leaves: list[dict[str, Any]] = [
        x._asdict() | {"parameters": math.prod(x.shape)} for x in info.leaves
    ]
    if statistics is not None:
        for leaf in leaves:
            found = statistics[leaf["path"]]
            leaf["stats"] = (
                {name: exact(x) for name, x in found._asdict().items()} if found else None
            )
    scalars = {
        path: {"type": type(x).__name__, "value": show(x)} for path, x in info.scalars.items()
    }
    total = sum(leaf["parameters"] for leaf in leaves)
    return info._asdict() | {"leaves": leaves, "scalars": scalars, "parameters": total}


def as_text(info: "Info", statistics: "dict[str, Statistics | None] | None") -> str:
    """The contents as tables for people: the arrays, the Python values, the run of `fit` and the
    metadata.
    """
    from jaxnet.checkpoint.runs import about_run
    from jaxnet.checkpoint.scalars import show

    ours = f"jaxnet checkpoint, format {info.version}"
    kind = "safetensors file of another program" if info.version is None else ours
    groups: dict[str, list[Leaf]] = {}
    for leaf in info.leaves:
        groups.setdefault(leaf.path.partition("/")[0], []).append(leaf)
    large = {name: leaves for name, leaves in groups.items() if len(leaves) > 1 and len(groups) > 1}
    rows = [_row(x.path, str(list(x.shape)), x.dtype, [x]) for x in info.leaves]
    sums = [
        _row(f"{name}/*", f"{len(leaves)} arrays", "", leaves) for name, leaves in large.items()
    ]
    sums.append(_row("total", f"{len(rows)} arrays", "", info.leaves))
    head = ("path", "shape", "dtype", "parameters", "bytes")
    if statistics is not None:
        head += ("min", "max", "mean", "std", "non-finite")
        found = [statistics[x.path] or (None,) * 5 for x in info.leaves]
        rows = [(*row, *map(short, numbers)) for row, numbers in zip(rows, found, strict=True)]
        sums = [(*row, *[""] * 5) for row in sums]
    parts = [printable(f"{info.path}: {kind}, {info.nbytes:,} bytes", keep="")]
    parts.append(table(head, [*rows, None, *sums]))
    if info.scalars:
        values = [(path, type(x).__name__, cut(show(x))) for path, x in info.scalars.items()]
        parts.append(table(("path", "type", "value"), values))
    if about := about_run(info):
        parts.append(about)
    metadata = {key: x for key, x in info.metadata.items() if key != "fit" or about is None}
    if metadata:
        parts.append(f"metadata: {json.dumps(metadata, indent=2, ensure_ascii=False)}")
    return "\n\n".join(parts)


def _row(path: str, shape: str, dtype: str, leaves: "Sequence[Leaf]") -> tuple[str, ...]:
    parameters, nbytes = sum(math.prod(x.shape) for x in leaves), sum(x.nbytes for x in leaves)
    return path, shape, dtype, f"{parameters:,}", f"{nbytes:,}"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...] | None]) -> str:
    """Align rows in columns, with numbers to the right. A row that is None becomes a ruled line."""
    cells = [
        [printable(cell, keep="") for cell in row] if row else None for row in (head, None, *rows)
    ]
    widths = [max(map(len, column)) for column in zip(*filter(None, cells), strict=True)]
    lines = []
    for row in cells:
        row = row or ["-" * width for width in widths]
        right = [
            name not in ("path", "shape", "dtype", "type", "value", "differs", "A", "B")
            for name in head
        ]
        padded = [
            x.rjust(w) if r else x.ljust(w) for x, w, r in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def short(x: float | None) -> str:
    """A number with four digits, or '-' for None."""
    return "-" if x is None else f"{x:,}" if isinstance(x, int) else f"{x:.4g}"


def cut(text: str, width: int = 80) -> str:
    """The text, shortened to `width` characters."""
    return text if len(text) <= width else f"{text[: width - 3]}..."
