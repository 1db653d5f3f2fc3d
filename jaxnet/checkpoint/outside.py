"""What lies outside of a checkpoint's file, in the same folder: its names, who may delete it, and when.

    state.safetensors.part-0123456789abcdef-00000      a part
    state.safetensors.orbax-0123456789abcdef           a folder of Orbax
    state.safetensors.lock-0123456789abcdef            locked while the save of that number lasts

Symbolic links of such names are left alone.
"""

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterable, Iterator

from jaxnet.checkpoint import atomic, container, places
from jaxnet.checkpoint.format import CheckpointError, Orbax, Parts


def path_of(target: str, identity: str, number: int) -> str:
    return f"{target}.part-{identity}-{number:05d}"


def orbax_path(target: str, identity: str) -> str:
    return f"{target}.orbax-{identity}"


def lock_path(target: str, identity: str) -> str:
    return f"{target}.lock-{identity}"


# What follows a file's name in those of all the others. Orbax adds to its own while it writes.
OUTSIDE = r"\.(?:part|orbax|lock)-([0-9a-f]{16})(?:-\d{5,}|\.orbax-checkpoint-tmp.*)?"


def sweep(target: str) -> None:
    """Remove what a path has outside its file and does not mean: of older saves, and of those that failed."""
    folder, name = os.path.split(target)
    with contextlib.suppress(OSError, CheckpointError):  # a file that cannot be read keeps whatever is there
        found = [
            (entry, re.fullmatch(re.escape(name) + OUTSIDE, entry)) for entry in places.entries(folder, links=False)
        ]
        for identity in {match[1] for _, match in found if match}:
            with _claimed(target, identity) as dead:
                meant = _outside(target)  # read now, since a save gives itself up after it is meant
                if dead and (meant is None or meant.id != identity):
                    _remove_all(folder, [entry for entry, match in found if match and match[1] == identity])


def _remove_all(folder: str, names: Iterable[str]) -> None:
    """Delete the files and folders of a save; the lock last and by others, so that what a kill leaves can be told."""
    for name in names:
        if not re.search(r"\.lock-[0-9a-f]{16}$", name):
            with contextlib.suppress(OSError):
                places.remove(os.path.join(folder, name), folder_too=".orbax-" in name)


def owners(folder: str) -> set[str]:
    """The names of the files in a folder, there or not, of which a save is under way or was killed."""
    locks = (re.fullmatch(r"(.+)\.lock-[0-9a-f]{16}", entry) for entry in places.entries(folder, links=False))
    return {found[1] for found in locks if found}


def undo(target: str, identity: str) -> None:
    """Remove all that a save has written, of which the file does not yet know."""
    folder, name = os.path.split(target)
    with contextlib.suppress(OSError):
        found = [
            (entry, re.fullmatch(re.escape(name) + OUTSIDE, entry)) for entry in places.entries(folder, links=False)
        ]
        _remove_all(folder, [entry for entry, match in found if match and match[1] == identity])


def _outside(target: str) -> Parts | Orbax | None:
    try:
        with container.opened(target) as (file, fd, size):
            return container.read_content(file, fd, size).header.outside
    except FileNotFoundError:
        return None


def remove(path: str) -> None:
    """Delete a checkpoint with all that is outside its file, the file first; nothing if it is a symbolic link."""
    target = places.real(path, follow=False)
    if not places.is_url(target) and os.path.islink(target):
        return
    with contextlib.suppress(OSError, CheckpointError):
        if (outside := _outside(target)) and not places.is_url(target):  # so that what a kill leaves can be told
            flags = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
            os.close(os.open(lock_path(target, outside.id), flags, 0o666))
    places.remove(target)
    sweep(target)


@contextlib.contextmanager
def reserved(target: str, identity: str) -> Iterator[None]:
    """While this lasts, no other save to the same path sweeps what the save of this number has written."""
    atomic.make_folder(os.path.dirname(target))
    path = lock_path(target, identity)
    fd = atomic.open_locked(path)
    while fd is None:
        fd = atomic.open_locked(path)
    try:
        yield
    finally:
        atomic.discard(path, fd)


@contextlib.contextmanager
def _claimed(target: str, identity: str) -> Iterator[bool]:
    """Give whether no living save has reserved this number; while this lasts, none can, and then its lock is gone."""
    if places.is_url(target):
        yield True
        return
    try:
        fd = os.open(path := lock_path(target, identity), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield True
        return
    except OSError as e:
        if e.errno != errno.ELOOP:  # a symbolic link is no lock of ours
            raise
        yield True
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # it lives, or the file system has no locks: perhaps it lives
            yield False
            return
        yield True
        with contextlib.suppress(OSError):
            os.unlink(path)  # while it is locked: who has just made it sees that, and makes it again
    finally:
        os.close(fd)
