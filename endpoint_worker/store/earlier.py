"""What an earlier life of the store left: found by the names of its files, taken up or removed.

    whole objects ──► found ──► wanted: sealed again
                            ├─► written by a worker that may tell of them again: as if it were still writing them
                            └─► the rest: gone
    segments that a worker writes ──► entered at once, until their worker is known to be dead

A worker of then names a file by the name that it knew: its stem is what counts. It may also have been told of a segment
whose file it had not made when we looked.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from endpoint_worker.store import names, segments
from endpoint_worker.store.index import Index
from endpoint_worker.store.model import PULL, Segment, capacity_for


class Found(NamedTuple):
    """A whole object that an earlier life left.

    Attributes:
        name: what its file's name says.
        text: the name itself.
        disk: it lies on disk.
        bytes: the length of the file.
    """

    name: names.Whole
    text: str
    disk: bool
    bytes: int


class EarlierLife:
    """The files of an earlier life, looked at once. Without any (a new store's folders are empty) it has nothing to do.

    All but `worker_gone` are called under the store's lock, or before anybody else has the store.

    Args:
        folders: of the store.
        index: of the store: what is taken up is entered there.
        first_number: of the segments of this life; those of earlier ones have smaller numbers.
    """

    def __init__(self, folders: segments.Folders, index: Index, first_number: int) -> None:
        self._folders = folders
        self._index = index
        self._first_number = first_number
        # Those that may still write; None: not known before `recover`.
        self._workers: frozenset[int] | None = None
        self._found: dict[int, Found] = {}
        for folder, text, disk in folders.scan():
            try:
                self._look_at(folder, text, disk)
            except OSError:
                continue  # somebody removed it meanwhile, or it is a folder

    def recover(
        self,
        wanted: Mapping[bytes, tuple[int, int]],
        workers: frozenset[int],
        caches: Collection[bytes],
        now: float,
    ) -> tuple[dict[bytes, tuple[int, int]], list[Segment]]:
        """See `Store.recover`; also gives what is to be unlinked."""
        found, self._found = self._found, {}
        self._workers = workers
        index = self._index
        best = _best(found.values(), wanted)
        taken: dict[bytes, tuple[int, int]] = {}
        unlink: list[Segment] = []
        for id, (attempt, size) in wanted.items():
            here = index.objects.get(id)
            if here is None and id in best:
                file = found.pop(best[id].name.number)
                segment = self._take_up(file, PULL)
                unlink += index.seal(id, attempt, segment.number, size, cache=id in caches, now=now)
                taken[id] = attempt, size
            elif here is not None and (here.attempt, here.size) == (attempt, size):
                taken[id] = attempt, size
        for file in found.values():
            segment = self._take_up(file, file.name.writer)
            if file.name.writer not in workers:
                unlink += index.abandon(segment.number, now, reusable=False)
        for worker in index.workers():
            if worker not in workers:
                unlink += index.worker_gone(worker, now)
        return taken, unlink

    def find(self, number: int, path: str) -> Segment | None:
        """A segment of then that was not entered yet, by the path that its writer knows."""
        folder, _, text = path.rpartition("/")
        file = self._found.get(number)
        if file is not None:
            if names.stem_of(file.text) != names.stem_of(text):
                return None  # another object has lain there since
            return self._take_up(self._found.pop(number), file.name.writer)
        said = names.parse(text)
        if not isinstance(said, names.Writing) or not self._is_of_then(said) or not os.path.exists(path):
            return None
        disk = folder == self._folders.disk
        segment = self._index.take_up(number, said.use, said.capacity, disk=disk, writer=said.writer)
        segment.name = text
        return segment

    def untold(self, worker: int) -> list[Segment]:
        """The whole objects that a worker wrote then, and that it has not told of in this life."""
        written = self._index.written_by(worker)
        return [segment for segment in written if isinstance(names.parse(segment.name), names.Whole)]

    def worker_gone(self, worker: int) -> None:
        """A worker is dead: what it made after we had looked, and did not tell of, goes."""
        if self._workers is None or worker not in self._workers:
            return
        for folder, text, _ in list(self._folders.scan()):
            said = names.parse(text)
            if isinstance(said, names.Writing) and said.writer == worker and self._is_of_then(said):
                segments.unlink(f"{folder}/{text}")
        self._workers -= {worker}

    def _is_of_then(self, said: names.Writing) -> bool:
        return (self._workers is None or said.writer in self._workers) and said.number < self._first_number

    def _look_at(self, folder: str, text: str, disk: bool) -> None:
        name = names.parse(text)
        path = f"{folder}/{text}"
        if isinstance(name, names.Whole):
            self._found[name.number] = Found(name, text, disk, os.stat(path).st_size)
        elif isinstance(name, names.Writing) and name.writer != PULL:
            segment = self._index.take_up(name.number, name.use, name.capacity, disk=disk, writer=name.writer)
            segment.name = text
        else:
            segments.unlink(path)

    def _take_up(self, file: Found, writer: int) -> Segment:
        name = file.name
        capacity = capacity_for(file.bytes)
        segment = self._index.take_up(name.number, name.use, capacity, disk=file.disk, writer=writer)
        segment.name = file.text
        segment.crc = name.crc
        return segment


def _best(files: Iterable[Found], wanted: Mapping[bytes, tuple[int, int]]) -> dict[bytes, Found]:
    """The file to take for each wanted object; memory goes before disk."""
    best: dict[bytes, Found] = {}
    for file in files:
        name = file.name
        if wanted.get(name.id) != (name.attempt, name.size) or file.bytes < name.size:
            continue
        if name.id not in best or best[name.id].disk:
            best[name.id] = file
    return best
