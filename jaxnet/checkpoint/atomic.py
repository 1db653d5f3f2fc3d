"""Replace files atomically and durably, whatever their contents.

The steps are: write a temporary file in the same folder, fsync it, rename it, fsync the folder. A
reader sees either the old bytes or the new bytes. A process locks its temporary file, so an
unlocked one was left behind by a killed process. This module never creates, deletes or follows
symbolic links; `places.real` resolves them first.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator

from jaxnet.checkpoint.words import shown

__all__ = [
    "check_target",
    "discard",
    "make_folder",
    "open_locked",
    "replacing",
    "sync_folder",
    "temporary_file",
    "write",
]

# The prefix of the names of temporary files; their suffix is ".tmp".
TEMPORARY = ".jaxnet-"


@contextlib.contextmanager
def replacing(file: str, target: str) -> Iterator[int]:
    """Yield a descriptor to write to. The content replaces `target` if the block succeeds and is
    discarded if it raises.

    Args:
      file: how errors name the file.
      target: the absolute path to replace. If it is a symbolic link, the link is replaced, not the
        file behind it.
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
        # There is no second try: after a failed fsync, the kernel may have dropped the bytes and
        # report success.
        os.fsync(fd)
        os.replace(temporary, target)
    except BaseException as e:
        discard(temporary, fd)
        e.add_note(f"while saving {shown(file)}: nothing has been replaced")
        raise
    os.close(fd)
    sync_folder(folder)


def check_target(file: str, target: str) -> os.stat_result | None:
    """Return the status of the regular file at `target`, if any. Raise OSError if the target cannot
    be replaced.
    """
    try:
        old = os.lstat(target)
    except (FileNotFoundError, NotADirectoryError):
        # If a parent is a file, `make_folder` raises later.
        return None
    if stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(
            errno.EISDIR, "a checkpoint is a file, this is a folder: add a file name", file
        )
    if stat.S_ISLNK(old.st_mode):
        return None
    if not stat.S_ISREG(old.st_mode):
        raise FileExistsError(
            errno.EEXIST, "this is neither a file nor a folder, and will not be replaced", file
        )
    return old


def write(fd: int, data: memoryview) -> None:
    """Write all data; `os.write` may write only a part."""
    while data:
        data = data[os.write(fd, data) :]


@contextlib.contextmanager
def temporary_file(folder: str) -> Iterator[int]:
    """Yield the descriptor of a new, locked file in a folder, and delete the file after the
    block.
    """
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
    """Create a file, lock it and return its descriptor; None if another process deleted it before
    it was locked.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        # On a file system without locks, `_sweep` cannot lock either, and so deletes nothing.
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
    except BaseException:
        discard(path, fd)
        raise
    os.close(fd)
    return None


def discard(path: str, fd: int) -> None:
    """Delete and close an open file."""
    with contextlib.suppress(OSError):
        os.unlink(path)
    os.close(fd)


def _sweep(folder: str) -> None:
    """Delete temporary files that no running process has locked."""
    with os.scandir(folder) as entries:
        left = [e.path for e in entries if e.name.startswith(TEMPORARY) and e.name.endswith(".tmp")]
    for path in left:
        # OSError: the file is locked, already deleted, a link, or owned by another user.
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(fd)


def make_folder(folder: str) -> None:
    """Create a folder and its parents, each durably."""
    if not os.path.isdir(folder):
        make_folder(os.path.dirname(folder))
        # Another process may have created it meanwhile. If it is a file, `sync_folder` raises.
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        sync_folder(os.path.dirname(folder))


def sync_folder(folder: str) -> None:
    """Make renames and new names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as e:
        # Some file systems cannot sync folders and report one of these two errors, which PostgreSQL
        # also ignores.
        if e.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(fd)
