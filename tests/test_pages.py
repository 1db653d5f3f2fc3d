"""The documentation: its programs run, its links lead somewhere, it builds without a warning."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import types
from typing import Any

import pages
import pytest
from pages import ROOT, all_pages, blocks_of, programs

import jaxnet

# The other files that run the programs of a page, and compare their numbers with other libraries.
ELSEWHERE = {"README.md": "test_readme.py", "docs/recipes.md": "test_recipes.py"}

each_page = pytest.mark.parametrize("page", all_pages())


def check_training(scope: dict[str, Any]) -> None:
    assert scope["run"].best.value > 0.8 and os.path.exists("curves.png")


def check_checkpoints(scope: dict[str, Any]) -> None:
    assert sorted(os.listdir("run")) == [f"step_{step:08d}.safetensors" for step in (2, 4, 5)]
    assert scope["tuned"]["body"]["bias"].shape == (3,)


# What a page's program leaves behind, beyond what its own blocks assert.
AFTERWARDS = {"docs/training.md": check_training, "docs/checkpoints.md": check_checkpoints}


@pytest.mark.parametrize(
    "page", [page for page in all_pages() if page not in ELSEWHERE and programs(page)]
)
def test_the_programs_of_a_page_run_and_print_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for blocks in programs(page).values():
        scope = pages.run(page, blocks)
        AFTERWARDS.get(page, lambda scope: None)(scope)


def test_the_programs_of_all_other_pages_run_elsewhere():
    for page, file in ELSEWHERE.items():
        assert "pages.run" in (ROOT / "tests" / file).read_text(), f"{file} does not run {page}"


@pytest.mark.parametrize("page", AFTERWARDS)
def test_what_is_checked_afterwards_is_there(page):
    assert page in all_pages() and page not in ELSEWHERE


LANGUAGES = {"python", "pycon", "bash", "text", "json", "toml", "{toctree}", "{eval-rst}"}


@each_page
def test_every_block_says_what_it_is_so_that_no_program_is_left_out(page):
    unknown = {block.language for block in blocks_of((ROOT / page).read_text())} - LANGUAGES
    assert not unknown, f"{page} has blocks of {unknown}"


SESSION = """\
>>> 1 + 1
2
>>> int('x')
Traceback (most recent call last):
ValueError: invalid ... 'x'
"""


def test_a_session_that_prints_what_it_shows_passes():
    pages.run("page.md", [pages.Block("pycon", SESSION, 0)])


@pytest.mark.parametrize(
    "right, wrong",
    [("\n2", "\n3"), (" 'x'", " 'y'"), ("int('x')", "int('7')"), ("ValueError", "TypeError")],
    ids=["value", "message", "no error", "kind of error"],
)
def test_a_session_that_prints_something_else_fails(right, wrong):
    with pytest.raises(AssertionError, match="page.md, line"):
        pages.run("page.md", [pages.Block("pycon", SESSION.replace(right, wrong), 0)])


def test_a_session_with_an_error_that_is_not_shown_fails():
    with pytest.raises(ZeroDivisionError):
        pages.run("page.md", [pages.Block("pycon", ">>> 1 / 0\n", 0)])


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^(`{3,}).*\n(?:.*\n)*?\1$", "", (ROOT / page).read_text(), flags=re.MULTILINE)


@each_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.is_relative_to(ROOT) and target.exists(), f"{page} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(target.relative_to(ROOT).as_posix()), re.M)
            assert anchor in map(slug, headings), (
                f"{page} links to {link}, which is no heading there"
            )


@each_page
def test_lines_are_wrapped_at_100(page):
    """Rows of tables cannot be wrapped, nor what a program has printed."""
    lines = prose(page).split("\n")
    for block in blocks_of((ROOT / page).read_text()):
        lines += block.text.split("\n") if block.language in ("python", "pycon") else []
    long = [line for line in lines if len(line) > 100 and not line.startswith("|")]
    assert not long, f"{page}: {long[:3]}"


def test_every_page_is_in_the_index():
    """Each page is on the site's path, and each page of the reference in the reference."""
    for folder in ("docs", "docs/reference"):
        index = (ROOT / folder / "index.md").read_text()
        trees = [block.text for block in blocks_of(index) if block.language == "{toctree}"]
        listed = "".join(trees).split("\n")
        for page in sorted((ROOT / folder).glob("*.md")):
            name = page.stem
            if name != "index":
                assert any(name in line for line in listed), (
                    f"{folder}/index.md does not list {name}"
                )
                assert f"({name}.md)" in index, f"{folder}/index.md has no link to {name}.md"


def modules() -> dict[str, str]:
    """The page of each module in the reference: `automodule` documents all that is in `__all__`."""
    found = {}
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for name in re.findall(r"^\.\. automodule:: (\S+)$", page.read_text(), re.M):
            found[name] = page.read_text()
    return found


def test_the_reference_has_every_public_module():
    members = {f"jaxnet.{name}": getattr(jaxnet, name) for name in jaxnet.__all__}
    public = {name for name, member in members.items() if isinstance(member, types.ModuleType)}
    assert modules().keys() >= public | {"jaxnet", "jaxnet.core", "jaxnet.mixed", "jaxnet.ops"}


@pytest.mark.parametrize("name", modules())
def test_the_tables_of_the_reference_name_everything_public_and_nothing_else(name):
    module, page = importlib.import_module(name), modules()[name]
    members = {member: getattr(module, member) for member in module.__all__}
    public = {n for n, member in members.items() if not isinstance(member, types.ModuleType)}
    elsewhere = re.search(r":exclude-members: (.*)", page)
    public -= set(elsewhere[1].split(", ")) if elsewhere else set()
    assert sorted(re.findall(r"^   (\w+)$", page, re.M)) == sorted(public)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="pip install '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", ROOT / "docs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "train.html").read_text().count("fit") > 5


def test_the_pages_of_the_layers_are_those_that_their_docstrings_give():
    spec = importlib.util.spec_from_file_location("layers_page", ROOT / "docs" / "layers_page.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, page in module.PAGES.items():
        remedy = "run `python docs/layers_page.py`"
        assert (ROOT / "docs" / name).read_text() == page(), remedy
