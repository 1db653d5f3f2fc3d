"""Optimizers as arguments: an optax transformation, a learning rate, or a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import tree

if TYPE_CHECKING:
    from typing import TypeAlias

    import optax

    Optimizer: TypeAlias = (
        optax.GradientTransformation
        | optax.MultiSteps
        | optax.Schedule
        | float
        | np.number[Any]
        | jax.Array
    )
    """An optax transformation, or a learning rate or schedule of the step for plain SGD."""

__all__ = ["as_optax", "check_optimizer", "check_state", "find"]


def check_optimizer(what: str, optimizer: Any) -> None:
    """Raise TypeError unless this is an optax transformation, a learning rate, or a schedule of the
    step.
    """
    if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        return
    wanted = (
        "an optax transformation such as optax.adam(1e-3), a learning rate, or a schedule of the "
        "step"
    )
    if isinstance(optimizer, str):
        raise TypeError(
            f"{what}: the optimizer is {wanted}, got the text {optimizer!r}; names are not "
            "looked up, so make the optimizer itself"
        )
    if hasattr(optimizer, "param_groups") and not isinstance(optimizer, type):
        raise TypeError(
            f"{what}: the optimizer is {wanted}, got PyTorch's {type(optimizer).__name__}; "
            "take the one of optax"
        )
    if _is_rate(optimizer):
        return
    if callable(optimizer) and not isinstance(optimizer, type):
        try:
            made = optimizer(jnp.int32(0))
        except Exception:
            made = None
        if _is_rate(made):
            return
        name = getattr(optimizer, "__name__", "it")
        raise TypeError(
            f"{what}: the optimizer is {wanted}, got the function {name}, whose value at step 0 "
            f"is not a number; if it makes optimizers, call it: {name}(1e-3)"
        )
    if isinstance(optimizer, type):
        kind = f"the class {optimizer.__name__}"
    else:
        kind = f"a {type(optimizer).__name__}"
    raise TypeError(f"{what}: the optimizer is {wanted}, got {kind}")


def _is_rate(x: Any) -> bool:
    kinds = int | float | np.number | np.ndarray | jax.Array
    return (
        isinstance(x, kinds)
        and not isinstance(x, bool)
        and np.ndim(x) == 0
        and not jnp.iscomplexobj(x)
    )


def check_state(what: str, optimizer: Any, params: Any, opt: Any) -> None:
    """Raise ValueError unless `opt` has the structure and shapes of this optimizer's state for
    these parameters.
    """
    if not hasattr(optimizer, "init"):
        wanted: Any = ()
    else:
        try:
            wanted = jax.eval_shape(optimizer.init, params)
        except Exception:
            # The optimizer cannot be traced, so there is nothing to compare.
            return
    if jax.tree.structure(wanted) != jax.tree.structure(opt):
        differs = _first_difference(opt, wanted) or "their structures differ"
        raise ValueError(
            f"{what}: the train state was made with another optimizer, or for other parameters: "
            f"its `opt` is {_describe(opt)}, this optimizer's is {_describe(wanted)}; {differs}; "
            "pass the same optimizer to TrainState.create and train_step, or begin anew with "
            "TrainState.create(params, optimizer, key)"
        )
    leaves = jax.tree.leaves(wanted), jax.tree.leaves(opt)
    for path, a, b in zip(tree.paths(wanted), *leaves, strict=True):
        if a.shape != jnp.shape(b):
            raise ValueError(
                f"{what}: the optimizer's state was made for other parameters: 'opt/{path}' has "
                f"the shape {list(jnp.shape(b))}, these parameters need {list(a.shape)}; begin "
                "anew with TrainState.create(params, optimizer, key)"
            )


def _first_difference(here: Any, wanted: Any, path: str = "opt") -> str | None:
    """Name the first container or leaf in which two states of optimizers differ, as a clause; None
    if there is none.
    """
    (ours, children), (theirs, others) = (_opened(node) for node in (here, wanted))
    if ours != theirs:
        return f"'{path}' is {ours} there and {theirs} here"
    for (name, child), (_, other) in zip(children, others, strict=True):
        if found := _first_difference(child, other, f"{path}/{name}"):
            return found
    return None


def _opened(node: Any) -> tuple[str, list[tuple[str, Any]]]:
    """A node of a tree in a few words, and its children by name."""
    found = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)[0]
    children = [
        (jax.tree_util.keystr(keys, simple=True, separator="/"), child) for keys, child in found
    ]
    if node is None:
        return "None", []
    if len(found) == 1 and found[0][1] is node:
        return "an array", []
    kind = type(node).__name__
    if isinstance(node, dict):
        return f"a dict with {', '.join(name for name, _ in children) or 'nothing'}", children
    return f"a {kind} of {len(children)} parts" if children else f"an empty {kind}", children


def _describe(opt: Any) -> str:
    """The state of an optimizer as text: the types of its parts and the number of arrays."""
    kinds = []

    def visit(node: Any):
        fields = getattr(node, "_fields", None)
        if fields is not None and type(node).__name__ != "EmptyState":
            kinds.append(f"{type(node).__name__}({', '.join(fields)})")
        children = node.values() if isinstance(node, dict) else node
        if isinstance(node, dict | tuple | list):
            for child in children:
                visit(child)

    visit(opt)
    shown = " + ".join(dict.fromkeys(kinds)) or "empty, as for plain SGD"
    return f"{shown} with {len(jax.tree.leaves(opt))} arrays" if jax.tree.leaves(opt) else shown


def as_optax(optimizer: Any) -> Any:
    """A learning rate or a schedule as plain SGD; an optax transformation unchanged."""
    import optax

    check_optimizer("optimizer", optimizer)
    return optimizer if hasattr(optimizer, "update") else optax.sgd(optimizer)


def find(opt: Any, kind: type) -> Any:
    """The first node of this type in an optimizer's state, or None."""
    nodes = jax.tree.leaves(opt, is_leaf=lambda node: isinstance(node, kind))
    return next((node for node in nodes if isinstance(node, kind)), None)
