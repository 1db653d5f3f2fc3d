"""Files that appear whole or not at all, durably: nothing here knows what is in them.

A temporary file in the same folder, fsync, rename, fsync of the folder: whoever opens the file sees the old bytes or the
new ones. A lock on the temporary file tells it from one that a killed process left behind. Symbolic links are never made
here, never deleted, and never followed: `places.real` has followed those that count.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator

from jaxnet.checkpoint.words import shown

TEMPORARY = ".jaxnet-"  # how the names of temporary files begin; they end in ".tmp"


@contextlib.contextmanager
def replacing(file: str, target: str) -> Iterator[int]:
    """Give a descriptor to write to; the content replaces `target` if the block ends well, else it vanishes.

    Args:
      file: how errors name the file.
      target: the absolute path to replace. A symbolic link there is replaced itself, not the file behind it.
    """
    folder = os.path.dirname(target)
    old = check_target(file, target)
    make_folder(folder)
    _sweep(folder)
    temporary, fd = _open_temporary(folder)
    try:
        if old and old.st_mode != os.fstat(fd).st_mode:
            os.fchmod(fd, stat.S_IMODE(old.st_mode))
        yield fd
        os.fsync(fd)  # if this fails the kernel may have dropped the bytes: no second try can tell
        os.replace(temporary, target)
    except BaseException as e:
        discard(temporary, fd)
        e.add_note(f"while saving {shown(file)}: nothing has been replaced")
        raise
    os.close(fd)
    sync_folder(folder)


def check_target(file: str, target: str) -> os.stat_result | None:
    """Return the status of the regular file that is there, if any; raise OSError if the target cannot be replaced."""
    try:
        old = os.lstat(target)
    except (FileNotFoundError, NotADirectoryError):  # a file where a folder should be fails when folders are made
        return None
    if stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a checkpoint is a file, this is a folder: add a file name", file)
    if stat.S_ISLNK(old.st_mode):
        return None
    if not stat.S_ISREG(old.st_mode):
        raise FileExistsError(errno.EEXIST, "this is neither a file nor a folder, and will not be replaced", file)
    return old


def write(fd: int, data: memoryview) -> None:
    """Write all of the data."""
    while data:
        data = data[os.write(fd, data) :]


@contextlib.contextmanager
def temporary_file(folder: str) -> Iterator[int]:
    """Give the descriptor of a new, locked file in a folder, which is gone after the block."""
    path, fd = _open_temporary(folder)
    try:
        yield fd
    finally:
        discard(path, fd)


def _open_temporary(folder: str) -> tuple[str, int]:
    while True:
        path = os.path.join(folder, f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}.tmp")
        if (fd := open_locked(path)) is not None:
            return path, fd


def open_locked(path: str) -> int | None:
    """Make a file and lock it; None if another process swept it before it was locked."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: then who sweeps cannot lock either
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
    except BaseException:
        discard(path, fd)
        raise
    os.close(fd)
    return None


def discard(path: str, fd: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
    os.close(fd)


def _sweep(folder: str) -> None:
    """Remove temporary files that no living process has locked."""
    with os.scandir(folder) as entries:
        left = [e.path for e in entries if e.name.startswith(TEMPORARY) and e.name.endswith(".tmp")]
    for path in left:
        with contextlib.suppress(OSError):  # locked, gone, a link, or somebody else's
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(fd)


def make_folder(folder: str) -> None:
    """Make a folder and its parents, each durably."""
    if not os.path.isdir(folder):
        make_folder(os.path.dirname(folder))
        with contextlib.suppress(FileExistsError):  # another process was faster; a file in the way fails just below
            os.mkdir(folder)
        sync_folder(os.path.dirname(folder))


def sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EBADF):  # a file system that cannot; PostgreSQL allows for these two
            raise
    finally:
        os.close(fd)
