"""The project's own files: one source of the version, and metadata that agree with each other."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import jaxnet

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# As in the documentation of hatchling: how it reads the version out of a Python file.
HATCH = r'(?im)^(__version__|VERSION)(?: ?\: ?str)? *= *([\'"])v?(?P<version>.+?)\2'


def test_the_version_stands_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    source = ROOT / PROJECT["tool"]["hatch"]["version"]["path"]
    assert source == pathlib.Path(str(jaxnet.__file__))
    (found,) = re.finditer(HATCH, source.read_text())
    assert found["version"] == jaxnet.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", jaxnet.__version__)
    # Neither file repeats it, so neither can be forgotten.
    for name in ("CITATION.cff", "docs/versioning.md"):
        assert jaxnet.__version__ not in (ROOT / name).read_text()


def test_the_newest_section_of_the_changelog_is_of_this_version():
    sections = re.findall(r"^## (\S+), (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert sections and sections[0][0] == jaxnet.__version__
    assert all(re.fullmatch(r"\d{4}-\d{2}-\d{2}|not released yet", when) for _, when in sections)


def test_the_classifiers_agree_with_the_oldest_python():
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    minors = [
        x.rpartition(" ")[2]
        for x in PROJECT["project"]["classifiers"]
        if re.search(r":: 3\.\d+$", x)
    ]
    assert minors[0] == oldest and minors == sorted(minors, key=lambda x: int(x.partition(".")[2]))


def test_the_urls_are_of_one_repository():
    urls = PROJECT["project"]["urls"]
    assert {"Homepage", "Source", "Documentation", "Issues"} <= urls.keys()
    assert all(url.startswith(urls["Source"]) for url in urls.values())
    assert f"repository-code: {urls['Source']}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_citation_says_what_the_project_says():
    text = (ROOT / "CITATION.cff").read_text()
    fields = dict(re.findall(r"^([a-z-]+): (.+)$", text, re.M))
    assert fields["cff-version"] == "1.2.0" and fields["license"] == PROJECT["project"]["license"]
    assert {"message", "title", "type"} <= fields.keys() and "\nauthors:\n" in text


@pytest.mark.slow
def test_a_wheel_has_the_version_and_the_package(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        tmp_path,
        ROOT,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"jaxnet-{jaxnet.__version__}-py3")
