"""Checks of what `evaluate` and `stop` return, and of the names in records."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxnet.best_rule import BestRule
from jaxnet.train.evaluation import Evaluation
from jaxnet.train.mistakes import maybe_takes_params, takes_params
from jaxnet.train.records import RESERVED, Record
from jaxnet.train.rules import EarlyStopping
from jaxnet.train.state import TrainState
from jaxnet.train.words import describe

__all__ = [
    "check_evaluation",
    "check_names",
    "check_stop",
    "check_stop_metric",
    "evaluated_names",
    "reason_of",
]


def check_stop(stop: Callable[[Sequence[Record]], Any], names: Iterable[str]) -> None:
    """Call a stop condition with one record of NaN, to find wrong names and values before the first
    step.

    Args:
      stop: the condition.
      names: the names in records.

    Raises:
      TypeError: the condition raised it, or returned an array.
      NameError: the condition raised it.
      AttributeError: the condition raised it.
      KeyError: the condition raised it. Other errors may depend on the numbers.
    """
    record = dict.fromkeys([*RESERVED, *names], float("nan"))
    record |= {"step": 0, "epoch": 1, "seconds": 0.0}
    try:
        reason = stop([record])
    except (TypeError, NameError, AttributeError, KeyError) as error:
        error.add_note(
            f"fit: stop raised this for a record with {sorted(record)}, before the first step"
        )
        raise
    except Exception:
        return
    reason_of(reason)


def reason_of(result: Any) -> str | None:
    """The reason to stop in the result of a condition; None to go on. Raises TypeError for an
    array.
    """
    if isinstance(result, str):
        return result or None
    if np.ndim(result):
        raise TypeError(
            f"fit: stop must return a bool or a reason, got {describe(result)}; reduce it to "
            "one number"
        )
    return "the condition held" if result else None


def check_names(
    metrics: Iterable[str], evaluated: Iterable[str], stop: Any, stored: str | None
) -> None:
    """Raise unless records will have the names that `stop` and a store use, without collisions.

    Args:
      metrics: the metrics that the step returns.
      evaluated: the names of the values that `evaluate` returns.
      stop: the condition, which may use a metric.
      stored: the metric by which a store of checkpoints keeps the best steps.

    Raises:
      ValueError: `evaluate` returns a name that the record has already.
      KeyError: no record has a name that is used.
    """
    own = {*RESERVED, *metrics} - {"weight"}
    if clash := own & set(evaluated):
        raise ValueError(
            f"fit: evaluate returns {sorted(clash)}, names that the record has already; use others"
        )
    known = own | set(evaluated)
    check_stop_metric(stop, known, sorted(known))
    if stored and stored not in known:
        raise KeyError(
            f"fit: the store keeps the best by '{stored}', and no record has it; there are "
            f"{sorted(known)}"
        )


def check_stop_metric(stop: Any, known: Collection[str], shown: Sequence[str]) -> None:
    """Raise KeyError if early stopping uses a metric that is not among the known names. The error
    lists the names `shown`.
    """
    if isinstance(stop, EarlyStopping) and stop.rule.metric not in known:
        raise KeyError(
            f"fit: no record has '{stop.rule.metric}', on which it is to stop; there are {shown}"
        )


def evaluated_names(
    evaluate: Callable[[TrainState], Mapping[str, Any]],
    train_state: TrainState,
    best_rule: BestRule | None,
) -> tuple[str, ...] | None:
    """Return the names of the values that `evaluate` returns, after checking the values.

    A function that JAX can trace, because it is jitted or made by `jaxnet.train.evaluate`, is only
    traced. Any other function is called once.

    Args:
      evaluate: as in `fit`.
      train_state: the start.
      best_rule: the rule whose metric must be among the values, or None.

    Returns:
      The names; None if they are unknown before the run.
    """
    try:
        if hasattr(evaluate, "lower") or isinstance(evaluate, Evaluation):
            values = jax.eval_shape(evaluate, train_state)
        else:
            values = evaluate(train_state)
    except (TypeError, AttributeError, ValueError) as error:
        if takes_params(error):
            raise TypeError(
                "fit: evaluate receives the train state, and this one takes it for parameters: "
                "use `state.params`, as in lambda state: {'test_loss': f(state.params)}, or "
                "`evaluate(test, data)` of a function test(params, batch)"
            ) from None
        if maybe_takes_params(error):
            error.add_note(
                "fit: evaluate receives the train state: use `state.params`, or `evaluate(test, "
                "data)`"
            )
        raise
    except LookupError:
        # For instance, a table of values by step may have no entry for the start.
        return None
    return tuple(check_evaluation(values, best_rule))


def check_evaluation(values: Any, best_rule: BestRule | None) -> Mapping[str, Any]:
    """Return the values from `evaluate` if they are a dict of numbers that includes the metric of
    `best_rule`.

    Args:
      values: what `evaluate` returned.
      best_rule: the rule, or None.

    Raises:
      TypeError: they are not a dict of numbers by name.
      ValueError: a value is not a scalar.
      KeyError: the metric of `best_rule` is missing.
    """
    if not isinstance(values, Mapping):
        raise TypeError(
            f"fit: evaluate must return a dict of numbers by name, got {describe(values)}; "
            "write for instance {'test_accuracy': value}"
        )
    for name, value in values.items():
        if not isinstance(name, str):
            raise TypeError(
                f"fit: the values that evaluate returns must have names that are strings, got "
                f"{name!r}"
            )
        if np.ndim(value) if not hasattr(value, "ndim") else value.ndim:
            raise ValueError(
                f"fit: the value '{name}' that evaluate returns must be a number, got shape "
                f"{list(np.shape(value))}; reduce it, for instance to its mean"
            )
        dtype = getattr(value, "dtype", None) or np.result_type(type(value))
        if not (jax.numpy.issubdtype(dtype, np.number) or jax.numpy.issubdtype(dtype, np.bool_)):
            raise TypeError(
                f"fit: the value '{name}' that evaluate returns must be a number, got "
                f"{describe(value)}"
            )
    if best_rule is not None and best_rule.metric not in values:
        raise KeyError(
            f"fit: best_rule='{best_rule}', but `evaluate` returns {sorted(values)}; name one of "
            "these"
        )
    return values
