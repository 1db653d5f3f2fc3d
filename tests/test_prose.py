"""The patterns of benchmarks/prose.py find the turns of phrase that they are named after, and no
others. The sentences are written for these tests.
"""

import pathlib
import re
import runpy

import pytest

PROSE = runpy.run_path(
    str(pathlib.Path(__file__).parent.parent / "benchmarks" / "prose.py"), run_name="prose"
)

BAD = {
    "free relative": "What is not spread is saved by process 0.",
    "where": "Raises ValueError where no window fits.",
    "so that": "It is sorted, so that it is fast.",
    "a for per": "It makes one value an example.",
    "of its own": "Each sample is a process of its own.",
    "is no": "A path that is no file is refused.",
    "who": "The process who has the lock writes.",
}
GOOD = [
    "What is a layer? A value.",
    "y = x W, where W is the kernel.",
    "The folder where it is saved.",
    "One value per example, one part of an example, and one call of a layer.",
    "Each sample is a separate process.",
    "There is no file, and it is no longer open.",
    "A process that has the lock writes.",
]


@pytest.mark.parametrize("name", BAD)
def test_a_pattern_finds_its_own_sentence_alone(name):
    found = [p for p, pattern in PROSE["PATTERNS"].items() if re.search(pattern, BAD[name])]
    assert found == [name]


@pytest.mark.parametrize("text", GOOD)
def test_no_pattern_finds_a_good_sentence(text):
    assert not [p for p, pattern in PROSE["PATTERNS"].items() if re.search(pattern, text)]


def test_prose_is_text_without_code(tmp_path):
    """Docstrings, messages and comments are found; code and names in backticks are not."""
    path = tmp_path / "some.py"
    path.write_text(
        '"""The head.\n\n>>> who()\n"""\n# A comment\n# of two lines.\n'
        'def f():\n    """The `who` body."""\n    raise ValueError(f"bad {1}: remedy")\n'
    )
    found = [PROSE["prose"](text) for _, text in PROSE["texts_of_python"](path)]
    assert sorted(found) == [
        "A comment of two lines.",
        "The head.",
        "The x body.",
        "bad x: remedy",
    ]
