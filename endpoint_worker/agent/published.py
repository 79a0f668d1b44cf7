"""What an endpoint says of itself in its `GCREF_HOME`: its record, changed while it runs, and taken back at the end."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

from gcref.directory import records
from gcref.directory.records import EndpointRecord


class Published:
    """The record of a running endpoint. Any thread may call anything.

    Args:
        record: what is true now; it is written at once.
        home: the `GCREF_HOME`.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, record: EndpointRecord, home: Path) -> None:
        self._lock = threading.Lock()
        self._home = home
        self._record = record
        self._withdrawn = False
        records.write(record, home)

    @property
    def record(self) -> EndpointRecord:
        """As it was written last."""
        return self._record

    def change(self, **fields: Any) -> None:
        """Write it anew, with these fields, if that makes a difference.

        Raises:
            ConfigError: the folder cannot be written.
        """
        with self._lock:
            changed = dataclasses.replace(self._record, **fields)
            if changed != self._record and not self._withdrawn:
                self._record = changed
                records.write(changed, self._home)

    def withdraw(self) -> None:
        """We cannot be found any more."""
        with self._lock:
            self._withdrawn = True
            if self._record.ephemeral:
                records.remove(self._record.name, self._home)
            else:
                records.write(dataclasses.replace(self._record, running=False), self._home)
