"""Check the arguments of `fit` before the first step. Errors name the argument, the received value
and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxnet.train.data_checks import check_call, describe
from jaxnet.train.feed import LIMIT
from jaxnet.train.history import FIXED
from jaxnet.train.rules import best_of, time_budget
from jaxnet.train.step import TrainState
from jaxnet.train.writers import write_csv, write_jsonl

__all__ = [
    "check_evaluation",
    "check_functions",
    "check_length",
    "check_names",
    "check_save_seconds",
    "check_start",
    "check_stop",
    "evaluated",
    "reason_of",
]


def check_start(step: Any, train_state: Any) -> None:
    """Raise TypeError unless these are a step and a train state."""
    if isinstance(step, TrainState) or not callable(step):
        text = "fit: step must be a function (train_state, batch) -> (train_state, metrics)"
        raise TypeError(f"{text}, as train_step(loss, optimizer) makes it; got {describe(step)}")
    if train_state is not TrainState and all(
        hasattr(train_state, name) for name in TrainState._fields
    ):
        return
    hint = ""
    if callable(train_state):
        hint = "; call it: TrainState.create(params, optimizer, key)"
    elif isinstance(train_state, Mapping):
        hint = (
            "; these look like parameters: TrainState.create(params, optimizer, jax.random.key(0)) "
            "makes a train state of them"
        )
    raise TypeError(
        "fit: train_state must be what TrainState.create(params, optimizer, key) returns, got "
        f"{describe(train_state)}{hint}"
    )


def check_length(total: int | None) -> None:
    """Raise ValueError for more steps than the counter of a train state can hold."""
    if total is not None and total > LIMIT:
        raise ValueError(
            f"fit: steps are counted in int32: at most {LIMIT:,} in all, got {total:,}"
        )


def check_functions(evaluate: Any, best_rule: str | None, stop: Any, callbacks: Any) -> None:
    """Raise unless these arguments of `fit` can be called as `fit` calls them."""
    if best_rule is not None:
        best_of(best_rule)
        if evaluate is None:
            raise ValueError(
                f"fit: best_rule={best_rule!r} looks at what `evaluate` returns; pass that, too"
            )
    if evaluate is not None:
        check_call("evaluate", evaluate, "a function (train_state) -> dict of numbers", _OF_BATCH)
    if stop is not None:
        if stop is time_budget:
            raise TypeError("fit: stop is time_budget itself; call it first: time_budget(seconds)")
        check_call(
            "stop",
            stop,
            "a function (history) -> bool or a reason, as early_stopping(...) makes it",
        )
    if (
        callable(callbacks)
        or isinstance(callbacks, str | Mapping)
        or not isinstance(callbacks, Iterable)
    ):
        raise TypeError(
            f"fit: callbacks must be a list of functions, got {describe(callbacks)}; write "
            "callbacks=[...]"
        )
    for i, callback in enumerate(callbacks):
        if callback in (write_csv, write_jsonl):
            name = callback.__name__
            raise TypeError(
                f"fit: callbacks[{i}] is {name} itself; call it first, with the path: "
                f"{name}('history')"
            )
        check_call(f"callbacks[{i}]", callback, "a function (record)")


_OF_BATCH = "; evaluate(test, data) makes it of a function test(params, batch)"


def check_save_seconds(seconds: Any) -> None:
    """Raise unless this is a number of seconds, at least 0."""
    number = isinstance(seconds, int | float | np.number) and not isinstance(seconds, bool)
    if not number or not seconds >= 0:
        raise ValueError(
            f"fit: save_seconds must be a number of seconds of at least 0, got {seconds!r}"
        )


def check_stop(stop: Callable[..., Any], names: Iterable[str]) -> None:
    """Call a stop condition with one record of NaN, to find wrong names and values before the first
    step.

    Args:
      stop: the condition.
      names: the names in records.

    Raises:
      TypeError, NameError, AttributeError, KeyError: the condition raised it. Other errors may
        depend on the numbers.
    """
    record = dict.fromkeys([*FIXED, *names], float("nan")) | {"step": 0, "epoch": 1, "seconds": 0.0}
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
    metrics: Iterable[str], evaluated: Iterable[str], stop: Any, metric: str | None
) -> None:
    """Raise unless records will have the names that `stop` and a store use, without collisions.

    Args:
      metrics: the metrics that the step returns.
      evaluated: the names of the values that `evaluate` returns.
      stop: the condition, which may use a metric.
      metric: the metric by which a store of checkpoints keeps the best steps.

    Raises:
      ValueError: `evaluate` returns a name that the record has already.
      KeyError: no record has a name that is used.
    """
    own = {*FIXED, *metrics} - {"weight"}
    if clash := own & set(evaluated):
        raise ValueError(
            f"fit: evaluate returns {sorted(clash)}, names that the record has already; use others"
        )
    known = own | set(evaluated)
    name = getattr(stop, "metric", None)
    if name and name not in known:
        raise KeyError(
            f"fit: no record has '{name}', on which it is to stop; there are {sorted(known)}"
        )
    if metric and metric not in known:
        raise KeyError(
            f"fit: the store keeps the best by '{metric}', and no record has it; there are "
            f"{sorted(known)}"
        )


def evaluated(
    evaluate: Callable[..., Any], train_state: TrainState, best_rule: str | None
) -> tuple[str, ...] | None:
    """The names of the values that `evaluate` returns, after checking the values; None if they are
    unknown.

    A function that is jitted or made by `jaxnet.train.evaluate` is only traced. Any other function
    is called once.
    """
    try:
        if hasattr(evaluate, "lower") or getattr(evaluate, "traceable", False):
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


def check_evaluation(values: Any, best_rule: str | None) -> Mapping[str, Any]:
    """Return the values from `evaluate` if they are a dict of numbers that includes the metric of
    `best_rule`.

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
                f"fit: what evaluate returns must have names that are strings, got {name!r}"
            )
        if np.ndim(value) if not hasattr(value, "ndim") else value.ndim:
            raise ValueError(
                f"fit: what evaluate returns as '{name}' must be a number, got shape "
                f"{np.shape(value)}"
            )
        dtype = getattr(value, "dtype", None) or np.result_type(type(value))
        if not (jax.numpy.issubdtype(dtype, np.number) or jax.numpy.issubdtype(dtype, np.bool_)):
            raise TypeError(
                f"fit: what evaluate returns as '{name}' must be a number, got {describe(value)}"
            )
    if best_rule is not None and (name := best_of(best_rule)[0]) not in values:
        raise KeyError(f"fit: best_rule={best_rule!r}, but `evaluate` returns {sorted(values)}")
    return values
