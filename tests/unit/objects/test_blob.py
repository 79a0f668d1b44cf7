"""The layout of blobs: what goes in comes out, aligned, and no damage to the head gets past the checks."""

from __future__ import annotations

import os
import struct
import tempfile
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcref.errors import GcrefError, ProtocolError
from gcref.objects import blob, serialize
from gcref.objects.blob import ALIGN_BYTES, HEADER_BYTES, PLAIN_HEADER, REF_BYTES, Encoded
from gcref.objects.ref import ObjectRef, split

pieces = st.lists(st.binary(max_size=200), max_size=4)
buffers = st.lists(st.binary(max_size=300), max_size=6)
refs = st.integers(0, 4).flatmap(lambda n: st.binary(min_size=n * REF_BYTES, max_size=n * REF_BYTES))


def encode(stream: list[bytes], content: list[bytes], references: bytes = b"") -> Encoded:
    named = [ObjectRef.unpack(each) for each in split(references)]
    return blob.encode(stream, [memoryview(part) for part in content], named)


def head_size(data: bytes | bytearray) -> int:
    """Bytes of the header, the references and the table of a sound blob."""
    n_refs: int
    n_buffers: int
    n_refs, n_buffers = struct.unpack_from("<II", data, 8)
    return HEADER_BYTES + REF_BYTES * n_refs + (16 * (1 + n_buffers) if n_buffers else 0)


@given(pieces, buffers, refs)
def test_what_goes_in_comes_out(stream: list[bytes], content: list[bytes], references: bytes) -> None:
    encoded = encode(stream, content, references)
    data = blob.join(encoded)
    assert len(data) == encoded.size
    assert blob.refs_of(data) == references
    assert encoded.refs == references
    for view in (data, bytearray(data), memoryview(data)):
        found = blob.layout(view)
        assert bytes(view[slice(*found.refs)]) == references
        assert bytes(view[slice(*found.stream)]) == b"".join(stream)
        assert [bytes(view[slice(*span)]) for span in found.buffers] == content
        assert all(start % ALIGN_BYTES == 0 for start, _ in found.buffers)


@given(pieces, buffers, refs)
def test_every_way_of_writing_gives_the_same_bytes(
    stream: list[bytes], content: list[bytes], references: bytes
) -> None:
    encoded = encode(stream, content, references)
    data = blob.join(encoded)
    target = bytearray(b"\xaa" * (encoded.size + 3))
    blob.write_into(encoded, memoryview(target))
    assert target == data + b"\xaa" * 3
    with tempfile.TemporaryFile() as file:
        blob.pwrite_all(encoded, file.fileno())
        assert file.read() == data


def test_the_header_is_what_the_specification_says() -> None:
    assert b"GCB\x01\x00\x00\x00\x00" + bytes(8) == PLAIN_HEADER
    data = blob.join(encode([b"stream"], [b"buffer"], bytes(48)))
    assert data[:16] == struct.pack("<3sBB3xII", b"GCB", 1, 0, 1, 1)
    assert struct.unpack_from("<QQQQ", data, 64) == (96, 6, 128, 6)
    assert data[96:102] == b"stream"
    assert data[102:128] == bytes(26)
    assert data[128:] == b"buffer"


@given(pieces, buffers, refs, st.data())
def test_no_truncation_gets_past_the_checks(
    stream: list[bytes], content: list[bytes], references: bytes, draw: st.DataObject
) -> None:
    data = blob.join(encode(stream, content, references))
    # Without a table nothing says how long the stream is: that is for pickle to find out.
    end = len(data) if content else head_size(data)
    cut = data[: draw.draw(st.integers(0, max(0, end - 1)))]
    with pytest.raises(ProtocolError):
        blob.layout(cut)


@given(pieces, buffers, refs, st.data())
def test_no_damage_to_the_head_leads_out_of_bounds(
    stream: list[bytes], content: list[bytes], references: bytes, draw: st.DataObject
) -> None:
    data = bytearray(blob.join(encode(stream, content, references)))
    head = st.integers(0, head_size(data) - 1)
    for at, value in draw.draw(st.lists(st.tuples(head, st.integers(0, 255)), min_size=1, max_size=8)):
        data[at] = value
    assert_safe(bytes(data))


