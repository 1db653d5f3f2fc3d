"""The places of checkpoints: a file system, or an object store (gs://, s3://).

Object stores need the extra `orbax`. An object exists as a whole or not at all, and nothing has to
be synced; otherwise a URL is used like a path. TensorStore asks the store each time, whereas other
clients would return answers from their caches.
"""

import contextlib
import errno
import functools
import os
import re
import shutil
import stat
from collections.abc import Iterator
from typing import Any

from jaxnet.checkpoint import atomic
from jaxnet.checkpoint.words import shown

__all__ = [
    "absolute",
    "base",
    "check_engine",
    "check_url",
    "check_writable",
    "entries",
    "fetch",
    "is_url",
    "put",
    "real",
    "remove",
    "size",
]

DRIVERS = {"gs": "gcs", "s3": "s3"}
# Seconds until the first answer of an object store.
ANSWER = 30
# Seconds to transfer one object, or the list of all names.
TRANSFER = 600


def is_url(path: str) -> bool:
    """Whether a path is a URL."""
    # pathlib writes such a path with one slash.
    return re.match("[A-Za-z][A-Za-z0-9+.-]*:/", path) is not None


def check_url(url: str) -> None:
    """Raise ValueError unless a URL names an object or a folder."""
    found = re.fullmatch("([a-z0-9]+)://([^/]+)((?:/[^/%?#*\\[]+)+)/?", url)
    if not found or found[1] not in DRIVERS or {".", ".."} & {*found[3].split("/")}:
        text = (
            "must be gs://bucket/name or s3://bucket/name, without empty, '.' or '..' parts and "
            "%, ?, #, * and ["
        )
        raise ValueError(f"{shown(url)}: a URL {text}")


def check_engine(file: str, engine: str | None) -> None:
    """Raise ValueError unless this engine exists and can write to this path."""
    if engine not in (None, "orbax"):
        raise ValueError(f"engine must be 'orbax' or None, got {engine!r}")
    if engine is None and is_url(file):
        text = "say engine='orbax' (in `fit`: give it a `Checkpoints` with that), or save to a file"
        raise ValueError(f"{shown(file)} is in an object store: {text}")
    if is_url(file):
        check_url(file)


def real(path: str, *, follow: bool = True) -> str:
    """The absolute path with symbolic links resolved, with `follow=False` all but the last one."""
    if is_url(path):
        return path.rstrip("/")
    if follow:
        return os.path.realpath(path)
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def absolute(path: str) -> str:
    """The absolute path, or the URL without a slash at its end."""
    return path.rstrip("/") if is_url(path) else os.path.abspath(path)


def entries(folder: str, *, links: bool = True) -> dict[str, bool]:
    """The names in a folder, and for each whether it is a file.

    With `links`, symbolic links to files count as files. All other symbolic links are left out. The
    result is empty if the folder does not exist.
    """
    if is_url(folder):
        with _as_os_errors(folder):
            keys = [key.decode() for key in _store(folder).list().result(timeout=TRANSFER)]
        return {key.partition("/")[0]: "/" not in key for key in keys}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as found:
        return {x.name: x.is_file() for x in found if not x.is_symlink() or links and x.is_file()}
    return {}


def remove(path: str, *, folder_too: bool = False) -> None:
    """Delete a file or, with `folder_too`, a folder and its contents.

    A missing path is not an error. Symbolic links and their targets are left alone.
    """
    if is_url(path):
        folder, _, name = path.rpartition("/")
        with _as_os_errors(path):
            from etils import epath

            for key in map(bytes.decode, _store(folder).list().result(timeout=TRANSFER)):
                if key.partition("/")[0] == name:
                    with contextlib.suppress(FileNotFoundError):
                        epath.Path(f"{folder}/{key}").unlink()
        return
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if stat.S_ISDIR(mode) and folder_too:
            shutil.rmtree(path)
        elif not stat.S_ISLNK(mode):
            os.unlink(path)


def size(folder: str) -> int:
    """The total size in bytes of all files in and below a folder."""
    if is_url(folder):
        with _as_os_errors(folder):
            from etils import epath

            files = [file for file in epath.Path(folder).rglob("*") if file.is_file()]
            return sum(file.stat().length for file in files)
    places = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    return sum(os.lstat(path).st_size for path in places)


def fetch(url: str) -> bytes:
    """The content of an object. Raises FileNotFoundError if there is none."""
    folder, _, name = url.rpartition("/")
    with _as_os_errors(url):
        found = _store(folder).read(name).result(timeout=TRANSFER)
    if found.state != "value":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    return found.value


def put(url: str, content: bytes) -> None:
    """Write an object, replacing an existing one."""
    folder, _, name = url.rpartition("/")
    with _as_os_errors(url):
        _store(folder).write(name, content).result(timeout=TRANSFER)


def check_writable(folder: str) -> None:
    """Create a folder, and raise OSError if it is not writable."""
    if is_url(folder):
        put(f"{folder}/.jaxnet-writable.tmp", b"jaxnet")
        return remove(f"{folder}/.jaxnet-writable.tmp")
    atomic.make_folder(folder)
    with atomic.temporary_file(folder):
        pass


def base(folder: str) -> dict[str, Any]:
    """A folder as TensorStore's specification of a key-value store."""
    if not is_url(folder):
        return {"driver": "file", "path": f"{folder}/"}
    check_url(f"{folder}/x")
    scheme, _, bucket, *path = folder.split("/")
    prefix = "".join(f"{step}/" for step in path)
    return {"driver": DRIVERS[scheme[:-1]], "bucket": bucket, "path": prefix}


def _store(folder: str) -> Any:
    where = base(folder)
    _ask(where["driver"], where["bucket"])
    return _opened(where)


@functools.cache
def _ask(driver: str, bucket: str) -> None:
    """Raise TimeoutError if a bucket does not answer. TensorStore alone would retry for minutes."""
    import tensorstore

    nothing = tensorstore.KvStore.KeyRange("jaxnet", "jaxnet\0")
    try:
        _opened({"driver": driver, "bucket": bucket}).list(nothing).result(timeout=ANSWER)
    except TimeoutError:
        raise
    except Exception:
        # A refusal is an answer, too: objects may be readable even if they cannot be listed.
        return


def _opened(where: dict[str, Any]) -> Any:
    import tensorstore

    return tensorstore.KvStore.open(where).result(timeout=ANSWER)


@contextlib.contextmanager
def _as_os_errors(url: str) -> Iterator[None]:
    """Raise what an object store reports as the OSError that a file system would raise."""
    try:
        yield
    except ImportError as e:
        text = "object stores need Orbax: pip install 'jaxnet[orbax]'"
        raise ImportError(f"{shown(url)}: {text}") from e
    except TimeoutError as e:
        text = (
            "the object store does not answer in time: is there a network, and who may read there?"
        )
        raise TimeoutError(errno.ETIMEDOUT, text, url) from e
    except Exception as e:
        check_url(url)
        raise OSError(errno.EIO, f"the object store says {e}", url) from e
