"""Feed the reader of checkpoints with what a coverage-guided fuzzer makes up: only CheckpointError
may come out.

    pip install atheris
    python benchmarks/fuzz_checkpoint.py -max_total_time=600 [other flags, a folder for the corpus]

Four kinds of input, by the first byte: the bytes of a file; the header of another program's file
with 64 bytes of data; `[tree, tensors]` as JSON, put into a file whose digest and checksums are
right, so that the fuzzer gets past them; and the manifest of a file whose tensors are elsewhere, in
parts or with Orbax, again with the right digest. It starts from the golden files of the tests. A
crash, an input that takes 5 seconds or 1 GB end the run and are written to a file. Each input goes
through `load`, `inspect`, `verify` and `lazy`; what loads is saved, and loads again the same.
"""

import contextlib
import importlib
import json
import os
import pathlib
import sys
import tempfile
import zlib
from typing import Any

atheris: Any = importlib.import_module("atheris")

with atheris.instrument_imports(include=["jaxnet.checkpoint"]):
    # The library imports these three later, when they would not be instrumented.
    import jaxnet.checkpoint.arrays
    import jaxnet.checkpoint.casting
    import jaxnet.checkpoint.placement  # noqa: F401
    from jaxnet.checkpoint import CheckpointError, inspect, lazy, load, save, verify
    from jaxnet.checkpoint import format as fmt
    from jaxnet.checkpoint.tensors import crc_start, layout

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "golden"
FOLDER = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
FILE, AGAIN = os.path.join(FOLDER.name, "f"), os.path.join(FOLDER.name, "again")


def file_of(data: bytes) -> bytes:
    """The file for an input."""
    kind, rest = data[:1], data[1:]
    if kind == b"h":
        return len(rest).to_bytes(8, "little") + rest + bytes(64)
    with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError, CheckpointError):
        if kind == b"t":
            return sealed(*json.loads(rest))
        if kind == b"m":
            return fmt.write_header("", [], json.loads(rest))
    return rest


def sealed(tree, tensors) -> bytes:
    """A file with this tree and tensors [[name, code, shape], ...], a right digest and right
    checksums.
    """
    placed = layout([(name, code, tuple(shape)) for name, code, shape in tensors])
    size = placed[-1].stop if placed else 0
    if size > 1 << 16 or any(t.stop < t.start or t.chunks > 1 for t in placed):
        raise ValueError("too large")
    data = bytes(range(256)) * 256
    sums = [f"{zlib.crc32(data[t.start : t.stop], crc_start(t, 0)):08x}" for t in placed]
    header = fmt.write_header(
        "", placed, {"version": 1, "metadata": {}, "tree": tree, "crc32": sums}
    )
    return header + data[:size]


def one_input(data: bytes) -> None:
    with open(FILE, "wb") as f:
        f.write(file_of(data))
    for read in (inspect, verify, read_lazily):
        with contextlib.suppress(CheckpointError):
            read(FILE)
    with contextlib.suppress(CheckpointError):
        save(AGAIN, load(FILE))
        first = pathlib.Path(AGAIN).read_bytes()
        save(AGAIN, load(AGAIN))
        assert pathlib.Path(AGAIN).read_bytes() == first


def read_lazily(path: str) -> None:
    with lazy(path) as leaves:
        dict(leaves)


def first_inputs(folder: pathlib.Path) -> None:
    """The golden files, as they are, by their headers, and by their trees."""
    for golden in GOLDEN.glob("*.safetensors"):
        data = golden.read_bytes()
        header = data[8 : 8 + int.from_bytes(data[:8], "little")]
        entries = json.loads(header)
        manifest = json.loads(entries.pop("__metadata__")["jaxnet"])
        tensors = [[name, entry["dtype"], entry["shape"]] for name, entry in entries.items()]
        inputs = {
            "f": data,
            "h": json.dumps(entries).encode(),
            "t": json.dumps([manifest["tree"], tensors]).encode(),
        }
        if manifest["version"] > 1:
            inputs["m"] = json.dumps(manifest).encode()
        for kind, content in inputs.items():
            (folder / f"{kind}-{golden.stem}").write_bytes(kind.encode() + content)


def main() -> None:
    seeds = pathlib.Path(FOLDER.name) / "seeds"
    seeds.mkdir()
    first_inputs(seeds)
    flags = (
        sys.argv[1:]
        if any(not a.startswith("-") for a in sys.argv[1:])
        else [*sys.argv[1:], str(seeds)]
    )
    atheris.Setup(
        [sys.argv[0], "-timeout=5", "-rss_limit_mb=1024", "-max_len=16384", *flags], one_input
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
