"""Training processes that are killed at random moments and resumed end with the bits of a process
that was not killed.
"""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxnet.checkpoint import load

SCRIPT = pathlib.Path(__file__).with_name("run_to_be_killed.py")
STEPS = 2000


def start(folder: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, SCRIPT, folder, str(STEPS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> int:
    _, errors = process.communicate(timeout=300)
    assert process.returncode in (0, 130, 143, -signal.SIGKILL, -signal.SIGINT, -signal.SIGTERM), (
        errors
    )
    return process.returncode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The end of a run that was not killed, and its seconds from the first record on."""
    folder = tmp_path_factory.mktemp("kills") / "undisturbed"
    folder.mkdir()
    process = start(folder)
    assert process.stdout is not None
    process.stdout.readline()
    began = time.monotonic()
    assert finish(process) == 0
    return folder.parent, (folder / "end.safetensors").read_bytes(), time.monotonic() - began


def killed_until_it_ends(
    undisturbed, name: str, signals: list[signal.Signals], kills: int, rng: random.Random
) -> int:
    """Kill a run repeatedly.

    Return how many of the kills came during training. The run must end as the other one did.
    """
    parent, expected, seconds = undisturbed
    folder = parent / name
    folder.mkdir()
    hits = 0
    for kill in range(kills):
        process = start(folder)
        assert process.stdout is not None
        # Most kills come while it trains, some while it starts.
        if kill % 4:
            process.stdout.readline()
        time.sleep(rng.uniform(0, 1.5 * seconds / kills))
        number = signals[kill % len(signals)]
        process.send_signal(number)
        if rng.random() < 0.3:
            # The second signal ends it at once.
            process.send_signal(number)
        code = finish(process)
        hits += code != 0
        if code == 0:
            break
    assert finish(start(folder)) == 0
    assert (folder / "end.safetensors").read_bytes() == expected
    steps = [
        json.loads(line)["step"] for line in (folder / "history.jsonl").read_text().splitlines()
    ]
    # What had to be done again stands there once.
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    return hits


def test_a_run_that_is_killed_ends_with_the_same_bits(undisturbed):
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    hits = killed_until_it_ends(undisturbed, "once", signals, 3, random.Random(0))
    assert hits >= 1


@pytest.mark.slow
def test_fifty_kills_change_no_bit(undisturbed):
    signals, rng, hits, run = (
        [signal.SIGKILL, signal.SIGTERM, signal.SIGINT],
        random.Random(1),
        0,
        0,
    )
    while hits < 50:
        rng.shuffle(signals)
        hits += killed_until_it_ends(undisturbed, f"run{run}", signals, 10, rng)
        run += 1
    print(f"\n{hits} kills in {run} runs of {STEPS} steps; all ends are equal, bit for bit")


def test_the_end_holds_what_a_run_computes(undisturbed):
    parent, _, _ = undisturbed
    end = load(parent / "undisturbed/end.safetensors")
    assert end["train_state"]["step"] == STEPS and end["best"]["step"] % 20 == 0
    assert np.isfinite(end["history"]["loss"]).all() and len(end["history"]["loss"]) == STEPS // 20
