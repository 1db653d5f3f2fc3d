"""The docstrings of all public names, as a parser of Google style reads them.

A name is public if a package or one of MODULES has it in `__all__`. The rules:

1. griffe understands every section: it has no findings, and no section header is left in plain
   text. Sections are separated by blank lines, and each header stands on its own line.
2. `Args:` lists every argument of the signature once, in the order of the signature and under its
   own name (`*layers` with its star), and nothing else. The arguments of a class are those of its
   `__init__`. A dataclass or a NamedTuple has `Attributes:` instead, which lists its public fields.
3. A function that returns something has `Returns:`, a generator or a context manager `Yields:`. All
   arguments and results are annotated.
4. Shapes stand in brackets, as in `x: the input, [..., D]`. An argument takes arrays if its
   annotation says so (`jax.Array`, `np.ndarray`; not inside `Callable[...]`), or if it is one of
   ARRAYS. Its description has a shape, or calls it a scalar or a PRNG key. The same holds for
   `Returns:` if the function returns an array. The docstring of a function in `jaxnet.layers` that
   returns a Layer has a shape, because the layer takes arrays.
5. Public methods and properties of public classes follow the same rules. A property needs a
   docstring only.
"""

import ast
import importlib
import logging
import pathlib
import pkgutil
import re

import griffe
import pytest

import jaxnet

ROOT = pathlib.Path(jaxnet.__file__).parent

# Public modules that are not packages.
MODULES = ["jaxnet.mixed"]

# Arguments that are arrays by their name, whatever the annotation.
ARRAYS = {"array", "images", "kernel", "labels", "positions", "sequence", "x"}

# Fields of the docstring site's parser: the text of `Returns:` is one paragraph, not a list.
OPTIONS = {"returns_multiple_items": False}

SECTIONS = "Args|Arguments|Attributes|Example|Examples|Raises|Returns|Source|Yields"
HEADER = re.compile(rf"\s*(?:(?:{SECTIONS})(?:, | and )?)+:(?P<rest>.*)")
SHAPE = re.compile(r"(?<![\w\]])\[[^\[\]]*\]|\bscalar\b|\bPRNG key")
ANNOTATED_ARRAY = re.compile(r"\b(Array|ArrayLike|ndarray)\b")
NOTHING = {"None", "NoReturn", "Never"}


def public_modules() -> list[str]:
    packages = [
        info.name for info in pkgutil.walk_packages(jaxnet.__path__, "jaxnet.") if info.ispkg
    ]
    return ["jaxnet", *packages, *MODULES]


def public_names() -> dict[str, griffe.Object]:
    """The definitions of all public names by path; a definition of several public paths has the
    first one.
    """
    loader = griffe.GriffeLoader(search_paths=[ROOT.parent], allow_inspection=False)
    package = loader.load("jaxnet")
    loader.resolve_aliases(implicit=True, external=False)
    names, known = {}, set()
    for module in sorted(public_modules(), key=lambda name: (name == "jaxnet", name)):
        for name in getattr(importlib.import_module(module), "__all__", ()):
            found = package[f"{module}.{name}".removeprefix("jaxnet.")]
            found = found.final_target if isinstance(found, griffe.Alias) else found
            if found.kind in (griffe.Kind.CLASS, griffe.Kind.FUNCTION) and found.path not in known:
                known.add(found.path)
                names[f"{module}.{name}"] = found
    return names


NAMES = public_names()


class Findings(logging.Handler):
    def __init__(self):
        super().__init__(logging.DEBUG)
        self.texts: list[str] = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def parsed(thing: griffe.Object) -> tuple[dict[str, griffe.DocstringSection], list[str]]:
    """The sections of a docstring by kind, and what is wrong with its form."""
    assert thing.docstring is not None
    logger, findings = logging.getLogger("griffe"), Findings()
    level = logger.level
    logger.addHandler(findings)
    logger.setLevel(logging.DEBUG)
    try:
        sections = thing.docstring.parse(griffe.Parser.google, **OPTIONS)
    finally:
        logger.removeHandler(findings)
        logger.setLevel(level)
    problems = [
        text.partition(": ")[2] or text
        for text in findings.texts
        if not text.startswith("Base class ")  # of Python or another library
    ]
    by_kind = {}
    for section in sections:
        kind = section.kind.value
        if kind == "text":
            for line in section.value.splitlines():
                header = HEADER.fullmatch(line)
                # "Source: Author, title" is a paragraph; all other headers open a section.
                if header and not (line.startswith("Source: ") and header["rest"].strip()):
                    problems.append(f"a section that does not parse: {line.strip()!r}")
        elif kind != "admonition" and kind in by_kind:
            problems.append(f"two sections of {kind}")
        by_kind[kind] = section
    return by_kind, problems


