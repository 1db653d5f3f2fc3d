"""The documentation: its programs run, its links lead somewhere, and it builds without a warning."""

import os
import re
import subprocess
import sys
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


@pytest.mark.parametrize("page", [page for page in all_pages() if page not in ELSEWHERE and programs(page)])
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


def test_a_session_that_prints_something_else_is_found():
    """The mechanism itself: wrong values, wrong errors, missing errors and errors that are not shown."""
    good = ">>> 1 + 1\n2\n>>> int('x')\nTraceback (most recent call last):\nValueError: invalid ... 'x'\n"
    pages.run("page.md", [pages.Block("pycon", good, 0)])
    for old, new in [("2", "3"), ("'x'\n", "'y'\n"), ("int('x')", "int('7')"), ("ValueError", "TypeError")]:
        bad = good[::-1].replace(old[::-1], new[::-1], 1)[::-1]
        with pytest.raises(AssertionError, match="page.md, line"):
            pages.run("page.md", [pages.Block("pycon", bad, 0)])
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
            assert anchor in map(slug, headings), f"{page} links to {link}, which is no heading there"


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
        (listed,) = [block.text.split("\n") for block in blocks_of(index) if block.language == "{toctree}"]
        for page in sorted((ROOT / folder).glob("*.md")):
            name = page.stem
            if name != "index":
                assert any(name in line for line in listed), f"{folder}/index.md does not list {name}"
                assert f"({name}.md)" in index, f"{folder}/index.md has no link to {name}.md"


def test_the_reference_has_every_public_module():
    """`automodule` documents all that is in `__all__`, so it is enough that each module has its page."""
    text = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    modules = {f"jaxnet.{name}" for name in jaxnet.__all__ if type(getattr(jaxnet, name)).__name__ == "module"}
    for module in modules | {"jaxnet", "jaxnet.core", "jaxnet.mixed", "jaxnet.ops"}:
        assert re.search(rf"^\.\. automodule:: {re.escape(module)}\n", text, re.M), f"no page for {module}"


def test_the_tables_of_the_reference_name_everything_public_and_nothing_else():
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        text = page.read_text()
        for name in re.findall(r"^\.\. automodule:: (\S+)\n", text, re.M):
            module = sys.modules[name] if name in sys.modules else __import__(name, fromlist=["*"])
            public = {n for n in module.__all__ if type(getattr(module, n)).__name__ != "module"}
            listed = re.findall(r"^   (\w+)$", text, re.M)
            assert sorted(listed) == sorted(public), f"{page.name} lists other names than {name} has"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="pip install '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", ROOT / "docs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "train.html").read_text().count("fit") > 5
