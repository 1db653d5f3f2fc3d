"""Four ways of saving, and a program that kills them with SIGKILL at every call that changes the
disk.

python tests/saves_to_be_killed.py FOLDER RANDOM

FOLDER holds what was there `before` in one folder for each mode; each kill leaves a folder MODE-N
beside these, and RANDOM kills at random moments leave `random-N`.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time

import numpy as np

from jaxnet.checkpoint import Checkpoints, save


def tree_of(step):
    return {"x": np.arange(500.0) * step, "step": step}


def save_fresh(root, returned):
    """Save to a folder that does not exist; `returned(step)` reports the steps that are safe."""
    save(os.path.join(root, "new", "t"), tree_of(1))
    returned(1)


def save_over(root, returned):
    for step in (1, 2):
        save(os.path.join(root, "t"), tree_of(step))
        returned(step)


def save_steps(root, returned, beside=False):
    with Checkpoints(root, keep=2, best_rule="min loss", asynchronous=beside) as store:
        # The store keeps step 1, the best, and deletes 2 and then 3.
        for step in (4, 5):
            store.save(step, tree_of(step), {"loss": step})
            store.wait()
            returned(step)


def save_steps_beside(root, returned):
    save_steps(root, returned, beside=True)


SAVES = {
    "fresh": save_fresh,
    "overwrite": save_over,
    "store": save_steps,
    "asynchronous": save_steps_beside,
}
CALLS = ("open", "write", "lseek", "fchmod", "fsync", "replace", "unlink", "mkdir", "close")


def before(mode, root):
    """Make the files that exist before the saves of a mode."""
    os.mkdir(root)
    if mode == "overwrite":
        save(os.path.join(root, "t"), tree_of(0))
    elif mode != "fresh":
        with Checkpoints(root) as store:
            for step in (1, 2, 3):
                store.save(step, tree_of(step), {"loss": step})


def killed_at(n, work):
    """Do the work in a child that dies at its n-th call; False if there were not so many."""
    if (child := os.fork()) == 0:
        left = [n]

        def dying(name, real):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    if name == "write":
                        real(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in CALLS:
            setattr(os, name, dying(name, getattr(os, name)))
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def save_for_ever(root, beside):
    store = Checkpoints(root, keep=2, best_rule="min loss", asynchronous=beside)
    for step in range(10**6):
        store.save(step, {"x": np.full(200_000, step), "step": step}, {"loss": (step - 5) ** 2})


def main(folder, count):
    # The modules that a save needs are imported on first use. A child that had to import them would
    # be killed while it imports.
    with tempfile.TemporaryDirectory() as other:
        before("store", os.path.join(other, "store"))
    for mode, saves in SAVES.items():
        for n in range(1, 99):
            root = f"{folder}/{mode}-{n}"
            shutil.copytree(f"{folder}/before/{mode}", root)
            if not killed_at(n, lambda saves=saves, root=root: saves(root, lambda step: None)):
                break
    for i in range(count):
        if (child := os.fork()) == 0:
            save_for_ever(f"{folder}/random-{i}", i % 2 == 0)
        time.sleep(0.02 + random.Random(i).random() / 3)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