def problems_of(thing: griffe.Object) -> list[str]:
    if thing.docstring is None:
        return ["no docstring"]
    sections, problems = parsed(thing)
    if isinstance(thing, griffe.Class):
        return problems + problems_of_class(thing, sections)
    assert isinstance(thing, griffe.Function)
    problems += problems_of_arguments(thing.parameters, sections)
    problems += problems_of_result(thing, sections)
    if thing.path.startswith("jaxnet.layers.") and str(thing.returns) == "Layer":
        if not SHAPE.search(thing.docstring.value):
            problems.append("a layer without the shapes of its inputs and outputs in brackets")
    return problems


def problems_of_arguments(parameters: griffe.Parameters, sections) -> list[str]:
    given = [p for p in parameters if p.name not in ("self", "cls")]
    expected = [_starred(p) for p in given]
    items = sections["parameters"].value if "parameters" in sections else []
    listed = [item.name for item in items]
    if expected != listed:
        return [f"Args: has {listed}, the signature {expected}"]
    problems = []
    for parameter, item in zip(given, items, strict=True):
        annotation = str(parameter.annotation or "")
        if not annotation:
            problems.append(f"'{parameter.name}' has no annotation")
        takes_array = _is_array(annotation) or parameter.name in ARRAYS
        if takes_array and not SHAPE.search(item.description):
            problems.append(f"'{parameter.name}' is an array without a shape in brackets")
        if not item.description.strip():
            problems.append(f"'{parameter.name}' has no description")
    return problems


def _is_array(annotation: str) -> bool:
    return not annotation.startswith("Callable") and bool(ANNOTATED_ARRAY.search(annotation))


def _starred(parameter: griffe.Parameter) -> str:
    stars = {
        griffe.ParameterKind.var_positional: "*",
        griffe.ParameterKind.var_keyword: "**",
    }
    return stars.get(parameter.kind or griffe.ParameterKind.positional_only, "") + (
        parameter.name.lstrip("*")
    )


def problems_of_result(function: griffe.Function, sections) -> list[str]:
    returned = str(function.returns or "")
    if not returned:
        return ["the result has no annotation"]
    if returned in NOTHING:
        return ["Returns: of a function without a result"] if "returns" in sections else []
    yields = "yield" in function.source.split() and _is_generator(function)
    kind = "yields" if yields else "returns"
    if kind not in sections:
        return [f"no {kind.capitalize()}: section"]
    items = sections[kind].value
    problems = [f"{kind.capitalize()}: has {len(items)} items"] if len(items) != 1 else []
    text = " ".join(item.description for item in items)
    if _is_array(returned) and not SHAPE.search(text):
        problems.append(f"{kind.capitalize()}: an array without a shape in brackets")
    return problems


def _is_generator(function: griffe.Function) -> bool:
    tree = ast.parse(_dedented(function.source))
    nodes = list(ast.iter_child_nodes(tree.body[0]))
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Yield | ast.YieldFrom):
            return True
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return False


def _dedented(source: str) -> str:
    first = next(line for line in source.splitlines() if line.strip())
    indent = len(first) - len(first.lstrip())
    return "\n".join(line[indent:] for line in source.splitlines())


