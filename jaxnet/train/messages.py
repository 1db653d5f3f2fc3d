"""The messages of `fit` about a run beside its line of progress."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from jaxnet.train import snapshot
from jaxnet.train.interrupt import AGAIN
from jaxnet.train.keeper import Found, Keeper
from jaxnet.train.progress import Progress
from jaxnet.train.run import Run

__all__ = ["say_done", "say_where", "say_why"]


def say_where(
    run: Run, start: int, found: Found | None, notes: Sequence[str], show: Progress
) -> None:
    """Print where the run begins. Raises ValueError if it is already beyond its last step."""
    step, total = run.history.step, run.feed.total
    if found is None:
        if total is not None and step >= total:
            raise ValueError(
                f"fit: the train state has done {step} steps, and {total} are asked for in all; "
                "ask for more, or begin anew with TrainState.create(params, ...)"
            )
    elif run.done():
        say_done(run, found, show)
    elif step > start:
        show.note(f"goes on from step {step:,}, saved in {found.path}")
    for note in notes:
        show.note(note)
    if run.feed.left_out:
        show.note(run.feed.left_out)


def say_done(run: Run, found: Found, show: Progress) -> None:
    """Print that nothing is left to train, and what has changed."""
    step, total, epochs = run.history.step, run.feed.total, run.feed.epochs
    if total is None:
        at, beyond = f"after pass {run.passes} of {epochs}", run.passes > (epochs or 0)
    else:
        at, beyond = f"at step {step:,} of {total:,}", step > total
    text = (
        f"{found.path} is {at}: nothing left to train. To begin anew, delete it or name another "
        "file"
    )
    rule = run.looks.best_rule
    if rule is not None and run.looks.best is None:
        text += f". run.best stays None: no step is left in which best_rule='{rule}' could be found"
    if beyond:
        raise ValueError(f"fit: {text}; to go on, ask for more")
    if snapshot.step_changed(run):
        # Without a warning, the old result would look like that of the new settings.
        text = (
            f"fit: {text}. Its step was another one (learning rate, loss or network): this is "
            "the result of that run"
        )
        warnings.warn(text, stacklevel=4)
    else:
        show.note(text)


def say_why(run: Run, keeper: Keeper, show: Progress) -> None:
    """Print why the run has stopped before its last step, and where the state is saved."""
    of = "" if run.feed.total is None else f" of {run.feed.total:,}"
    by = f"by {run.stopped} " if run.stopped in ("SIGINT", "SIGTERM") else ""
    text = f"stopped {by}at step {run.history.step:,}{of}" + ("" if by else f": {run.stopped}")
    if keeper and run.started:
        text += f", saved in {keeper}"
    if run.stopped == "SIGINT":
        text += f"; Ctrl-C again within {AGAIN:.0f} s ends the program"
    show.note(text)
