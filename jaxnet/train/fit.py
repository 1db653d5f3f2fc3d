"""A host loop over compiled chunks of training: what one wants to see, keep and decide in between."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import tree
from jaxnet.train import source
from jaxnet.train.diagnose import NonFiniteError, explain
from jaxnet.train.history import History, Record, best_of
from jaxnet.train.interrupt import Interrupted, interruptible
from jaxnet.train.loop import chunk_of, planned_ahead, steps_per_epoch, take
from jaxnet.train.optimizers import Guarded, find
from jaxnet.train.order import Order, shuffle
from jaxnet.train.progress import Progress
from jaxnet.train.step import TrainState, examples

if TYPE_CHECKING:
    from jaxnet.checkpoint import Checkpoints

__all__ = ["Best", "Result", "fit"]

CALL = 0.3  # seconds that a compiled call should take at most: how long Ctrl-C waits


class Best(NamedTuple):
    """The best evaluation so far: its value and step, and the parameters and state that it was of."""

    value: float
    step: int
    params: Any
    state: Any


class Result(NamedTuple):
    """What `fit` returns.

    Attributes:
      train_state: after the last step.
      history: a list of records, dicts of plain numbers.
      best: the best evaluation, None unless `best` was given.
      stopped: why it ended before the last step: 'SIGINT', 'SIGTERM', what the condition said, or 'the data ended'; None if
        it did not.
      compiled: what was compiled and why, one line each; more than one means that shapes or dtypes of batches changed.
    """

    train_state: TrainState
    history: list[Record]
    best: Best | None = None
    stopped: str | None = None
    compiled: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """For `sys.exit`: 128 + the number of the signal that ended the run (130, 143), 0 without one."""
        return 128 + getattr(signal, self.stopped) if self.stopped in ("SIGINT", "SIGTERM") else 0


def fit(
    step: Callable[[TrainState, Any], tuple[TrainState, dict]],
    train_state: TrainState,
    data: Any,
    *,
    batch_size: int | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    order: Order | None = shuffle,
    drop_last: bool = True,
    evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None,
    evaluate_every: int | None = None,
    record_every: int | None = None,
    best: str | None = None,
    stop: Callable[[Sequence[Record]], Any] | None = None,
    callbacks: Sequence[Callable[[Record], Any]] = (),
    checkpoint: str | os.PathLike | Checkpoints | None = None,
    save_every: float = 60.0,
    check_finite: bool = True,
    progress: bool | None = None,
) -> Result:
    """Train: run a step again and again in compiled chunks, and look at what happens in between.

    It is `train_steps` in a loop with what such a loop needs, and nothing that changes the numbers: the result is the same
    bit for bit, wherever the chunks end, and whether the run was interrupted and resumed or not.

    Args:
      step: (train_state, batch) -> (train_state, metrics), as `train_step` makes it, or one of your own; not jitted.
      train_state: where to start, as from `train_state(params, optimizer, key)`. It is copied, never donated.
      data: with `batch_size`, a pytree of arrays with a leading axis of examples; those in memory go to the device as a whole,
        memory maps and others that are read by `array[rows]` are read where they are needed. Without `batch_size`, an
        iterable of batches, or a function (number of the pass) -> iterable; they are drawn ahead by a thread.
      epochs, steps: until when: passes over the data, or steps, counted from step 0 of the train state. One of them.
      order, drop_last: as in `train_steps`; for arrays.
      evaluate: (train_state) -> dict of numbers, joined to the record: after each epoch, or every `evaluate_every` steps. What
        it wants to keep it copies: the memory is given to the next steps.
      record_every: steps a record; the default is about 100, an equal part of an epoch where there is one, and at most
        1,000 records in all.
      best: 'min test_loss', 'max test_accuracy', ...: keep the parameters of the best evaluation.
      stop: a condition (history) -> bool or a reason, asked after each record: `early_stopping`, `time_budget`.
      callbacks: functions of a record, called with each as it comes: `write_jsonl(path)`, `wandb.log`, `print`.
      checkpoint: a file, or a `jaxnet.checkpoint.Checkpoints`, a folder with one file a step. If there is one the run goes on
        from there. It is written every `save_every` seconds, at the end, on a signal, and before an error is raised; a
        store with a metric after each evaluation, too.
      check_finite: stop where a loss, parameter or state ceases to be finite, and keep what was before, at the price of a
        second copy of the train state on the device.
      progress: a line on stderr, rewritten in place on a terminal, one plain line an epoch elsewhere; False is silent.

    On the main thread SIGINT (Ctrl-C) and SIGTERM let the chunk end, save, and return what there is; a second one raises.

    Returns: a `Result`. A record has 'step', 'epoch', the mean of each metric since the last one, what `evaluate` gave,
    'samples_per_second', and 'seconds' of training since the start, without compiling and evaluating.

    Raises:
      ValueError, TypeError: data that is empty, of unequal lengths or out of range; a batch larger than the data; a step that
        changes the type of the train state; a metric that is not a scalar; a checkpoint of a run with other data. All
        before the first step is taken.
      NonFiniteError (a FloatingPointError): names the step, the parameters and the operation where it began.
      Every error that comes while it trains has the state until then as its `train_state`.
      CheckpointError, OSError: the checkpoint is damaged, of another network, or cannot be written.
    """
    if (epochs is None) == (steps is None):
        raise ValueError(f"fit: say how long, by one of epochs and steps; got epochs={epochs}, steps={steps}")
    for name, value in {
        "epochs": epochs,
        "steps": steps,
        "evaluate_every": evaluate_every,
        "record_every": record_every,
    }.items():
        if value is not None and (not isinstance(value, int | np.integer) or value < 1):
            raise ValueError(f"fit: {name} must be an int of at least 1, got {value!r}")
    if best is not None:
        best_of(best)
        if evaluate is None:
            raise ValueError(f"fit: best={best!r} looks at what `evaluate` returns; pass that, too")
    if batch_size is None:
        feed = _Iterable(data, epochs, steps)
    else:
        feed = _Arrays(data, batch_size, epochs, steps, order, drop_last)
    run = _Run(step, train_state, feed, evaluate, evaluate_every, record_every, best, stop, callbacks, check_finite)
    keeper = _Keeper(checkpoint)
    keeper.check()
    if found := keeper.newest():
        run.restore(found)
    elif feed.total is not None and run.history.step >= feed.total:
        raise ValueError(
            f"fit: the train state has done {run.history.step} steps, and {feed.total} are asked for in all; ask for more, "
            "or begin anew with train_state(params, ...)"
        )
    show = Progress(feed.total, feed.epoch_steps, step=run.history.step, show=progress)
    if run.history.step > int(train_state.step):
        show.note(f"goes on from step {run.history.step:,}, saved in {found}")
    with interruptible() as flag:
        try:
            run.go(flag, show, keeper, save_every)
        except Exception as error:
            if keeper and run.started and not (run.spoiled and keeper.newest()):
                with contextlib.suppress(Exception):
                    run.settle(error)
                try:
                    run.save(keeper)
                    keeper.wait()
                    error.add_note(f"the state at step {run.history.step} is saved in {keeper}")
                except Exception as failure:
                    error.add_note(f"the state at step {run.history.step} could not be saved in {keeper}: {failure!r}")
            if not hasattr(error, "train_state"):
                with contextlib.suppress(Exception):
                    error.train_state = run.current  # pyright: ignore[reportAttributeAccessIssue]
            raise
        finally:
            run.close()
            show.close()
    return Result(run.current, run.history.records, run.best, run.stopped, tuple(run.compiled))


class _Arrays:
    """Arrays: rows are drawn within the compiled call, or on the host where the arrays are read lazily."""

    def __init__(self, data, batch_size, epochs, steps, order, drop_last):
        self.n = examples(data)
        self.epoch_steps = steps_per_epoch(self.n, batch_size, drop_last=drop_last)
        self.total = steps if epochs is None else epochs * self.epoch_steps
        self.batching = {"batch_size": batch_size, "order": order, "drop_last": drop_last}
        self.lazy = any(source.is_lazy(leaf) for leaf in jax.tree.leaves(data))
        self.data = data if self.lazy else source.on_device(data)
        self.facts = {"examples": self.n, "batch_size": batch_size, "drop_last": drop_last}

    def stacks(self, train_state, step, position, next_cut, abandoned):
        if self.lazy:
            key = jnp.copy(train_state.key)
            stacks = source.stacks_of_rows(self.data, self.n, key, step, next_cut, self.total, **self.batching)
            return source.Prefetch(stacks, abandoned)
        return self._stacks(step, next_cut)

    def _stacks(self, step, next_cut):
        batch_size = self.batching["batch_size"]
        size = source.plan_size(batch_size)
        while step < self.total:
            n = min(next_cut(step), self.total) - step
            yield source.Stack((self.data,), size, n, n * batch_size, {}, {}, False)
            step += n

    def batches(self, size):
        """The plan of a compiled call with room for so many steps, and how to read it; see `chunk_of`."""
        if self.lazy:
            return _of_stack

        def of_rows(n, train_state, data):
            return planned_ahead(train_state, self.n, size, n, **self.batching), lambda rows: take(data, rows)

        return of_rows


class _Iterable:
    """Batches that come from outside."""

    lazy = True

    def __init__(self, data, epochs, steps):
        if isinstance(data, dict | tuple | np.ndarray | jax.Array) or not (
            isinstance(data, Iterable) or callable(data)
        ):
            raise TypeError(
                f"fit: without batch_size the data is an iterable of batches, got {type(data).__name__}; "
                "for arrays say batch_size"
            )
        self.data, self.epochs, self.total, self.epoch_steps = data, epochs, steps, None
        self.facts = {}

    def stacks(self, train_state, step, position, next_cut, abandoned):
        return source.Prefetch(source.stacks_of_iterable(self.data, position, next_cut, step), abandoned)

    def batches(self, size):
        return _of_stack


def _of_stack(n, train_state, stack):
    return stack, lambda batch: batch


class _Keeper:
    """Where the state of a run is kept: in a file, in a folder with a file a step, or nowhere (then it is false)."""

    def __init__(self, checkpoint: str | os.PathLike | Checkpoints | None):
        place: Any = None if checkpoint is None else getattr(checkpoint, "folder", checkpoint)
        self.place = None if place is None else os.fspath(place)
        self.store: Any = checkpoint if hasattr(checkpoint, "folder") else None
        self.saved = -1

    def __bool__(self):
        return self.place is not None

    def __str__(self):
        return str(self.place)

    @property
    def wants_evaluations(self) -> bool:
        return self.store is not None and self.store.metric is not None

    def check(self) -> None:
        """Raise OSError if nothing can be written there."""
        from jaxnet.checkpoint import file, places

        if self.place is not None:
            file.check_engine(self.place, getattr(self.store, "engine", None))
            places.check_writable(
                self.place if self.store is not None else os.path.dirname(os.path.abspath(self.place))
            )

    def newest(self) -> str | None:
        if self.store is not None:
            found = self.store.latest()
            return None if found is None else found.path
        return self.place if self.place is not None and os.path.exists(self.place) else None

    def save(self, step: int, tree: Any, record: Record | None, metadata: dict[str, Any]) -> None:
        from jaxnet import checkpoint

        if self.store is None:
            checkpoint.save(str(self.place), tree, metadata=metadata)
        elif step != self.saved:
            known = self.store.metric is None or self.store.metric[4:] in (record or {})
            self.store.save(step, tree, record if known else None, metadata)
        self.saved = step

    def wait(self) -> None:
        if self.store is not None:
            self.store.wait()


class _Pending(NamedTuple):
    """A call that has been sent to the device."""

    stack: source.Stack
    first: int
    n: int
    outputs: tuple
    sent: float


class _Run:
    """The state of a `fit`."""

    def __init__(
        self, step, train_state, feed, evaluate, evaluate_every, record_every, best, stop, callbacks, check_finite
    ):
        self.step, self.feed, self.evaluate, self.stop, self.callbacks = step, feed, evaluate, stop, callbacks
        self.best_rule, self.check_finite = best, check_finite
        self.current: TrainState = jax.tree.map(_copy, train_state)
        self.evaluate_every = evaluate_every or feed.epoch_steps
        self.record_every = record_every or _record_every(feed.epoch_steps, feed.total)
        self.history = History(self.next_record, self.epoch)
        self.history.step = int(train_state.step)
        guard = find(train_state.opt, Guarded)
        self.limit, self.in_a_row = None if guard is None else int(guard.limit), 0
        self.best: Best | None = None
        self.stopped: str | None = None
        self.position: dict[str, Any] = {}
        self.passes = 0
        self.programs: dict[Any, Callable] = {}
        self.compiled: list[str] = []
        self.good = jnp.bool_(True)
        self.pace = 1  # steps a call
        self.done_at = 0.0
        self.started = self.spoiled = self.ended = False
        self.pending: _Pending | None = None
        self.feeding: Any = None

    # Where something is due

    def next_record(self, step: int) -> int:
        return min(_after(step, self.record_every), self.next_look(step))

    def next_look(self, step: int) -> int:
        """The next step at which the host wants to look at the state."""
        ends = [step + (1 << 30) if self.feed.total is None else max(self.feed.total, step + 1)]
        if self.evaluate is not None and self.evaluate_every:
            ends.append(_after(step, self.evaluate_every))
        if self.stop is not None:  # asked at the same steps wherever calls would end
            ends.append(_after(step, self.record_every))
        return min(ends)

    def epoch(self, step: int) -> int:
        return -(-step // self.feed.epoch_steps) if self.feed.epoch_steps else self.passes + 1

    # The loop

    def go(self, flag: Interrupted, show: Progress, keeper: _Keeper, save_every: float) -> None:
        total = self.feed.total
        self._ask_to_stop()
        if self.stopped or self.passed():
            return
        abandoned = functools.partial(getattr, flag, "name")
        self.feeding = self.feed.stacks(self.current, self.history.step, self.position, self.next_look, abandoned)
        saved_at, ahead = time.perf_counter(), self.history.step
        while not self.stopped and not flag.name and (total is None or ahead < total) and not self.passed():
            stack = next(self.feeding, None)
            if stack is None:
                if not flag.name:
                    self.ended = True
                break
            first = 0
            while first < stack.n and not self.stopped and not flag.name:
                n = min(stack.n - first, stack.size, self.pace)
                if total is not None:
                    n = min(n, total - ahead)
                call = self._send(stack, first, n, show)
                first, ahead = first + n, ahead + n
                waiting, self.pending = self.pending, call
                if waiting is not None:
                    self._receive(waiting, show)  # while the device works on the next one
                looking = (stack.end and first == stack.n) or ahead == self.next_look(ahead - 1)
                due = keeper and time.perf_counter() - saved_at > save_every
                due = due or (keeper.wants_evaluations and looking)
                if looking or due or self.stop is not None or (total is not None and ahead >= total):
                    self._receive_pending(show)
                if due:
                    self.save(keeper)
                    saved_at = time.perf_counter()
                if total is not None and ahead >= total:
                    break
        self._receive_pending(show)
        self.stopped = self.stopped or flag.name or ("the data ended" if self.ended and not self.passed() else None)
        if keeper and self.started:
            self.save(keeper)
            keeper.wait()

    def passed(self) -> bool:
        """Whether an iterable has been passed over as often as was asked for."""
        return self.feed.epoch_steps is None and self.feed.epochs is not None and self.passes >= self.feed.epochs

    def settle(self, error: Exception) -> None:
        """Bring what is known of the run up to its state, after an error."""
        if self.pending is not None and not isinstance(error, NonFiniteError):
            self._receive_pending(None)

    def close(self) -> None:
        if hasattr(self.feeding, "close"):
            self.feeding.close()

    def _send(self, stack: source.Stack, first: int, n: int, show: Progress) -> _Pending:
        size = stack.size if self.feed.lazy else source.plan_size(self.feed.batching["batch_size"])
        start = first if self.feed.lazy else 0
        program = self._program(size, stack.inputs, show)
        sent = time.perf_counter()
        self.current, self.good, *outputs = program(
            self.current, self.good, np.int32(start), np.int32(n), *stack.inputs
        )
        self.started = True
        return _Pending(stack, start, n, (self.good, *outputs), sent)

    def _program(self, size: int, inputs: tuple, show: Progress) -> Callable:
        spec = {
            path: f"{leaf.dtype}{list(leaf.shape[int(self.feed.lazy) :])}"
            for path, leaf in tree.flatten(inputs).items()
        }
        kind = (size, jax.tree.structure(inputs), *spec.values())
        if kind not in self.programs:
            start = time.perf_counter()
            chunk = chunk_of(self.step, size, self.feed.batches(size), check_finite=self.check_finite)
            lowered = jax.jit(chunk, donate_argnums=0, out_shardings=(_shardings(self.current), None, None)).lower(
                self.current, self.good, jnp.int32(0), jnp.int32(0), *inputs
            )
            self.programs[kind] = lowered.compile()
            seconds, why = time.perf_counter() - start, ""
            if self.compiled:
                before = self.spec
                changed = [f"'{p}' from {before.get(p)} to {x}" for p, x in spec.items() if before.get(p) != x]
                why = f": the batch changed, {', '.join(changed[:3]) or 'in structure'}"
            self.compiled.append(f"compiled in {seconds:.1f} s{why}")
            show.note(self.compiled[-1])
        self.spec = spec
        return self.programs[kind]

    def _receive_pending(self, show: Progress | None) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            self._receive(pending, show)

    def _receive(self, call: _Pending, show: Progress | None) -> None:
        """Wait for a call, and take in what it says; without `show`, tell nobody."""
        good, metrics = call.outputs
        metrics = {name: np.asarray(values)[: call.n] for name, values in metrics.items()}
        now = time.perf_counter()
        seconds, self.done_at = now - max(call.sent, self.done_at), now
        if not good:
            raise self._broken(call)
        end = call.stack.end and call.first + call.n == call.stack.n
        samples = call.stack.samples * call.n // call.stack.n
        new = self.history.add(call.n, metrics, seconds, samples, cut=end)
        self.position = call.stack.before and {
            **call.stack.before,
            "skip": call.stack.before["skip"] + call.first + call.n,
        }
        if end:
            self.passes += 1
            self.position = call.stack.after
        step = self.history.step
        if self.evaluate is not None and (end if not self.evaluate_every else step % self.evaluate_every == 0):
            self._evaluate(new[-1])
        self.pace = int(np.clip(CALL * call.n / max(seconds, 1e-9), 1, 8 * call.n))
        if show is None:
            return
        for record in new:
            show(record, last=record is new[-1])
            for callback in self.callbacks:
                callback(dict(record))
        if not new:
            show(self.history.preview(), partial=True)
        if new:
            self._ask_to_stop()
        self._check_skipped(metrics)

    def _ask_to_stop(self) -> None:
        records = self.history.records
        if self.stop is None or not records:
            return
        name = getattr(self.stop, "metric", None)
        if name and self.evaluate is None and name not in records[-1]:
            raise KeyError(f"fit: no record has '{name}', on which it is to stop; there are {sorted(records[-1])}")
        if reason := self.stop(records):
            self.stopped = reason if isinstance(reason, str) else "the condition held"

    def _evaluate(self, record: Record) -> None:
        start = time.perf_counter()
        values = {}
        for name, value in self.evaluate(self.current).items():
            if np.ndim(value):
                raise ValueError(
                    f"fit: what evaluate returns as '{name}' must be a number, got shape {np.shape(value)}"
                )
            values[name] = float(value)
        if clash := values.keys() & record.keys():
            raise ValueError(f"fit: evaluate returns {sorted(clash)}, names that the record has already; use others")
        record |= values
        if (name := getattr(self.stop, "metric", None)) and name not in record:
            raise KeyError(f"fit: no record has '{name}', on which it is to stop; there are {sorted(record)}")
        if self.best_rule is not None:
            name, better = best_of(self.best_rule)
            if name not in values:
                raise KeyError(f"fit: best={self.best_rule!r}, but `evaluate` returns {sorted(values)}")
            if self.best is None or np.isnan(self.best.value) or better(values[name], self.best.value):
                params, state = jax.tree.map(_copy, (self.current.params, self.current.state))
                self.best = Best(values[name], int(record["step"]), params, state)
        self.done_at += time.perf_counter() - start

    def _check_skipped(self, metrics) -> None:
        if self.limit is None:
            return
        for i, skipped in enumerate(metrics["skipped"]):
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if self.in_a_row > self.limit:
                self.spoiled = True  # what is in the file is better than a state that skips all steps
                at = self.history.step - len(metrics["skipped"]) + i
                raise NonFiniteError(
                    f"fit: {self.in_a_row} steps in a row were not finite, up to step {at}, and were skipped; "
                    f"the limit is {self.limit}. A smaller learning rate may help",
                    at,
                    (),
                    self.current,
                    self.history.records,
                )

    def _broken(self, call: _Pending) -> NonFiniteError:
        """What happened in a call whose numbers are not finite, by doing it again one step at a time."""

        @jax.jit
        def batch_at(train_state, i, *inputs):
            plan, batch_of = self.feed.batches(call.stack.size if self.feed.lazy else 1)(1, train_state, *inputs)
            return batch_of(jax.tree.map(lambda leaf: leaf[i if self.feed.lazy else 0], plan))

        batches = (
            lambda train_state, i=i: batch_at(train_state, jnp.int32(i), *call.stack.inputs)
            for i in range(call.first, call.first + call.n)
        )
        return explain(self.step, self.current, batches, self.history.records)

    # Keeping

    def save(self, keeper: _Keeper) -> None:
        text = {
            "history": self.history.state(),
            "position": self.position,
            "passes": self.passes,
            "facts": self.feed.facts,
        }
        text |= {"in_a_row": self.in_a_row}
        best = None if self.best is None else self.best._asdict()
        step, records = self.history.step, self.history.records
        record = records[-1] if records and records[-1]["step"] == step else None
        keeper.save(step, {"train_state": self.current, "best": best}, record, {"fit": json.dumps(text)})

    def restore(self, path: str) -> None:
        from jaxnet import checkpoint

        info = checkpoint.inspect(path)
        if "fit" not in info.metadata:
            raise checkpoint.CheckpointError(path, None, "not written by `fit`: name another file")
        text = json.loads(info.metadata["fit"])
        if text["facts"] != self.feed.facts:
            raise ValueError(
                f"fit: {path} is of a run with {text['facts']}, this one has {self.feed.facts}; its position would mean another "
                "batch: use the same data and batch size, or another file"
            )
        best = None
        if "best/value" in info.scalars:
            best = Best(0.0, 0, self.current.params, self.current.state)._asdict()
        run = checkpoint.load(path, like={"train_state": self.current, "best": best})
        self.current = jax.tree.map(_copy, run["train_state"])
        self.best = None if best is None else Best(**run["best"])
        self.history.restore(text["history"])
        self.position, self.passes, self.in_a_row = text["position"], text["passes"], text["in_a_row"]


def _copy(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf, getattr(leaf, "dtype", None))
    where = leaf.sharding if leaf.committed else None
    return jax.device_put(leaf, where, may_alias=False)  # unlike jnp.array(copy=True), it compiles nothing


def _shardings(train_state: TrainState) -> Any:
    """Keep the train state where it is, if it is on several devices."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, train_state)
    several = any(len(sharding.device_set) > 1 for sharding in jax.tree.leaves(shardings))
    return shardings if several else None


def _after(step: int, every: int) -> int:
    """The first multiple of `every` after a step."""
    return (step // every + 1) * every


def _record_every(epoch_steps: int | None, total: int | None) -> int:
    """About 100 steps, a divisor of the epoch if there is one up to 1,000; more where that would be more than 1,000 records."""
    every = 100
    if epoch_steps is not None:
        divisors = [d for d in range(min(50, epoch_steps), min(1000, epoch_steps) + 1) if epoch_steps % d == 0]
        every = min(divisors, key=lambda d: abs(d - 100), default=every)
    return every * max(1, -(-(total or 0) // (1000 * every)))
