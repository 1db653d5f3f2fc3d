"""Count turns of phrase that readers of American technical English stumble over.

    python benchmarks/prose.py                 # a table; also optax and equinox, if installed
    python benchmarks/prose.py --show where    # each hit of one pattern in jaxnet

The texts are docstrings, comments, and messages (strings in `raise`, `warn` and `add_note`) of the
packages, and the Markdown of jaxnet. Code in backticks, in blocks and in doctests is left out. The
patterns are regular expressions, so read the numbers as ratios: some hits are fine, and some
mistakes are missed. It is a check to run by hand; no test depends on it.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
PEERS = ("optax", "equinox")

_START = r"(?:^|(?<=[.:;!?] ))"
# Python wants a lookbehind of one width: the last four letters of place, position, file, ...
_PLACE = "(?:lace|tion|file|lder|path|hine|vice|dule)"
_UNIT = (
    "step|example|file|call|batch|epoch|member|record|second|minute|feature|leaf|element|axis|"
    "process|window|token|layer|line|row|run|save|class|host|device|multiply-add"
)
_NO_END = r"(?: (?!of|to|into|along|in|at|on|with)[\w-]+){0,2}"
_COUNT = r"(?:one|two|three|few|many|once|twice|\d[\d,.]*|(?:steps|values|files|bytes|FLOPs))"
PATTERNS = {
    # "What is not spread is saved by process 0."
    "free relative": rf"{_START}(?:What|Whatever|Who|Whoever|Wherever|Whichever)\b[^?]*?[.;:!]",
    # "Raises ValueError where no window fits."
    # Definitions such as "where x is the input" are fine, and so are places.
    "where": rf"(?<![\w.])(?<!{_PLACE} )where\b(?! [\w`]+ (?:is|are|denotes?)\b)",
    "so that": r"\bso that\b",
    # "One value an example."
    "a for per": rf"\b{_COUNT}{_NO_END} an? (?:{_UNIT})\b",
    "of its own": r"\bof (?:its|their|your|our|his|her|one's) own\b",
    # "It is no array."
    "is no": r"(?<!there )(?<!There )\b(?:is|are|was|were) no (?!longer|more|less|such)\w",
    "who": r"\b(?:who|whoever)\b",
}


def texts_of_python(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """The prose of a module: (line, text)."""
    source = path.read_text()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield getattr(node, "lineno", 1), text
        called = isinstance(node, ast.Call) and getattr(node.func, "attr", "")
        if isinstance(node, ast.Raise) or called in ("warn", "add_note"):
            yield getattr(node, "lineno", 1), _message(node)
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(
            r"#!|# (?:pyright|noqa|fmt)", token.string
        ):
            line, text = token.start[0], token.string.lstrip("# ")
            # The lines of one comment are one text.
            if comments and comments[-1][0] + comments[-1][1].count("\n") + 1 == line:
                comments[-1] = comments[-1][0], f"{comments[-1][1]}\n{text}"
            else:
                comments.append((line, text))
    yield from comments


def _message(node: ast.AST) -> str:
    parts = []
    for child in ast.walk(node):
        if isinstance(child, ast.JoinedStr):
            inside = (c.value if isinstance(c, ast.Constant) else "x" for c in child.values)
            parts.append("".join(map(str, inside)))
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            parts.append(child.value)
    return max(parts, key=len, default="")


def prose(text: str) -> str:
    """The text without code, with single spaces."""
    text = re.sub(r"(?ms)^```.*?^```", " ", text)
    text = re.sub(r"(?m)^\s*(?:>>>|\.\.\. ).*$", " ", text)
    text = re.sub(r"(?m)^ {4,}\S.*[=()\[\]].*$", " ", text) if "\n" in text else text
    text = re.sub(r"`[^`]*`", "x", text)
    text = re.sub(r"\n\s*\n", ". ", text)
    return re.sub(r"\s+", " ", text).strip()


def texts(name: str) -> list[tuple[str, str]]:
    """All texts of a package as (place, prose)."""
    if name == "jaxnet":
        root = ROOT / "jaxnet"
        pages = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]
    else:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        root, pages = pathlib.Path(spec.origin).parent, []
    found = []
    for path in sorted(root.rglob("*.py")):
        if "test" not in path.name:
            found += [
                (f"{path.relative_to(root.parent)}:{line}", prose(text))
                for line, text in texts_of_python(path)
            ]
    return found + [(str(page.relative_to(ROOT)), prose(page.read_text())) for page in pages]


def counts(found: list[tuple[str, str]]) -> tuple[int, dict[str, int]]:
    """The number of words, and of hits per pattern."""
    words = sum(len(text.split()) for _, text in found)
    hits = {
        name: sum(len(re.findall(pattern, text)) for _, text in found)
        for name, pattern in PATTERNS.items()
    }
    return words, hits


def show(pattern: str) -> None:
    """Print each hit of a pattern in jaxnet with the words around it."""
    for place, text in texts("jaxnet"):
        for match in re.finditer(PATTERNS[pattern], text):
            print(f"{place}: {text[max(0, match.start() - 50) : match.end() + 30]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--show", choices=PATTERNS, help="print each hit of this pattern")
    args = parser.parse_args()
    if args.show:
        show(args.show)
        return
    names = ["jaxnet", *(name for name in PEERS if importlib.util.find_spec(name))]
    columns = {name: counts(texts(name)) for name in names}
    print(f"{'per 10,000 words':18}" + "".join(f"{name:>10}" for name in names))
    for pattern in PATTERNS:
        rates = (10_000 * hits[pattern] / words for words, hits in columns.values())
        print(f"{pattern:18}" + "".join(f"{rate:10.1f}" for rate in rates))
    print(f"{'words':18}" + "".join(f"{words:10,}" for words, _ in columns.values()))


if __name__ == "__main__":
    main()
