"""As `journal`, and each batch has reached the disk before anything rests on it."""

from __future__ import annotations

from tests.bench.systems import journal


class Adapter(journal.Adapter):
    name = "fsync"
    fsync = True
