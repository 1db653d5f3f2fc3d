"""The configuration of Sphinx: `sphinx-build -W docs build/site` builds the site."""

import pathlib
import re
import sys

from sphinx.ext import autosummary

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the reference is that of this checkout

import jaxnet  # noqa: E402

project = "jaxnet"
author = "the authors of jaxnet"
copyright = "the authors of jaxnet, Apache-2.0 license"
version = release = jaxnet.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
myst_heading_anchors = 3  # links to headings, as on GitHub

html_theme = "sphinx_book_theme"
html_title = "jaxnet"
html_theme_options = {"show_navbar_depth": 1, "show_toc_level": 2, "home_page_in_toc": False}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
pygments_style = "friendly"

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings tell them, with shapes
autosummary_generate = False  # the tables link to the entries below them
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
smartquotes_action = "D"  # dashes; quotes in docstrings are those of Python
default_role = "code"  # docstrings quote code in single backticks, as Markdown does
toc_object_entries_show_parents = "hide"

# These pages show a file outside of this folder. On GitHub they are a link to it.
SHOWN = {
    "benchmarks": "benchmarks/README.md",
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
}


def read_page(app, docname, source):
    """Show the files in `SHOWN`, and make links between Markdown files links between pages."""
    if docname in SHOWN:
        file = ROOT / SHOWN[docname]
        app.env.note_dependency(str(file))
        source[0] = file.read_text().replace("](../docs/", "](").replace("](docs/", "](")
    for page, file in SHOWN.items():
        source[0] = source[0].replace(f"](../{file}", f"]({page}.md")


def read_docstring(app, what, name, obj, options, lines):
    """Docstrings are plain text: `*` and `|` outside of code are themselves, not markup."""
    in_code = False
    for i, line in enumerate(lines):
        in_code = line.lstrip().startswith((">>>", "...")) or (in_code and bool(line.strip()))
        if not in_code:
            parts = re.split(r"(`[^`]*`)", line)
            lines[i] = "".join(
                part if part.startswith("`") else re.sub(r"([*|]|(?<=\w)_(?=\W|$))", r"\\\1", part)
                for part in parts
            )


def first_paragraph(lines, settings):
    """What the tables of the reference say. Sphinx's own function stops at the dots of f(...)."""
    text = "\n".join(lines).strip()
    return " ".join(text.partition("\n\n")[0].split())


def skip_member(app, what, name, obj, skip, options):
    """Leave out what Python writes itself, such as "Alias for field number 0"."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field") else None


def setup(app):
    autosummary.extract_summary = first_paragraph
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", read_docstring, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip_member)
