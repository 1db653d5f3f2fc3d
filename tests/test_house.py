"""The house: who may import whom, what an import costs, and the examples in docstrings."""

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import jaxnet

ROOT = pathlib.Path(jaxnet.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# The rooms: each module or folder, and what it may import from the others. A folder's modules may
# import each other.
MAY_IMPORT = {
    "checks": set(),
    "best_rule": set(),
    "first_use": set(),
    "core": {"checks"},
    "numerics": set(),
    "nodes": set(),
    "tree": {"nodes", "numerics"},
    "ops": {"first_use"},
    "data": {"checks"},
    "mixed": set(),
    "combinators": {"checks", "core", "mixed"},
    "layers": {"checks", "combinators", "core", "first_use", "mixed", "ops"},
    "flops": {"core"},
    "transform": {"core", "flops", "tree"},
    "adapt": {"checks", "core", "mixed", "transform", "tree"},
    "checkpoint": {"best_rule", "checks", "first_use", "tree"},
    "interop": {"checks", "tree", "checkpoint"},
    "train": {"checks", "best_rule", "tree", "checkpoint"},
}
EVERYTHING = {"__init__", "cli"}  # the front door and the command line
# A folder may hand on the names of a room above it, for type checkers and when they are asked for,
# never at import.
HANDS_ON = {"jaxnet.checkpoint": {"interop"}}

# Not even loaded with the package: heavy, or optional, or for one function only.
LAZY = {
    "matplotlib",
    "sklearn",
    "orbax",
    "torch",
    "h5py",
    "keras",
    "optax",
    "urllib",
    "safetensors",
    "chex",
    "hypothesis",
    "pytest",
    "flax",
}


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """The room of 'jaxnet.layers.norm' is 'layers', that of 'jaxnet' its front door."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: pathlib.Path) -> list[tuple[str, bool]]:
    """All modules that a file imports, each with whether it does so at the top level, that is,
    outside of functions.
    """
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found = []

    def visit(node, top):
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], node.module or ""]).strip(".")
                if node.level
                else node.module
            )
            # `from jaxnet import tree` imports jaxnet.tree; `from jaxnet.tree import get` imports
            # jaxnet.tree.
            found.extend(
                (f"{base}.{alias.name}" if base == "jaxnet" else base, top) for alias in node.names
            )
        top = top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        # Only type checkers read these imports.
        top = top and not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            visit(child, top)

    visit(ast.parse(path.read_text()), True)
    return found


each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))


@each_file
def test_who_may_import_whom(path):
    home = room(module_name(path))
    guests = {room(name) for name, _ in imports(path) if name.split(".")[0] == "jaxnet"} - {home}
    assert "cli" not in guests, "nothing imports the command line"
    if home not in EVERYTHING:
        assert home in MAY_IMPORT, (
            f"'{home}' is new: give it a place in the table above and in the design"
        )
        forbidden = guests - MAY_IMPORT[home] - HANDS_ON.get(module_name(path), set())
        assert not forbidden, (
            f"{home} may import {MAY_IMPORT[home] or 'nothing of the package'}, not {forbidden}"
        )


@each_file
def test_heavy_and_optional_packages_are_imported_where_they_are_used(path):
    heavy = sorted(name for name, top in imports(path) if top and name.split(".")[0] in LAZY)
    assert not heavy, f"import {heavy} inside the function that needs it"


@each_file
def test_the_package_needs_nothing_that_it_does_not_declare(path):
    declared = {"jax", "jaxlib", "numpy", "optax", "jaxnet"}
    # For plots, real data, files of torch and of Keras.
    optional = {"matplotlib", "sklearn", "torch", "h5py"}
    # An engine for checkpoints, and what it stands on.
    optional |= {"orbax", "tensorstore", "etils"}
    optional |= {"ml_dtypes"}  # NumPy's bfloat16, which jax itself requires
    known = declared | optional | set(sys.stdlib_module_names)
    assert {name.split(".")[0] for name, _ in imports(path)} <= known


def test_the_table_has_no_cycle():
    """A room may be built when all that it imports is there: Kahn's algorithm gets through the
    whole table.
    """
    left = dict(MAY_IMPORT)
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    assert not left


ROOMS_OF_FILES = sorted(path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file())


@pytest.mark.parametrize("home", ROOMS_OF_FILES)
def test_the_modules_of_a_room_import_each_other_in_no_circle(home):
    """Kahn's algorithm, as above. An import inside a function counts, because it may hide a
    circle.
    """
    left = {module_name(path): set() for path in (ROOT / home).glob("*.py")}
    # The front door of a room imports all of its modules.
    del left[f"jaxnet.{home}"]
    for path in (ROOT / home).glob("*.py"):
        if path.name != "__init__.py":
            left[module_name(path)] = {name for name, _ in imports(path)}
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    assert not left, f"a circle is among {sorted(left)}"


@each_file
def test_a_module_has_at_most_350_lines(path):
    """A longer module has two subjects."""
    lines = len(path.read_text().splitlines())
    assert lines <= 350


def test_the_imports_of_a_file_are_found_wherever_they_are(tmp_path, monkeypatch):
    """The parser itself: relative and nested imports, several names, and which are at the top
    level.
    """
    monkeypatch.setitem(globals(), "ROOT", tmp_path / "jaxnet")
    file = tmp_path / "jaxnet" / "layers" / "some.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import os, jax.numpy as jnp\nfrom jaxnet import tree, core\nfrom ..core import "
        "Layer\nfrom . import norm\n"
        "try:\n    import optax\nexcept ImportError: pass\nclass A:\n    import sys\n"
        "def f():\n    import matplotlib.pyplot\n    return lambda: __import__('x')\n"
        "if TYPE_CHECKING:\n    import chex\n"
    )
    top = [
        "os",
        "jax.numpy",
        "jaxnet.tree",
        "jaxnet.core",
        "jaxnet.core",
        "jaxnet.layers",
        "optax",
        "sys",
    ]
    assert imports(file) == [
        *((name, True) for name in top),
        ("matplotlib.pyplot", False),
        ("chex", False),
    ]


def test_importing_the_package_loads_nothing_heavy_and_warns_of_nothing():
    code = "import sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = []
    for imports in ("from jaxnet import *", "import jax"):
        command = [sys.executable, "-W", "error", "-c", f"{imports}; {code}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        loaded.append(set(done.stdout.split()))
    ours = loaded[0] - loaded[1]
    assert "jaxnet" in ours and not ours & LAZY, f"from jaxnet import * loads {sorted(ours & LAZY)}"


@pytest.mark.parametrize("home, rooms", HANDS_ON.items())
def test_what_a_folder_hands_on_is_imported_when_it_is_asked_for(home, rooms):
    (above,) = rooms
    code = f"import sys, {home} as home; print('jaxnet.{above}' in sys.modules); home.from_torch; "
    code += (
        f"print('jaxnet.{above}' in sys.modules, all(hasattr(home, name) for name in home.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "True"], done.stderr


@each_file
def test_no_public_name_hides_a_module(path):
    """`from package import name` gives the same thing, `package.name` imported or not."""
    module = importlib.import_module(module_name(path))
    submodules = {info.name for info in pkgutil.iter_modules(getattr(module, "__path__", []))}
    names = submodules & set(getattr(module, "__all__", []))
    hidden = {name for name in names if not inspect.ismodule(getattr(module, name))}
    assert not hidden, f"{module.__name__} has a public name and a module called {hidden}"


@each_file
def test_the_examples_in_docstrings_are_right(path):
    module = importlib.import_module(module_name(path))
    result = doctest.testmod(module)
    assert result.failed == 0


@each_file
def test_every_public_function_is_exported_and_has_a_docstring(path):
    module = importlib.import_module(module_name(path))
    assert module.__doc__ or path.name == "__init__.py" and not path.read_text().strip()
    for name in getattr(module, "__all__", []):
        assert getattr(getattr(module, name), "__doc__", None), (
            f"{module.__name__}.{name} has no docstring"
        )
