"""References: equal by object, closed-mouthed about their token, and opened by whoever is there to do it."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from gcref import ids
from gcref.errors import LocalProtocolError, ProtocolError
from gcref.objects import ref as refs
from gcref.objects.ref import ObjectRef, read_token, split
from tests.unit.objects.holders import HOME, TOKEN, make_ref


def test_ids_are_text_outside_and_bytes_inside() -> None:
    id = ids.new_id()
    ref = ObjectRef(id, HOME, TOKEN)
    assert (ref.id, ref.home) == (ids.text(id), ids.text(HOME))
    assert (ref._id, ref._home, ref._token) == (id, HOME, TOKEN)
    assert ref.ref() is ref


def test_packed_it_is_48_bytes_and_comes_back() -> None:
    ref = make_ref()
    packed = ref.pack()
    assert len(packed) == 48
    for data in (packed, bytearray(packed), memoryview(packed)):
        back = ObjectRef.unpack(data)
        assert back == ref
        assert back._token == TOKEN
    for data in (b"", packed[:-1], packed + b"0"):
        with pytest.raises(ProtocolError):
            ObjectRef.unpack(data)


def test_a_run_of_references_is_cut_where_each_ends() -> None:
    several = [make_ref().pack() for _ in range(3)]
    assert list(split(b"".join(several))) == several
    assert list(split(b"")) == []
    with pytest.raises(ProtocolError):
        split(bytes(47))


@pytest.mark.parametrize("sizes", [(15, 16, 16), (16, 17, 16), (16, 16, 0)])
def test_parts_of_a_wrong_size_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        ObjectRef(*map(bytes, sizes))


def test_it_survives_pickling_without_its_pin() -> None:
    ref = ObjectRef(ids.new_id(), HOME, TOKEN, pin=object())
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(pickle.dumps(ref, protocol))
        assert back == ref
        assert back.pack() == ref.pack()
        assert back._pin is None


def test_the_same_object_is_the_same_reference() -> None:
    id = ids.new_id()
    one, same = ObjectRef(id, HOME, TOKEN), ObjectRef(id, HOME, bytes(16))
    assert one == same
    assert len({one, same}) == 1
    assert one != ObjectRef(id, bytes(16), TOKEN)
    assert one != ObjectRef(bytes(16), HOME, TOKEN)
    assert one != id


def test_the_token_is_not_in_the_representation() -> None:
    ref = make_ref()
    for secret in (TOKEN.hex(), repr(TOKEN), str(ids.text(TOKEN))):
        assert secret not in repr(ref)
    assert ref.id in repr(ref)


def test_it_is_opened_by_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_ref(ref: ObjectRef) -> Any:
        opened.append(ref)
        return SimpleNamespace(result=lambda timeout: ("value", timeout), done=lambda: True, size_bytes=7)

    opened: list[ObjectRef] = []
    monkeypatch.setattr(refs, "opener", open_ref)
    ref = make_ref()
    assert ref.get() == ("value", None)
    assert ref.get(timeout=3) == ("value", 3)
    assert ref.done() is True
    assert ref.size_bytes == 7
    assert opened == [ref] * 4


def test_without_a_client_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refs, "opener", None)
    with pytest.raises(LocalProtocolError, match="no client"):
        make_ref().get()


def test_a_token_belongs_to_one_object_and_one_secret() -> None:
    secret, id = bytes(32), ids.new_id()
    assert len(read_token(secret, id)) == 16
    assert read_token(secret, id) == read_token(secret, id)
    assert read_token(secret, ids.new_id()) != read_token(secret, id)
    assert read_token(b"1" * 32, id) != read_token(secret, id)
