"""What goes around an optax optimizer: groups by path, frozen parameters, averaged weights, steps
that are not taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import tree
from jaxnet.checks import size_of
from jaxnet.train.finite import all_finite, keep

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

__all__ = ["Averaged", "Guarded", "averaged", "averaged_params", "by_path", "freeze", "guarded"]


def by_path(groups: Mapping[str, Optimizer | None]) -> optax.GradientTransformation:
    """Give each group of parameters a separate optimizer. The first matching pattern decides.

    Args:
      groups: path pattern (see `jaxnet.tree`) -> an optax transformation, a learning rate or
        schedule for plain SGD, or None for parameters that do not change. Under `jax.jit`, the
        gradients of those are not even computed.

    Returns:
      An optax transformation.

    Raises:
      KeyError: at `init`, no pattern matches a parameter, or a pattern is never the first match.

    Example:
      >>> import optax
      >>> decayed = optax.adamw(1e-3, weight_decay=0.1)
      >>> optimizer = by_path({"embed": None, "**/bias": optax.adam(1e-3), "**": decayed})
    """
    import optax

    groups = dict(groups)
    transforms: dict[Any, Any] = {
        pattern: optax.set_to_zero() if g is None else as_optax(g) for pattern, g in groups.items()
    }

    def labels(params):
        paths = tree.paths(params)
        chosen = {path: next((p for p in groups if tree.matches(path, p)), None) for path in paths}
        if left := [path for path, pattern in chosen.items() if pattern is None]:
            raise KeyError(
                f"by_path: no pattern matches {left[:5]}; the last may be '**', for all others"
            )
        if idle := [pattern for pattern in groups if pattern not in chosen.values()]:
            raise KeyError(f"by_path: nothing is left for {idle}; the parameters are {paths[:20]}")
        return tree.map_with_path(lambda path, _: chosen[path], params)

    return optax.partition(transforms, labels)


def freeze(optimizer: Optimizer, *patterns: str) -> optax.GradientTransformation:
    """Leave the parameters whose path matches one of the patterns as they are. Raises as
    `by_path`.
    """
    return by_path({pattern: None for pattern in patterns} | {"**": optimizer})


class Averaged(NamedTuple):
    """The state of `averaged`: of the optimizer inside, the average of the parameters, and the
    number of updates.
    """

    inner: Any
    params: Any
    updates: jax.Array


def averaged(optimizer: Optimizer, decay: float = 0.999) -> optax.GradientTransformationExtraArgs:
    """Keep a moving average of the parameters beside them, a <- d a + (1 - d) w with d = min(decay,
    (1 + t) / (10 + t)).

    The ramp lets the start be forgotten. `averaged_params(train_state)` reads it; training itself
    is unchanged. Half-precision parameters are averaged in float32.

    Source: Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; the
    ramp is that of tf.train.ExponentialMovingAverage(num_updates).
    """
    import optax

    if not 0 <= decay < 1:
        raise ValueError(f"averaged: decay must be in [0, 1), got {decay}")
    inner = optax.with_extra_args_support(as_optax(optimizer))

    def init(params):
        copies = jax.tree.map(
            lambda w: jnp.array(w, jnp.promote_types(w.dtype, jnp.float32), copy=True), params
        )
        return Averaged(inner.init(params), copies, jnp.int32(0))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("averaged: update needs the parameters, update(grads, state, params)")
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        t = state.updates.astype(jnp.float32)
        d = jnp.minimum(decay, (1 + t) / (10 + t))
        new = optax.apply_updates(params, updates)
        mean = jax.tree.map(
            lambda a, w: a + (1 - d).astype(a.dtype) * (w.astype(a.dtype) - a), state.params, new
        )
        return updates, Averaged(inner_state, mean, state.updates + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(train_state: Any) -> Any:
    """The averaged parameters of a run whose optimizer is `averaged`, in the dtypes of the
    parameters.

    Raises: ValueError where there is no average.
    """
    found = find(train_state.opt, Averaged)
    if found is None:
        raise ValueError("averaged_params: the optimizer keeps no average; wrap it in `averaged`")
    return jax.tree.map(lambda a, w: a.astype(w.dtype), found.params, train_state.params)


# The largest power of two in float32.
_LARGEST_SCALE = 2.0**127


class Guarded(NamedTuple):
    """The state of `guarded`.

    Attributes:
      inner: of the optimizer inside.
      scale: what the loss is multiplied by, float32 [].
      clean: steps since the scale changed, int32 [].
      skipped: steps skipped in a row until now, and in_all: since the start, int32 [].
      limit: more than so many in a row are an error, int32 [].
    """

    inner: Any
    scale: jax.Array
    clean: jax.Array
    skipped: jax.Array
    in_all: jax.Array
    limit: jax.Array


def guarded(
    optimizer: Optimizer, *, limit: int = 10, loss_scale: float | None = None, interval: int = 2000
) -> optax.GradientTransformationExtraArgs:
    """Skip a step whose loss or gradients are not finite: parameters, state and optimizer stay as
    they were.

    More than `limit` such steps in a row are an error, which `fit` raises; until then, and
    afterwards, no NaN is ever applied. `train_step` counts the steps skipped in its metrics
    ('skipped').

    Args:
      optimizer: an optax transformation, a learning rate, or a schedule.
      limit: the most skipped steps in a row; one more is an error.
      loss_scale: for float16, whose gradients underflow: the loss is multiplied by this number,
        such as 2.0**15, and the gradients are divided by it. The scale is halved at each skipped
        step, down to 1 (or `loss_scale`, if that is smaller), and doubled after `interval` steps
        without one, up to 2.0**127.
      interval: steps after which the scale is doubled.

    Source of the scaling: Micikevicius et al., "Mixed Precision Training", ICLR 2018.
    """
    import optax

    limit, interval = size_of("guarded: limit", limit, 0), size_of("guarded: interval", interval)
    if loss_scale is not None and not 0 < loss_scale <= _LARGEST_SCALE:
        raise ValueError(f"guarded: loss_scale must be in (0, 2**127], got {loss_scale}")
    inner = optax.with_extra_args_support(as_optax(optimizer))

    def init(params):
        scale = jnp.float32(1.0 if loss_scale is None else loss_scale)
        return Guarded(inner.init(params), scale, *(jnp.int32(n) for n in (0, 0, 0, limit)))

    def update(updates, state, params=None, **extra):
        good = all_finite(updates) & (state.skipped <= state.limit)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        updates = jax.tree.map(lambda u: jnp.where(good, u, jnp.zeros_like(u)), updates)
        inner_state = keep(good, inner_state, state.inner)
        scale, clean = state.scale, jnp.where(good, state.clean + 1, 0)
        if loss_scale is not None:
            grown = clean >= interval
            lower = jnp.minimum(scale, jnp.maximum(scale / 2, 1.0))
            upper = jnp.where(grown, jnp.minimum(scale * 2, _LARGEST_SCALE), scale)
            scale = jnp.where(good, upper, lower)
            clean = jnp.where(grown, 0, clean)
        skipped = jnp.where(good, 0, state.skipped + 1)
        return updates, Guarded(
            inner_state, scale, clean, skipped, state.in_all + jnp.where(good, 0, 1), state.limit
        )

    return optax.GradientTransformationExtraArgs(init, update)


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
            "looked up"
        )
    if hasattr(optimizer, "param_groups") and not isinstance(optimizer, type):
        raise TypeError(
            f"{what}: the optimizer is {wanted}, got PyTorch's {type(optimizer).__name__}"
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
            f"is no number; if it makes optimizers, call it: {name}(1e-3)"
        )
    kind = (
        f"the class {optimizer.__name__}"
        if isinstance(optimizer, type)
        else f"a {type(optimizer).__name__}"
    )
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
            "give the same optimizer to train_state and train_step, or begin anew with "
            "TrainState.create(params, optimizer, key)"
        )
    for path, a, b in zip(
        tree.paths(wanted), jax.tree.leaves(wanted), jax.tree.leaves(opt), strict=True
    ):
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
        children = (
            node.values()
            if isinstance(node, dict)
            else node
            if isinstance(node, tuple | list)
            else ()
        )
        for child in children:
            visit(child)

    visit(opt)
    shown = " + ".join(dict.fromkeys(kinds)) or "empty, as for plain SGD"
    return f"{shown} with {len(jax.tree.leaves(opt))} arrays" if jax.tree.leaves(opt) else shown


def as_optax(optimizer: Any) -> Any:
    """A learning rate or schedule as plain SGD; an optax transformation as it is."""
    import optax

    check_optimizer("optimizer", optimizer)
    return optimizer if hasattr(optimizer, "update") else optax.sgd(optimizer)


def find(opt: Any, kind: type) -> Any:
    """The first node of this type in an optimizer's state, or None."""
    nodes = jax.tree.leaves(opt, is_leaf=lambda node: isinstance(node, kind))
    return next((node for node in nodes if isinstance(node, kind)), None)
