"""The table of engines: which one writes a tree, and which one reads a file."""

from typing import Any

from jaxnet.checkpoint import manifests, orbax, parts, processes, single
from jaxnet.checkpoint.format import Header
from jaxnet.checkpoint.protocol import Engine

__all__ = ["ENGINES", "engine_for", "engine_of"]

# By the version of the format that an engine writes.
ENGINES: dict[int, Engine] = {
    manifests.VERSION: single.ENGINE,
    manifests.PARTS: parts.ENGINE,
    manifests.ORBAX: orbax.ENGINE,
}


def engine_for(name: str | None, leaves: dict[str, Any]) -> Engine:
    """The engine that writes these leaves, if the user has asked for the engine `name`."""
    if name == "orbax":
        return ENGINES[manifests.ORBAX]
    return ENGINES[manifests.PARTS if processes.is_spread(leaves) else manifests.VERSION]


def engine_of(header: Header) -> Engine:
    """The engine that reads a file."""
    # Files of other programs hold all their tensors.
    version = manifests.VERSION if header.manifest is None else header.manifest["version"]
    return ENGINES[version]
