"""Write the pages of all layers from their docstrings: docs/layers.md and the reference.

    python docs/layers_page.py

A row of the table holds the summary and the equation, the shapes (the section `Returns:`), and the
twins in other libraries (the paragraph `Twins:`). A test holds the pages to the docstrings.
"""

import inspect
import pathlib
import re

import jaxnet.layers

DOCS = pathlib.Path(__file__).parent

INTRODUCTION = """# All layers

Each layer is a function that returns a pair of pure functions, `init` and `apply`
([Compose](compose.md)). Leading axes are batch axes. Images are [..., H, W, C], sequences
[..., T, C]. The [reference](reference/layers.md) has the arguments. The layers with a star are
also names of `jaxnet` itself; all are names of `jaxnet.layers`. The last column names the twins in
other libraries. `python docs/layers_page.py` writes this page from the docstrings.
"""

REFERENCE = """# jaxnet.layers

All layers by family. [The table of all layers](../layers.md) has their shapes and their twins in
other libraries.
"""

# The modules of each family, in the order of the page.
FAMILIES = {
    "Linear maps": "linear einsum embedding",
    "Convolution": "convolution depthwise transposed local",
    "Pooling": "pool global_pool adaptive unpool",
    "Shapes and sizes": "shape resizing",
    "Normalization": "batch_norms feature_norms group_norms local_norm",
    "Noise": "noise",
    "Recurrent layers and cells": "sequences cells long_memory",
    "Linear-time recurrences": "linear_recurrence selective rwkv",
    "Attention": "attention attention_core softmaxes cache",
    "Positions": "positions position_bias",
    "Masks of attention": "masks",
    "Feed-forward blocks and experts": "feed_forward experts",
    "Codebooks and random features": "codebook random_features",
}


def paragraphs(function) -> list[str]:
    """The paragraphs of a docstring, each on one line."""
    text = inspect.getdoc(function) or ""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]


def row(name: str) -> str:
    """The row of a layer."""
    summary, *rest = paragraphs(getattr(jaxnet.layers, name))
    equation = next((part for part in rest if re.match(r"[^.:]{0,60} = ", part)), "")
    if " = " in summary or equation.startswith(("Parameters", "Args")):
        equation = ""
    equation = re.match(r".*?(?:\.(?= [A-Z])|$)", equation)[0]  # its first sentence
    returns = next((part for part in rest if part.startswith("Returns: ")), "Returns: ")
    shapes = re.sub(r"^Returns: (The layer, )?", "", returns)
    twins = next((part.partition("Twins: ")[2] for part in rest if "Twins: " in part), "")
    named = re.findall(r"[a-z_]+(?:\.\w+)+[^,.]*", twins)
    star = "*" if hasattr(jaxnet, name) else ""
    twin = ", ".join(f"`{name}`" for name in named)
    cells = [f"`{name}`{star}", f"{summary} {equation}".strip(), shapes, twin]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def family_of(name: str) -> str:
    """The family of a layer, from the module that defines it."""
    module = getattr(jaxnet.layers, name).__module__.rpartition(".")[2]
    return next(family for family, modules in FAMILIES.items() if module in modules.split())


def families() -> dict[str, list[str]]:
    """The layers of each family."""
    names = {family: [] for family in FAMILIES}
    for name in jaxnet.layers.__all__:
        names[family_of(name)].append(name)
    return names


def table() -> str:
    """The page with the table."""
    text = INTRODUCTION
    for family, members in families().items():
        text += f"\n## {family}\n\n| layer | computes | shapes | twins |\n|---|---|---|---|\n"
        text += "".join(row(name) + "\n" for name in members)
    return text


def reference() -> str:
    """The page of the reference."""
    text = REFERENCE
    for family, members in families().items():
        names = "".join(f"   {name}\n" for name in members)
        text += f"\n## {family}\n\n```{{eval-rst}}\n.. currentmodule:: jaxnet.layers\n\n"
        text += f".. autosummary::\n   :nosignatures:\n\n{names}```\n"
    return text + "\n## Details\n\n```{eval-rst}\n.. automodule:: jaxnet.layers\n```\n"


PAGES = {"layers.md": table, "reference/layers.md": reference}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
    print(f"{len(jaxnet.layers.__all__)} layers: {', '.join(PAGES)}")
