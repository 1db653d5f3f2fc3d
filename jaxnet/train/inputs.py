"""Check the arguments of `fit` before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxnet.best_rule import BestRule
from jaxnet.checks import size_of
from jaxnet.train.data_checks import check_call
from jaxnet.train.feed import LIMIT
from jaxnet.train.rules import time_budget
from jaxnet.train.state import TrainState
from jaxnet.train.words import describe
from jaxnet.train.writers import write_csv, write_jsonl

__all__ = [
    "check_functions",
    "check_length",
    "check_save_seconds",
    "check_start",
    "length_of",
    "size_or_none",
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


def length_of(epochs: Any, steps: Any) -> tuple[int | None, int | None]:
    """Check the length of a run: one of epochs and steps, as an int of at least 1."""
    if (epochs is None) == (steps is None):
        raise ValueError(
            f"fit: say how long, by one of epochs and steps; got epochs={epochs}, steps={steps}"
        )
    if epochs is None:
        return None, size_or_none("steps", steps)
    return size_or_none("epochs", epochs), None


def size_or_none(name: str, value: Any) -> int | None:
    """A size as an int of at least 1; None for None."""
    if value is None:
        return None
    try:
        return size_of(f"fit: {name}", value)
    except ValueError:
        raise ValueError(f"fit: {name} must be an int of at least 1, got {value!r}") from None


def check_length(total: int | None) -> None:
    """Raise ValueError for more steps than the counter of a train state can hold."""
    if total is not None and total > LIMIT:
        raise ValueError(
            f"fit: steps are counted in int32: at most {LIMIT:,} in all, got {total:,}"
        )


def check_functions(evaluate: Any, best_rule: Any, stop: Any, callbacks: Any) -> None:
    """Raise unless these arguments of `fit` can be called as `fit` calls them."""
    if best_rule is not None:
        BestRule.parse("fit: best_rule", best_rule)
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
    single = callable(callbacks) or isinstance(callbacks, str | Mapping)
    if single or not isinstance(callbacks, Iterable):
        raise TypeError(
            f"fit: callbacks must be a list of functions, got {describe(callbacks)}; write "
            "callbacks=[...]"
        )
    for i, callback in enumerate(callbacks):
        for name, writer in (("write_csv", write_csv), ("write_jsonl", write_jsonl)):
            if callback is writer:
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
