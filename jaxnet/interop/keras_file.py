"""Read Keras files (`.keras`, `.weights.h5`, the old `.h5`) without Keras, and without trust.

An HDF5 file may link to other files, declare arrays that it does not contain, and decompress to any
size. Files that Keras writes do none of this, so all of it is refused before an array is read.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxnet.checkpoint.container import opened
from jaxnet.checkpoint.errors import RESTORE, CheckpointError
from jaxnet.checkpoint.structure import MAX_DEPTH
from jaxnet.checkpoint.words import shown
from jaxnet.interop.keras_layers import Weights, kind_of_class, named
from jaxnet.interop.kinds import check_archive, kind_of_file, refused_kind

__all__ = ["read_layers"]

# The name of the weights in a .keras archive.
WEIGHTS = "model.weights.h5"
OPTIMIZERS = ("optimizer", "optimizer_weights")
# The filters of HDF5 that do not change the size: shuffle, fletcher32.
HARMLESS = (2, 3)


class _Layer(NamedTuple):
    """A layer in the configuration of a model.

    Attributes:
      kind: as in `Weights`.
      options: the arguments of its constructor.
    """

    kind: str
    options: dict[str, Any]


def read_layers(path: str | os.PathLike[str] | bytes) -> list[Weights]:
    """Read the weights of all layers in a Keras file.

    Args:
      path: the file; `from_keras` lists the kinds.

    Returns:
      The layers with their weights, in the order of the file.

    Raises:
      CheckpointError: as `from_keras`.
      ImportError: as `from_keras`.
      OSError: as `from_keras`.
    """
    with opened(os.fsdecode(path)) as (file, fd, size):
        if (kind := kind_of_file(file, fd)) != "keras":
            raise CheckpointError(file, None, refused_kind(kind))
        with os.fdopen(os.dup(fd), "rb") as raw:
            if os.pread(fd, 2, 0) != b"PK":
                return _read_hdf5(file, raw, size, None)
            names = check_archive(file, kind, raw, size)
            if WEIGHTS not in names:
                text = (
                    f"the archive has no {WEIGHTS}, but {sorted(names)[:5]}: save the weights in "
                    "one file of HDF5"
                )
                raise CheckpointError(file, None, text)
            with zipfile.ZipFile(raw) as archive:
                content, config = archive.read(WEIGHTS), archive.read("config.json")
        return _read_hdf5(file, io.BytesIO(content), len(content), config)


def _read_hdf5(file: str, raw: Any, size: int, config: bytes | None) -> list[Weights]:
    try:
        import h5py  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        text = "needs h5py to be opened: pip install 'jaxnet[keras]'"
        raise ImportError(f"{shown(file, 5000)}: {text}") from e
    try:
        with h5py.File(raw, "r") as content:
            return _read_groups(_Reader(file, h5py, size), content, config)
    except CheckpointError:
        raise
    except Exception as e:
        # Damage causes errors of many types.
        text = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise CheckpointError(file, None, f"h5py cannot read it ({text}): {RESTORE}") from e


def _read_groups(reader: _Reader, content: Any, config: bytes | None) -> list[Weights]:
    old = "model_weights" in content
    if old or any(name.startswith("layer_names") for name in content.attrs):
        root = reader.child(content, "model_weights") if old else content
        known = _configured(content.attrs.get("model_config", config))
        return [layer for name in root for layer in _old_layers(reader, root, name, known)]
    return list(_layers(reader, content, (), "", _configured(config)))


def _layers(
    reader: _Reader,
    group: Any,
    path: tuple[str, ...],
    step: str,
    known: dict[tuple[str, ...], _Layer],
    depth: int = 0,
) -> Iterator[Weights]:
    """The layers at and below a group of a `.weights.h5`.

    The arrays of each layer are numbered in its group `vars`.
    """
    reader.enter(group, depth)
    for name in group:
        if not depth and name in OPTIMIZERS:
            continue
        child = reader.child(group, name)
        if name == "vars":
            own, options = known.get(path, _Layer("", {}))
            kind = own or kind_of_class(step) or kind_of_class(path[-1] if path else "")
            numbers = sorted(child, key=lambda x: (len(x), x))
            arrays = [reader.array(child, number) for number in numbers]
            if numbers != [str(i) for i in range(len(numbers))]:
                yield Weights(path, kind, dict(zip(numbers, arrays, strict=True)))
            elif arrays:
                yield Weights(path, kind, named(kind, arrays, options))
        elif reader.is_group(child):
            yield from _layers(
                reader, child, (*path, *_step(reader, child, name)), name, known, depth + 1
            )


def _step(reader: _Reader, group: Any, name: str) -> tuple[str, ...]:
    """The steps that a group adds to the path of a layer: its name, or nothing for a list."""
    if "vars" in group:
        stored = reader.child(group, "vars").attrs.get("name")
        return (stored if isinstance(stored, str) and stored else name,)
    return ()


def _old_layers(
    reader: _Reader, root: Any, layer: str, known: dict[tuple[str, ...], _Layer]
) -> Iterator[Weights]:
    """The layers in a group of an old `.h5`.

    Its arrays have names, such as `dense/dense/kernel:0` or `inner/inner/dense/kernel`.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}

    def visit(group: Any, steps: tuple[str, ...]) -> None:
        reader.enter(group, len(steps))
        for name in group:
            child = reader.child(group, name)
            if reader.is_group(child):
                visit(child, (*steps, name))
            else:
                below = steps[steps.index(layer) + 1 :] if layer in steps else steps
                path = below if layer == "top_level_model_weights" else (layer, *below)
                arrays = found.setdefault(path, {})
                if (short := name.removesuffix(":0")) in arrays:
                    leaf = "/".join((*path, short))
                    raise CheckpointError(reader.file, leaf, "two arrays have this path")
                arrays[short] = reader.array(group, name)

    visit(reader.child(root, layer), ())
    for path, arrays in found.items():
        kind = known.get(path, _Layer("", {})).kind or kind_of_class(path[-1] if path else "")
        yield Weights(path, kind, arrays)


