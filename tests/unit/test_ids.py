"""Ids: random, distinct also across a fork, and told from what is no id."""

from __future__ import annotations

import os
import threading
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcref import ids


def test_new_ids_are_version_4_uuids_and_distinct() -> None:
    made = [ids.new_id() for _ in range(1000)]
    assert len(set(made)) == 1000
    for id in made:
        read = uuid.UUID(bytes=id)
        assert (read.version, read.variant) == (4, uuid.RFC_4122)


def test_every_other_bit_is_random() -> None:
    either = bytes(16)
    both = b"\xff" * 16
    for _ in range(500):
        id = ids.new_id()
        either = bytes(a | b for a, b in zip(either, id, strict=True))
        both = bytes(a & b for a, b in zip(both, id, strict=True))
    assert either.hex() == "ffffffffffff4fffbfffffffffffffff"
    assert both.hex() == "00000000000040008000000000000000"


def test_threads_get_distinct_ids() -> None:
    made: list[list[bytes]] = []

    def make() -> None:
        made.append([ids.new_id() for _ in range(2000)])

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id for part in made for id in part}) == 16_000


def test_a_forked_child_does_not_repeat_the_ids_of_its_parent() -> None:
    ids.new_id()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"".join(ids.new_id() for _ in range(100)))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    theirs = {data[at : at + 16] for at in range(0, len(data), 16)}
    assert len(theirs) == 100
    assert not theirs & {ids.new_id() for _ in range(600)}


@given(st.binary(min_size=16, max_size=16))
def test_every_form_of_an_id_gives_its_bytes(id: bytes) -> None:
    same = uuid.UUID(bytes=id)
    assert ids.text(id) == str(same)
    for form in (id, same, str(same), str(same).upper(), same.hex):
        assert ids.parse(form) == id


@pytest.mark.parametrize(
    "value",
    [
        "",
        "polaris",
        "x" * 36,
        "0" * 31,
        "0" * 33,
        "0" * 31 + " ",
        "00000000-0000-0000-0000-00000000000",
        "0000000000-00-0000-0000-000000000000",
        "00000000-0000-0000-0000-0000000000é0",
        b"",
        b"0" * 36,
        bytes(15),
        bytearray(16),
        None,
        7,
    ],
)
def test_what_is_no_id_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not an id"):
        ids.parse(value)  # type: ignore[arg-type]


@given(st.text())
def test_no_text_does_anything_but_parse_or_raise_value_error(value: str) -> None:
    try:
        assert len(ids.parse(value)) == 16
    except ValueError:
        pass
