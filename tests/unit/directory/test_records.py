"""The records of endpoints: written whole, read with suspicion, and what they say about who lives where."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gcref import config, ids
from gcref.directory import records
from gcref.directory.records import EndpointRecord
from gcref.errors import ConfigError, NotFoundError

KEY = "k" * 40
ALL = frozenset(("ipc", "direct", "broker"))


def make(name: str = "polaris", **fields: Any) -> EndpointRecord:
    return EndpointRecord(ids.new_id(), name, KEY, **fields)


@pytest.fixture
def here(home: Path) -> Iterator[tuple[EndpointRecord, Path]]:
    """A record whose endpoint lives on this machine, and its folder."""
    record = make(
        control=("tcp://127.0.0.1:4000", "ipc:///run/control"),
        bulk=("ipc:///run/bulk",),
        host_nonce="nonce",
        running=True,
    )
    folder = config.host_dir(record.id)
    (folder / "nonce").write_text("nonce")
    (folder / "lock").touch()
    yield record, folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_what_is_written_is_read(home: Path) -> None:
    record = make(control=("tcp://127.0.0.1:4000",), running=True, pid=7, started=1.5)
    path = records.write(record)
    assert path == home / "endpoints" / "polaris" / "record.json"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert records.read("polaris") == record
    records.write(dataclasses.replace(record, running=False))
    found = records.read("polaris")
    assert found is not None
    assert not found.running
    assert [entry.name for entry in path.parent.iterdir()] == ["record.json"]
    assert records.read("midway") is None


def test_it_is_found_by_name_and_by_id(home: Path) -> None:
    polaris, midway = make(), make("midway")
    records.write(polaris)
    records.write(midway)
    assert records.list_records() == [midway, polaris]
    id = ids.text(midway.id)
    for named in ("midway", id, id.upper(), midway.id, uuid.UUID(id)):
        assert records.resolve(named) == midway


def test_an_unknown_one_is_an_error_that_names_those_that_are_known(home: Path) -> None:
    with pytest.raises(NotFoundError, match="none is known here"):
        records.resolve("polaris")
    records.write(make())
    for wanted in ("midway", str(uuid.uuid4()), uuid.uuid4(), "../x", ""):
        with pytest.raises(NotFoundError, match="known here: polaris"):
            records.resolve(wanted)


def test_it_is_removed_with_its_folder_unless_that_holds_more(home: Path) -> None:
    path = records.write(make())
    records.remove("polaris")
    assert not path.parent.exists()
    records.remove("polaris")
    path = records.write(make())
    (path.parent / "key").touch()
    records.remove("polaris")
    assert path.parent.exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "-x", "x" * 65, "é", "a b", str(uuid.uuid4()), "0" * 32]
)
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name an endpoint"):
        records.check_name(name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        "\ud800",
        json.dumps({"name": "polaris", "public_key": KEY}),
        json.dumps({"id": 5, "name": "polaris", "public_key": KEY}),
        json.dumps({"id": "no id", "name": "polaris", "public_key": KEY}),
        json.dumps({"id": str(uuid.uuid4()), "name": "../x", "public_key": KEY}),
        json.dumps({"id": str(uuid.uuid4()), "name": "polaris", "public_key": KEY, "control": "tcp://x"}),
        json.dumps({"id": str(uuid.uuid4()), "name": "polaris", "public_key": KEY, "control": ["http://x"]}),
        json.dumps({"id": str(uuid.uuid4()), "name": "polaris", "public_key": KEY, "pid": "1"}),
        " " * (records.MAX_RECORD_BYTES + 1),
    ],
)
def test_a_damaged_record_is_an_error_that_names_the_file(home: Path, text: str) -> None:
    path = records.write(make("midway")).parent.parent / "polaris" / "record.json"
    path.parent.mkdir()
    path.write_text(text, errors="surrogatepass")
    with pytest.raises(ConfigError, match=r"polaris/record\.json"):
        records.read("polaris")
    assert [record.name for record in records.list_records()] == ["midway"]


def test_unknown_keys_are_ignored(home: Path) -> None:
    record = make()
    path = records.write(record)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of": "the future"}))
    assert records.read("polaris") == record


def test_ways_from_the_same_machine(here: tuple[EndpointRecord, Path]) -> None:
    record, folder = here
    direct, ipc = ("direct", "tcp://127.0.0.1:4000", KEY.encode()), ("ipc", "ipc:///run/control", None)
    assert record.candidates(ALL) == [ipc, direct]
    assert record.candidates(frozenset(("direct",))) == [direct]
    assert record.bulk_candidates(ALL) == [("ipc", "ipc:///run/bulk", None)]
    (folder / "nonce").write_text("somebody else's")
    assert record.candidates(ALL) == [direct]
    assert record.bulk_candidates(ALL) == []


def test_whether_it_lives(here: tuple[EndpointRecord, Path]) -> None:
    record, folder = here
    assert record.alive() is False
    lock = os.open(folder / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert record.alive() is True
    assert dataclasses.replace(record, running=False).alive() is False
    os.close(lock)
    assert record.alive() is False
    assert record.alive_here() is False


def test_what_a_dead_one_left_may_have_been_swept(here: tuple[EndpointRecord, Path]) -> None:
    record, folder = here
    (folder / "nonce").unlink()
    assert record.alive() is None
    assert record.alive_here() is False
    assert dataclasses.replace(record, host="another machine").alive_here() is None
    assert dataclasses.replace(record, host="").alive_here() is None
