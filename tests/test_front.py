"""The front door: what `import jaxnet` and the command line load; how public names are found."""

import ast
import importlib
import json
import pathlib
import pickle
import pydoc
import subprocess
import sys

import pytest

import jaxnet
from jaxnet.first_use import resolver

GOLDEN = pathlib.Path(__file__).parent / "golden"
# Packages that are found as attributes of jaxnet without `from jaxnet import *` giving them.
FOR_AUTHORS = {"combinators", "core", "mixed", "ops", "transform"}
PACKAGES = ["jaxnet", "jaxnet.checkpoint", "jaxnet.layers", "jaxnet.ops"]


def loaded_by(code: str) -> set[str]:
    """The modules that a new process has loaded after this code."""
    code += "\nimport sys; sys.stderr.write('\\n' + ' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def run_cli(*arguments) -> str:
    return f"from jaxnet.cli import main\nassert main({[str(x) for x in arguments]!r}) == 0"


def test_import_jaxnet_loads_nothing_of_it():
    loaded = loaded_by("import jaxnet; dir(jaxnet); jaxnet.__version__")
    assert {name for name in loaded if name.startswith("jax")} == {"jaxnet", "jaxnet.first_use"}
    # These take longer to import than jaxnet itself. Python alone loads none of them.
    slow = {"numpy", "typing", "re", "collections", "inspect", "dataclasses"}
    assert not loaded & slow - loaded_by("")


@pytest.mark.parametrize(
    "code",
    [
        "import jaxnet.checkpoint, jaxnet.interop",
        "from jaxnet import load, save",
        "import jaxnet.checkpoint as c; [getattr(c, name) for name in c.__all__]",
        "import jaxnet.cli",
        *(
            run_cli(command, *options, GOLDEN / file)
            for command, *options in [("inspect",), ("inspect", "--json"), ("verify",)]
            for file in [
                "v1_structure.safetensors",
                "v1_dtypes.safetensors",
                "v2_parts.safetensors",
            ]
        ),
        run_cli("inspect", GOLDEN / "v3_orbax.safetensors"),
    ],
)
def test_checkpoints_are_inspected_and_verified_without_jax_and_numpy(code):
    assert not {"jax", "jaxlib", "numpy", "optax", "jaxnet.tree"} & loaded_by(code)


def test_the_data_room_loads_numpy_alone():
    loaded = loaded_by("from jaxnet.data import batches, mnist")
    assert "numpy" in loaded and "jax" not in loaded


def test_the_layers_load_neither_training_nor_checkpoints():
    code = "from jaxnet import Layer, chain, conv, dense, repeat, summary, wire"
    loaded = loaded_by(code) - loaded_by("import jax")
    rooms = {name.split(".")[1] for name in loaded if name.startswith("jaxnet.")}
    assert not rooms & {"checkpoint", "cli", "data", "interop", "train"}
    # `jax.extend` loads Pallas, which takes longer than all of these. The first `init` needs it.
    assert not {name for name in loaded if name.startswith(("jax.extend", "jax._src.pallas"))}


