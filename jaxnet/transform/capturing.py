"""The outputs of inner layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxnet.core import Layer, as_layer, check_state, run, show_inputs, tap
from jaxnet.transform.walking import as_patterns, join_names, matches_own, rebuild_with

__all__ = ["capture", "with_taps"]


def capture(net: Layer, pattern: str | Sequence[str] = "**") -> Callable[..., Any]:
    """Make a function that calls `net.apply` and also returns the outputs of inner layers.

    It is a pure function, which works under `jax.jit`, `jax.grad` and `jax.vmap` like `net.apply`.
    Outputs inside `repeat`, `scan` and `vmap` are stacked, [n, ...]. The path of
    `repeat` has the outputs of its copies. If a layer is called twice, the second output is at
    'path:1', the third at 'path:2'. For a layer that shares the path of its parent (inside
    `residual` or `cast`), the output of the parent is captured. The output of the network is at ''.

    Loss terms and metrics of inner layers use the same mechanism: the body calls an identity child,
    `aux` by convention, with the value, and `capture(net, "**/aux")` returns it.

    Args:
      net: a layer.
      pattern: a path with wildcards as in `jaxnet.tree`, or several. The layers whose own path
        matches are captured.

    Returns:
      A function with the arguments of `net.apply`. It returns (the result of `net.apply`, {path:
      output}).

    Raises:
      KeyError: no layer matches a pattern.
      RuntimeError: when called, a selected layer ran inside a raw JAX transform, which its output
        cannot leave. The default pattern leaves such layers out.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxnet import chain
      >>> net = chain(double=lambda x: 2 * x, square=lambda x: x * x)
      >>> _, outputs = capture(net)({}, jnp.float32(3))
      >>> {path: float(x) for path, x in outputs.items()}
      {'': 36.0, 'double': 6.0, 'square': 36.0}
    """
    net = as_layer(net)
    patterns = as_patterns(net, pattern)

    def apply(params, *inputs, state=None, key=None, train=False, **named):
        check_state(net.label, state, stateful=net.init_state is not None)
        ran: set[tuple[str, bool]] = set()
        chosen = lambda path: any(matches_own(path, p) for p in patterns)  # noqa: E731
        tapped = with_taps(net, "", chosen, lambda layer, args, outputs: outputs, ran)
        start = {} if state is None else state
        outputs, new_state, taken = run(tapped, params, start, key, train, inputs, named)
        lost = sorted({path for path, comes_out in ran if not comes_out or path not in taken})
        if lost and pattern != "**":
            raise RuntimeError(_lost(lost))
        seen = {
            f"{path}:{i}" if i else path: value
            for path, values in taken.items()
            for i, value in enumerate(values)
        }
        result = outputs if net.init_state is None else (outputs, new_state)
        return result, dict(sorted(seen.items()))

    show_inputs(apply, net.apply)
    return apply


def with_taps(
    net: Layer,
    path: str,
    chosen: Callable[[str], bool],
    take: Callable[..., Any],
    ran: set[tuple[str, bool]],
) -> Layer:
    """The network whose selected layers also return `take(layer, (inputs, named), outputs)` of each
    call.

    If parent and child share a path, the parent is captured, except for `repeat`, whose copies are
    captured instead. `ran` receives the path of each selected layer that was called, with whether
    its value can be captured.
    """

    def visit(path: str, layer: Layer, covered: bool) -> Layer:
        shares_output = covered or layer.repeats is None

        def inside(name, child):
            return visit(join_names(path, name), child, name == "" and shares_output)

        rebuilt = rebuild_with(layer, inside)
        if not chosen(path) or covered or layer.repeats is not None:
            return rebuilt
        return tap(
            rebuilt,
            layer,
            lambda args, outputs: take(layer, args, outputs),
            lambda comes_out: ran.add((path, comes_out)),
        )

    return visit(path, net, False)


def _lost(paths: list[str]) -> str:
    names = ", ".join(f"'{path}'" for path in paths)
    return (
        f"capture: {names} ran inside a raw JAX transform (scan, vmap, checkpoint, ...), which "
        "captured outputs cannot leave; use jaxnet.scan, vmap, repeat or remat there, or choose "
        "other layers"
    )
