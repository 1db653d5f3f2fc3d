"""Everything that lies beside a checkpoint's file: parts, Orbax folders and locks.

    state.safetensors.part-0123456789abcdef-00000      a part
    state.safetensors.orbax-0123456789abcdef           a folder of Orbax
    state.safetensors.lock-0123456789abcdef            locked while the save of that number runs

This module knows their names, and when they may be deleted. Symbolic links with such names are left
alone.
"""

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterable, Iterator

from jaxnet.checkpoint import atomic, container, places
from jaxnet.checkpoint.errors import CheckpointError
from jaxnet.checkpoint.manifests import Orbax, Parts

__all__ = ["lock_path", "orbax_path", "owners", "path_of", "remove", "reserved", "sweep", "undo"]


def path_of(target: str, identity: str, number: int) -> str:
    """The path of one part of a save."""
    return f"{target}.part-{identity}-{number:05d}"


def orbax_path(target: str, identity: str) -> str:
    """The path of the Orbax folder of a save."""
    return f"{target}.orbax-{identity}"


def lock_path(target: str, identity: str) -> str:
    """The path of the lock of a save."""
    return f"{target}.lock-{identity}"


# The suffixes of all names beside a file. While Orbax writes, its folder has a longer suffix.
OUTSIDE = r"\.(?:part|orbax|lock)-([0-9a-f]{16})(?:-\d{5,}|\.orbax-checkpoint-tmp.*)?"


def sweep(target: str) -> None:
    """Delete parts, Orbax folders and locks beside `target` that its file does not reference.

    Older saves and failed saves left them behind. If the file cannot be read, everything stays.
    """
    with contextlib.suppress(OSError, CheckpointError):
        for identity, names in _saves(target).items():
            with _claimed(target, identity) as dead:
                # Read the file under the lock: a save renames its file into place before it
                # releases its lock.
                current = _outside(target)
                if dead and (current is None or current.id != identity):
                    _remove_all(os.path.dirname(target), names)


def _saves(target: str) -> dict[str, list[str]]:
    """The names beside a file by the number of their save."""
    folder, name = os.path.split(target)
    saves: dict[str, list[str]] = {}
    for entry in places.entries(folder, links=False):
        if match := re.fullmatch(re.escape(name) + OUTSIDE, entry):
            saves.setdefault(match[1], []).append(entry)
    return saves


def _remove_all(folder: str, names: Iterable[str]) -> None:
    """Delete the files and folders of a save, except its lock.

    The lock stays until a later sweep, which can then still attribute the leftovers of a killed
    process to this save.
    """
    for name in names:
        if not re.search(r"\.lock-[0-9a-f]{16}$", name):
            with contextlib.suppress(OSError):
                places.remove(os.path.join(folder, name), folder_too=".orbax-" in name)


def owners(folder: str) -> set[str]:
    """The names of files in a folder whose save is running or was killed.

    Such a file need not exist.
    """
    locks = (
        re.fullmatch(r"(.+)\.lock-[0-9a-f]{16}", entry)
        for entry in places.entries(folder, links=False)
    )
    return {found[1] for found in locks if found}


def undo(target: str, identity: str) -> None:
    """Delete everything that a save has written beside its file, before the file references it."""
    with contextlib.suppress(OSError):
        _remove_all(os.path.dirname(target), _saves(target).get(identity, []))


def _outside(target: str) -> Parts | Orbax | None:
    """The parts or the Orbax folder that the file references; None if there are none."""
    try:
        with container.opened(target) as (file, fd, size):
            return container.read_content(file, fd, size).header.outside
    except FileNotFoundError:
        return None


def remove(path: str) -> None:
    """Delete the file of a checkpoint, and then everything beside it.

    A symbolic link is left alone.
    """
    target = places.real(path, follow=False)
    if not places.is_url(target) and os.path.islink(target):
        return
    with contextlib.suppress(OSError, CheckpointError):
        if (outside := _outside(target)) and not places.is_url(target):
            # After a kill, the lock shows which checkpoint the leftovers belong to.
            flags = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
            os.close(os.open(lock_path(target, outside.id), flags, 0o666))
    places.remove(target)
    sweep(target)


@contextlib.contextmanager
def reserved(target: str, identity: str) -> Iterator[None]:
    """Hold the lock of a save during the block.

    Other saves to the same path then delete neither its parts nor its folder.
    """
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
    """Yield whether no running save holds this number.

    If so, no save can take the number during the block, and the lock is deleted after it.
    """
    if places.is_url(target):
        yield True
        return
    try:
        fd = os.open(path := lock_path(target, identity), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield True
        return
    except OSError as e:
        # ELOOP: a symbolic link, which is never a lock.
        if e.errno != errno.ELOOP:
            raise
        yield True
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            # The save is running. On a file system without locks, it may be running.
            yield False
            return
        yield True
        # Unlink while holding the lock: a process that has just created this file sees st_nlink ==
        # 0 and retries.
        with contextlib.suppress(OSError):
            os.unlink(path)
    finally:
        os.close(fd)
