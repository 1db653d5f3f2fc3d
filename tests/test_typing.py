"""What type checkers see: errors in a user's program, the types of public signatures, and mistakes
that are found.
"""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

import jaxnet

HERE = pathlib.Path(__file__).parent
USER, PEER = HERE / "typing_user.py", HERE / "typing_peer.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("pyright"), reason="needs pyright"),
]


def strict(folder: pathlib.Path, *files: pathlib.Path) -> dict[str, list[str]]:
    """The errors of pyright in strict mode, as 'line: text', by the name of the file."""
    for file in files:
        shutil.copy(file, folder / file.name)
    config = {
        "include": [file.name for file in files],
        "extraPaths": [str(HERE.parent)],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.11",
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = ["pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == len(files), done.stdout
    found: dict[str, list[str]] = {file.name: [] for file in files}
    for error in report["generalDiagnostics"]:
        if error["severity"] == "error":
            line = error["range"]["start"]["line"] + 1
            found[pathlib.Path(error["file"]).name].append(f"{line}: {error['message']}")
    return found


def test_the_programs_run(tmp_path, monkeypatch, capsys):
    """Only programs that work are compared."""
    monkeypatch.chdir(tmp_path)
    for file in (USER, PEER):
        if file is PEER and importlib.util.find_spec("equinox") is None:
            continue
        exec(compile(file.read_text(), file.name, "exec"), {"__name__": "user"})
    assert "out/kernel (16, 3)" in capsys.readouterr().out


def test_a_strict_user_sees_at_most_as_many_errors_as_with_equinox(tmp_path):
    if importlib.util.find_spec("equinox") is None:
        pytest.skip("needs equinox")
    found = strict(tmp_path, USER, PEER)
    assert len(found[USER.name]) <= len(found[PEER.name]), found


def test_every_error_that_a_strict_user_sees_comes_from_jax_or_optax(tmp_path):
    """optax has no `py.typed`, `jnp.ones` an unknown argument, and `jax.jit` an unknown result."""
    lines = USER.read_text().splitlines()
    after_jit = lines.index("state, metrics = jax.jit(step)(start, (images, labels))") + 1
    for error in strict(tmp_path, USER)[USER.name]:
        number = int(error.split(":")[0])
        known = (
            "optax" in error
            or "jnp.ones" in lines[number - 1]
            or after_jit <= number <= after_jit + 2
        )
        assert known, error


MISTAKES = """
import jax
import optax
import jaxnet
from jaxnet import chain, dense, wire
from jaxnet.train import fit, many, train_step

jaxnet.dens
jaxnet.checkpoint.lod
jaxnet.ops.convolv
dense("ten")
dense(10).aply
chain([dense(3)])
wire(a=3)
train_step(print, "adam")
many(print, how="vamp")
wire(a=dense(3))(lambda f, x: f.trian + f.train.x)
"""


def test_mistakes_are_found(tmp_path):
    """One error per line after the imports."""
    (tmp_path / "source").mkdir()
    file = tmp_path / "source" / "mistakes.py"
    file.write_text(MISTAKES)
    lines = {int(error.split(":")[0]) for error in strict(tmp_path, file)[file.name]}
    first = MISTAKES.splitlines().index("jaxnet.dens") + 1
    assert lines >= set(range(first, len(MISTAKES.splitlines()) + 1))


PACKAGES = ["core", "data", "checkpoint", "interop", "mixed", "ops", "train", "tree"]


def public_objects() -> set[str]:
    """Where each public function and class is defined, 'jaxnet.layers.linear.dense'."""
    packages = [jaxnet, *(getattr(jaxnet, name) for name in PACKAGES)]
    objects = [getattr(package, name) for package in packages for name in package.__all__]
    return {f"{x.__module__}.{x.__qualname__}" for x in objects if hasattr(x, "__qualname__")}


def test_no_public_signature_has_an_unknown_type():
    """`pyright --verifytypes` lists the types of all names. Those of public functions and public
    attributes count.
    """
    command = [
        "pyright",
        "--outputjson",
        "--pythonpath",
        sys.executable,
        "--verifytypes",
        "jaxnet",
        "--ignoreexternal",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    symbols = json.loads(done.stdout)["typeCompleteness"]["symbols"]
    public, unknown = public_objects(), []
    assert {"jaxnet.layers.linear.dense", "jaxnet.core.contract.Layer"} <= public & {
        x["name"] for x in symbols
    }
    for symbol in symbols:
        home, _, attribute = symbol["name"].rpartition(".")
        counts = symbol["name"] in public or (
            home in public and (attribute[0] != "_" or attribute == "__init__")
        )
        # Without a text of its own, a name repeats what is wrong with another one.
        if counts and not symbol["isTypeKnown"] and symbol["diagnostics"]:
            unknown.append((symbol["name"], [text["message"] for text in symbol["diagnostics"]]))
    assert not unknown
