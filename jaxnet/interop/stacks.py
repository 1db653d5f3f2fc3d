"""Numbered modules (`blocks/0`, `blocks/1`, ...), and the leading axis of `repeat` instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxnet.checkpoint.words import shown

__all__ = ["in_stack", "stacked", "unstacked"]


def in_stack(name: str, wanted: Mapping[str, Any]) -> tuple[str, int | None]:
    """The wanted name that results from removing one number from this name, and that number; else
    the name and None.
    """
    steps = name.split("/")
    for i, step in enumerate(steps):
        short = "/".join(steps[:i] + steps[i + 1 :])
        if name not in wanted and step.isdecimal() and short in wanted:
            return short, int(step)
    return name, None


def stacked(leaves: dict[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Stack `blocks/0/kernel`, `blocks/1/kernel`, ... if `blocks/kernel` is wanted."""
    import numpy as np

    result, groups = {}, {}
    for name, x in leaves.items():
        target, number = in_stack(name, wanted)
        if number is None:
            result[name] = x
        else:
            groups.setdefault(target, {})[number] = name
    for target, names in groups.items():
        parts = [leaves[names[number]] for number in sorted(names)]
        alike = len({(x.shape, x.dtype) for x in parts}) == 1
        if alike and sorted(names) == list(range(len(names))):
            result[target] = np.stack(parts)
        else:
            # These do not form a stack, so errors report each under its own name.
            result |= {name: leaves[name] for name in names.values()}
    return result


def unstacked(leaves: dict[str, Any], path: str) -> dict[str, Any]:
    """The inverse of `stacked`, for the leaves below a path.

    Raises ValueError if these leaves have no common leading axis.
    """
    inside = {name: x for name, x in leaves.items() if name.startswith(f"{path}/") or not path}
    sizes = {x.shape[:1] for x in inside.values()}
    if len(sizes) != 1 or sizes == {()}:
        found = f"have first axes of sizes {sorted(s[0] if s else 1 for s in sizes)}"
        text = found if sizes else "do not exist"
        raise ValueError(
            f"stacked: the leaves below '{shown(path)}' must share a leading axis, these {text}"
        )
    result = {name: x for name, x in leaves.items() if name not in inside}
    for name, x in inside.items():
        below = name[len(path) :].removeprefix("/")
        for number, part in enumerate(x):
            result["/".join(filter(None, (path, str(number), below)))] = part
    return result
