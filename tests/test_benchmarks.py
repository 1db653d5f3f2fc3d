"""The benchmarks run, whatever is installed; the arithmetic of `measure` is checked with a clock
that the test moves.
"""

import functools
import importlib
import importlib.util
import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("measure")


@pytest.fixture
def options(measure):
    # The tests' own process is not pinned.
    return measure.arguments(None, argv=["--rounds", "4", "--cores", "0"])


class Clock:
    """Time passes only where the work says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, measure, seconds, *, steps=1, output=1.0):
        """A competitor whose calls take these seconds, one after the other; the last is
        repeated.
        """
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return np.float32(output)

        return lambda: measure.Work(run, steps)


def compare(measure, options, clock, competitors, **arguments):
    table = measure.compare(
        "Title",
        competitors,
        per="step",
        unit="ms",
        reference="base",
        options=options,
        clock=clock,
        **arguments,
    )
    return {row.name: row for row in table.rows}, measure.format_table(table)


def test_times_are_per_step_and_ratios_within_the_round(measure, options):
    clock = Clock()
    competitors = {
        "twice": clock.work(measure, [9.0, 2.0, 4.0, 4.0, 8.0, 8.0], steps=2),
        "base": clock.work(measure, [5.0, 1.0, 1.0, 1.0, 2.0, 2.0]),
    }
    rows, text = compare(measure, options, clock, competitors)
    # The first call, 5 s, and the second, 1 s, are apart.
    assert rows["base"].seconds == [1.0, 1.0, 2.0, 2.0]
    assert rows["twice"].seconds == [2.0, 2.0, 4.0, 4.0]
    assert rows["twice"].ratios == [2.0, 2.0, 2.0, 2.0]
    assert (rows["base"].compile_seconds, rows["twice"].compile_seconds) == (4.0, 7.0)
    lines = text.splitlines()
    assert lines[3].split() == [
        "base",
        "1,500",
        "[1,000,",
        "2,000]",
        "1.00",
        "[1.00,",
        "1.00]",
        "4",
        "4.00",
    ]
    assert lines[4].split() == [
        "twice",
        "3,000",
        "[2,000,",
        "4,000]",
        "2.00",
        "[2.00,",
        "2.00]",
        "4",
        "7.00",
    ]


def test_other_quantities_are_columns_of_medians(measure):
    rows = [
        measure.Row("base", [1.0], [1.0], others={"wall s": [1.0, 3.0, 2.0], "peak MB": [300.0]}),
        measure.Row("quick", [0.5], [0.5]),
        measure.Row("broken", problem="failed"),
    ]
    lines = measure.format_table(measure.Table("Title", "run", "s", "base", rows)).splitlines()
    assert lines[2].split()[-3:] == ["s", "peak", "MB"] and lines[4].split()[-2:] == ["2.00", "300"]
    # Nothing but the rounds.
    assert lines[3].split()[-1] == "1" and lines[-1] == "wall s, peak MB: medians"


def test_quick_work_is_called_often_enough_to_be_measured(measure, options):
    clock, calls = Clock(), []

    def prepare():
        def run():
            calls.append(1)
            clock.now += 2.0**-10

        return measure.Work(run)

    rows, _ = compare(measure, options, clock, {"base": prepare})
    assert rows["base"].seconds == [2.0**-10] * 4
    assert len(calls) == 2 + 4 * 21  # 21 / 1024 s is the first above 0.02 s


def test_problems_are_named_and_the_others_go_on(measure, options):
    clock = Clock()

    def missing():
        raise ModuleNotFoundError("No module named 'keras'", name="keras")

    def breaks_later():
        calls = []

        def run():
            calls.append(1)
            clock.now += 1.0
            if len(calls) == 4:
                raise RuntimeError("out of\nmemory")
            return np.float32(3.0)

        return measure.Work(run, steps=3)

    competitors = {
        "base": clock.work(measure, [1.0]),
        "missing": missing,
        "wrong": clock.work(measure, [1.0], output=1.1),
        "not a number": clock.work(measure, [1.0], output=np.nan),
        "breaks": breaks_later,
        "good": clock.work(measure, [2.0], output=1.0005),
    }
    rows, text = compare(
        measure, options, clock, competitors, expected=lambda steps: np.float64(steps)
    )
    assert rows["missing"].problem == "skipped: keras is not installed"
    assert (
        rows["wrong"].problem
        == "failed: ValueError: the result is off by 1.0e-01 of the largest value, 1e-03 allowed"
    )
    assert "off by nan" in rows["not a number"].problem
    assert rows["breaks"].problem == "failed: RuntimeError: out of"
    assert rows["good"].ratios == [2.0] * 4
    # Problems come last.
    assert [line.split("  ")[0] for line in text.splitlines()[3:5]] == ["base", "good"]
    assert "missing       skipped: keras is not installed" in text


def test_a_competitor_may_expect_a_result_of_its_own(measure, options):
    clock = Clock()

    def other(result):
        return lambda: clock.work(measure, [1.0], output=result)()._replace(
            expected=lambda steps: 5.0
        )

    competitors = {"base": clock.work(measure, [1.0]), "other": other(5.0), "wrong": other(1.0)}
    rows, _ = compare(measure, options, clock, competitors, expected=lambda steps: 1.0)
    assert [row.problem for row in rows.values()][:2] == ["", ""]
    assert "off by 8.0e-01" in rows["wrong"].problem


def test_batches_go_through_all_rows_in_a_new_order_each_epoch(measure):
    feed = importlib.import_module("peers").Feed(
        np.arange(6), -np.arange(6), batch_size=2, epochs=2
    )
    batches = list(itertools.islice(feed.stream(), feed.steps))
    assert all((x == -y).all() for x, y in batches)
    first, second = (np.concatenate([x for x, _ in part]) for part in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(6))
    assert (first != second).any()
    whole = feed._replace(batch_size=6)
    assert next(whole.stream())[0] is feed.x and whole.steps == 2


def test_one_bad_number_is_enough(measure):
    good, bad = np.ones(2), np.array([1.0, np.nan])
    measure.check([good, good * 1.0005], [good, good], 1e-3)
    for result in [[good, bad], [bad, good], [good, good * 1.002]]:
        with pytest.raises(ValueError, match="the result is off by"):
            measure.check(result, [good, good], 1e-3)


def test_results_of_another_shape_are_wrong(measure):
    with pytest.raises(ValueError, match=r"shapes \[\(3,\)\], expected \[\(2,\)\]"):
        measure.check([np.ones(3)], [np.ones(2)], 1e-3)


def test_quartiles(measure):
    assert measure.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
    assert np.isnan(measure.quartiles([])).all()


def test_no_round_starts_after_the_budget(measure, options):
    options.seconds = 0.0
    rows, _ = compare(measure, options, clock := Clock(), {"base": clock.work(measure, [1.0])})
    assert len(rows["base"].seconds) == 1  # but there is always one


@pytest.mark.parametrize(
    "script, flags, measured, peer, module",
    [
        (
            "xor.py",
            ["--only", "train_steps", "--only", "Haiku"],
            "jaxnet, one loop: train_steps",
            "Haiku",
            "haiku",
        ),
        slow(
            "xor.py",
            ["--only", "train_steps", "--only", "Keras"],
            "jaxnet, one loop: train_steps",
            "Keras fit",
            "keras",
        ),
        slow(
            "convnet.py",
            ["--only", "jaxnet, jit", "--only", "Keras"],
            "jaxnet, jitted step",
            "Keras fit",
            "keras",
        ),
        slow(
            "first_step.py",
            ["--only", "Haiku"],
            "jaxnet, fit",
            "Haiku",
            "haiku",
        ),
        slow(
            "startup.py",
            ["--only", "Haiku, eager", "--depth", "1"],
            "jaxnet, eager",
            "Haiku, eager",
            "haiku",
        ),
        slow(
            "checkpoints.py",
            [
                "--only",
                "jaxnet",
                "--only",
                "npz",
                "--only",
                "Equinox",
                "--leaves",
                "20",
                "--megabytes",
                "1",
            ],
            "jaxnet",
            "Equinox, durable",
            "equinox",
        ),
        slow(
            "loops.py",
            ["--table", "adam", "--rows", "1280", "--only", "a file", "--only", "Keras"],
            "jaxnet, fit, progress on a file",
            "Keras fit",
            "keras",
        ),
    ],
)
def test_each_benchmark_runs(script, flags, measured, peer, module, tmp_path):
    file = tmp_path / "numbers.json"
    command = [
        sys.executable,
        BENCHMARKS / script,
        "--rounds",
        "1",
        "--seconds",
        "1",
        "--json",
        file,
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {
        row["name"]: row
        for table in json.loads(file.read_text())["tables"]
        for row in table["rows"]
    }
    assert rows[measured]["problem"] == "" and rows[measured]["seconds"][0] > 0
    installed = importlib.util.find_spec(module) is not None
    assert rows[peer]["problem"] == ("" if installed else f"skipped: {module} is not installed")
    assert f"{peer} " in done.stdout


OVERHEADS = {
    "trace of apply, unrolled": "jaxnet",
    "trace of grad, scanned": "jaxnet",
    "init again, scanned": "jaxnet",
    "eval_shape(init), unrolled": "jaxnet",
    "eager apply, scanned": "jaxnet",
}


def overhead(folder, *flags):
    """The rows of a small run of overhead.py by table, and what it prints."""
    command = [
        sys.executable,
        BENCHMARKS / "overhead.py",
        "--rounds",
        "1",
        "--seconds",
        "1",
        "--json",
        folder / "x.json",
    ]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    tables = json.loads((folder / "x.json").read_text())["tables"]
    return {
        table["title"]: {row["name"]: row for row in table["rows"]} for table in tables
    }, done.stdout


@pytest.mark.slow
def test_overhead_is_measured_beside_the_hand_written_network(tmp_path):
    """A row exists only if the network has the hand-written one's weights, and gives its output."""
    flags = [part for title in OVERHEADS for part in ("--row", title)]
    tables, printed = overhead(tmp_path, "--blocks", "2", "--only", "jaxnet", *flags)
    assert tables.keys() == OVERHEADS.keys()
    for title, name in OVERHEADS.items():
        row = tables[title][name]
        assert row["problem"] == "" and row["ratios"][0] > 0 and row["others"]["wall ratio"][0] > 0
        assert [line.startswith(title) for line in printed.splitlines()].count(True) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, module", [("Linen", "flax"), ("Equinox", "equinox"), ("Haiku", "haiku"), ("NNX", "flax")]
)
def test_overhead_of_every_library(name, module, tmp_path):
    tables, printed = overhead(tmp_path, "--blocks", "2", "--only", name, "--only", "jaxnet")
    installed = importlib.util.find_spec(module) is not None
    assert len(tables) == 15
    for title, rows in tables.items():
        assert rows["jaxnet"]["problem"] == "", title
        for other in (row for row in rows.values() if name in row["name"]):
            assert other["problem"] == (
                "" if installed else f"skipped: {module} is not installed"
            ), title
    assert "first init, ResNet-50" in printed


