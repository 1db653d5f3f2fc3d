"""The MNIST data set."""

import hashlib
import os
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from jaxnet.data.idx import read_idx, replacing
from jaxnet.data.splits import Dataset, Split

_MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")

# name: (sha256 of the published .gz, sha256 of its content). They come from files whose md5 are
# those that torchvision publishes; tests/test_data.py compares the two.
CHECKSUMS = {
    "train-images-idx3-ubyte": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train-labels-idx1-ubyte": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "t10k-images-idx3-ubyte": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "t10k-labels-idx1-ubyte": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}


def mnist(
    folder: str | os.PathLike[str],
    *,
    download: bool = False,
    mirrors: Sequence[str] = _MIRRORS,
    timeout: float = 30.0,
    time_limit: float = 300.0,
) -> Dataset:
    """Load MNIST, 60,000 training and 10,000 test images of handwritten digits.

    Source: Y. LeCun, C. Cortes & C. J. C. Burges, "The MNIST database of handwritten digits", 1998,
    http://yann.lecun.com/exdb/mnist/

    Args:
      folder: the folder with train-images-idx3-ubyte, train-labels-idx1-ubyte,
        t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, gzipped (.gz) or not. The spelling
        train-images.idx3-ubyte is found, too.
      download: fetch missing files into `folder`, 12 MB in all. Every file is verified before it is
        kept, and an existing file is never replaced.
      mirrors: base URLs, tried in turn for each file.
      timeout: seconds that a mirror may stay silent before the next is tried.
      time_limit: seconds that a mirror may take for one file, of at most 10 MB, before the next is
        tried.

    Returns:
      A `Dataset` of 220 MB, with images float32 [N, 28, 28, 1] (0 paper, 1 ink) and labels int32
      [N].

    Raises:
      FileNotFoundError: files are missing; the message lists all of them.
      ValueError: a file is not the published one.
      OSError: no mirror gave a file; the message has the reason of each.
    """
    folder = pathlib.Path(folder)
    paths = {name: _find(folder, name) for name in CHECKSUMS}
    for name, path in paths.items():
        if path is not None:
            _verify(path, CHECKSUMS[name])
    missing = [name for name, path in paths.items() if path is None]
    if missing and not download:
        raise FileNotFoundError(
            f"{folder}: expected the four MNIST files (.gz or unpacked), missing "
            f"{', '.join(missing)}; pass download=True, or put them there by hand, e.g. from "
            f"{_MIRRORS[0]}"
        )
    for name in missing:
        paths[name] = _download(folder, name, mirrors, timeout, time_limit)
    return Dataset(train=_load(paths, "train"), test=_load(paths, "t10k"))


def _find(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    spellings = (name, name.replace("-idx", ".idx"))
    candidates = [folder / (spelling + suffix) for spelling in spellings for suffix in (".gz", "")]
    return next((path for path in candidates if path.is_file()), None)


def _verify(path: pathlib.Path, checksums: tuple[str, str]) -> None:
    with open(path, "rb") as file:
        received = hashlib.file_digest(file, "sha256").hexdigest()
    if received not in checksums:
        raise ValueError(
            f"{path}: expected MNIST's file with sha256 {checksums[0]} (gzipped) or "
            f"{checksums[1]} (unpacked), got sha256 {received}; it is damaged or another set "
            "(nothing was changed): move it away and pass download=True, or read another set "
            "with read_idx; if you gzipped it yourself, unpack it"
        )


def _download(
    folder: pathlib.Path, name: str, mirrors: Sequence[str], timeout: float, time_limit: float
) -> pathlib.Path:
    from http.client import HTTPException

    if isinstance(mirrors, str):
        raise TypeError(
            f"mnist: mirrors must be a sequence of URLs, got one string; write [{mirrors!r}]"
        )
    reasons = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{name}.gz"
        try:
            body = _within(
                time_limit, lambda url=url: _fetch(url, CHECKSUMS[name][0], timeout, time_limit)
            )
        except (OSError, HTTPException, ValueError) as error:
            reasons.append(f"{url}: {error}")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.gz"
        with replacing(path) as file:
            file.write(body)
        return path
    raise OSError(
        f"{folder}: could not fetch {name}.gz from any of {len(reasons)} mirrors; check the "
        "connection, pass other `mirrors`, or put the file there by hand\n"
        + "\n".join(f"  {reason}" for reason in reasons)
    )


def _within(seconds: float, work: Callable[[], bytes]) -> bytes:
    """Call `work` in a thread and return its result. Raises TimeoutError if it takes longer than
    `seconds`.

    The timeout of a socket restarts with every byte, so a slow server could keep the caller for
    hours. The name lookup and the headers have no total limit either. Therefore the caller waits
    for a thread with a limit.
    """
    done: queue.SimpleQueue[tuple[bytes | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        body, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"not done after {seconds:g} seconds") from None
    if error is not None:
        raise error
    assert body is not None
    return body


def _fetch(url: str, checksum: str, timeout: float, time_limit: float) -> bytes:
    """The verified bytes of a URL. They stay in memory (10 MB at most), so no unverified file ever
    exists.
    """
    # These are imported here, because with ssl and http they take longer to import than the rest.
    from urllib.error import HTTPError
    from urllib.request import urlopen

    deadline, body = time.monotonic() + time_limit, bytearray()
    try:
        with urlopen(url, timeout=timeout) as response:
            while len(body) < _LARGEST and (part := response.read1(_LARGEST - len(body))):
                body += part
                # The caller has stopped waiting, so this thread ends as well.
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not done after {time_limit:g} seconds")
    except HTTPError as error:
        # The error holds the connection open.
        error.close()
        raise
    received = hashlib.sha256(body).hexdigest()
    if received != checksum:
        raise ValueError(
            f"expected sha256 {checksum}, got {len(body):,} bytes with sha256 {received}"
        )
    return bytes(body)


# Bytes: more than the largest of the four files has. Reading stops there if a stream does not end.
_LARGEST = 1 << 24


def _load(paths: dict, part: str) -> Split:
    images = read_idx(paths[f"{part}-images-idx3-ubyte"])
    labels = read_idx(paths[f"{part}-labels-idx1-ubyte"])
    return Split(images[..., None] / np.float32(255), labels.astype(np.int32))
