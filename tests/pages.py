"""The programs in the documentation: find them in the Markdown, run them, compare what they print.

The blocks of a page run in order in one namespace, as a reader types them; `ALONE` lists the pages
whose parts are separate programs. A `python` block is executed. A `pycon` block is a session: what
each statement prints, or the error that it raises, must be what the page shows. Line breaks and
indentation do not count there, so long messages can be wrapped. `...` stands for any text.
"""

import contextlib
import doctest
import io
import pathlib
import re
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

ROOT = pathlib.Path(__file__).parents[1]

# Pages whose programs are smaller than the page: one per block, or one per section.
ALONE = {"README.md": "block", "docs/recipes.md": "section"}


class Block(NamedTuple):
    """A fenced block: its language, its text, and the number of the line above the text."""

    language: str
    text: str
    line: int


def all_pages() -> list[str]:
    """The Markdown files that people read, by their path in the repository."""
    top = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    pages = [*top, ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page.relative_to(ROOT).as_posix() for page in pages if page.exists()]


def blocks_of(text: str) -> Iterator[Block]:
    """All fenced blocks of a Markdown text."""
    for found in re.finditer(r"^(`{3,})(.*)\n((?:.*\n)*?)\1$", text, re.MULTILINE):
        yield Block(found[2].strip(), found[3], text[: found.start(3)].count("\n"))


def programs(page: str) -> dict[str, list[Block]]:
    """The programs of a page by title, each a list of blocks that share a namespace."""
    text = (ROOT / page).read_text()
    code = [block for block in blocks_of(text) if block.language in ("python", "pycon")]
    if ALONE.get(page) == "block":
        return {f"program {i}": [block] for i, block in enumerate(code, 1)}
    if ALONE.get(page) != "section":
        return {page: code} if code else {}
    heads = [(i, line[3:]) for i, line in enumerate(text.split("\n")) if line.startswith("## ")]
    ends = [line for line, _ in heads[1:]] + [len(text)]
    return {
        title: [block for block in code if start < block.line < end]
        for (start, title), end in zip(heads, ends, strict=True)
    }


@contextlib.contextmanager
def defaults() -> Iterator[None]:
    """The options of JAX that a reader has. The tests' own are stricter."""
    with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        yield


def run(page: str, blocks: list[Block]) -> dict[str, Any]:
    """Run the blocks of one program, and return the names that it leaves behind."""
    scope: dict[str, Any] = {"__name__": "page"}
    with defaults():
        for block in blocks:
            if block.language == "python":
                exec(compile("\n" * block.line + block.text, page, "exec"), scope)
            else:
                check_session(page, block, scope)
    return scope


def check_session(page: str, block: Block, scope: dict[str, Any]) -> None:
    """Run a session statement by statement, and compare what comes out with what the page shows."""
    for example in doctest.DocTestParser().get_examples(block.text, page):
        line = block.line + example.lineno
        code = compile("\n" * line + example.source, page, "single")
        printed, error = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            try:
                exec(code, scope)
            except Exception as raised:
                if example.exc_msg is None:
                    raise
                error = raised
        shown = example.want if example.exc_msg is None else example.exc_msg
        got = printed.getvalue() if error is None else message(error)
        same = doctest.OutputChecker().check_output(shown, got, _FLAGS)
        assert same, f"{page}, line {line + 1}:\n{example.source}shows\n{shown}but gives\n{got}"


_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def message(error: BaseException) -> str:
    """The last lines of a traceback, without the module of the class and JAX's own notes."""
    lines = traceback.format_exception_only(error)
    text = "".join(lines).partition("--------------------")[0]
    # Python 3.12 and later propose a name in the traceback, too.
    text = re.sub(r"\. Did you mean: '\w+'\?$", "", text.rstrip()) + "\n"
    return re.sub(r"^(?:\w+\.)+(?=\w+:)", "", text)