class _Reader:
    """Reads an HDF5 file.

    It refuses links, arrays outside the file, and more bytes than the file has.
    """

    def __init__(self, file: str, h5py: Any, size: int):
        self.file, self.h5py, self.size = file, h5py, size
        self.left, self.seen = size, set()

    def child(self, group: Any, name: str) -> Any:
        if not isinstance(group.get(name, getlink=True), self.h5py.HardLink):
            text = (
                "it is a link to somewhere else, expected the array or group itself: copy it "
                "into the file"
            )
            raise CheckpointError(self.file, self.path(group, name), text)
        return group[name]

    def enter(self, group: Any, depth: int) -> None:
        """Check a group before visiting it.

        Raises CheckpointError if it was visited before, as in a cycle.
        """
        if not self.is_group(group):
            name = (group.name or "").lstrip("/")
            raise CheckpointError(self.file, name, "it is an array, expected a group of them")
        address = self.h5py.h5o.get_info(group.id).addr
        if address in self.seen or depth > MAX_DEPTH:
            text = (
                f"the group is in the file twice, or deeper than {MAX_DEPTH} levels: does it "
                "contain itself?"
            )
            raise CheckpointError(self.file, (group.name or "").lstrip("/")[:200], text)
        self.seen.add(address)

    def is_group(self, x: Any) -> bool:
        return isinstance(x, self.h5py.Group)

    def array(self, group: Any, name: str) -> Any:
        import ml_dtypes

        dataset, path = self.child(group, name), self.path(group, name)
        if not isinstance(dataset, self.h5py.Dataset) or dataset.shape is None:
            text = f"it is a {type(dataset).__name__} without values, expected an array"
            raise CheckpointError(self.file, path, text)
        filters = dataset.id.get_create_plist()
        kinds = [filters.get_filter(i)[0] for i in range(filters.get_nfilters())]
        problem = None
        if dataset.is_virtual or dataset.external:
            problem = "its values are in other files"
        elif any(kind not in HARMLESS for kind in kinds):
            problem = "it is compressed"
        elif dataset.dtype.hasobject:
            problem = "it holds text or other objects"
        elif dataset.nbytes > dataset.id.get_storage_size():
            problem = (
                f"it announces {dataset.nbytes:,} bytes and holds {dataset.id.get_storage_size():,}"
            )
        elif dataset.nbytes > self.left:
            problem = f"all arrays together announce more than the {self.size:,} bytes of the file"
        if problem:
            text = (
                f"{problem}, expected an array stored as it is (what Keras writes): load it in "
                "Keras and save it again"
            )
            raise CheckpointError(self.file, path, text)
        self.left -= dataset.nbytes
        values = dataset[()]
        # HDF5 has no bfloat16. Of the Keras dtypes with two bytes, h5py stores only bfloat16 as raw
        # bytes.
        return values.view(ml_dtypes.bfloat16) if values.dtype == "V2" else values

    def path(self, group: Any, name: str) -> str:
        return f"{group.name or ''}/{name}".lstrip("/")


def _configured(config: Any) -> dict[tuple[str, ...], _Layer]:
    """The layers in the configuration of a model, by the names of all layers above them."""
    found: dict[tuple[str, ...], _Layer] = {}

    def visit(model: Any, path: tuple[str, ...]) -> None:
        for layer in model.get("layers", []):
            options = layer["config"]
            below = (*path, options.get("name") or layer["name"])
            found[below] = _Layer(kind_of_class(layer["class_name"]), options)
            visit(options, below)

    try:
        visit(json.loads(config)["config"], ())
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError):
        return {}
    return found