def problems_of_class(thing: griffe.Class, sections) -> list[str]:
    members = {
        name: member.final_target if isinstance(member, griffe.Alias) else member
        for name, member in thing.all_members.items()
        if not name.startswith("_")
    }
    attributes = {n: m for n, m in members.items() if isinstance(m, griffe.Attribute)}
    listed = {
        kind: [item.name for item in sections[kind].value] if kind in sections else []
        for kind in ("attributes", "parameters")
    }
    problems = []
    # The arguments of a dataclass are its attributes. The parser does not see all attributes that
    # an `__init__` sets.
    written = "__init__" in thing.members and "dataclass" not in thing.labels
    if written:
        problems += problems_of_arguments(thing["__init__"].parameters, sections)
    for name, member in attributes.items():
        if name not in [*listed["attributes"], *listed["parameters"]] and member.docstring is None:
            problems.append(f"the attribute '{name}' is in no section and has no docstring")
    for name in listed["attributes"]:
        if name not in attributes and not written:
            problems.append(f"Attributes: has '{name}', which the class has not")
    for name, member in members.items():
        if isinstance(member, griffe.Function):
            problems += [f".{name}: {problem}" for problem in problems_of(member)]
    return problems


@pytest.mark.parametrize("name", NAMES)
def test_docstring(name):
    problems = problems_of(NAMES[name])
    assert not problems, "\n".join([f"{NAMES[name].path}:", *problems])


def test_every_public_package_is_found():
    """The expected packages are those of the design's table."""
    rooms = {"core", "combinators", "layers", "ops", "data"}
    rooms |= {"train", "checkpoint", "interop", "cli"}
    assert {f"jaxnet.{room}" for room in rooms} <= set(public_modules())
    assert {"jaxnet.data.batches", "jaxnet.ops.convolve", "jaxnet.tree.get"} <= NAMES.keys()


RETURNS = "\n\nReturns:\n  y, [N]."
INPUT = "Do.\n\nArgs:\n  x: the input, [N]."
BAD = {
    "no section": ("x: jax.Array", "Do.\n\nArgs, Returns: as `g`.", "does not parse"),
    "no blank line": ("x: jax.Array", f"{INPUT}\nReturns:\n  y, [N].", "does not parse"),
    "one line": ("", "Do.\n\nReturns: y, a scalar.", "does not parse"),
    "missing": ("x: jax.Array, n: int", INPUT + RETURNS, r"signature \['x', 'n'\]"),
    "another": ("x: jax.Array", f"{INPUT}\n  n: none.{RETURNS}", r"Args: has \['x', 'n'\]"),
    "a pair": ("x: int, y: int", f"Do.\n\nArgs:\n  x, y: two.{RETURNS}", r"has \['x, y'\]"),
    "no star": ("*x: jax.Array", INPUT + RETURNS, r"Args: has \['x'\]"),
    "no shape": ("x: jax.Array", f"Do.\n\nArgs:\n  x: it.{RETURNS}", "'x' is an array"),
    "an index": ("x: jax.Array", f"Do.\n\nArgs:\n  x: as x[n].{RETURNS}", "'x' is an array"),
    "a name": ("x: Any", f"Do.\n\nArgs:\n  x: it.{RETURNS}", "'x' is an array"),
    "no result": ("", "Do.", "no Returns"),
    "no shape of the result": ("", "Do.\n\nReturns:\n  y.", "Returns: an array"),
    "no annotation": ("n", f"Do.\n\nArgs:\n  n: one.{RETURNS}", "'n' has no annotation"),
}


@pytest.mark.parametrize("signature, docstring, finding", BAD.values(), ids=BAD)
def test_the_rules_find_what_is_wrong(signature, docstring, finding):
    text = docstring.replace("\n", "\n    ")
    code = f'def f({signature}) -> jax.Array:\n    """{text}\n    """\n'
    with griffe.temporary_visited_module(code) as module:
        problems = problems_of(module["f"])
    assert any(re.search(finding, problem) for problem in problems), problems


def test_the_rules_accept_a_good_docstring():
    code = '''
class Point(NamedTuple):
    """A point.

    Attributes:
      x: the first coordinate.
    """

    x: float

    def move(self, by: jax.Array, *rest: int, **named: int) -> jax.Array:
        """Move it.

        The equation: y = x + by.

        Source: Somebody, "Title", 2020.

        Args:
          by: the way, [2], which
            goes on.
          *rest: more.
          **named: more by name.

        Returns:
          The point, a pair of
          numbers [2].

        Raises:
          ValueError: it cannot move.

        Example:
          >>> 1
          1
        """
'''
    with griffe.temporary_visited_module(code) as module:
        assert problems_of(module["Point"]) == []
