"""The command line: what it prints (compared whole, since people and scripts read it) and its exit codes."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxnet import __version__
from jaxnet.checkpoint import save
from jaxnet.cli import main

TREE = {
    "params": {"dense": {"kernel": jnp.ones((784, 10), jnp.bfloat16), "bias": jnp.zeros(10)}},
    "key": jax.random.key(0),
    "step": 7,
    "name": "a\x1b[31m\n",
}
TABLE = """
{path}: jaxnet checkpoint, format 1, {size:,} bytes

path                 shape      dtype              parameters   bytes
-------------------  ---------  -----------------  ----------  ------
params/dense/kernel  [784, 10]  bfloat16                7,840  15,680
params/dense/bias    [10]       float32                    10      40
key                  []         key<threefry2x32>           1       8
-------------------  ---------  -----------------  ----------  ------
params/*             2 arrays                           7,850  15,720
total                3 arrays                           7,851  15,728

path  type  value
----  ----  -------------
step  int   7
name  str   'a\\x1b[31m\\n'

metadata: {{
  "accuracy": 0.98
}}
"""


@pytest.fixture
def path(tmp_path):
    save(tmp_path / "t.safetensors", TREE, metadata={"accuracy": 0.98})
    return str(tmp_path / "t.safetensors")


def test_inspect_prints_a_table(path, capsys):
    assert main(["inspect", path]) == 0
    assert capsys.readouterr().out == TABLE.lstrip().format(path=path, size=os.path.getsize(path))


def test_inspect_prints_json(path, capsys):
    assert main(["inspect", "--json", path]) == 0
    got = json.loads(capsys.readouterr().out)
    kernel = {
        "path": "params/dense/kernel",
        "shape": [784, 10],
        "dtype": "bfloat16",
        "nbytes": 15680,
        "parameters": 7840,
    }
    assert got["leaves"][0] == kernel and len(got["leaves"]) == 3
    assert got["scalars"] == {
        "step": {"type": "int", "value": "7"},
        "name": {"type": "str", "value": repr(TREE["name"])},
    }
    rest = {key: got[key] for key in got if key not in ("leaves", "scalars")}
    size = os.path.getsize(path)
    assert rest == {"path": path, "version": 1, "metadata": {"accuracy": 0.98}, "nbytes": size, "parameters": 7851}


def test_inspect_shows_files_of_other_programs_and_escapes_their_names(tmp_path, capsys):
    file = str(tmp_path / "f.safetensors")
    safetensors.numpy.save_file({"a.\x1b[2J\n\u202e": np.ones((2, 3), np.float16)}, file, metadata={"format": "\x07"})
    assert main(["inspect", file]) == 0
    out = capsys.readouterr().out
    assert "safetensors file of another program" in out and r"a.\x1b[2J\n\u202e  [2, 3]    float16" in out
    assert r'"format": "\u0007"' in out and not set(out) & set("\x1b\x07\u202e")


def test_inspect_shows_an_empty_tree_and_a_huge_number(tmp_path, capsys):
    save(tmp_path / "empty", {})
    assert main(["inspect", str(tmp_path / "empty")]) == 0
    assert "total  0 arrays                  0      0" in capsys.readouterr().out
    save(tmp_path / "huge", {"n": 2**20000})  # more digits than Python likes to print
    for arguments, expected in [([], f"n     int   0x1{74 * '0'}..."), (["--json"], f'"0x1{5000 * "0"}"')]:
        assert main(["inspect", *arguments, str(tmp_path / "huge")]) == 0
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, match", [("missing", "No such file"), ("bad", "too few for a safe"), (".", "is a folder")]
)
def test_a_bad_file_gives_one_line_on_stderr_and_code_1(name, match, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_bytes(b"bad")
    assert main(["inspect", name]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("jaxnet inspect: ") and match in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["inspekt", "f"], ["inspect", "f", "--xml"]])
def test_a_wrong_command_gives_code_2(arguments, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)
    assert "usage: jaxnet" in capsys.readouterr().err


def test_version_and_help(capsys):
    for arguments, expected in [(["--version"], f"jaxnet {__version__}"), (["--help"], "exit codes: 0 all is well")]:
        with pytest.raises(SystemExit, match="^0$"):
            main(arguments)
        assert expected in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^0$"):
        main(["inspect", "--help"])
    assert "Only the header is read" in capsys.readouterr().out


def test_as_a_program(path):
    """A real terminal without UTF-8, and a reader that leaves after one line."""
    command = f"{sys.executable} -m jaxnet.cli inspect '{path}'"
    done = subprocess.run(f"{command} | head -1", shell=True, capture_output=True, text=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
    done = subprocess.run(
        f"{command}x", shell=True, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 1 and b"No such file" in done.stderr and b"Traceback" not in done.stderr