@pytest.mark.parametrize("name", PACKAGES)
def test_the_table_the_imports_for_type_checkers_and_all_agree(name):
    """One name has one home, in three places that Python, type checkers and `import *` read."""
    package = importlib.import_module(name)
    at_once, checked = {}, {}
    for node in ast.parse(pathlib.Path(str(package.__file__)).read_text()).body:
        if isinstance(node, ast.ImportFrom):
            at_once |= homes_of(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for inner in node.body:
                assert isinstance(inner, ast.ImportFrom)
                checked |= homes_of(inner)
    assert package._HOMES == checked
    assert list(package._HOMES) == sorted(package._HOMES)
    public = {
        public
        for public, home in at_once.items()
        if home.startswith(f"{name}.") and public != "resolver"
    }
    public |= set(package._HOMES) - (FOR_AUTHORS if name == "jaxnet" else set())
    assert package.__all__ == sorted(public, key=lambda name: (not name[0].isupper(), name))
    assert dir(package) == sorted(package.__all__)


def homes_of(node: ast.ImportFrom) -> dict[str, str]:
    """The module of each imported name: `from jaxnet import tree` imports jaxnet.tree."""
    names = [alias.name for alias in node.names]
    return {
        name: f"jaxnet.{name}" if node.module == "jaxnet" else str(node.module) for name in names
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_is_resolved_once(package):
    """It is the object of its home, and afterwards an attribute: nothing is looked up again."""
    code = f"""
import {package} as package, sys, json
before = sorted(set(package._HOMES) & set(vars(package)))
found = {{name: getattr(package, name) for name in package._HOMES}}
homes = {{name: sys.modules[home] for name, home in package._HOMES.items()}}
same = all(found[name] is getattr(home, name, home) for name, home in homes.items())
print(json.dumps([before, same, found.keys() <= vars(package).keys()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(done.stdout) == [[], True, True], done.stderr


def test_every_room_is_an_attribute():
    """`import jaxnet; jaxnet.mixed.add_bias` needs no import of jaxnet.mixed."""
    rooms = {
        path.stem
        for path in pathlib.Path(str(jaxnet.__file__)).parent.iterdir()
        if not path.stem.startswith("_")
    }
    inner = {"best_rule", "checks", "cli", "first_use", "flops", "nodes", "numerics", "py"}
    assert rooms - inner == {
        name for name, home in jaxnet._HOMES.items() if home == f"jaxnet.{name}"
    }
    code = (
        "import jaxnet; assert all(getattr(jaxnet, room).__name__ == f'jaxnet.{room}' for room in "
        + f"{rooms - inner})"
    )
    assert "jaxnet.mixed" in loaded_by(code)


def test_a_star_import_gives_every_public_name():
    code = """
import jaxnet
from jaxnet import *
assert all(globals()[name] is getattr(jaxnet, name) for name in jaxnet.__all__)
"""
    loaded = loaded_by(code)
    assert "jaxnet.train" in loaded and "optax" not in loaded


def test_threads_find_the_same_objects():
    """All begin at once, in a process in which nothing is imported yet."""
    code = """
import jaxnet, threading
start, found = threading.Barrier(8), []
def work():
    start.wait()
    found.append([id(getattr(jaxnet, name)) for name in jaxnet.__all__])
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads], [t.join() for t in threads]
print(len(found), len(set(map(tuple, found))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["8", "1"], done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_that_does_not_exist_is_answered_as_python_does(package):
    module = importlib.import_module(package)
    with pytest.raises(
        AttributeError, match=f"^module '{package}' has no attribute 'dens'$"
    ) as caught:
        module.dens  # noqa: B018
    # From these, the traceback proposes the closest name.
    assert (caught.value.name, caught.value.obj) == ("dens", module)
    assert not hasattr(module, "__wrapped__")  # doctest asks for it
    with pytest.raises(ImportError, match="cannot import name 'dens'"):
        exec(f"from {package} import dens")


def test_the_traceback_proposes_the_closest_name():
    done = subprocess.run(
        [sys.executable, "-c", "import jaxnet; jaxnet.dens"], capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == (
        "AttributeError: module 'jaxnet' has no attribute 'dens'. Did you mean: 'dense'?"
    )


def test_an_error_in_a_home_is_shown_as_it_is(tmp_path, monkeypatch):
    """A missing dependency is no missing attribute: `hasattr` must not swallow it."""
    (tmp_path / "broken_home.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        resolver("jaxnet", {"broken": "broken_home"})("broken")


def test_help_shows_every_public_name():
    text = pydoc.plain(pydoc.render_doc(jaxnet))
    assert "dense(" in text and "class Layer(" in text and "0.1.0" in text


def test_layers_are_pickled_by_the_call_that_made_them():
    net = jaxnet.chain(jaxnet.dense(3), out=jaxnet.dense(2))
    assert repr(pickle.loads(pickle.dumps(net))) == repr(net)
    assert pickle.loads(pickle.dumps(jaxnet.dense)) is jaxnet.dense


def test_a_network_works_when_only_the_front_door_is_imported():
    code = (
        "import jaxnet; import jax.numpy as jnp; import jax\n"
        "net = jaxnet.chain(jaxnet.dense(3)); x = jnp.ones((2, 4))\n"
        "assert jaxnet.tree.count(net.init(jax.random.key(0), x)) == 15"
    )
    assert "jax.extend" in loaded_by(code)
