"""Sealed mail: what opens, and everything that must not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcref import ids
from gcref.carriers import keys
from gcref.carriers.mail import seal
from gcref.carriers.mail.post import BULK, CONTROL
from gcref.carriers.mail.seal import (
    ENVELOPE_MAX_BYTES,
    HEADER_BYTES,
    OVERHEAD_BYTES,
    PART_MAX_BYTES,
    Opener,
    Sealer,
)

A, B, C = ids.new_id(), ids.new_id(), ids.new_id()
ADA, BOB, EVE = keys.generate(), keys.generate(), keys.generate()


def ada() -> Sealer:
    return Sealer(A, ADA)


def bob() -> Opener:
    return Opener(B, BOB)


def one(frame: bytes = b"hello", sealer: Sealer | None = None) -> bytes:
    (envelope,) = (sealer or ada()).seal(B, BOB.public, CONTROL, [frame])
    return envelope


@pytest.mark.parametrize("lane", [CONTROL, BULK])
@pytest.mark.parametrize("size", [0, 1, 1000, PART_MAX_BYTES])
def test_what_is_sealed_is_opened(lane: int, size: int) -> None:
    frame = random.Random(size).randbytes(size)
    (envelope,) = ada().seal(
        B, BOB.public, lane, [memoryview(frame)[: size // 2], bytearray(frame[size // 2 :])]
    )
    assert len(envelope) == size + OVERHEAD_BYTES <= ENVELOPE_MAX_BYTES
    assert bob().open(envelope) == (A, ADA.public, lane, frame)


def test_large_frames_travel_in_parts() -> None:
    frame = random.Random(1).randbytes(3 * PART_MAX_BYTES + 5)
    envelopes = ada().seal(B, BOB.public, BULK, [frame])
    assert [len(each) for each in envelopes] == [ENVELOPE_MAX_BYTES] * 3 + [OVERHEAD_BYTES + 5]
    opener = bob()
    assert [opener.open(each) for each in envelopes[:3]] == [None] * 3
    assert opener.open(envelopes[3]) == (A, ADA.public, BULK, frame)
    assert not any(opener.counts.values())


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_frame_with_a_missing_part_is_none(missing: int) -> None:
    sealer, opener = ada(), bob()
    envelopes = sealer.seal(B, BOB.public, BULK, [bytes(2 * PART_MAX_BYTES + 5)])
    for number, envelope in enumerate(envelopes):
        assert number == missing or opener.open(envelope) is None
    opened = opener.open(one(b"next", sealer))
    assert opened is not None
    assert opened.data == b"next"
    assert opener.counts["broken"] > 0


def test_frames_that_are_too_large_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "FRAME_MAX_BYTES", PART_MAX_BYTES + 10)
    opener = bob()
    for envelope in ada().seal(B, BOB.public, BULK, [bytes(2 * PART_MAX_BYTES)]):
        assert opener.open(envelope) is None
    assert opener.counts["oversize"] == 1
    assert opener._partial == 0


def test_unfinished_frames_of_many_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "PARTIAL_MAX_BYTES", 3 * PART_MAX_BYTES)
    opener = bob()
    for _ in range(6):
        first, _ = ada().seal(B, BOB.public, BULK, [bytes(PART_MAX_BYTES + 1)])
        assert opener.open(first) is None
    assert opener._partial <= 3 * PART_MAX_BYTES
    assert opener.counts["oversize"] == 3


@given(st.data())
def test_a_changed_byte_anywhere_opens_nothing(data: st.DataObject) -> None:
    envelope = bytearray(one(b"pay 100"))
    at = data.draw(st.integers(0, len(envelope) - 1))
    envelope[at] ^= data.draw(st.integers(1, 255))
    opener = bob()
    assert opener.open(bytes(envelope)) is None
    assert sum(opener.counts.values()) == 1


@given(st.binary(max_size=300))
def test_any_bytes_are_dropped_and_nothing_is_raised(noise: bytes) -> None:
    opener = bob()
    assert opener.open(noise) is None
    assert opener.open(bytes([seal.VERSION]) + noise) is None
    header = one()[:HEADER_BYTES]
    assert opener.open(header + noise) is None
    assert sum(opener.counts.values()) == 3


@pytest.mark.parametrize("size", [*range(0, OVERHEAD_BYTES + 6, 9), OVERHEAD_BYTES + 4])
def test_what_is_cut_short_is_dropped(size: int) -> None:
    opener = bob()
    assert opener.open(one()[:size]) is None
    assert opener.counts["garbage"] + opener.counts["forged"] == 1


def test_what_is_larger_than_a_message_may_be_is_not_looked_at() -> None:
    opener = bob()
    assert opener.open(one() + bytes(ENVELOPE_MAX_BYTES)) is None
    assert opener.counts["oversize"] == 1


def test_mail_for_another_party_or_key_is_dropped() -> None:
    opener = bob()
    (for_eve,) = ada().seal(C, BOB.public, CONTROL, [b"x"])
    assert opener.open(for_eve) is None
    (for_another_key,) = ada().seal(B, EVE.public, CONTROL, [b"x"])
    assert opener.open(for_another_key) is None
    assert (opener.counts["foreign"], opener.counts["forged"]) == (1, 1)


def test_a_key_cannot_be_claimed() -> None:
    """Eve writes Ada's key into the header: the box does not open. With her own key it opens as hers."""
    envelope = bytearray(one(b"x", Sealer(A, EVE)))
    opener = bob()
    envelope[34:66] = one()[34:66]
    assert opener.open(bytes(envelope)) is None
    assert opener.counts["forged"] == 1
    opened = opener.open(one(b"x", Sealer(A, EVE)))
    assert opened is not None
    assert opened.key == EVE.public


def test_weak_keys_open_nothing() -> None:
    envelope = bytearray(one())
    opener = bob()
    for weak in (bytes(32), b"\1" + bytes(31), b"\xff" * 32):
        envelope[34:66] = weak
        assert opener.open(bytes(envelope)) is None
    assert opener.counts["forged"] == 3


def test_each_number_counts_once_and_never_backwards() -> None:
    sealer, opener = ada(), bob()
    first, second, third = (one(b"%d" % number, sealer) for number in range(3))
    assert opener.open(first) is not None
    assert opener.open(first) is None
    assert opener.open(third) is not None, "gaps are allowed"
    assert opener.open(second) is None
    assert opener.counts["replayed"] == 2
    assert opener.open(third, again=True) is None
    assert opener.counts["replayed"] == 2, "what comes again from the broker is no fault"


def test_two_processes_of_a_party_are_two_streams() -> None:
    opener = bob()
    assert opener.open(one(b"old")) is not None
    assert opener.open(one(b"new")) is not None


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "STREAMS_MAX", 5)
    monkeypatch.setattr(seal, "KEYS_MAX", 5)
    opener = bob()
    for _ in range(20):
        assert opener.open(one(sealer=Sealer(ids.new_id(), keys.generate()))) is not None
    assert len(opener._streams) == 5
    assert len(opener._keys._known) == 5


def test_nonces_never_repeat() -> None:
    sealer = ada()
    headers = {one(b"same", sealer)[:HEADER_BYTES] for _ in range(50)}
    headers |= {ada().seal(B, BOB.public, CONTROL, [b"same"])[0][:HEADER_BYTES] for _ in range(50)}
    assert len(headers) == 100


def test_a_key_that_is_none_is_named() -> None:
    for bad in (b"", b"x" * 39, b"\xff" * 40):
        with pytest.raises(ValueError, match="is no key"):
            ada().seal(B, bad, CONTROL, [b"x"])