@pytest.mark.slow
def test_ensembles_train_alike_in_every_form(tmp_path):
    file, networks = (
        tmp_path / "numbers.json",
        ["--network", "2-2-1", "--batch", "4", "--optimizer", "adam"],
    )
    command = [
        sys.executable,
        BENCHMARKS / "ensembles.py",
        *networks,
        "--members",
        "3",
        "--rounds",
        "1",
        "--seconds",
        "1",
    ]
    done = subprocess.run(
        [*command, "--only", "vmap", "--only", "Python", "--json", file],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (table,) = json.loads(file.read_text())["tables"]
    assert len(table["rows"]) == 3 and not any(row["problem"] for row in table["rows"])
    multiples = [float(cell) for cell in done.stdout.splitlines()[-1].split()[-3:]]
    assert min(multiples) == 1.0


@pytest.mark.slow
def test_the_faults_of_checkpoints_are_counted(tmp_path):
    """A small run: jaxnet loses nothing, and NumPy's savez, which writes in place, does (its zip
    files have checksums).
    """
    flags = "--damages 2 --pages 1 --kills 2 --writers 1 --only numpy --only".split() + [
        "jaxnet save"
    ]
    command = [
        sys.executable,
        BENCHMARKS / "checkpoint_faults.py",
        "--json",
        tmp_path / "numbers.json",
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {
        row["system"]: row for row in json.loads((tmp_path / "numbers.json").read_text())["rows"]
    }
    ours, numpy = rows["jaxnet save"], rows["numpy savez"]
    assert ours["problem"] == numpy["problem"] == "" and "numpy savez " in done.stdout
    assert [ours[kind] for kind in ("tensor", "other", "page", "cut")] == [
        "0/2",
        "0/2",
        "0/1",
        "0/1",
    ]
    assert (ours["own"], ours["foreign"], ours["harmless"]) == ("6", "0", "0")
    assert (
        ours["2 writers"] == "0/0 of 1" and ours["template"] == "16/16" and ours["limit"] == "old"
    )
    assert ours["kill"].startswith("0/") and numpy["limit"] == "LOST"
    if shutil.which("strace"):
        assert ours["kill"] == "0/2" and ours["power"] == "new" and numpy["power"] == "LOST"
        assert int(numpy["kill"].split("/")[0]) >= 1  # an archive that is not whole


LAYERS = {
    "lstm": ("jaxnet", "Haiku", "haiku"),
    "gru": ("jaxnet", "Flax NNX", "flax"),
    "gpt": ("jaxnet, repeat", "Equinox", "equinox"),
    "resnet": ("jaxnet", "Flax Linen", "flax"),
    "separable": ("jaxnet", "Haiku", "haiku"),
    "moe": ("jaxnet, ragged", "Keras", "keras"),
    "linear": ("jaxnet", "Keras", "keras"),
}


@pytest.mark.slow
@pytest.mark.parametrize("row", LAYERS)
def test_layers_of_every_library_give_the_losses_of_the_hand_written_network(row, tmp_path):
    """A competitor without a problem has these losses, forward and over the steps of training."""
    ours, peer, module = LAYERS[row]
    names = ["--only", ours, "--only", peer, "--kind", "forward", "--kind", "step loop"]
    tables = layers(tmp_path, "--row", row, "--steps", "3", *names)
    installed = importlib.util.find_spec(module) is not None
    assert len(tables) == 2
    for rows in tables:
        assert rows[ours]["problem"] == "" and rows[ours]["ratios"][0] > 0
        assert rows[peer]["problem"] == ("" if installed else f"skipped: {module} is not installed")


@pytest.mark.slow
def test_what_depth_costs_is_measured(tmp_path):
    steps, inits = layers(tmp_path, "--row", "deep", "--only", "jaxnet, repeat")
    for rows in (steps, inits):
        assert rows.keys() > {"JAX by hand", "jaxnet, repeat"}
        assert not any(row["problem"] for row in rows.values())
    assert steps["jaxnet, repeat"]["others"]["to 2 layers"][0] > 0


def test_names_of_weights_are_joined_and_stacked(measure):
    """Expected by hand from the two rules in the description of layer_nets.py."""
    nets = importlib.import_module("layer_nets")
    parts = {"x/i": [[1, 2]], "x/f": [[3, 4]], "h/i": [[5, 6]], "h/f": [[7, 8]]}
    weights = {f"{name}/kernel": np.array(value) for name, value in parts.items()}

    def filled(name, weights, transposed=False):
        net = nets.Net(None, None, lambda path: name, transposed)
        slot = np.zeros(sum(value.size for value in weights.values()), np.float32)
        return np.asarray(nets.filled(net, {"w": slot}, weights)["w"])

    both = "{x;h}/[i,f]/kernel"
    assert filled(both, weights).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert filled(both, weights, transposed=True).tolist() == [1, 5, 2, 6, 3, 7, 4, 8]
    copies = {f"{i}/bias": np.array([i, 10 * i]) for i in range(12)}
    assert filled("*/bias", copies).tolist() == [x for i in range(12) for x in (i, 10 * i)]
    with pytest.raises(ValueError, match="the network has no h/f/kernel, h/i/kernel"):
        nets.filled(
            nets.Net(None, None, lambda path: "x/[i,f]/kernel"),
            {"w": np.zeros((1, 4), np.float32)},
            weights,
        )


def test_what_is_too_slow_is_not_called_again(measure):
    task = importlib.import_module("layer_task")
    run = task.patient(lambda: np.float32(1.0), steps=2, patience=-1.0)
    assert run() == run() == 1.0  # the first call compiles, the second is timed
    with pytest.raises(task.SlowError, match=r"0\.00 s a step, so it was not called again"):
        run()


def layers(folder, *flags):
    """The rows of a run of layers.py with tiny networks, by table and name."""
    command = [sys.executable, BENCHMARKS / "layers.py", "--quick", "--rounds", "1", "--seconds"]
    command += ["1", "--json", folder / "x.json"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    tables = json.loads((folder / "x.json").read_text())["tables"]
    return [{row["name"]: row for row in table["rows"]} for table in tables]
