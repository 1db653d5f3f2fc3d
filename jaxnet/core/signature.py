"""The signature of `apply` that `help` and editors show."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any

__all__ = ["show_inputs"]

_PARAMS = Parameter("params", Parameter.POSITIONAL_OR_KEYWORD)
# The arguments of every `apply` that are not inputs.
_OTHERS = {"state": None, "key": None, "train": False}
_LAST = [
    Parameter(name, Parameter.KEYWORD_ONLY, default=default) for name, default in _OTHERS.items()
]


def show_inputs(
    apply: Callable[..., Any], function: Callable[..., Any], after: int = 1, *, body: bool = False
) -> None:
    """Let `inspect.signature(apply)` name the inputs: (params, x, *, state=None, key=None,
    train=False).

    What `apply` accepts does not change. If `function` has no signature that fits, `apply` shows
    the one it is written with, (params, *inputs, state=None, key=None, train=False, **named).

    Args:
      apply: the function whose signature is set.
      function: the function that has the inputs as parameters.
      after: the number of parameters of `function` before the inputs.
      body: whether `function` receives inputs only. Else its parameters `state`, `key` and `train`
        are those of `apply`.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        # Some functions that are written in C have none.
        return
    before, inputs = (
        parameters[:after],
        [p for p in parameters[after:] if body or p.name not in _OTHERS],
    )
    clash = any(p.name == "params" or p.name in _OTHERS for p in inputs)
    if clash or len(before) < after or any(p.kind is p.VAR_POSITIONAL for p in before):
        return
    positional_only = bool(inputs) and inputs[0].kind is Parameter.POSITIONAL_ONLY
    params = _PARAMS.replace(kind=Parameter.POSITIONAL_ONLY) if positional_only else _PARAMS
    rest = [inputs.pop()] if inputs and inputs[-1].kind is Parameter.VAR_KEYWORD else []
    apply.__signature__ = inspect.Signature([params, *inputs, *_LAST, *rest])  # pyright: ignore[reportFunctionMemberAccess]
