"""Values and packets as bytes: what goes in comes out, and whatever comes in ends in a value or in a typed error."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcref.config import PROTOCOL_VERSION
from gcref.errors import LocalProtocolError, ProtocolError, RemoteProtocolError, VersionMismatchError
from gcref.wire import codec

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | TEXT
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)
U64 = st.integers(0, (1 << 64) - 1 - codec.MAX_ITEMS)


@given(PLAIN)
def test_plain_values_come_back(value: Any) -> None:
    assert codec.unpack(codec.pack(value)) == value


def test_tuples_become_lists_and_buffers_bytes() -> None:
    assert codec.unpack(codec.pack((1, (2, bytearray(b"x"), memoryview(b"y"))))) == [1, [2, b"x", b"y"]]
    assert math.isnan(codec.unpack(codec.pack(math.nan)))


@pytest.mark.parametrize("value", [object(), {1, 2}, 1 << 64, -(1 << 63) - 1, [1, [object()]], "\ud800"])
def test_what_is_not_plain_is_refused_and_the_next_one_is_whole(value: object) -> None:
    with pytest.raises(LocalProtocolError):
        codec.pack(["a beginning that must not stay", value])
    assert codec.unpack(codec.pack([1])) == [1]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_protocol_error(data: bytes) -> None:
    for read in (codec.unpack, codec.unpack_packet):
        try:
            read(data)
        except ProtocolError:
            pass


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",  # never used by msgpack
        codec.pack(1) + b"\x00",  # left over
        codec.pack("text")[:-1],
        b"\xa1\xff",  # a text that is none
        b"\xc7\x00\x05",  # extension types, an empty one too
        b"\xd4\x01\x00",
        msgpack.packb(msgpack.Timestamp(1, 0)),
        b"\x81\xc0\x01",  # a key that is no text
        b"\xdf\xff\xff\xff\xff",  # sizes beyond the bytes
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 5000 + b"\xc0",  # deeper than any stack
    ],
)
def test_hostile_bytes_are_a_remote_protocol_error(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        codec.unpack(data)


def test_sizes_are_bounded_before_decoding() -> None:
    data = codec.pack(b"x" * 100)
    assert codec.unpack(data, len(data)) == b"x" * 100
    with pytest.raises(RemoteProtocolError, match="limit of 50"):
        codec.unpack(data, 50)
    with pytest.raises(RemoteProtocolError):
        codec.unpack(b"\xdd" + (codec.MAX_ITEMS + 1).to_bytes(4, "big") + b"\xc0" * (codec.MAX_ITEMS + 1))


@given(st.integers(0, codec.BYE), U64, U64, U64, U64, st.lists(PLAIN, max_size=4))
def test_packets_come_back(
    kind: int, epoch: int, first_seq: int, ack_epoch: int, ack: int, messages: list[Any]
) -> None:
    frame = codec.pack_packet(kind, epoch, first_seq, ack_epoch, ack, [codec.pack(each) for each in messages])
    assert frame[0] == PROTOCOL_VERSION
    assert len(frame) == codec.HEADER_BYTES + sum(len(codec.pack(each)) for each in messages)
    assert codec.unpack_packet(frame) == (kind, epoch, first_seq, ack_epoch, ack, messages)
    assert codec.unpack_packet(memoryview(frame)) == codec.unpack_packet(frame)


@given(U64, U64, st.lists(PLAIN, max_size=4))
def test_renumbered_packets_hold_the_same_messages(epoch: int, first_seq: int, messages: list[Any]) -> None:
    frame = codec.pack_packet(codec.DATA, 1, 2, 3, 4, [codec.pack(each) for each in messages])
    again = codec.unpack_packet(codec.renumber(frame, epoch, first_seq))
    assert again == (codec.DATA, epoch, first_seq, 0, 0, messages)


def test_unknown_trailing_fields_of_a_packet_are_ignored() -> None:
    frame = bytes([PROTOCOL_VERSION]) + codec.pack([codec.DATA, 1, 2, 3, 4, [[5]], "new"])
    assert codec.unpack_packet(frame) == (codec.DATA, 1, 2, 3, 4, [[5]])


@pytest.mark.parametrize(
    "fields",
    [
        [],
        None,
        [0, 1, 2, 3, 4],
        [6, 1, 2, 3, 4, []],
        [-1, 1, 2, 3, 4, []],
        [True, 1, 2, 3, 4, []],
        [0, -1, 2, 3, 4, []],
        [0, 1, "2", 3, 4, []],
        [0, 1, (1 << 64) - 1, 3, 4, []],
        [0, 1, 2, None, 4, []],
        [0, 1, 2, 3, 4.0, []],
        [0, 1, 2, 3, 4, {}],
    ],
)
def test_packets_with_wrong_fields_are_refused(fields: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        codec.unpack_packet(bytes([PROTOCOL_VERSION]) + codec.pack(fields))


def test_another_version_is_told_with_both_numbers() -> None:
    with pytest.raises(VersionMismatchError) as caught:
        codec.unpack_packet(b"\x09whatever version nine says")
    assert (caught.value.local, caught.value.remote) == (PROTOCOL_VERSION, 9)
    assert "version 1" in str(caught.value)
    assert "9" in str(caught.value)
