"""The definition of a layer: the parameters and state that its `init` and `init_state` make for
given inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxnet.core.memo import memoized, remember
from jaxnet.core.specs import abstractly, describe, is_array, key_spec, specs_of

__all__ = ["Definition"]

_REMEDY = "make them with init, or load those of this network"


class Definition:
    """Make the parameters and state of a layer, and compare given ones with their names and shapes.

    Args:
      label: the name of the layer in errors.
      init: (key, *inputs) -> params, or None.
      init_state: (key, *inputs) -> state, or None.
    """

    def __init__(
        self, label: str, init: Callable[..., Any] | None, init_state: Callable[..., Any] | None
    ):
        self.label = label
        makers = {"params": init, "state": init_state}
        self.makers = {name: make for name, make in makers.items() if make is not None}
        self.last: dict[str, Any] = {}

    def make(self, subject: str, key: Any, inputs: Any, named: Any) -> Any:
        """Make parameters or state for these inputs, and store their shapes for `problem`."""
        inputs, named = specs_of((inputs, named))
        made = self.makers[subject](key, *inputs, **named)
        self.last[subject] = specs_of(made)
        remember(self, subject, self.last[subject], inputs, named)
        return made

    def problem(
        self, params: Any, state: Any, inputs: Any, named: Any, asked: Any = None
    ) -> Exception | None:
        """The error for params and state that differ from those of this layer for these inputs;
        None if they agree.

        If several names are missing, the error is about the name `asked`.
        """
        given = {"params": params, "state": state}
        for subject in self.makers:
            expected, exact = self._expected(subject, inputs, named)
            if expected is None:
                continue
            differences = list(_differences(expected, given[subject]))
            if differences:
                free = self._free(subject, inputs, named)
                differences = [d for d in differences if not _differ_only_along(free, *d)]
            if differences:
                about = next((d for d in differences if d[0] == asked), differences[0])
                return self._error(subject, *about, expected, given, exact)
        return None

    def _expected(self, subject: str, inputs: Any, named: Any) -> tuple[Any, bool]:
        """The specs of params or state for these inputs, and True.

        If `init` fails for these inputs, the specs of the last ones that it made, and False,
        because `init` may need more than `apply`; None if there are none. The layer itself reports
        wrong inputs better.
        """

        def compute():
            make = abstractly(self.makers[subject])
            return make(key_spec(), *specs_of(inputs), **specs_of(named))

        try:
            return memoized(self, subject, compute, False, inputs, named), True
        except Exception:
            return self.last.get(subject), False

    def _free(self, subject: str, inputs: Any, named: Any) -> dict[str, tuple[int, ...]]:
        """The axes whose sizes follow from the batch and time axes of the inputs, by path. Any size
        along these axes may be right.

        For instance, a cache that was made for the longest sequence is the state of a call with one
        token.
        """
        longer, (now, _) = (
            _stretched(specs_of((inputs, named))),
            self._expected(subject, inputs, named),
        )
        then, _ = self._expected(subject, *longer)
        pairs = zip(*(jax.tree.leaves_with_path(tree) for tree in (now, then)), strict=False)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): _differing_axes(a, b)
            for (path, a), (_, b) in pairs
        }

    def _error(
        self,
        subject: str,
        path: str,
        wanted: Any,
        got: Any,
        expected: Any,
        given: Any,
        exact: bool,
    ) -> Exception:
        label = self.label
        if isinstance(wanted, Mapping):
            where = f"{subject} must be" if not path else f"'{path}' in {subject} must be"
            # Equal layers of other networks share `last`, so only its names are certain.
            names = ", ".join(f"'{name}'" for name in sorted(wanted, key=str))
            entries = f", {describe(wanted)}" if exact else f" with {names}"
            return TypeError(f"{label}: {where} a dict{entries}, got {describe(got)}; {_REMEDY}")
        if wanted is None:
            have = ", ".join(expected) or "nothing"
            return ValueError(
                f"{label}: {subject} must have no '{path}', got {describe(got)}; this layer has "
                f"{have}; {_REMEDY}"
            )
        if got is None:
            dicts = [given[s] for s in self.makers if isinstance(given[s], Mapping)]
            held = {name: leaf for entries in dicts for name, leaf in entries.items()}
            have = ", ".join(f"{name} {describe(leaf)}" for name, leaf in held.items()) or "nothing"
            return ValueError(
                f"{label}: no '{path}' in {' and '.join(self.makers)} (they hold {have}); {_REMEDY}"
            )
        where = f"'{path}' in {subject}" if path else subject
        return ValueError(
            f"{label}: {where} must be {describe(wanted)} for these inputs, got {describe(got)}; "
            f"they are of another network or other inputs: {_REMEDY}"
        )


def _differences(expected: Any, given: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The differences in names and shapes: (path, expected, given), with None for a missing one."""
    if not isinstance(expected, Mapping):
        if not _same_shapes(expected, given):
            yield path, expected, given
        return
    if not isinstance(given, Mapping):
        yield path, expected, given
        return
    for name, wanted in expected.items():
        inside = f"{path}/{name}" if path else str(name)
        if name not in given:
            yield inside, wanted if not isinstance(wanted, Mapping) else describe(wanted), None
        else:
            yield from _differences(wanted, given[name], inside)
    for name, got in given.items():
        if name not in expected and not (isinstance(got, Mapping) and not got):
            yield f"{path}/{name}" if path else str(name), None, got


def _stretched(specs: Any) -> Any:
    """The specs with every axis but the last one longer."""

    def longer(x):
        if not is_array(x) or len(x.shape) < 2:
            return x
        return jax.ShapeDtypeStruct((*(n + 1 for n in x.shape[:-1]), x.shape[-1]), x.dtype)

    return jax.tree.map(longer, specs)


def _differ_only_along(
    free: Mapping[str, tuple[int, ...]], path: str, expected: Any, given: Any
) -> bool:
    if not is_array(expected) or not is_array(given) or len(expected.shape) != len(given.shape):
        return False
    return all(axis in free.get(path, ()) for axis in _differing_axes(expected, given))


def _differing_axes(a: Any, b: Any) -> tuple[int, ...]:
    sizes = enumerate(zip(a.shape, b.shape, strict=False))
    return tuple(axis for axis, (m, n) in sizes if m != n)


def _same_shapes(expected: Any, given: Any) -> bool:
    if is_array(expected):
        return _shape(given) == tuple(expected.shape)
    leaves, tree = jax.tree.flatten(expected)
    others, other_tree = jax.tree.flatten(given)
    return tree == other_tree and all(
        _shape(b) == tuple(a.shape) for a, b in zip(leaves, others, strict=True) if is_array(a)
    )


def _shape(x: Any) -> tuple[Any, ...] | None:
    """The shape of an array or a number. None for anything else."""
    if is_array(x):
        return tuple(x.shape)
    return () if isinstance(x, int | float | complex | np.generic) else None
