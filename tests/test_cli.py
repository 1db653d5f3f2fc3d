"""The command line: its output (compared whole, because people and scripts read it) and its exit
codes.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxnet
from jaxnet import __version__
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint import places, save, verify
from jaxnet.checkpoint.compare import statistics
from jaxnet.cli import commands, main

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
    assert rest == {
        "path": path,
        "version": 1,
        "metadata": {"accuracy": 0.98},
        "nbytes": size,
        "parameters": 7851,
    }


def test_inspect_shows_files_of_other_programs_and_escapes_their_names(tmp_path, capsys):
    file = str(tmp_path / "f.safetensors")
    safetensors.numpy.save_file(
        {"a.\x1b[2J\n\u202e": np.ones((2, 3), np.float16)}, file, metadata={"format": "\x07"}
    )
    assert main(["inspect", file]) == 0
    out = capsys.readouterr().out
    assert (
        "safetensors file of another program" in out
        and r"a.\x1b[2J\n\u202e  [2, 3]    float16" in out
    )
    assert r'"format": "\u0007"' in out and not set(out) & set("\x1b\x07\u202e")


def test_inspect_shows_an_empty_tree_and_a_huge_number(tmp_path, capsys):
    save(tmp_path / "empty", {})
    assert main(["inspect", str(tmp_path / "empty")]) == 0
    assert "total  0 arrays                  0      0" in capsys.readouterr().out
    # Python refuses to print so many digits.
    save(tmp_path / "huge", {"n": 2**20000})
    for arguments, expected in [
        ([], f"n     int   0x1{74 * '0'}..."),
        (["--json"], f'"0x1{5000 * "0"}"'),
    ]:
        assert main(["inspect", *arguments, str(tmp_path / "huge")]) == 0
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, match, code",
    [("missing", "No such file", 2), ("bad", "too few for a safe", 1), (".", "is a folder", 2)],
)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_bad_file_gives_one_line_on_stderr(
    command, name, match, code, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_bytes(b"bad")
    # The code is 1 if the file is at fault, and 2 if it cannot be opened.
    assert main([command, name]) == code
    out, err = capsys.readouterr()
    assert (
        out
        == {"inspect": "", "verify": f"{name}: {'damaged' if code == 1 else 'unreadable'}\n"}[
            command
        ]
    )
    assert err.startswith(f"jaxnet {command}: ") and match in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["inspect"], ["inspekt", "f"], ["inspect", "f", "--xml"], ["verify"], ["diff", "f"]],
)
def test_a_wrong_command_gives_code_2(arguments, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)
    assert "usage: jaxnet" in capsys.readouterr().err


def test_inspect_shows_statistics_of_the_finite_elements(tmp_path, capsys):
    tree = {
        "x": np.array([-1, 2, np.nan, np.inf], np.float32),
        "n": np.array([np.nan, -np.inf], np.float16),
    }
    tree |= {
        "b": np.array([True, True, False]),
        "k": jax.random.key(0),
        "c": np.ones(1, np.complex64),
        "nothing": np.ones((0, 2)),
    }
    save(tmp_path / "t", tree)
    assert main(["inspect", "--stats", str(tmp_path / "t")]) == 0
    rows = {
        words[0]: words[-5:]
        for line in capsys.readouterr().out.splitlines()
        if (words := line.split())
    }
    # The deviation is that of (-1, 2) from its mean.
    assert rows["x"] == ["-1", "2", "0.5", "1.5", "2"]
    # The deviation is sqrt(2/3 * 1/3).
    assert rows["b"] == ["0", "1", "0.6667", "0.4714", "0"]
    assert rows["n"] == ["-", "-", "-", "-", "2"] and rows["nothing"] == ["-", "-", "-", "-", "0"]
    assert rows["k"] == rows["c"] == ["-"] * 5
    assert main(["inspect", "--stats", "--json", str(tmp_path / "t")]) == 0
    leaves = {leaf["path"]: leaf["stats"] for leaf in json.loads(capsys.readouterr().out)["leaves"]}
    assert (
        leaves["x"] == {"min": -1, "max": 2, "mean": 0.5, "std": 1.5, "nonfinite": 2}
        and leaves["k"] is None
    )


def test_statistics_of_more_than_one_block(tmp_path):
    x = np.random.default_rng(0).normal(3, 2, (1 << 20) + 12345).astype(np.float32)
    got, wide = statistics(x), x.astype(np.float64)
    assert (
        got and (got.min, got.max, got.nonfinite) == (x.min(), x.max(), 0) and got.mean and got.std
    )
    # NumPy's own.
    np.testing.assert_allclose((got.mean, got.std), (wide.mean(), wide.std()), rtol=1e-12)


def test_inspect_can_be_limited_to_patterns(path, capsys):
    assert main(["inspect", path, "--pattern", "**/bias", "--pattern", "step"]) == 0
    out = capsys.readouterr().out
    assert (
        "params/dense/bias" in out
        and "step  int   7" in out
        and "kernel" not in out
        and "name" not in out
    )
    assert "total              1 arrays" in out
    assert main(["inspect", path, "--pattern", "params/dens"]) == 2
    assert (
        "no path matches 'params/dens'; the nearest of 5 are ['params/dense/bias'"
        in capsys.readouterr().err
    )


def damage(path):
    with open(path, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        last = f.read(1)
        f.seek(-1, os.SEEK_END)
        f.write(bytes([last[0] ^ 1]))


def test_verify_goes_through_all_files(path, tmp_path, capsys):
    save(bad := str(tmp_path / "bad"), TREE)
    damage(bad)
    safetensors.numpy.save_file({"a": np.ones(2)}, other := str(tmp_path / "other"))
    assert main(["verify", path, other]) == 0
    assert capsys.readouterr().out == f"{path}: good\n{other}: unchecked\n"
    assert main(["verify", bad, path]) == 1
    out, err = capsys.readouterr()
    assert out == f"{bad}: damaged\n{path}: good\n" and "jaxnet verify: " in err and "CRC-32" in err
    missing = str(tmp_path / "missing")
    assert main(["verify", "--json", path, missing, bad, other]) == 2
    out, err = capsys.readouterr()
    states = [(x["path"], x["state"]) for x in json.loads(out)]
    assert (
        states == [(path, "good"), (missing, "unreadable"), (bad, "damaged"), (other, "unchecked")]
        and err == ""
    )
    assert [x["reason"] is None for x in json.loads(out)] == [True, False, False, False]


DIFF = """
path   differs    A                    B                                         elements  max |A-B|   relative
-----  ---------  -------------------  ----------------------------------------  --------  ---------  ---------
old    only in A  int8[1]              -                                                -          -          -
x      values     float32[2]           float32[2]                                       1          4        0.8
shape  shape      float32[2]           float32[3]                                       -          -          -
dtype  dtype      float32[2]           bfloat16[2]                                      1  0.0009766  0.0006902
zero   values     float64[1]           float64[1]                                       1          0          0
nan    values     float32[2]           float32[2]                                       1        inf        inf
key    values     key<threefry2x32>[]  key<threefry2x32>[]                              1          -          -
impl   dtype      key<threefry2x32>[]  key<rbg>[]                                       -          -          -
n      values     3                    0x10000000000000000000000000000000000...         -          -          -
kind   shape      int                  int32[]                                          -          -          -
new    only in B  -                    str                                              -          -          -
"""  # noqa: E501 (a table as it is printed)


def test_diff_shows_what_differs_and_how_far(tmp_path, capsys):
    key, rbg = jax.random.key(0), jax.random.key(0, impl="rbg")
    # 2^-10 / sqrt(1 + (1 + 2^-10)^2) = 0.00069020.
    pairs: dict[str, Any] = {
        "same": (jnp.array([jnp.nan, 1]), jnp.array([jnp.nan, 1])),
        "also": ("text", "text"),
        "none": (float("nan"), float("nan")),
        "x": (jnp.array([3.0, 4.0]), jnp.array([3.0, 8.0])),  # |(0, 4)| / |(3, 4)| = 0.8
        "shape": (jnp.ones(2), jnp.ones(3)),
        "dtype": (
            jnp.array([1.0, 1 + 2**-10]),
            jnp.ones(2, jnp.bfloat16),
        ),
        # The numbers are equal, but have different bits.
        "zero": (np.zeros(1), -np.zeros(1)),
        "nan": (jnp.array([1.0, 2]), jnp.array([1.0, jnp.nan])),
        "key": (key, jax.random.key(9)),
        "impl": (key, rbg),
        "n": (3, 2**20000),
        "kind": (3, np.int32(3)),
    }
    a = {"old": np.zeros(1, np.int8)} | {path: x for path, (x, _) in pairs.items()}
    b = {path: y for path, (_, y) in pairs.items()} | {"new": "x"}
    files = [str(tmp_path / "a"), str(tmp_path / "b")]
    save(files[0], a)
    save(files[1], dict(reversed(b.items())))
    assert main(["diff", *files]) == 1
    assert capsys.readouterr().out == DIFF.lstrip()
    assert main(["diff", "--json", *files]) == 1
    found = {x["path"]: x for x in json.loads(capsys.readouterr().out)}
    expected = {"path": "x", "what": "values", "a": "float32[2]", "b": "float32[2]", "differing": 1}
    assert found["x"] == expected | {"largest": 4, "relative": 0.8}
    assert found["nan"]["largest"] == "inf" and len(found) == 11
    assert main(["diff", files[0], files[0]]) == 0
    assert capsys.readouterr().out == "the leaves are equal, bit for bit\n"
    assert main(["diff", "--json", files[1], files[1]]) == 0
    assert capsys.readouterr().out == "[]\n"


def test_diff_of_more_than_one_block(tmp_path, capsys):
    x = np.arange((1 << 20) + 10, dtype=np.float64)
    y = x.copy()
    y[[5, -1]] += 0.5
    save(tmp_path / "a", {"x": x})
    save(tmp_path / "b", {"x": y})
    assert main(["diff", "--json", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["differing"], found["largest"]) == (2, 0.5)
    np.testing.assert_allclose(
        found["relative"], np.linalg.norm(x - y) / np.linalg.norm(x), rtol=1e-9
    )


def test_diff_of_a_damaged_or_missing_file_is_trouble_and_not_a_difference(path, tmp_path, capsys):
    save(bad := str(tmp_path / "bad"), TREE)
    damage(bad)
    assert main(["diff", path, bad]) == 2 and main(["diff", bad, path]) == 2
    assert "CRC-32" in capsys.readouterr().err
    assert main(["diff", path, str(tmp_path / "missing")]) == 2


def test_version_and_help(capsys):
    for arguments, expected in [
        (["--version"], f"jaxnet {__version__}"),
        (["--help"], "exit codes: 0 success, or no differences"),
    ]:
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
        f"{command}x",
        shell=True,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (
        done.returncode == 2 and b"No such file" in done.stderr and b"Traceback" not in done.stderr
    )


def run(command, **options):
    """Run a line of bash in which $J is the program, as `set -o pipefail` has it."""
    lines = f"set -o pipefail; J='{sys.executable} -m jaxnet.cli'; {command}"
    return subprocess.run(
        ["bash", "-c", lines], capture_output=True, text=True, timeout=120, **options
    )


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "command, code",
    [
        ("$J diff a b | head -1", 1),
        ("$J verify bad | true", 1),
        ("$J verify bad 2>&1 | true", 1),
        ("$J verify a bad a | head -1", 1),
        ("$J verify a missing bad | true", 2),
        ("$J inspect a | true", 0),
        ("$J --help | true", 0),
        ("$J diff a a | true", 0),
        ("$J inspect a >&-", 0),
        ("$J verify bad >&- 2>&-", 1),
        ("$J diff a b <&- >&- 2>&-", 1),
        ("$J inspect a >/dev/full", 2),
        ("$J inspect http://x/y", 2),
        ("$J verify s3:// a", 2),
        ("$J verify bad s3://bucket", 2),
        ("$J diff a gs://bucket", 2),
    ],
)
def test_the_exit_code_outlives_the_reader(command, code, tmp_path):
    save(tmp_path / "a", {f"x{i}": np.full(3, i) for i in range(5)})
    save(tmp_path / "b", {f"x{i}": np.full(3, i + 1) for i in range(5)})
    save(tmp_path / "bad", TREE)
    damage(str(tmp_path / "bad"))
    done = run(command, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_closed_stream_is_not_the_file_that_is_written(tmp_path):
    """The system gives the number of a closed stream to the next file, and the output must not end
    up there.
    """
    save(tmp_path / "a", {"x": np.arange(3)})
    assert run("$J convert a b >&- 2>&-", cwd=tmp_path).returncode == 0
    assert verify(tmp_path / "b").leaves[0].path == "x"


EVIL = "o\x1b[31m\a\r\nforged\x9b\u202e"


@pytest.mark.parametrize(
    "arguments",
    [
        # The target exists.
        ["convert", "a", EVIL],
        ["convert", "a", "b", "--rename", EVIL],
        ["convert", "a", "b", EVIL],
        ["convert", "a", "gs://" + EVIL],
        ["convert", "a", "b", "--from", EVIL],
        ["inspect", EVIL + "missing"],
        ["inspect", EVIL],
        ["verify", EVIL],
        ["verify", "http://" + EVIL],
        ["diff", "a", EVIL],
        ["inspect", "a", "--pattern", EVIL],
        ["convert", "a", "b", "--rename", EVIL + "=x"],
        [EVIL],
    ],
)
def test_nothing_raw_reaches_the_terminal(arguments, tmp_path, monkeypatch, capsys):
    save(tmp_path / "a", {"x": np.arange(3)})
    save(tmp_path / EVIL, {EVIL: np.arange(3), "more" + EVIL: EVIL}, metadata={EVIL: EVIL})
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):
        main(arguments)
    text = "".join(capsys.readouterr())
    assert text and all(c.isprintable() or c == "\n" for c in text)
    assert "\nforged" not in text and "Traceback" not in text


def test_json_is_json_whatever_a_file_holds(tmp_path, capsys):
    """1e999 is a number in JSON and infinity in Python, whose json would write a word that JSON
    does not have.
    """
    header = fmt.write_header(
        "", [], {"version": 1, "metadata": {"x": [123456]}, "tree": ["dict", []], "crc32": []}
    )
    raw = header[8:].replace(b"123456", b"-1e999")
    (tmp_path / "x").write_bytes(
        len(raw).to_bytes(8, "little") + fmt.with_digest(raw, fmt.digest_of(raw))
    )
    assert main(["inspect", "--json", str(tmp_path / "x")]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(word))
    assert found["metadata"] == {"x": ["-inf"]}


def test_an_object_store_out_of_reach_is_said_in_time(monkeypatch, capsys):
    pytest.importorskip("tensorstore")
    # The default is half a minute.
    monkeypatch.setattr(places, "ANSWER", 0.2)
    assert main(["inspect", "gs://jaxnet-no-such-bucket/x"]) == 2
    text = capsys.readouterr().err
    assert "does not answer in time: is there a network" in text or "the object store says" in text


def test_what_nobody_has_foreseen_is_no_damage(path, monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(commands, "as_text", broken)
    assert main(["inspect", path]) == 2
    assert "ZeroDivisionError: by zero" in capsys.readouterr().err


def test_inspect_and_verify_need_only_the_standard_library(tmp_path):
    """The front door of the package is left out, and JAX and NumPy cannot be imported."""
    save(tmp_path / "a", {"w": np.ones(3), "step": 1})
    code = """
import sys, types
front = types.ModuleType("jaxnet")
front.__path__, front.__version__ = [sys.argv[1]], "0"
sys.modules |= {"jaxnet": front, "jax": None, "numpy": None, "ml_dtypes": None}
from jaxnet.cli import main
sys.exit(main(["inspect", sys.argv[2]]) or main(["verify", sys.argv[2]]))
"""
    room = pathlib.Path(jaxnet.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(room), str(tmp_path / "a")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "float64" in done.stdout and f"{tmp_path / 'a'}: good" in done.stdout