@given(st.binary(max_size=400))
def test_no_garbage_leads_out_of_bounds(data: bytes) -> None:
    assert_safe(data)
    assert_safe(PLAIN_HEADER[:8] + data)


def assert_safe(data: bytes) -> None:
    """A blob is refused, or all that it points to lies in it, in order and apart."""
    try:
        found = blob.layout(data)
    except ProtocolError:
        return
    spans = [found.refs, found.stream, *found.buffers]
    assert spans[0][0] == HEADER_BYTES
    assert all(start <= end <= len(data) for start, end in spans)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert blob.refs_of(data) == data[slice(*found.refs)]


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"X"),  # magic
        (3, b"\x02"),  # version
        (3, b"\x00"),
        (4, b"\x01"),  # flags
        (5, b"\x01"),  # padding
        (8, b"\xff\xff\xff\xff"),  # number of references
        (12, b"\xff\xff\xff\xff"),  # number of buffers
        (16, struct.pack("<Q", 2**64 - 1)),  # offset of the stream
        (16, struct.pack("<Q", 0)),
        (24, struct.pack("<Q", 2**64 - 1)),  # length of the stream
        (24, struct.pack("<Q", 2**63)),
        (32, struct.pack("<Q", 65)),  # offset of the buffer: not aligned
        (32, struct.pack("<Q", 0)),
        (40, struct.pack("<Q", 10**9)),  # length of the buffer
    ],
)
def test_each_number_of_the_head_is_checked(at: int, value: bytes) -> None:
    data = bytearray(blob.join(encode([b"stream" * 20], [b"buffer"])))
    blob.layout(data)
    data[at : at + len(value)] = value
    with pytest.raises(ProtocolError):
        blob.layout(data)
    with pytest.raises(GcrefError):
        serialize.loads(data)


def test_another_version_is_named() -> None:
    data = bytearray(PLAIN_HEADER)
    data[3] = 9
    with pytest.raises(ProtocolError, match="version 9"):
        blob.refs_of(data)


def test_a_target_that_is_too_short_is_refused_before_anything_is_written() -> None:
    target = bytearray(20)
    with pytest.raises(ValueError, match="does not fit"):
        blob.write_into(encode([b"stream"], []), memoryview(target))
    assert target == bytes(20)


def test_more_pieces_than_the_kernel_takes_at_once_are_written() -> None:
    encoded = encode([b"stream"], [bytes([n % 251]) * (n % 70) for n in range(3000)])
    with tempfile.TemporaryFile() as file:
        blob.pwrite_all(encoded, file.fileno())
        assert file.read() == blob.join(encoded)


def test_a_write_that_stops_in_the_middle_of_a_piece_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev

    def short(fd: int, parts: list[memoryview], at: int) -> int:
        joined = b"".join(parts)
        return real(fd, [joined[:7]], at)

    encoded = encode([b"a stream", b"in pieces"], [b"buffer" * 9, b"", b"x"], bytes(48))
    monkeypatch.setattr(os, "pwritev", short)
    with tempfile.TemporaryFile() as file:
        blob.pwrite_all(encoded, file.fileno())
        assert file.read() == blob.join(encoded)


def test_encoding_and_writing_a_large_array_makes_one_copy() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(100 * 2**20 // 8)
    target = memoryview(bytearray(array.nbytes + 4096))
    tracemalloc.start()
    try:
        encoded = serialize.dumps(array)
        blob.write_into(encoded, target)
        with open(os.devnull, "wb") as sink:
            os.writev(sink.fileno(), encoded.parts)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    assert (serialize.loads(target[: encoded.size]) == array).all()


def test_a_large_bytes_value_is_not_copied_either() -> None:
    value = bytes(50 * 2**20)
    target = memoryview(bytearray(len(value) + 4096))
    tracemalloc.start()
    try:
        blob.write_into(serialize.dumps(value), target)
        blob.write_into(serialize.dumps_call(None, (1, value), {}).encoded, target)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
