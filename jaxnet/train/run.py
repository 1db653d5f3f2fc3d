"""A run: the host loop over compiled calls."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.train.clock import Clock
from jaxnet.train.diagnose import NonFiniteError, explain
from jaxnet.train.feed import Feed
from jaxnet.train.history import History, New
from jaxnet.train.identity import start_of
from jaxnet.train.interrupt import Interrupted
from jaxnet.train.keeper import Keeper
from jaxnet.train.looks import Looks
from jaxnet.train.pace import Pace
from jaxnet.train.programs import Programs
from jaxnet.train.progress import Progress
from jaxnet.train.save_times import SaveTimes
from jaxnet.train.schedule import Schedule
from jaxnet.train.skips import Skips
from jaxnet.train.stacks import Stack
from jaxnet.train.state import TrainState, copied

__all__ = ["Run"]


class _Call(NamedTuple):
    """A call that has been sent to the device.

    Attributes:
      stack: the data of its steps.
      first: the steps of the stack that were done before.
      n: the number of its steps.
      good: whether all values are finite, bool [].
      metrics: the metrics of its steps, by name [size].
      fresh: whether it is the first call of its program.
    """

    stack: Stack
    first: int
    n: int
    good: Any
    metrics: dict[str, jax.Array]
    fresh: bool

    def is_finished(self) -> bool:
        """Whether the device has finished the call."""
        return self.good.is_ready()

    @property
    def ends_pass(self) -> bool:
        """Whether a pass over the data ends with this call."""
        return self.stack.end and self.first + self.n == self.stack.n


class Run:
    """A run in progress.

    Args:
      train_state: the start, which is copied.
      feed: the source of the batches.
      programs: the compiled programs.
      looks: what the host does between calls.
      schedule: the steps at which the host acts.
      keeper: the place where the run is saved.
      save: a function (run, keeper) that saves the run.

    Attributes:
      current: the train state after the last call that was sent.
      history: the records.
      start: how the run began, which tells it from another run with other parameters; None without
        a checkpoint.
      stopped: why the run has stopped before its last step; None if it has not.
      position: the position in an iterable.
      passes: the number of finished passes over an iterable.
      started: whether a step was taken.
      spoiled: whether the state is worse than that in the checkpoint.
      save_start: whether to save before the first step, too. If the run is killed soon, the next
        run then finds that the records in a file are its own.
    """

    def __init__(
        self,
        train_state: TrainState,
        feed: Feed,
        programs: Programs,
        looks: Looks,
        schedule: Schedule,
        keeper: Keeper,
        save: Callable[[Run, Keeper], None],
    ):
        self.feed, self.programs, self.looks = feed, programs, looks
        self.schedule, self.keeper, self.save = schedule, keeper, save
        self.current: TrainState = jax.tree.map(copied, train_state)
        self.start: dict[str, Any] | None = start_of(train_state) if keeper else None
        self.history = History(schedule.next_record, self.epoch, schedule.ends_between)
        self.history.begin(int(train_state.step))
        self.stopped: str | None = None
        self.position: dict[str, Any] = {}
        self.passes = 0
        self.skips = Skips(train_state.opt)
        self.good = jnp.bool_(True)
        self.clock, self.pace = Clock(), Pace()
        self.started = self.spoiled = self.save_start = False
        self._pending: _Call | None = None
        self._stacks: Any = None

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
        self.stopped = self.looks.reason_to_stop(self.history.records)
        if self.stopped or self.done():
            return
        abandoned = functools.partial(getattr, flag, "name")
        next_look, step = self.schedule.next_look, self.history.step
        self._stacks = self.feed.stacks(self.current, step, self.position, next_look, abandoned)
        saves = SaveTimes(self.keeper, save_seconds, step, self.feed.epoch_steps)
        # The steps that have been sent, which may be ahead of the history by one call.
        sent, ended = step, False
        while not (self.stopped or flag.name or self.passed() or sent == self.feed.total):
            stack = next(self._stacks, None)
            if stack is None:
                ended = not flag.name
                break
            first = 0
            while first < stack.n and not self.stopped and not flag.name:
                n = min(stack.n - first, stack.size, self.pace.steps, saves.room(sent))
                self._send(stack, first, n, show)
                first, sent = first + n, sent + n
                looking = (stack.end and first == stack.n) or sent == next_look(sent - 1)
                due = saves.due(sent, looking, looking and self.looks.evaluate is not None)
                if looking or due or self.pace.quick or self.looks.stop is not None:
                    self._receive_pending(show)
                if due:
                    self._save()
                    saves.done()
        self._receive_pending(show)
        self.stopped = self.stopped or flag.name
        if ended and not self.passed():
            self.stopped = self.stopped or "the data ended"
        if self.keeper and self.started:
            self._save()
            self.keeper.wait()

    def settle(self, error: Exception) -> None:
        """Receive the pending call after an error, so that the history agrees with the state."""
        if not isinstance(error, NonFiniteError):
            self._receive_pending(None)

    def close(self) -> None:
        """Close the feed."""
        if self._stacks is not None:
            self._stacks.close()

    def _save(self) -> None:
        with self.clock.excluded():
            self.save(self, self.keeper)

    def _send(self, stack: Stack, first: int, n: int, show: Progress) -> None:
        """Send n steps to the device, and receive the results of the previous call."""
        program = self.programs.get(stack.size, stack.inputs)
        fresh = program is None
        if program is None:
            self._receive_pending(show)
            with self.clock.excluded():
                program = self._prepared(stack, show)
            if self.save_start and not self.started:
                self._save()
        if not self.started:
            self.clock.lap()
        self.current, self.good, metrics = program(
            self.current, self.good, np.int32(first), np.int32(n), *stack.inputs
        )
        self.started = True
        # The previous call is received while the device works on this one.
        waiting = self._pending
        self._pending = _Call(stack, first, n, self.good, metrics, fresh)
        if waiting is not None:
            self._receive(waiting, show)

    def _prepared(self, stack: Stack, show: Progress) -> Callable[..., Any]:
        """Compile the program for stacks of this kind. Before the first one, check the functions
        that look at the run.
        """
        begin = time.perf_counter()
        with show.busy("compiling"):
            traced = self.programs.trace(stack.size, stack.inputs, self.current, self.good)
            seconds = time.perf_counter() - begin
            if not self.started:
                metrics, fresh = self.programs.metrics or (), not self.history.records
                self.looks.check(self.current, metrics, self.keeper.metric, fresh=fresh)
            program, line = self.programs.compile(stack.size, stack.inputs, traced, seconds)
        show.note(line)
        if not self.started and self.programs.expected not in (None, self.programs.digest):
            _say_changed(show)
        return program

    # What comes back

    def _receive_pending(self, show: Progress | None) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._receive(pending, show)

    def _receive(self, call: _Call, show: Progress | None) -> None:
        """Wait for a call and receive its results. Without `show`, print nothing and call no
        callbacks.
        """
        metrics = {name: np.asarray(values)[: call.n] for name, values in call.metrics.items()}
        good = bool(call.good)
        following = self._pending
        n_next = following.n if following is not None and following.is_finished() else None
        seconds = self.pace.seconds_of(call.n, self.clock.lap(), n_next)
        if not good:
            raise self._broken(call)
        new = self._record(call, metrics, seconds)
        if self.looks.evaluate is not None and self._evaluation_is_due(call.ends_pass):
            with self.clock.excluded():
                self._evaluate(new[-1])
        if show is not None:
            self._tell(new, show)
            self._check_skipped(metrics)

    def _record(self, call: _Call, metrics: dict[str, np.ndarray], seconds: float) -> list[New]:
        """Take a call into the history and the position; return the records that are complete."""
        stack, before = call.stack, call.stack.before
        if before:
            # A resumed run may find its pass finished, so take the number of the pass from the
            # stack.
            self.passes = before["passes"]
        self.history.seconds -= self.pace.loading(call.n, seconds, call.fresh)
        samples = stack.samples * call.n // stack.n
        new = self.history.add(call.n, metrics, seconds, samples, cut=call.ends_pass)
        self.pace.received(call.n, seconds, call.fresh, bool(new))
        self.position = before and {**before, "skip": before["skip"] + call.first + call.n}
        if call.ends_pass:
            self.passes += 1
            self.position = stack.after
        return new

    def _evaluation_is_due(self, ends_pass: bool) -> bool:
        every, step = self.schedule.evaluate_every, self.history.step
        return step % every == 0 if every else ends_pass or step == self.feed.total

    def _evaluate(self, new: New) -> None:
        metrics = self.programs.metrics or ()
        values = self.looks.evaluation(self.current, new.record, metrics)
        # If a run ends within an epoch, its sums are kept, so the means cover the whole epoch when
        # the run is extended.
        summary = self.history.summary() if new.summary is None else new.summary
        summary.update(values)
        self.history.evaluations.append(summary)

    def _tell(self, new: Sequence[New], show: Progress) -> None:
        """Show new records, call the callbacks with them, and ask whether to stop."""
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
            shown = evaluated or self.history.summary()
            show(shown, partial=not ended, evaluated=evaluated is not None)
        if new:
            self.stopped = self.looks.reason_to_stop(self.history.records) or self.stopped

    def _check_skipped(self, metrics: dict[str, np.ndarray]) -> None:
        skipped = metrics.get("skipped", np.zeros(0))
        i = self.skips.first_beyond(skipped)
        if i is None:
            return
        # The file has a better state than this one, which skips all steps.
        self.spoiled = True
        at = self.history.step - len(skipped) + i
        raise NonFiniteError(
            f"fit: {self.skips.in_a_row} steps in a row were not finite, up to step {at}, and were "
            f"skipped; the limit is {self.skips.limit}. A smaller learning rate may help",
            at,
            (),
            self.current,
            self.history.records,
        )

    def _broken(self, call: _Call) -> NonFiniteError:
        """Explain a call with values that are not finite, by repeating it one step at a time."""
        plan, inputs = self.feed.plan, call.stack.inputs
        one = jax.jit(lambda state, i, *inputs: plan(state, i, 1, 1, *inputs).batch(0))
        batches = (
            lambda train_state, i=i: one(train_state, jnp.int32(i), *inputs)
            for i in range(call.first, call.first + call.n)
        )
        records = self.history.records
        return explain(self.programs.step, self.current, batches, records, self.feed.data)


def _say_changed(show: Progress) -> None:
    text = "the step is not that of the run before: another learning rate, loss or network"
    if show.show:
        show.note(text)
    else:
        # The numbers are those of neither run alone, so a silent run warns.
        warnings.warn(f"fit: {text}", stacklevel=7)
