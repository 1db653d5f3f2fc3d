"""The README: its code runs, its commands exist, its figures are those of the benchmarks."""

import os
import pathlib
import re
import shutil
import subprocess
import tomllib
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
# One program.
TRAINING = "".join(
    re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.S)
)
COMMANDS = re.findall(r"```bash\n(.*?)```", README, re.S)


def test_the_first_screen_has_a_program_of_twenty_lines():
    assert len([line for line in PYTHON[0].splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.strip().splitlines()[-1][:30])
def test_code_blocks_run(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    promised = re.search(r"print\(.*\)  # ([\d.]+%)$", code, re.M)
    if promised:
        printed = float(capsys.readouterr().out.split()[-1].rstrip("%"))
        # Other processors round otherwise.
        assert abs(printed - float(promised[1].rstrip("%"))) < 1.5


def test_the_program_in_the_training_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "training"}
    exec(compile(TRAINING, "training.md", "exec"), scope)
    assert scope["run"].best.value > 0.8 and (tmp_path / "curves.png").exists()


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


def test_its_links_lead_somewhere():
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "benchmarks" / "README.md",
    ]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), (
                f"{page.name} links to {link}"
            )


def test_every_public_name_in_its_table_exists():
    import jaxnet
    from jaxnet import data, train, tree

    rows = re.findall(
        r"^\| (compose|layers|see and change|train|keep|data) \| (.*) \|$", README, re.M
    )
    names = {name for _, cell in rows for name in re.findall(r"`(\w+)`", cell)}
    assert (
        len(rows) == 6
        and {n for n in names if not any(hasattr(m, n) for m in (jaxnet, data, train, tree))}
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
