"""The content of a run's checkpoint: its state, its history, and the facts that identify it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxnet.train import identity
from jaxnet.train.keeper import Found, Keeper
from jaxnet.train.results import Best
from jaxnet.train.run import Run
from jaxnet.train.state import copied

if TYPE_CHECKING:
    from jaxnet.checkpoint import Info

__all__ = ["newest", "restore", "save", "step_changed"]

REMEDY = "name another file, or delete this one to begin anew"


def save(run: Run, keeper: Keeper) -> None:
    """Write the run as it is now. Raises CheckpointError if another program has written the file
    meanwhile.
    """
    numbers, arrays = run.history.state()
    best, rule = run.looks.best, run.looks.best_rule
    text = {
        "history": numbers,
        "position": run.position,
        "passes": run.passes,
        "in_a_row": run.skips.in_a_row,
        "facts": run.feed.facts,
        "start": run.start,
        "total": run.feed.total,
        "best": None if rule is None else str(rule),
        "step_digest": run.programs.digest,
    }
    step, records = run.history.step, run.history.records
    record = records[-1] if records and records[-1]["step"] == step else None
    tree = {
        "train_state": run.current,
        "best": None if best is None else best._asdict(),
        "history": arrays,
    }
    keeper.save(step, tree, record, {"fit": json.dumps(text)})


def newest(run: Run, keeper: Keeper) -> Found | None:
    """Load the newest checkpoint from which a run can resume; None if there is none. Raises if it
    is of another run.
    """
    from jaxnet.checkpoint.errors import Misfit

    try:
        return keeper.newest(_template_of(run))
    except Misfit as error:
        text = str(error)
        if "template `like`" not in text:
            raise
        # All leaves are the same and only their containers differ, so the optimizer is another one.
        lines = [line.strip() for line in text.splitlines()[1:]]
        differs = next((line for line in lines if line), "another structure")
        differs = differs.replace("template ", "here ")
        differs = differs.replace("container differs: train_state/", "container ")
        raise Misfit(error.path, None, _OTHER.format(differs)) from None


_OTHER = "of another network or optimizer: {}. For this one, " + REMEDY


def _template_of(run: Run) -> Callable[[Info], Any]:
    """A function from a file's header to the tree for `restore`. It raises if the file belongs to
    another run.
    """

    def template(info: Info) -> Any:
        from jaxnet.checkpoint.errors import Misfit

        if "fit" not in info.metadata:
            raise Misfit(info.path, None, f"not written by `fit`: {REMEDY}")
        text = json.loads(info.metadata["fit"])
        if differences := identity.changed(text["facts"], run.feed.facts):
            raise ValueError(
                f"fit: {info.path} is of a run with {differences}; to go on from it, use the "
                f"same data and batch size, order and key; else {REMEDY}"
            )
        _check_tree(run, info)
        if not identity.begins_alike(text.get("start"), run.start or {}):
            raise ValueError(
                f"fit: {info.path} is of a run that began with other parameters (another key of "
                f"init?); {REMEDY}"
            )
        best = None
        if "best/value" in info.scalars:
            best = Best(0.0, 0, run.current.params, run.current.state)._asdict()
        like = {"train_state": run.current, "best": best}
        if "records" in text["history"]:
            return like
        return like | {"history": _arrays(info)}

    return template


def _check_tree(run: Run, info: Info) -> None:
    """Raise Misfit unless the train state of a file has the leaves and the containers of this
    one.
    """
    from jaxnet.checkpoint.errors import Misfit

    prefix = "train_state/"
    leaves = {
        leaf.path.removeprefix(prefix): (leaf.dtype, leaf.shape)
        for leaf in info.leaves
        if leaf.path.startswith(prefix)
    }
    if differences := identity.tree_differences(run.current, leaves):
        raise Misfit(info.path, None, _OTHER.format(differences))


def _arrays(info: Info) -> Any:
    """NumPy arrays with the shapes and dtypes of the history in a file. Abstract arrays would load
    as JAX arrays.
    """
    from jaxnet.checkpoint.structure import leaf_path

    tree: Any = {
        "records": {"columns": {}, "has": {}},
        "evaluations": {"columns": {}, "has": {}},
        "pending": {},
    }
    for leaf in info.leaves:
        if not leaf.path.startswith("history/"):
            continue
        _, *nodes, name = leaf_path(leaf.path)
        place = tree
        for node in nodes:
            place = place[node]
        place[name] = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    return tree


def restore(run: Run, found: Found) -> list[str]:
    """Restore a run from a checkpoint, and return notes to print."""
    text = json.loads(found.metadata["fit"])
    run.current = jax.tree.map(copied, found.tree["train_state"])
    run.history.restore(text["history"], found.tree.get("history"))
    run.position, run.passes = text["position"], text["passes"]
    run.skips.in_a_row = text["in_a_row"]
    run.programs.expected = text.get("step_digest")
    # The file tells where the run began. Older files do not.
    run.start = text.get("start")
    if found.tree["best"] is None:
        return []
    rule, before = run.looks.best_rule, text.get("best")
    if rule is not None and before and before != str(rule):
        return [f"the best so far was by '{before}' and is now by '{rule}': it is looked for anew"]
    run.looks.best = Best(**found.tree["best"])
    return []


def step_changed(run: Run) -> bool:
    """Whether the step differs from that of the run that wrote the checkpoint. False if this cannot
    be known without data.
    """
    if run.feed.epoch_steps is None or run.programs.expected is None:
        return False
    stacks: Any = run.feed.stacks(run.current, 0, {}, lambda step: step + 1, lambda: False)
    try:
        stack = next(stacks)
        run.programs.trace(stack.size, stack.inputs, run.current, run.good)
    finally:
        stacks.close()
    return run.programs.digest != run.programs.expected
