"""The public call `fit`: train in compiled chunks, and evaluate, record and save in between."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from jaxnet.checks import size_of
from jaxnet.train import data_checks, identity, inputs, saved
from jaxnet.train.feed import Feed, StreamFeed, arrays_of
from jaxnet.train.history import Record
from jaxnet.train.interrupt import handled, interruptible
from jaxnet.train.keeper import Keeper
from jaxnet.train.notes import say_where, say_why
from jaxnet.train.order import Order, order_digest, shuffle
from jaxnet.train.programs import Programs, ordinary
from jaxnet.train.progress import Progress
from jaxnet.train.rules import Best, best_of
from jaxnet.train.run import Looks, Run
from jaxnet.train.schedule import Schedule, default_record_every
from jaxnet.train.sharding import on_mesh_of
from jaxnet.train.state import Step
from jaxnet.train.step import TrainState
from jaxnet.train.writers import begin_all

if TYPE_CHECKING:
    from jaxnet.checkpoint import Checkpoints

__all__ = ["Best", "Result", "fit"]


class _Result(NamedTuple):
    train_state: TrainState
    history: list[Record]
    best: Best | None = None
    stopped: str | None = None
    compiled: tuple[str, ...] = ()
    evaluations: Sequence[Record] = ()


class Result(_Result):
    """The outcome of `fit`.

    Attributes:
      train_state: after the last step.
      history: a list of records, dicts of plain numbers, about one per 100 steps.
      best: the best evaluation, None unless `best_rule` was given.
      stopped: why the run ended before the last step: 'SIGINT', 'SIGTERM', the reason from the
        condition, or 'the data ended'; None if the run was completed.
      compiled: one line per compilation, with its reason; more than one line means that shapes or
        dtypes of batches changed.
      evaluations: a list of records, one per evaluation: the values that `evaluate` returned, and
        the means of the training metrics since the evaluation before.
    """

    __slots__ = ()

    @property
    def stopped(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        # A program that reads this decides itself whether a signal ends more than this run.
        handled()
        return self[3]

    def __repr__(self) -> str:
        # The arrays of a train state would fill screens.
        best = None if self.best is None else f"{self.best.value:.6g} at step {self.best.step}"
        return (
            f"Result(step={int(self.train_state.step)}, records={len(self.history)}, "
            f"best={best}, stopped={self[3]!r})"
        )

    @property
    def exit_code(self) -> int:
        """For `sys.exit`: 128 + the number of the signal that ended the run (130, 143), 0 without
        one.
        """
        return 128 + getattr(signal, self.stopped) if self.stopped in ("SIGINT", "SIGTERM") else 0


def fit(
    step: Step,
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
    best_rule: str | None = None,
    stop: Callable[[Sequence[Record]], Any] | None = None,
    callbacks: Iterable[Callable[[Record], Any]] = (),
    checkpoint: str | os.PathLike[str] | Checkpoints | None = None,
    save_seconds: float = 60.0,
    check_finite: bool = True,
    progress: bool | None = None,
) -> Result:
    """Train in compiled chunks of many steps, and evaluate, record and save in between.

    `fit` runs `train_steps` in a loop. Evaluating, recording and saving do not change the numbers:
    the result is the same bit for bit wherever the chunks end, and whether or not the run was
    interrupted and resumed (on the same kind of device, with the same number of cores).

    Args:
      step: (train_state, batch) -> (train_state, metrics), from `train_step` or your own function;
        not jitted.
      train_state: the start, as from `TrainState.create(params, optimizer, key)`. It is copied,
        never donated.
      data: with `batch_size`, a pytree of arrays with a leading axis of examples. Arrays in memory
        are copied to the device as a whole; memory maps and other arrays with `array[rows]` are
        read by rows, as needed. Without `batch_size`, an iterable of batches, or a function (number
        of the pass) -> iterable; a thread draws batches in advance.
      batch_size: examples per step, for arrays.
      epochs, steps: the end of the run, as passes over the data or as steps, counted from step 0 of
        the train state. Pass exactly one of them.
      order, drop_last: as in `train_steps`; for arrays.
      evaluate: (train_state) -> dict of numbers. It is called after each epoch, or every
        `evaluate_every` steps (for an iterable with `steps`, after each pass and at the end), and
        its values are added to the record. Before the first step, a function that is jitted or made
        by `jaxnet.train.evaluate` is traced, and any other is called once, so its errors come
        early. It must copy any arrays it keeps: their buffers are donated to the following steps.
      evaluate_every: steps per evaluation.
      record_every: steps per record; the default is about 100, an equal part of an epoch if
        possible, and at most 1,000 records in all.
      best_rule: 'min test_loss', 'max test_accuracy', ...: keep the parameters of the best
        evaluation.
      stop: a condition (history) -> bool or a reason, called after each record: `early_stopping`,
        `time_budget`. It is also called once before the first step, with a record of NaN, so its
        errors come early.
      callbacks: functions of a record, called with each new record: `write_jsonl(path)`,
        `wandb.log`, `print`.
      checkpoint: a file, or a `jaxnet.checkpoint.Checkpoints`, a folder with one file per step. If
        it exists, the run resumes from it; data, batch size, order, key and the parameters at the
        start must then be the same. It is written after the first epoch, evaluation or 5 seconds of
        training, every `save_seconds`, at the end, on a signal, and before an error is
        raised. A store with a `best_rule` is also written after each evaluation.
      save_seconds: seconds between two saves.
      check_finite: stop when a loss, parameter or state is no longer finite, and return the last
        finite values. This needs a second copy of the train state on the device.
      progress: a line on stderr, rewritten in place on a terminal; elsewhere one line per epoch and
        evaluation, and at least every 30 seconds. False is silent.

    On the main thread the first SIGINT (Ctrl-C) or SIGTERM lets the chunk end, saves, and returns
    the state so far. A second one raises KeyboardInterrupt or SystemExit, also in the next `fit` if
    it comes within 10 seconds and the program has not read `stopped` or `exit_code` of the result.
    A signal that the program ignores stays ignored.

    Returns:
      A `Result`. A record has 'step', 'epoch', the mean of each metric since the record before, the
      values of `evaluate`, 'samples_per_second', and 'seconds' of training since the start, without
      compiling, evaluating and saving.

    Raises:
      ValueError, TypeError, KeyError: an argument is wrong: data that is empty, of unequal lengths
        or out of range; a batch larger than the data; a step that changes the type of the train
        state; a metric that is not a scalar; a name that no record has; a checkpoint of a run with
        other data, order, key or start, or beyond the last step. All before the first step is
        taken.
      NonFiniteError (a FloatingPointError): names the step, the parameters and the operation where
      it began. CheckpointError, OSError: the checkpoint is damaged, of another network, or cannot
      be written; or another program
        writes the same file, which is then left as it is.
      Every error that comes during the training has the state until then as its `train_state`.
    """
    epochs, steps = _length(epochs, steps)
    sizes = {"evaluate_every": evaluate_every, "record_every": record_every}
    for name, value in sizes.items():
        sizes[name] = None if value is None else _size(name, value)
    inputs.check_start(step, train_state)
    inputs.check_save_seconds(save_seconds)
    inputs.check_functions(evaluate, best_rule, stop, callbacks)
    looks = Looks(evaluate, best_rule, stop, list(callbacks))
    keeper = Keeper(checkpoint)
    keeper.check()
    check_finite = check_finite or _debugging()
    with ordinary():
        feed = _feed(
            train_state, data, batch_size, epochs, steps, order, drop_last, digest=bool(keeper)
        )
        inputs.check_length(feed.total)
        evaluate_every = None if evaluate is None else sizes["evaluate_every"] or feed.epoch_steps
        every = sizes["record_every"] or default_record_every(feed.epoch_steps, feed.total)
        cut_epochs = record_every is None and (feed.epoch_steps or 0) >= every
        schedule = Schedule(
            feed.total, feed.epoch_steps, every, evaluate_every, cut_epochs, stop is not None
        )
        programs = Programs(step, feed, check_finite, digests=bool(keeper))
        run = Run(
            on_mesh_of(feed.data if batch_size else (), train_state),
            feed,
            programs,
            looks,
            schedule,
            keeper,
        )
        found = saved.newest(run, keeper)
        notes = [] if found is None else saved.restore(run, found)
        writes = begin_all(looks.callbacks, run.history.step, resumed=found is not None)
        run.save_start = bool(keeper) and found is None and writes
        show = Progress(
            feed.total,
            feed.epoch_steps,
            step=run.history.step,
            show=progress,
            evaluations=schedule.evaluations,
            metric=None if best_rule is None else best_of(best_rule)[0],
        )
        say_where(run, int(train_state.step), found, notes, show)
        _run(run, keeper, show, save_seconds)
    return Result(
        run.current,
        run.history.records,
        run.best,
        run.stopped,
        tuple(programs.compiled),
        run.history.evaluations,
    )


def _run(run: Run, keeper: Keeper, show: Progress, save_seconds: float) -> None:
    """Train, and save the state before an error leaves."""

    def tell(name: str) -> None:
        show.note(f"{name}: finishing the running call; a second one ends the program at once")
        show.ending = True

    with interruptible(tell) as flag:
        try:
            run.go(flag, show, save_seconds)
            if run.stopped:
                say_why(run, keeper, show)
        except Exception as error:
            if (
                keeper
                and run.started
                and not (run.spoiled and keeper.has_some())
                and not keeper.taken
            ):
                with contextlib.suppress(Exception):
                    run.settle(error)
                try:
                    saved.save(run, keeper)
                    keeper.wait()
                    error.add_note(f"the state at step {run.history.step} is saved in {keeper}")
                except Exception as failure:
                    error.add_note(
                        f"the state at step {run.history.step} could not be saved in {keeper}: "
                        f"{failure!r}"
                    )
            if not hasattr(error, "train_state"):
                with contextlib.suppress(Exception):
                    error.train_state = run.current  # pyright: ignore[reportAttributeAccessIssue]
            raise
        finally:
            run.close()
            show.close()


def _length(epochs: Any, steps: Any) -> tuple[int | None, int | None]:
    if (epochs is None) == (steps is None):
        raise ValueError(
            f"fit: say how long, by one of epochs and steps; got epochs={epochs}, steps={steps}"
        )
    if epochs is None:
        return None, _size("steps", steps)
    return _size("epochs", epochs), None


def _size(name: str, value: Any) -> int:
    """A size as an int of at least 1."""
    try:
        return size_of(f"fit: {name}", value)
    except ValueError:
        raise ValueError(f"fit: {name} must be an int of at least 1, got {value!r}") from None


def _feed(
    train_state: Any,
    data: Any,
    batch_size: Any,
    epochs: Any,
    steps: Any,
    order: Any,
    drop_last: bool,
    *,
    digest: bool,
) -> Feed:
    """The feed of the run, with the facts that identify it. With `digest`, they include digests of
    the data and the key.
    """
    if batch_size is None:
        data_checks.check_iterable(data)
        feed: Feed = StreamFeed(data, epochs, steps)
    else:
        data_checks.check_arrays(data)
        feed = rows = arrays_of(data, batch_size, epochs, steps, order, drop_last)
        if digest:
            feed.facts["data"] = identity.data_digest(data)
            if order_of := order_digest(order, rows.n, rows.batching["batch_size"]):
                feed.facts["order_digest"] = order_of
    if digest and (key := identity.key_text(train_state.key)):
        feed.facts["key"] = key
    return feed


def _debugging() -> bool:
    """Whether JAX is configured to check for NaN or infinity. `fit` then checks for them itself."""
    return bool(jax.config.jax_debug_nans or jax.config.jax_debug_infs)  # pyright: ignore[reportAttributeAccessIssue]
