"""The host loop over compiled calls, which evaluates, records, saves and stops in between."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.train import inputs, source
from jaxnet.train.clock import Clock
from jaxnet.train.diagnose import NonFiniteError, explain
from jaxnet.train.feed import Feed
from jaxnet.train.history import History, New
from jaxnet.train.identity import start_of
from jaxnet.train.interrupt import Interrupted
from jaxnet.train.keeper import Keeper
from jaxnet.train.optimizers import Guarded, find
from jaxnet.train.programs import Programs
from jaxnet.train.progress import Progress
from jaxnet.train.rules import Best, best_of
from jaxnet.train.saved import save
from jaxnet.train.saves import Saves
from jaxnet.train.schedule import Schedule
from jaxnet.train.step import TrainState

__all__ = ["Looks", "Run", "copied"]

CALL = 0.3  # seconds that a compiled call should take at most: how long Ctrl-C waits
# Seconds: the host waits for shorter calls, since it could not tell their ends apart.
QUICK = 0.02


class Looks(NamedTuple):
    """The arguments of `fit` that act between calls: evaluation, best rule, stop condition and
    callbacks.
    """

    evaluate: Callable[..., Any] | None
    best_rule: str | None
    stop: Callable[..., Any] | None
    callbacks: Sequence[Callable[..., Any]]


class _Pending(NamedTuple):
    """A call that has been sent to the device."""

    stack: source.Stack
    first: int
    n: int
    outputs: tuple
    fresh: bool


class Run:
    """A run in progress: its state, history and best evaluation, and the call that is on the
    device.
    """

    def __init__(
        self,
        train_state: TrainState,
        feed: Feed,
        programs: Programs,
        looks: Looks,
        schedule: Schedule,
        keeper: Keeper,
    ):
        self.feed, self.programs, self.looks, self.schedule, self.keeper = (
            feed,
            programs,
            looks,
            schedule,
            keeper,
        )
        self.current: TrainState = jax.tree.map(copied, train_state)
        # How the run began, which tells it from another one with other parameters; only a
        # checkpoint needs it.
        self.start: dict[str, Any] | None = start_of(train_state) if keeper else None
        self.history = History(schedule.next_record, self.epoch, schedule.ends_between)
        self.history.begin(int(train_state.step))
        self.best: Best | None = None
        self.stopped: str | None = None
        # The position in an iterable, and the number of finished passes.
        self.position: dict[str, Any] = {}
        self.passes = 0
        guard = find(train_state.opt, Guarded)
        self.limit, self.in_a_row = None if guard is None else int(guard.limit), 0
        self.good = jnp.bool_(True)
        self.clock = Clock()
        # `pace` counts steps per call; `quick` says whether calls are too short to be sent ahead.
        self.pace, self.quick = 1, True
        # Steps and seconds of the first call of a program, until the next call tells how much of it
        # was training.
        self.loading: tuple[int, float] | None = None
        self.credit = 0.0  # seconds that belong to the pending call, and have passed already
        self.started = self.spoiled = self.ended = False
        # Whether the start is saved, too: a run that is killed soon finds then that its records are
        # its own.
        self.save_start = False
        self.pending: _Pending | None = None
        self.feeding: Any = None

    def epoch(self, step: int) -> int:
        """The number of the epoch of a step, starting at 1."""
        return -(-step // self.feed.epoch_steps) if self.feed.epoch_steps else self.passes + 1

    def passed(self) -> bool:
        """Whether all requested passes over an iterable are finished."""
        return self.feed.epochs is not None and self.passes >= self.feed.epochs

    def done(self) -> bool:
        """Whether nothing is left to train."""
        return self.passed() or (
            self.feed.total is not None and self.history.step >= self.feed.total
        )

    # The loop

    def go(self, flag: Interrupted, show: Progress, save_seconds: float) -> None:
        """Train to the end, or until something stops the run."""
        self._ask_to_stop()
        if self.stopped or self.done():
            return
        abandoned = functools.partial(getattr, flag, "name")
        self.feeding = self.feed.stacks(
            self.current, self.history.step, self.position, self.schedule.next_look, abandoned
        )
        saves = Saves(self.keeper, save_seconds, self.history.step, self.feed.epoch_steps)
        ahead = self.history.step
        while not (self.stopped or flag.name or self.passed() or ahead == self.feed.total):
            stack = next(self.feeding, None)
            if stack is None:
                self.ended = not flag.name
                break
            first = 0
            while first < stack.n and not self.stopped and not flag.name:
                n = min(stack.n - first, stack.size, self.pace, saves.room(ahead))
                self._train(stack, first, n, show)
                first, ahead = first + n, ahead + n
                looking = (stack.end and first == stack.n) or ahead == self.schedule.next_look(
                    ahead - 1
                )
                due = saves.due(ahead, looking, looking and self.looks.evaluate is not None)
                if looking or due or self.quick or self.looks.stop is not None:
                    self._receive_pending(show)
                if due:
                    self._save()
                    saves.done()
        self._receive_pending(show)
        self.stopped = (
            self.stopped
            or flag.name
            or ("the data ended" if self.ended and not self.passed() else None)
        )
        if self.keeper and self.started:
            self._save()
            self.keeper.wait()

    def settle(self, error: Exception) -> None:
        """Receive the pending call after an error, so that the history agrees with the state."""
        if self.pending is not None and not isinstance(error, NonFiniteError):
            self._receive_pending(None)

    def close(self) -> None:
        """Close the feed."""
        if hasattr(self.feeding, "close"):
            self.feeding.close()

    def _save(self) -> None:
        with self.clock.excluded():
            save(self, self.keeper)

    def _train(self, stack: source.Stack, done: int, n: int, show: Progress) -> None:
        """Send n steps to the device, and receive the results of the previous call."""
        program, first = self.programs.get(stack.size, stack.inputs), self.feed.first(done)
        fresh = program is None
        if program is None:
            self._receive_pending(show)
            with self.clock.excluded():
                program = self._prepare(stack, show)
            if self.save_start and not self.started:
                self._save()
        if not self.started:
            self.clock.lap()
        self.current, self.good, *outputs = program(
            self.current, self.good, np.int32(first), np.int32(n), *stack.inputs
        )
        self.started = True
        # The call before is received while the device works on this one.
        waiting, self.pending = self.pending, _Pending(stack, done, n, (self.good, *outputs), fresh)
        if waiting is not None:
            self._receive(waiting, show)

    def _prepare(self, stack: source.Stack, show: Progress) -> Callable[..., Any]:
        """Compile the program for stacks of this kind. Before the first one, check the names of the
        metrics.
        """
        begin = time.perf_counter()
        with show.busy("compiling"):
            traced = self._traced(stack)
            traced_in = time.perf_counter() - begin
            if not self.started:
                self._check()
            line = self.programs.compile(stack.size, stack.inputs, traced, traced_in)
        show.note(line)
        if not self.started and self.programs.expected not in (None, self.programs.digest):
            _say_changed(show)
        program = self.programs.get(stack.size, stack.inputs)
        assert program is not None
        return program

    def _traced(self, stack: source.Stack) -> Any:
        try:
            return self.programs.trace(stack.size, stack.inputs, self.current, self.good)
        except (TypeError, AttributeError, ValueError) as error:
            own = not hasattr(self.programs.step, "parts")
            if own and inputs.maybe_takes_params(error):
                error.add_note(
                    "fit: step receives the train state; train_step(loss, optimizer) makes a "
                    "step of a loss (params, batch)"
                )
            if own and inputs.takes_params(error):
                raise TypeError(
                    "fit: step receives the train state, and this one takes it for parameters: "
                    "train_step(loss, optimizer) makes a step of a loss (params, batch)"
                ) from None
            raise

    def _check(self) -> None:
        evaluate, best_rule, stop, _ = self.looks
        names = None if evaluate is None else inputs.evaluated(evaluate, self.current, best_rule)
        if evaluate is None or names is not None:
            metrics = self.programs.metrics or ()
            inputs.check_names(metrics, names or (), stop, self.keeper.metric)
            if stop is not None and not self.history.records:
                inputs.check_stop(stop, {*metrics, *(names or ())} - {"weight"})

    def _receive_pending(self, show: Progress | None) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            self._receive(pending, show)

    def _receive(self, call: _Pending, show: Progress | None) -> None:
        """Wait for a call and receive its results. Without `show`, print nothing and call no
        callbacks.
        """
        good, metrics = call.outputs
        metrics = {name: np.asarray(values)[: call.n] for name, values in metrics.items()}
        good, seconds = bool(good), self.clock.lap() + self.credit
        self.credit = 0.0
        if self.pending is not None and self.pending.outputs[0].is_ready():
            # Both calls are finished, and the end of the first is unknown. Split the time in
            # proportion to their steps.
            self.credit = seconds * self.pending.n / (call.n + self.pending.n)
            seconds -= self.credit
        if not good:
            raise self._broken(call)
        end = call.stack.end and call.first + call.n == call.stack.n
        samples = call.stack.samples * call.n // call.stack.n
        before = call.stack.before
        if before:
            # A resumed run may find its pass finished, so take the number of the pass from the
            # stack.
            self.passes = before["passes"]
        self._forget_loading(call, seconds)
        new = self.history.add(call.n, metrics, seconds, samples, cut=end)
        # A record that is complete has been handed out, and is not changed any more.
        self.loading = (call.n, seconds) if call.fresh and not new else None
        self.position = before and {**before, "skip": before["skip"] + call.first + call.n}
        if end:
            self.passes += 1
            self.position = call.stack.after
        if self.looks.evaluate is not None and self._evaluation_is_due(end):
            with self.clock.excluded():
                self._evaluate(new[-1])
        # Adapt the number of steps to the time of this call. A short call may be mostly overhead,
        # so growth is limited.
        self.pace = int(np.clip(CALL * call.n / max(seconds, 1e-9), 1, 8 * call.n))
        self.quick = seconds < QUICK
        if show is None:
            return
        self._tell(new, show)
        self._check_skipped(metrics)

    def _forget_loading(self, call: _Pending, seconds: float) -> None:
        """Take the loading of a program, which its first execution did, out of the seconds of
        training.
        """
        if self.loading is not None and not call.fresh:
            n, first = self.loading
            self.history.seconds -= max(0.0, first - n * seconds / call.n)

    def _evaluation_is_due(self, end: bool) -> bool:
        every, step = self.schedule.evaluate_every, self.history.step
        return step % every == 0 if every else end or step == self.feed.total

    def _tell(self, new: Sequence[New], show: Progress) -> None:
        evaluated = self.history.evaluations[-1] if self.history.evaluations else None
        if evaluated is not None and evaluated["step"] != self.history.step:
            evaluated = None
        for record, summary in new:
            if summary is not None:
                show(summary, evaluated=summary is evaluated, last=record is new[-1].record)
            for callback in self.looks.callbacks:
                callback(dict(record))
        if not new or new[-1].summary is None:
            ended = self.history.step == self.feed.total
            show(
                evaluated or self.history.summary(),
                partial=not ended,
                evaluated=evaluated is not None,
            )
        if new:
            self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        stop, records = self.looks.stop, self.history.records
        if stop is None or not records:
            return
        if reason := inputs.reason_of(stop(records)):
            self.stopped = reason

    def _evaluate(self, new: New) -> None:
        assert self.looks.evaluate is not None
        evaluated = inputs.check_evaluation(self.looks.evaluate(self.current), self.looks.best_rule)
        values = {name: float(value) for name, value in evaluated.items()}
        inputs.check_names(new.record, values, None, None)
        new.record.update(values)
        # If a run ends within an epoch, its sums are kept, so the means cover the whole epoch when
        # the run is extended.
        summary = self.history.summary() if new.summary is None else new.summary
        summary.update(values)
        self.history.evaluations.append(summary)
        if (name := getattr(self.looks.stop, "metric", None)) and name not in {
            *new.record,
            *(self.programs.metrics or ()),
        }:
            raise KeyError(
                f"fit: no record has '{name}', on which it is to stop; there are "
                f"{sorted(new.record)}"
            )
        if self.looks.best_rule is not None:
            name, better = best_of(self.looks.best_rule)
            first = self.best is None and not math.isnan(values[name])
            if first or (self.best is not None and better(values[name], self.best.value)):
                params, state = jax.tree.map(copied, (self.current.params, self.current.state))
                self.best = Best(values[name], int(new.record["step"]), params, state)

    def _check_skipped(self, metrics: dict[str, np.ndarray]) -> None:
        if self.limit is None:
            return
        for i, skipped in enumerate(metrics["skipped"]):
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if self.in_a_row > self.limit:
                # The file has a better state than this one, which skips all steps.
                self.spoiled = True
                at = self.history.step - len(metrics["skipped"]) + i
                raise NonFiniteError(
                    f"fit: {self.in_a_row} steps in a row were not finite, up to step {at}, and "
                    f"were skipped; the limit is {self.limit}. A smaller learning rate may help",
                    at,
                    (),
                    self.current,
                    self.history.records,
                )

    def _broken(self, call: _Pending) -> NonFiniteError:
        """Explain a call with values that are not finite, by repeating it one step at a time."""
        batch_of = jax.jit(self.feed.batch_of)
        batches = (
            lambda train_state, i=i: batch_of(train_state, jnp.int32(i), *call.stack.inputs)
            for i in range(call.first, call.first + call.n)
        )
        return explain(
            self.programs.step,
            self.current,
            batches,
            self.history.records,
            getattr(self.feed, "data", None),
        )


def _say_changed(show: Progress) -> None:
    text = "the step is not that of the run before: another learning rate, loss or network"
    if show.show:
        show.note(text)
    else:
        # The numbers are those of neither run alone, so a silent run is told, too.
        warnings.warn(f"fit: {text}", stacklevel=7)


def copied(leaf: Any) -> jax.Array:
    """A strongly typed copy of a leaf of a train state, on the same device."""
    leaf = jnp.asarray(leaf, getattr(leaf, "dtype", None))
    if getattr(leaf, "weak_type", False):
        # A resumed run has no weak types, and must compute the same bits.
        leaf = jax.lax.convert_element_type(leaf, leaf.dtype)
    where = leaf.sharding if leaf.committed else None
    # Unlike jnp.array(copy=True), this compiles nothing.
    return jax.device_put(leaf, where, may_alias=False)
