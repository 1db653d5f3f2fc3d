"""The definition of a layer: the parameters and state that its `init` and `init_state` make for given inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxnet.core.specs import abstractly, describe, is_array, key_spec, memoised, remember, specs_of

if TYPE_CHECKING:
    from jaxnet.core.contract import Layer

__all__ = ["Definition", "explain_call", "param_specs"]

_REMEDY = "make them with init, or load those of this network"


class Definition:
    """Make the parameters and state of a layer, and compare given ones with their names and shapes.

    Args:
      layer: the layer.
      init: (key, *inputs) -> params, or None.
      init_state: (key, *inputs) -> state, or None.
    """

    def __init__(self, layer: Layer, init: Callable[..., Any] | None, init_state: Callable[..., Any] | None):
        self.layer = layer
        self.makers = {name: make for name, make in [("params", init), ("state", init_state)] if make is not None}

    def make(self, subject: str, key: Any, inputs: Any, named: Any) -> Any:
        """Make parameters or state for these inputs, and store their shapes for `problem`."""
        inputs, named = specs_of((inputs, named))
        made = self.makers[subject](key, *inputs, **named)
        remember(self.layer, subject, specs_of(made), inputs, named)
        return made

    def problem(self, params: Any, state: Any, inputs: Any, named: Any, asked: Any = None) -> Exception | None:
        """The error for params and state that differ from those of this layer for these inputs; None if they agree.

        If several names are missing, the error is about the name `asked`.
        """
        given = {"params": params, "state": state}
        for subject in self.makers:
            expected = self._expected(subject, inputs, named)
            if expected is None:
                continue
            differences = list(_differences(expected, given[subject]))
            for path, wanted, got in sorted(differences, key=lambda difference: difference[0] != asked):
                return self._error(subject, path, wanted, got, expected, given)
        return None

    def _expected(self, subject: str, inputs: Any, named: Any) -> Any:
        """The specs of params or state for these inputs. None if the inputs are wrong, which the layer itself reports."""

        def compute():
            try:
                return abstractly(self.makers[subject])(key_spec(), *specs_of(inputs), **specs_of(named))
            except Exception:
                return None

        return memoised(self.layer, subject, compute, False, inputs, named)

    def _error(self, subject: str, path: str, wanted: Any, got: Any, expected: Any, given: Any) -> Exception:
        label = self.layer.label
        if isinstance(wanted, Mapping):
            where = f"{subject} must be" if not path else f"'{path}' in {subject} must be"
            return TypeError(f"{label}: {where} a dict, {describe(wanted)}, got {describe(got)}; {_REMEDY}")
        if wanted is None:
            have = ", ".join(expected) or "nothing"
            return ValueError(
                f"{label}: {subject} must have no '{path}', got {describe(got)}; this layer has {have}; {_REMEDY}"
            )
        if got is None:
            held = {name: leaf for s in self.makers if isinstance(given[s], Mapping) for name, leaf in given[s].items()}
            have = ", ".join(f"{name} {describe(leaf)}" for name, leaf in held.items()) or "nothing"
            return ValueError(f"{label}: no '{path}' in {' and '.join(self.makers)} (they hold {have}); {_REMEDY}")
        where = f"'{path}' in {subject}" if path else subject
        return ValueError(
            f"{label}: {where} must be {describe(wanted)} for these inputs, got {describe(got)}; they are of another "
            f"network or other inputs: {_REMEDY}"
        )


def param_specs(layer: Layer, inputs: Any, named: Any) -> Any:
    """The specs of the parameters that `init` of any layer makes for these inputs."""
    inputs, named = specs_of((inputs, named))

    def compute():
        return abstractly(layer.init)(key_spec(), *inputs, **named)

    return memoised(layer, "all params", compute, False, inputs, named)


def explain_call(what: str, error: Exception, fn: Any, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Raise TypeError with the signature of `fn` if `error` comes from a call that does not match it."""
    if not isinstance(error, TypeError):
        return
    signature = inspect.signature(fn)
    try:
        signature.bind(*inputs, **named)
    except TypeError as mismatch:
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        raise TypeError(f"{what} takes {inspect.Signature(bare)}: {mismatch}") from error


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
