"""The README: its code runs, its commands exist, its figures are those of the benchmarks."""

import os
import re
import shutil
import subprocess
import tomllib

import pages
import pytest
from pages import ROOT

README = (ROOT / "README.md").read_text()
PROGRAMS = pages.programs("README.md")
COMMANDS = [block.text for block in pages.blocks_of(README) if block.language == "bash"]


def test_the_first_screen_has_a_program_of_twenty_lines():
    (first,) = PROGRAMS["program 1"]
    assert len([line for line in first.text.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("title", PROGRAMS)
def test_code_blocks_run(title, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pages.run("README.md", PROGRAMS[title])
    promised = re.search(r"print\(.*\)  # ([\d.]+%)$", PROGRAMS[title][0].text, re.M)
    if promised:
        printed = float(capsys.readouterr().out.split()[-1].rstrip("%"))
        # Other processors round otherwise.
        assert abs(printed - float(promised[1].rstrip("%"))) < 1.5


def test_its_first_figures_are_those_of_the_tables():
    """Damages, kills and times of the first screen, from the outputs on the pages that it names."""
    reliability = (ROOT / "docs" / "reliability.md").read_text()
    damages = re.findall(r"'damages': (\d+),.*; 0 silent", reliability)
    kills = re.search(r"kills: \{(.*)\}, none lost", reliability)
    assert kills and f"{sum(map(int, damages)):,} random damages" in README
    killed = sum(map(int, re.findall(r": (\d+)", kills[1])))
    assert f"{killed} kills" in README
    loops = (ROOT / "benchmarks" / "README.md").read_text().partition("Convnet 28x28x1 of")[2]
    times = {
        name: float(re.search(rf"^{name}\W.*?(\d+\.\d)  \[", loops, re.M)[1])  # type: ignore[index]
        for name in (
            "jaxnet, train_epoch",
            "Haiku",
            "Flax Linen",
            "Flax NNX",
            "Keras fit",
            "Equinox",
        )
    }
    own = times.pop("jaxnet, train_epoch")
    assert f"{own:.1f} ms per step" in README and min(times.values()) > 3 * own
    assert f"{min(times.values()):.0f} to {max(times.values()):.0f} ms" in README


def test_its_commands_name_what_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    train, test = COMMANDS
    for extra in re.findall(r"\.\[(\w+)\]", README) + re.findall(r"extra `(\w+)`", README):
        assert extra in extras
    assert "examples/digits.py" in train and test.rstrip().endswith("-m pytest")
    gate = (ROOT / ".ci" / "run").read_text()
    assert (
        "pip install --quiet --editable '.[test]'" in gate and "python -m pytest" in gate
    )  # the second command, in CI


def test_every_public_name_in_its_table_exists():
    import jaxnet
    from jaxnet import adapt, data, train, tree

    rows = re.findall(
        r"^\| (compose|layers|adapt|see and change|train|keep|data) \| (.*) \|$", README, re.M
    )
    names = {name for _, cell in rows for name in re.findall(r"`(\w+)`", cell)}
    assert (
        len(rows) == 7
        and {n for n in names if not any(hasattr(m, n) for m in (jaxnet, adapt, data, train, tree))}
        == set()
    )
    missing = set(jaxnet.__all__) - names - {"Layer", "checkpoint"}
    assert not missing, f"public, but not in the README: {missing}"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=["train", "test"])
def test_the_commands_work_as_printed_in_a_fresh_clone(command, tmp_path):
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "jaxnet"], check=True)
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("VIRTUAL_ENV", "PYTHONPATH")
    }
    run = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path / "jaxnet", env=clean, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert ("every prediction is identical" if "digits.py" in command else " passed") in run.stdout
