"""The public call `fit`: train in compiled chunks, and evaluate, record and save in between."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from jaxnet.train import data_checks, identity, inputs, snapshot
from jaxnet.train.feed import Feed, RowFeed, StreamFeed, feed_of_arrays
from jaxnet.train.interrupt import interruptible
from jaxnet.train.keeper import Keeper
from jaxnet.train.looks import Looks
from jaxnet.train.messages import say_where, say_why
from jaxnet.train.order import Order, order_digest, shuffle
from jaxnet.train.programs import Programs, ordinary
from jaxnet.train.progress import Progress
from jaxnet.train.records import Record
from jaxnet.train.results import Result
from jaxnet.train.run import Run
from jaxnet.train.schedule import schedule_of
from jaxnet.train.sharding import on_mesh_of
from jaxnet.train.state import StepFunction, TrainState
from jaxnet.train.writers import begin_all

if TYPE_CHECKING:
    from jaxnet.checkpoint import Checkpoints

__all__ = ["fit"]


def fit(
    step: StepFunction,
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

    On the main thread the first SIGINT (Ctrl-C) or SIGTERM lets the chunk end, saves, and returns
    the state so far. A second one raises KeyboardInterrupt or SystemExit, also in the next `fit` if
    it comes within 10 seconds and the program has not read `stopped` or `exit_code` of the result.
    A signal that the program ignores stays ignored.

    Args:
      step: (train_state, batch) -> (train_state, metrics), from `train_step` or your own function;
        not jitted.
      train_state: the start, as from `TrainState.create(params, optimizer, key)`. It is copied,
        never donated.
      data: with `batch_size`, a pytree of arrays with a leading axis of examples, [N, ...]. Arrays
        in memory are copied to the device as a whole; memory maps and other arrays with
        `array[rows]` are read by rows, as needed. Without `batch_size`, an iterable of batches, or
        a function (number of the pass) -> iterable; a thread draws batches in advance.
      batch_size: examples per step, for arrays.
      epochs: the end of the run, as passes over the data. Pass exactly one of `epochs` and `steps`.
      steps: the end of the run, as steps counted from step 0 of the train state.
      order: as in `train_steps`; for arrays.
      drop_last: as in `train_steps`; for arrays.
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

    Returns:
      A `Result`. A record has 'step', 'epoch', the mean of each metric since the previous record,
      the values of `evaluate`, 'samples_per_second', and 'seconds' of training since the start,
      without compiling, evaluating and saving.

    Raises:
      ValueError: an argument is wrong: data that is empty, of unequal lengths or out of range; a
        batch larger than the data; a metric that is not a scalar; a checkpoint of a run with other
        data, order, key or start, or beyond the last step. It is raised before the first step.
      TypeError: an argument has the wrong type, or the step changes the type of the train state. It
        is raised before the first step.
      KeyError: no record has a name that `best_rule`, `stop` or a store uses.
      NonFiniteError: a FloatingPointError that names the step, the parameters and the operation
        where it began. As with every error during the training, its `train_state` is the state
        until then.
      CheckpointError: the checkpoint is damaged or of another network, or another program writes
        the same file, which is then left as it is.
      OSError: the checkpoint cannot be read or written.
    """
    epochs, steps = inputs.length_of(epochs, steps)
    evaluate_every = inputs.size_or_none("evaluate_every", evaluate_every)
    record_every = inputs.size_or_none("record_every", record_every)
    inputs.check_start(step, train_state)
    inputs.check_save_seconds(save_seconds)
    inputs.check_functions(evaluate, best_rule, stop, callbacks)
    looks = Looks(evaluate, best_rule, stop, list(callbacks))
    keeper = Keeper(checkpoint)
    keeper.check()
    check_finite = check_finite or _debugging()
    with ordinary():
        feed = _feed(data, batch_size, epochs, steps, order, drop_last)
        if keeper:
            _identify(feed, data, train_state)
        inputs.check_length(feed.total)
        schedule = schedule_of(
            feed.total,
            feed.epoch_steps,
            record_every=record_every,
            evaluate_every=evaluate_every,
            evaluates=evaluate is not None,
            asked=stop is not None,
        )
        programs = Programs(step, feed, check_finite, digests=bool(keeper))
        start = on_mesh_of(feed.data if batch_size else (), train_state)
        run = Run(start, feed, programs, looks, schedule, keeper, snapshot.save)
        found = snapshot.newest(run, keeper)
        notes = [] if found is None else snapshot.restore(run, found)
        writes = begin_all(looks.callbacks, run.history.step, resumed=found is not None)
        run.save_start = bool(keeper) and found is None and writes
        show = Progress(
            feed.total,
            feed.epoch_steps,
            step=run.history.step,
            show=progress,
            evaluations=schedule.evaluations,
            metric=None if looks.best_rule is None else looks.best_rule.metric,
        )
        say_where(run, int(train_state.step), found, notes, show)
        _run(run, keeper, show, save_seconds)
    return Result(
        run.current,
        run.history.records,
        looks.best,
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
            _save_after(error, run, keeper)
            raise
        finally:
            run.close()
            show.close()


def _save_after(error: Exception, run: Run, keeper: Keeper) -> None:
    """Save the state after an error, unless the checkpoint is better or belongs to another program,
    and give the error the state.
    """
    worse = run.spoiled and keeper.has_some()
    if keeper and run.started and not worse and not keeper.taken:
        with contextlib.suppress(Exception):
            run.settle(error)
        at = f"the state at step {run.history.step}"
        try:
            snapshot.save(run, keeper)
            keeper.wait()
            error.add_note(f"{at} is saved in {keeper}")
        except Exception as failure:
            error.add_note(f"{at} could not be saved in {keeper}: {failure!r}")
    if not hasattr(error, "train_state"):
        # Some exceptions do not take attributes.
        with contextlib.suppress(Exception):
            error.train_state = run.current  # pyright: ignore[reportAttributeAccessIssue]


def _feed(
    data: Any,
    batch_size: Any,
    epochs: int | None,
    steps: int | None,
    order: Order | None,
    drop_last: bool,
) -> Feed:
    """The feed of the run."""
    if batch_size is None:
        data_checks.check_iterable(data)
        return StreamFeed(data, epochs, steps)
    data_checks.check_arrays(data)
    return feed_of_arrays(data, batch_size, epochs, steps, order, drop_last)


def _identify(feed: Feed, data: Any, train_state: TrainState) -> None:
    """Add digests of the data, the order and the key to the facts of a feed."""
    if isinstance(feed, RowFeed):
        n, batch_size, order, _ = feed.batching
        feed.facts["data"] = identity.data_digest(data)
        if digest := order_digest(order, n, batch_size):
            feed.facts["order_digest"] = digest
    if key := identity.key_text(train_state.key):
        feed.facts["key"] = key


def _debugging() -> bool:
    """Whether JAX is configured to check for NaN or infinity. `fit` then checks for them itself."""
    return bool(jax.config.jax_debug_nans or jax.config.jax_debug_infs)  # pyright: ignore[reportAttributeAccessIssue]
