"""Folders of parties on this machine: who holds one, and clearing away what the dead left.

    host_dir()/<id>/lock      held (flock) by the living party, from its start to the end of its process
    host_dir()/<id>/…         sockets, pages, segments: gone with the party
    disk_dir()/<id>/spill     spilled objects: gone with the party; a journal beside it stays
    disk_dir()/<id>/recoverable   what the party needs to come back; see below

The kernel lets go of a lock when its process is dead, however it died, so a lock that can be had is the proof that its
folder may go. Whoever removes a folder holds its lock meanwhile, and removes the lock's file last; whoever claims one
looks again, once it has the lock, whether that file is still the one in the folder. So a party that is
just starting never loses a folder: it gets the old one before the sweep, or makes a new one after it.

A party that may come back, with its journal and its workers, says so (`mark_recoverable`), and names the paths that it
needs for that. As long as all of them are there, a sweep leaves both of its folders alone, however dead it is; it claims
them itself when it starts again. When one is gone, so is the party: all that it left goes, a journal too.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

LOCK: Final = "lock"
SPILL: Final = "spill"
RECOVERABLE: Final = "recoverable"
# A sweep holds a lock for as long as it takes to unlink what is there. A claim waits for it as long.
_CLAIM_S: Final = 2.0
_RETRY_S: Final = 0.01
# A folder without a lock that is not empty belongs to a party that is making it, or was killed doing so.
_UNLOCKED_S: Final = 60.0


def claim(folder: Path, keep: Collection[str] = ()) -> int:
    """Hold a folder as the living party that owns it, made if missing; what a dead one left in it goes.

    Args:
        folder: `host_dir(party)`.
        keep: names of entries that are left as they are: the party takes up what it left in them.

    Returns:
        The descriptor of its lock. Keep it open for as long as the party lives; children must not inherit it.

    Raises:
        BlockingIOError: another living process holds it.
    """
    deadline = time.monotonic() + _CLAIM_S
    while True:
        held = _try_lock(folder)
        if held is not None:
            _empty(folder, keep)
            return held
        if time.monotonic() > deadline:
            raise BlockingIOError(f"{folder} is held by another process")
        time.sleep(_RETRY_S)


def release(folder: Path, lock: int, keep: Collection[str] = ()) -> None:
    """End what `claim` began: remove the folder, then let go of its lock.

    Args:
        folder: as claimed.
        lock: what `claim` gave.
        keep: names of entries that stay for the party's next life; the folder goes if none of them is there.
    """
    if any((folder / name).exists() for name in keep):
        _empty(folder, keep)
    else:
        _remove(folder)
    os.close(lock)


def mark_recoverable(disk_folder: Path, needs: Iterable[Path]) -> None:
    """Have sweeps leave a party's folders alone after its death, so that it can come back.

    Args:
        disk_folder: `disk_dir(party)`.
        needs: what it cannot come back without, its journal among them: absolute paths.
    """
    unfinished = disk_folder / f"{RECOVERABLE}.new"
    unfinished.write_bytes(b"\0".join(os.fsencode(path) for path in needs))
    unfinished.replace(disk_folder / RECOVERABLE)


def unmark_recoverable(disk_folder: Path) -> None:
    """The party leaves nothing that it could take up again."""
    _unlink(str(disk_folder / RECOVERABLE))


def is_recoverable(disk_folder: Path) -> bool:
    """Whether a party may come back: it said so, and has all that it needs for that."""
    try:
        needs = (disk_folder / RECOVERABLE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return all(os.path.lexists(path) for path in needs.split(b"\0") if path)


def sweep(host: Path, disk: Path | None = None) -> list[str]:
    """Remove what dead parties of this user left on this machine.

    Args:
        host: `host_dir()`: the folders of all parties in memory.
        disk: `disk_dir()`: their folders on disk; None: leave those alone (nobody is recoverable then).

    Returns:
        The names of the parties that it found something of.
    """
    swept: list[str] = []
    for name in sorted({*_parties(host), *(_parties(disk) if disk is not None else ())}):
        folder = host / name
        on_disk = disk / name if disk is not None else None
        if on_disk is not None and is_recoverable(on_disk):
            continue
        if not _is_left(folder) and (on_disk is None or not _is_left_on_disk(on_disk)):
            continue
        # Making and locking it, also where there is only a spill, keeps out a party that is just starting.
        held = _try_lock(folder)
        if held is None:
            continue
        if on_disk is not None:
            if is_recoverable(on_disk):  # it was started and killed since we looked
                os.close(held)
                continue
            _remove_left_on_disk(on_disk)
        release(folder, held)
        swept.append(name)
    return swept


def _parties(root: Path) -> list[str]:
    """The folders named by an id; whatever else lies there is not ours to judge."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return [name for name in names if len(name) == 32 and set(name) <= set("0123456789abcdef")]


def _is_left(folder: Path) -> bool:
    """Whether a folder may be one that a dead party left; an empty one goes at once."""
    age_s = 0.0
    try:
        age_s = time.time() - folder.stat().st_mtime
        if (folder / LOCK).exists():
            return True
        folder.rmdir()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # it is not empty
        return age_s > _UNLOCKED_S
    return False


def _try_lock(folder: Path) -> int | None:
    """Make and lock a folder; None: somebody holds it, or it changed hands while we tried."""
    path = folder / LOCK
    try:
        _make(folder)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None  # swept between the two
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_still_there(path, descriptor):
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None


def _make(folder: Path) -> None:
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        pass


def _is_still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _empty(folder: Path, keep: Collection[str] = ()) -> None:
    for entry in os.scandir(folder):
        if entry.name == LOCK or entry.name in keep:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            _unlink(entry.path)


def _remove(folder: Path) -> None:
    """Remove a folder whose lock we hold; the lock's file goes last."""
    _empty(folder)
    _unlink(str(folder / LOCK))
    try:
        folder.rmdir()
    except OSError:
        pass  # somebody is making it again


def _is_left_on_disk(folder: Path) -> bool:
    """Whether a folder on disk has something that goes with its party: a spill, a mark that is void, or nothing at all."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return not names or SPILL in names or RECOVERABLE in names


def _remove_left_on_disk(folder: Path) -> None:
    if (folder / RECOVERABLE).exists():
        shutil.rmtree(folder, ignore_errors=True)
        return
    shutil.rmtree(folder / SPILL, ignore_errors=True)
    try:
        folder.rmdir()
    except OSError:
        pass  # a journal is there


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
