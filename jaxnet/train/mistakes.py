"""Recognize the errors of functions that take the train state for parameters."""

from __future__ import annotations

from jaxnet.train.state import TrainState

__all__ = ["maybe_takes_params", "takes_params"]


def takes_params(error: Exception) -> bool:
    """Whether an error looks as if a function took the train state for parameters."""
    return "got TrainState(" in str(error) or (
        isinstance(error, AttributeError)
        and isinstance(error.obj, TrainState)
        and hasattr(dict, error.name or "")
    )


def maybe_takes_params(error: Exception) -> bool:
    """Whether an error is that of `params['weight']` on some tuple, which may be the train
    state.
    """
    return str(error).startswith("tuple indices must be")
