"""Save and restore a run: its state, history and position in the data, and the facts that identify
it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxnet.train import identity
from jaxnet.train.keeper import Found, Keeper
from jaxnet.train.rules import Best

if TYPE_CHECKING:
    from jaxnet.checkpoint import Info
    from jaxnet.train.run import Run

__all__ = ["Found", "newest", "restore", "save", "step_changed", "template_of"]

REMEDY = "name another file, or delete this one to begin anew"


def save(run: Run, keeper: Keeper) -> None:
    """Write the run as it is now. Raises CheckpointError if another program has written the file
    meanwhile.
    """
    numbers, arrays = run.history.state()
    best = None if run.best is None else run.best._asdict()
    text = {
        "history": numbers,
        "position": run.position,
        "passes": run.passes,
        "in_a_row": run.in_a_row,
        "facts": run.feed.facts,
        "start": run.start,
        "total": run.feed.total,
        "best": run.looks.best_rule,
        "step_digest": run.programs.digest,
    }
    step, records = run.history.step, run.history.records
    record = records[-1] if records and records[-1]["step"] == step else None
    keeper.save(
        step,
        {"train_state": run.current, "best": best, "history": arrays},
        record,
        {"fit": json.dumps(text)},
    )


def template_of(run: Run) -> Callable[[Info], Any]:
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

    leaves = {leaf.path: (leaf.dtype, leaf.shape) for leaf in info.leaves}
    state = {
        p.removeprefix("train_state/"): x for p, x in leaves.items() if p.startswith("train_state/")
    }
    if differences := identity.tree_differences(run.current, state):
        raise Misfit(
            info.path,
            None,
            f"of another network or optimizer: {differences}. For this one, {REMEDY}",
        )


def _arrays(info: Info) -> Any:
    """NumPy arrays with the shapes and dtypes of the history in a file. Abstract arrays would load
    as JAX arrays.
    """
    from jaxnet.checkpoint.structure import leaf_path

    found = {
        leaf_path(leaf.path)[1:]: leaf for leaf in info.leaves if leaf.path.startswith("history/")
    }
    tree: Any = {
        "records": {"columns": {}, "has": {}},
        "evaluations": {"columns": {}, "has": {}},
        "pending": {},
    }
    for path, leaf in found.items():
        *nodes, name = path
        place = tree
        for node in nodes:
            place = place[node]
        place[name] = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    return tree


def newest(run: Run, keeper: Keeper) -> Found | None:
    """The newest checkpoint that a run can go on from; None if there is none. Raises if it is of
    another run.
    """
    from jaxnet.checkpoint.errors import Misfit

    try:
        return keeper.newest(template_of(run))
    except Misfit as error:
        text = str(error)
        if "template `like`" not in text:
            raise
        # All leaves are the same: only what holds them differs, which is the optimizer's matter.
        lines = [line.strip() for line in text.splitlines()[1:]]
        differs = next((line for line in lines if line), "another structure")
        differs = differs.replace("template ", "here ").replace(
            "container differs: train_state/", "container "
        )
        raise Misfit(
            error.path,
            None,
            f"of another network or optimizer: {differs}. For this one, {REMEDY}",
        ) from None


def restore(run: Run, found: Found) -> list[str]:
    """Restore a run from a checkpoint, and return notes to print."""
    from jaxnet.train.run import copied

    text = json.loads(found.metadata["fit"])
    run.current = jax.tree.map(copied, found.tree["train_state"])
    run.history.restore(text["history"], found.tree.get("history"))
    run.position, run.passes, run.in_a_row = text["position"], text["passes"], text["in_a_row"]
    run.programs.expected = text.get("step_digest")
    # The run began where its file says, which older files do not.
    run.start = text.get("start")
    notes = []
    if found.tree["best"] is not None:
        rule, before = run.looks.best_rule, text.get("best")
        if rule and before and rule != before:
            notes.append(
                f"the best so far was by '{before}' and is now by '{rule}': it is looked for anew"
            )
        else:
            run.best = Best(**found.tree["best"])
    return notes


def step_changed(run: Run, found: Found) -> bool:
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
