"""Where checkpoints lie: in a file system, or at a URL of an object store (gs://, s3://), which needs the extra `orbax`.

An object is there as a whole or not at all, and nothing has to be synced; otherwise a URL is used like a path.
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any


def is_url(path: str) -> bool:
    return re.match("[a-z0-9]+://", path) is not None


def real(path: str) -> str:
    """The path behind symbolic links, absolute."""
    return path if is_url(path) else os.path.realpath(path)


def absolute(path: str) -> str:
    return path.rstrip("/") if is_url(path) else os.path.abspath(path)


def entries(folder: str) -> dict[str, bool]:
    """The names in a folder, and whether they are files; none if there is no folder."""
    with contextlib.suppress(FileNotFoundError):
        if is_url(folder):
            with _as_os_errors(folder) as place:
                return {entry.name: True for entry in place.iterdir()} if place.exists() else {}
        with os.scandir(folder) as found:
            return {entry.name: entry.is_file() for entry in found}
    return {}


def exists(path: str) -> bool:
    if not is_url(path):
        return os.path.exists(path)
    with _as_os_errors(path) as place:
        return place.exists()


def remove(path: str) -> None:
    """Delete a file, or a folder with all that is in it; nothing if there is none."""
    with contextlib.suppress(FileNotFoundError):
        if is_url(path):
            with _as_os_errors(path) as place:
                place.rmtree() if place.is_dir() else place.unlink()
        elif os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def fetch(url: str) -> bytes:
    with _as_os_errors(url) as place:
        return place.read_bytes()


def put(url: str, content: bytes) -> None:
    with _as_os_errors(url) as place:
        place.write_bytes(content)


def check_writable(folder: str) -> None:
    """Make a folder and raise OSError if nothing can be written there."""
    if is_url(folder):
        put(f"{folder}/.jaxnet-writable.tmp", b"")
        return remove(f"{folder}/.jaxnet-writable.tmp")
    os.makedirs(folder, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".jaxnet-", suffix=".tmp"):
        pass


@contextlib.contextmanager
def _as_os_errors(url: str) -> Iterator[Any]:
    """Give what stands for a URL, and raise what its store reports as the OSError that a file system would raise."""
    try:
        from etils import epath
    except ImportError as e:
        raise ImportError(f"{url}: object stores need Orbax: pip install 'jaxnet[orbax]'") from e
    try:
        yield epath.Path(url)
    except FileNotFoundError as e:  # some say another name
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from e
    except (OSError, ImportError):
        raise
    except Exception as e:  # each store has its own
        raise OSError(errno.EIO, f"the object store says {type(e).__name__}: {e}", url) from e
