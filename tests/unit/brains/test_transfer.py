"""The transfer brain, beside a shell that is a dictionary and a network that does whatever a test wants."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from gcref.brains import transfer, transfer_windows
from gcref.brains.transfer import STRIKE_BAD, STRIKES_MAX, Transfers
from gcref.brains.transfer_answers import checksum
from gcref.brains.transfer_events import (
    Abort,
    Adopt,
    Begin,
    Cancel,
    Chunk,
    Done,
    Event,
    Failed,
    Fetch,
    LinkDown,
    LinkUp,
    Pull,
    PullReason,
    Seal,
    Sealed,
    SinkFailed,
    Tick,
    Trouble,
    Unsent,
    WayFailed,
    Write,
)
from gcref.errors import LocalProtocolError
from gcref.wire.messages import (
    MAY_NOT,
    MODE_BYTES,
    MODE_INTO,
    MODE_PATH,
    NO_SUCH_OBJECT,
    SOURCE_FAILED,
    WAY_CLOSED,
)

A, B = b"a" * 16, b"b" * 16
X, Y, Z = b"x" * 16, b"y" * 16, b"z" * 16
RANGE = 10
WINDOW = 4 * RANGE
MAIL_WINDOW = 2 * RANGE
TIMEOUT_S = 30.0
NO_LINK_S = 60.0


def blob(id: bytes, attempt: int, size: int) -> bytes:
    """Bytes of which no two ranges, attempts or objects look alike."""
    return bytes((at * 7 + at // RANGE + id[0] + 31 * attempt) % 256 for at in range(size))


@dataclasses.dataclass
class File:
    """What `Begin` makes: bytes, and which of them were written."""

    attempt: int
    data: bytearray
    written: list[bool]


class Shell:
    """Obeys the brain, and remembers what was asked and what came out."""

    def __init__(self, **settings: float) -> None:
        self.brain = Transfers(
            range_bytes=RANGE,
            window_bytes=int(settings.get("window", WINDOW)),
            total_window_bytes=int(settings.get("total", 4 * WINDOW)),
            mail_window_bytes=int(settings.get("mail", MAIL_WINDOW)),
            mail_total_bytes=int(settings.get("mail_total", 2 * MAIL_WINDOW)),
            first_request=int(settings.get("first_request", 0)),
            range_timeout_s=TIMEOUT_S,
            no_link_s=NO_LINK_S,
        )
        self.now = 0.0
        self.asked: list[Fetch] = []
        self.handed: dict[tuple[int, int], File] = {}  # the file that a question to fill one was asked with
        self.files: dict[bytes, File] = {}
        self.objects: dict[bytes, bytes] = {}
        self.ended: list[Done | Failed] = []
        self.aborted: list[bytes] = []
        self.closed_ways = False
        self.broken_disk = False

    def tell(self, event: Event) -> list[Fetch]:
        """Hand over an event; returns what was asked because of it."""
        before = len(self.asked)
        events = [event]
        while events:
            failed = set()
            for instruction in self.brain.handle(events.pop(0)):
                self.brain.validate()
                if instruction.id in failed:
                    continue
                match instruction:
                    case Begin(id, attempt, size):
                        assert id not in self.files
                        self.files[id] = File(attempt, bytearray(size), [False] * size)
                    case Fetch():
                        assert (instruction.mode != MODE_BYTES) <= (
                            instruction.length == self.size_of(instruction)
                        )
                        self.asked.append(instruction)
                        if instruction.mode == MODE_INTO:
                            self.handed[instruction.link, instruction.request] = self.files[instruction.id]
                    case Write(id, offset, data):
                        if self.broken_disk:
                            failed.add(id)
                            events.append(SinkFailed(id, "the disk is full", self.now))
                            continue
                        file, end = self.files[id], offset + len(data)
                        assert not any(file.written[offset:end]), "a place is written once"
                        file.data[offset:end] = data
                        file.written[offset:end] = [True] * len(data)
                    case Seal(id):
                        file = self.files.pop(id)
                        assert all(file.written), "never a half object"
                        self.objects[id] = bytes(file.data)
                        events.append(Sealed(id, self.now))
                    case Adopt(id, _, path, size):
                        if self.closed_ways:
                            failed.add(id)
                            events.append(WayFailed(id, "not the same file system", self.now))
                            continue
                        self.objects[id] = path.encode("latin-1")
                        assert len(self.objects[id]) == size
                        events.append(Sealed(id, self.now))
                    case Abort(id):
                        del self.files[id]
                        self.aborted.append(id)
                    case Done() | Failed():
                        self.ended.append(instruction)
        return self.asked[before:]

    def size_of(self, fetch: Fetch) -> int:
        progress = self.brain.progress(fetch.id)
        assert progress is not None
        return progress[1]

    def pull(
        self,
        id: bytes,
        size: int,
        *,
        attempt: int = 1,
        source: bytes = A,
        mode: int = MODE_BYTES,
        key: bytes | None = None,
    ) -> list[Fetch]:
        return self.tell(Pull(id, attempt, size, source, b"token", mode, key, self.now))

    def up(
        self, link: int, party: bytes = A, carrier: str = "direct", key: bytes | None = None
    ) -> list[Fetch]:
        return self.tell(LinkUp(link, party, carrier, key, self.now))

    def down(self, link: int) -> list[Fetch]:
        return self.tell(LinkDown(link, "cut", self.now))

    def answer(self, fetch: Fetch, **changes: Any) -> list[Fetch]:
        """Answer a question truthfully, but for the changes. A whole file is filled, or named by its very bytes."""
        whole = blob(fetch.id, fetch.attempt, fetch.offset + fetch.length)
        data = whole[fetch.offset :] if fetch.mode == MODE_BYTES else b""
        path = whole.decode("latin-1") if fetch.mode == MODE_PATH else None
        if fetch.mode == MODE_INTO:
            file = self.handed[fetch.link, fetch.request]
            file.data[:], file.written[:] = whole, [True] * len(whole)
        chunk = Chunk(
            fetch.link, fetch.request, fetch.id, fetch.attempt, fetch.offset, fetch.length, checksum(data), path, None,
            data, self.now,
        )  # fmt: skip
        return self.tell(chunk._replace(**changes))

    def answer_all(self, fetches: Sequence[Fetch]) -> None:
        """Answer these, and whatever is asked thereupon."""
        todo = list(fetches)
        while todo:
            todo += self.answer(todo.pop(0))

    def wait(self, seconds: float) -> list[Fetch]:
        """Let time pass, with a Tick whenever one is due."""
        end, before = self.now + seconds, len(self.asked)
        while (due := self.brain.deadline) is not None and due <= end:
            self.now = max(self.now, due)
            self.tell(Tick(self.now))
        self.now = end
        return self.asked[before:]

    def outcome(self) -> Done | Failed:
        (ended,) = self.ended
        return ended

    def reason(self) -> PullReason:
        outcome = self.outcome()
        assert isinstance(outcome, Failed)
        assert not self.files, "what failed leaves nothing"
        return outcome.reason


def ranges(fetches: Sequence[Fetch]) -> list[tuple[int, int]]:
    return [(fetch.offset, fetch.length) for fetch in fetches]


# ------------------------------------------------------------------------------------------------- the usual way


def test_an_object_comes_range_by_range() -> None:
    shell = Shell()
    shell.up(1)
    asked = shell.pull(X, 25)
    assert ranges(asked) == [(0, 10), (10, 10), (20, 5)]
    assert {fetch.token for fetch in asked} == {b"token"}
    shell.answer_all(asked)
    assert shell.outcome() == Done(X, 1, A, 25, {"direct": 25})
    assert shell.objects[X] == blob(X, 1, 25)
    assert shell.brain.received == {(A, "direct"): 25}
    assert shell.brain.deadline is None


@pytest.mark.parametrize("size", [0, 1, RANGE - 1, RANGE, RANGE + 1, 7 * RANGE])
def test_sizes_around_a_range(size: int) -> None:
    shell = Shell()
    shell.up(1)
    shell.answer_all(shell.pull(X, size))
    assert shell.objects[X] == blob(X, 1, size)


def test_a_pull_waits_for_a_link() -> None:
    shell = Shell()
    assert shell.pull(X, 15) == []
    assert shell.brain.progress(X) == (0, 15, None)
    shell.answer_all(shell.up(1))
    assert shell.objects[X] == blob(X, 1, 15)


def test_answers_may_come_in_any_order() -> None:
    shell = Shell()
    shell.up(1)
    for fetch in reversed(shell.pull(X, 35)):
        shell.answer(fetch)
    assert shell.objects[X] == blob(X, 1, 35)


def test_the_window_is_filled_and_no_more() -> None:
    shell = Shell()
    shell.up(1)
    asked = shell.pull(X, 100)
    assert len(asked) == WINDOW // RANGE
    assert ranges(shell.answer(asked[0])) == [(40, 10)]


def test_the_window_of_all_sources_together() -> None:
    shell = Shell(total=WINDOW)
    shell.up(1, A)
    shell.up(2, B)
    asked = shell.pull(X, 100, source=A) + shell.pull(Y, 100, source=B)
    assert len(asked) == WINDOW // RANGE
    news = [fetch for one in asked for fetch in shell.answer(one)]
    assert {fetch.id for fetch in news} == {X, Y}, "sources take turns"
    todo = news
    while todo:
        todo += shell.answer(todo.pop(0))
    assert set(shell.objects) == {X, Y}


def test_a_small_object_does_not_wait_behind_a_large_one() -> None:
    shell = Shell()
    shell.up(1)
    asked = shell.pull(X, 1000)
    asked += shell.pull(Y, 30)
    while Y not in shell.objects:
        asked += shell.answer(asked.pop(0))
    received = shell.brain.progress(X)
    assert received is not None
    assert received[0] <= WINDOW + 3 * RANGE


def test_many_small_objects_are_bounded_in_number() -> None:
    shell = Shell()
    shell.up(1)
    asked = [fetch for number in range(100) for fetch in shell.pull(bytes([number]) * 16, 0)]
    assert len(asked) == transfer_windows.WINDOW_RANGES
    shell.answer_all(asked)
    assert len(shell.objects) == 100


def test_the_same_pull_again_is_no_news() -> None:
    shell = Shell()
    shell.up(1)
    asked = shell.pull(X, 20)
    assert shell.pull(X, 20) == []
    shell.answer_all(asked)
    assert len(shell.ended) == 1


def test_a_pull_of_another_attempt_takes_the_place_of_the_first() -> None:
    shell = Shell()
    shell.up(1)
    first = shell.pull(X, 20)
    shell.answer(first[0])
    second = shell.pull(X, 20, attempt=2)
    assert shell.aborted == [X]
    shell.answer(first[1])
    shell.answer_all(second)
    assert shell.outcome() == Done(X, 2, A, 20, {"direct": 20})
    assert shell.objects[X] == blob(X, 2, 20)


def test_cancel_drops_what_has_come_and_is_silent() -> None:
    shell = Shell()
    shell.up(1)
    asked = shell.pull(X, 100)
    shell.answer(asked[0])
    shell.tell(Cancel(X, shell.now))
    shell.tell(Cancel(X, shell.now))
    for fetch in asked[1:]:
        assert shell.answer(fetch) == []
    assert (shell.ended, shell.files, shell.aborted) == ([], {}, [X])


# ------------------------------------------------------------------------------------------------------- mail


def test_through_a_mailbox_the_window_is_narrower() -> None:
    shell = Shell()
    shell.up(1, carrier="broker")
    asked = shell.pull(X, 100)
    assert ranges(asked) == [(0, 10), (10, 10)]
    assert ranges(shell.answer(asked[0])) == [(20, 10)]
    assert [fetch.link for fetch in shell.up(2)] == [2, 2], "what it leaves free is asked over a better link"
    assert shell.brain.progress(X) == (10, 100, "direct")


def test_all_mailboxes_share_a_window_in_turn() -> None:
    shell = Shell(mail_total=MAIL_WINDOW)
    shell.up(1, A, "broker")
    shell.up(2, B, "broker")
    todo = shell.pull(X, 60, source=A)
    assert shell.pull(Y, 60, source=B) == []
    order = []
    while todo:
        fetch = todo.pop(0)
        order.append(fetch.id)
        todo += shell.answer(fetch)
    assert set(shell.objects) == {X, Y}
    assert order[2:8].count(Y) == 3, "they take turns"


def test_a_pull_that_only_mail_may_serve_does_not_hold_up_the_others() -> None:
    shell = Shell()
    shell.up(1, carrier="broker", key=b"k")
    shell.up(2, carrier="direct", key=b"other")
    assert {fetch.link for fetch in shell.pull(X, 100, key=b"k")} == {1}
    assert {fetch.link for fetch in shell.pull(Y, 20, key=b"other")} == {2}


def test_what_mail_passed_over_is_lost_and_asked_again_at_once() -> None:
    shell = Shell()
    shell.up(1, carrier="broker")
    first, second = shell.pull(X, 30)
    assert sorted(ranges(shell.answer(second))) == [(0, 10), (20, 10)]
    assert shell.answer(first) == [], "and should it come yet, it is not taken twice"
    shell.answer_all(shell.asked[2:])
    assert shell.objects[X] == blob(X, 1, 30)


def test_a_question_that_did_not_leave_is_asked_after_a_pause() -> None:
    shell = Shell()
    shell.up(1, carrier="broker")
    first, second = shell.pull(X, 40)
    for fetch in (first, second):
        assert shell.tell(Unsent(fetch.link, fetch.request, shell.now)) == []
    assert shell.brain.deadline == transfer_windows.PAUSE_S
    assert shell.wait(transfer_windows.PAUSE_S / 2) == []
    again = shell.wait(transfer_windows.PAUSE_S / 2)
    assert sorted(ranges(again)) == [(0, 10), (10, 10)]
    for fetch in again:
        shell.tell(Unsent(fetch.link, fetch.request, shell.now))
    assert shell.brain.deadline == shell.now + 2 * transfer_windows.PAUSE_S, "longer each time"
    shell.answer_all(shell.wait(1.0))
    assert shell.objects[X] == blob(X, 1, 40)


def test_an_answer_ends_a_pause() -> None:
    shell = Shell()
    shell.up(1, carrier="broker")
    first, second = shell.pull(X, 20)
    shell.tell(Unsent(second.link, second.request, shell.now))
    shell.answer_all(shell.answer(first))
    assert shell.objects[X] == blob(X, 1, 20)


def test_questions_that_do_not_leave_are_never_too_many() -> None:
    shell = Shell()
    shell.up(1, carrier="broker")
    asked = shell.pull(X, 10)
    for _ in range(3 * STRIKES_MAX):
        (fetch,) = asked
        shell.tell(Unsent(fetch.link, fetch.request, shell.now))
        asked = shell.wait(transfer_windows.PAUSE_MAX_S)
    shell.answer_all(asked)
    assert shell.objects[X] == blob(X, 1, 10)


def test_answers_to_the_questions_of_an_earlier_process_are_dropped() -> None:
    shell = Shell(first_request=0xFFFFFFFF)
    shell.up(1, carrier="broker")
    first, second = shell.pull(X, 20)
    assert (first.request, second.request) == (0xFFFFFFFF, 0)
    shell.answer(first, request=7, error=[NO_SUCH_OBJECT, "not yet"], data=b"")
    shell.answer_all([first, second])
    assert shell.objects[X] == blob(X, 1, 20)


def test_an_error_about_another_object_is_no_answer() -> None:
    shell = Shell()
    shell.up(1, carrier="broker")
    (fetch,) = shell.pull(X, 10)
    again = shell.answer(fetch, id=Y, error=[NO_SUCH_OBJECT, "gone"], data=b"")
    assert shell.ended == []
    shell.answer_all(again)
    assert shell.objects[X] == blob(X, 1, 10)


# ------------------------------------------------------------------------------------------------- bad answers


def test_duplicates_and_late_answers_are_dropped() -> None:
    shell = Shell()
    shell.up(1)
    asked = shell.pull(X, 20)
    shell.answer(asked[0])
    shell.answer(asked[0])
    shell.answer(asked[1])
    shell.answer(asked[1])
    assert shell.objects[X] == blob(X, 1, 20)
    assert len(shell.ended) == 1


def test_an_answer_over_a_link_that_was_not_asked_is_dropped() -> None:
    shell = Shell()
    shell.up(1, A)
    shell.up(2, B)
    (fetch,) = shell.pull(X, 5)
    assert shell.answer(fetch, link=2, data=b"wrong", checksum=checksum(b"wrong")) == []
    shell.answer(fetch)
    assert shell.objects[X] == blob(X, 1, 5)


@pytest.mark.parametrize(
    "changes",
    [
        {"checksum": 1},
        {"checksum": 0},
        {"data": b"01234567x9"},
        {"data": b"short"},
        {"data": b""},
        {"data": b"longer than asked"},
        {"attempt": 2},
        {"id": Y},
        {"offset": 10},
        {"length": 5},
    ],
)
def test_wrong_bytes_are_asked_again_and_given_up_in_the_end(changes: dict[str, Any]) -> None:
    shell = Shell()
    shell.up(1)
    asked = shell.pull(X, 10)
    tries = 0
    while asked:
        tries += 1
        (fetch,) = asked
        asked = shell.answer(fetch, **changes)
    assert tries == STRIKES_MAX // STRIKE_BAD
    assert shell.reason() is PullReason.CORRUPT


def test_a_link_that_brings_wrong_bytes_is_left_for_another() -> None:
    shell = Shell()
    shell.up(1)
    shell.up(2)
    asked = shell.pull(X, 10)
    assert [fetch.link for fetch in asked] == [1]
    asked = shell.answer(asked[0], checksum=1)
    assert [fetch.link for fetch in asked] == [2]
    shell.answer_all(asked)
    assert shell.objects[X] == blob(X, 1, 10)


def test_within_a_machine_no_checksum_is_needed_but_a_wrong_one_is_wrong() -> None:
    shell = Shell()
    shell.up(1, carrier="ipc")
    first, second = shell.pull(X, 20)
    shell.answer(first, checksum=0)
    (again,) = shell.answer(second, checksum=5)
    (again,) = shell.answer(again, checksum=0, data=b"short")
    (again,) = shell.answer(again, checksum=0, data=b"longer than asked")
    shell.answer(again)
    assert shell.objects[X] == blob(X, 1, 20)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (NO_SUCH_OBJECT, PullReason.NOT_FOUND),
        (MAY_NOT, PullReason.REFUSED),
        (SOURCE_FAILED, PullReason.SOURCE),
        (WAY_CLOSED, PullReason.SOURCE),
        (99, PullReason.SOURCE),
    ],
)
def test_a_refusal_of_the_source_ends_the_pull(code: int, reason: PullReason) -> None:
    shell = Shell()
    shell.up(1)
    asked = shell.pull(X, 40)
    shell.answer(asked[0])
    shell.answer(asked[1], error=[code, "says why"], data=b"")
    assert shell.reason() is reason
    assert "says why" in shell.ended[0].message  # type: ignore[union-attr]
    for fetch in asked[2:]:
        assert shell.answer(fetch) == []


def test_a_sink_that_fails_ends_this_pull_and_no_other() -> None:
    shell = Shell()
    shell.up(1)
    asked = shell.pull(X, 10) + shell.pull(Y, 10)
    shell.broken_disk = True
    shell.answer(asked[0])
    (failed,) = shell.ended
    assert isinstance(failed, Failed)
    assert (failed.id, failed.reason) == (X, PullReason.STORE)
    assert list(shell.files) == [Y]
    shell.broken_disk = False
    shell.answer(asked[1])
    assert shell.objects == {Y: blob(Y, 1, 10)}


def test_sealed_without_being_asked_is_a_defect_of_the_shell() -> None:
    shell = Shell()
    shell.up(1)
    shell.pull(X, 10)
    with pytest.raises(LocalProtocolError):
        shell.brain.handle(Sealed(X, 0.0))


# ------------------------------------------------------------------------------------------------------- links


def test_a_broken_link_costs_only_what_was_in_flight() -> None:
    shell = Shell()
    shell.up(1)
    shell.up(2)
    asked = shell.pull(X, 60)
    shell.answer(asked[0])
    shell.answer(asked[2])
    again = shell.down(1)
    assert {fetch.link for fetch in again} == {2}
    shell.answer_all(again)
    assert shell.objects[X] == blob(X, 1, 60)
    written_twice = len(shell.asked) - 6
    assert written_twice == 4, "the window that was in flight"


def test_a_transfer_goes_on_when_the_only_link_comes_back() -> None:
    shell = Shell()
    shell.up(1)
    asked = shell.pull(X, 40)
    shell.answer(asked[0])
    assert shell.down(1) == []
    again = shell.up(1)
    assert sorted(ranges(again)) == [(10, 10), (20, 10), (30, 10)]
    shell.answer_all(again)
    assert shell.objects[X] == blob(X, 1, 40)


def test_a_link_that_comes_up_twice_has_been_down_in_between() -> None:
    shell = Shell()
    shell.up(1)
    asked = shell.pull(X, 20)
    again = shell.up(1)
    assert sorted(ranges(again)) == sorted(ranges(asked))
    shell.answer_all(again)
    assert shell.objects[X] == blob(X, 1, 20)


def test_a_link_that_breaks_whenever_it_is_used_is_given_up() -> None:
    shell = Shell()
    shell.pull(X, 10)
    flaps = 0
    while not shell.ended:
        flaps += 1
        shell.up(1)
        shell.down(1)
    assert flaps == STRIKES_MAX
    assert shell.reason() is PullReason.UNREACHABLE


def test_without_a_link_a_pull_ends_in_time() -> None:
    shell = Shell()
    shell.pull(X, 10)
    shell.tell(Trouble(A, "nobody answers at tcp://a:1", False))
    shell.wait(NO_LINK_S - 1)
    assert shell.ended == []
    shell.wait(2)
    assert shell.reason() is PullReason.UNREACHABLE
    assert "nobody answers" in shell.ended[0].message  # type: ignore[union-attr]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_refused_key_is_told(when: str) -> None:
    shell = Shell()
    events: list[Event] = [
        Pull(X, 1, 10, A, None, MODE_BYTES, None, 0.0),
        Trouble(A, "our key was refused", True),
    ]
    for event in events if when == "after" else reversed(events):
        shell.tell(event)
    shell.wait(NO_LINK_S)
    assert shell.reason() is PullReason.REFUSED


def test_the_patience_without_a_link_starts_anew_after_each() -> None:
    shell = Shell()
    shell.up(1)
    shell.pull(X, 10)
    shell.wait(10)
    shell.down(1)
    shell.wait(NO_LINK_S - 1)
    shell.up(1)
    shell.down(1)
    shell.wait(NO_LINK_S - 1)
    assert shell.ended == []
    shell.wait(2)
    assert shell.reason() is PullReason.UNREACHABLE


def test_the_better_carrier_is_asked_and_a_better_one_is_taken_later() -> None:
    shell = Shell()
    shell.up(1, carrier="broker")
    shell.up(2, carrier="direct")
    asked = shell.pull(X, 100)
    assert {fetch.link for fetch in asked} == {2}
    shell.up(3, carrier="ipc")
    more = [fetch for one in asked for fetch in shell.answer(one)]
    assert {fetch.link for fetch in more} == {3}
    shell.answer_all(more)
    assert shell.outcome() == Done(X, 1, A, 100, {"direct": 40, "ipc": 60})


def test_only_links_with_the_right_key_are_asked() -> None:
    shell = Shell()
    shell.up(1, key=b"somebody")
    assert shell.pull(X, 10, key=b"right") == []
    assert [fetch.link for fetch in shell.up(2, key=b"right")] == [2]
    shell.down(2)
    shell.wait(NO_LINK_S)
    assert shell.reason() is PullReason.UNREACHABLE


# -------------------------------------------------------------------------------------------------------- time


def test_a_silent_link_is_left_for_another() -> None:
    shell = Shell()
    shell.up(1)
    shell.up(2, carrier="broker")
    asked = shell.pull(X, 20)
    assert {fetch.link for fetch in asked} == {1}
    again = shell.wait(TIMEOUT_S)
    assert {fetch.link for fetch in again} == {2}
    shell.answer_all(again)
    assert shell.objects[X] == blob(X, 1, 20)


def test_silence_ends_in_a_timeout() -> None:
    shell = Shell()
    shell.up(1)
    shell.pull(X, 20)
    shell.wait(TIMEOUT_S * STRIKES_MAX / STRIKE_BAD - 1)
    assert shell.ended == []
    shell.wait(2)
    assert shell.reason() is PullReason.TIMEOUT


def test_a_slow_link_is_not_a_silent_one() -> None:
    shell = Shell()
    shell.up(1)
    asked = shell.pull(X, 40)
    for fetch in asked:
        assert shell.wait(TIMEOUT_S - 1) == []
        shell.answer(fetch)
    assert shell.objects[X] == blob(X, 1, 40)
    assert len(shell.asked) == 4


def test_a_question_that_was_passed_over_is_asked_again_though_others_are_answered() -> None:
    shell = Shell()
    shell.up(1)
    lost, *others = shell.pull(X, 1000)
    again: list[Fetch] = []
    while not again:
        others += shell.wait(1)
        others += shell.answer(others.pop(0))
        again = [fetch for fetch in others if fetch.offset == lost.offset]
        assert shell.now < TIMEOUT_S + 2
    shell.answer_all(others)
    assert shell.objects[X] == blob(X, 1, 1000)


def test_chatter_that_answers_nothing_is_silence() -> None:
    shell = Shell()
    shell.up(1)
    (fetch,) = shell.pull(X, 10)
    while not shell.ended:
        shell.wait(1)
        shell.answer(fetch, request=12345)
        assert shell.now < 10 * TIMEOUT_S
    assert shell.reason() is PullReason.TIMEOUT


def test_nothing_to_do_needs_no_clock() -> None:
    shell = Shell()
    assert shell.brain.deadline is None
    shell.up(1)
    shell.answer_all(shell.pull(X, 10))
    shell.tell(Tick(1e9))
    assert shell.brain.deadline is None


# ----------------------------------------------------------------------------------------- within one machine


def test_by_path_no_bytes_move() -> None:
    shell = Shell()
    shell.up(1, carrier="ipc")
    (fetch,) = shell.pull(X, 1000, mode=MODE_PATH)
    assert (fetch.mode, fetch.length) == (MODE_PATH, 1000)
    shell.answer(fetch)
    assert shell.outcome() == Done(X, 1, A, 1000, {"ipc": 1000})
    assert shell.aborted == []


def test_into_a_file_no_bytes_move() -> None:
    shell = Shell()
    shell.up(1, carrier="ipc")
    (fetch,) = shell.pull(X, 1000, mode=MODE_INTO)
    assert (fetch.mode, fetch.length) == (MODE_INTO, 1000)
    shell.answer(fetch)
    assert shell.objects[X] == blob(X, 1, 1000)


@pytest.mark.parametrize("mode", [MODE_PATH, MODE_INTO])
@pytest.mark.parametrize("trouble", ["error", "length", "here"])
def test_a_closed_way_falls_back_to_bytes(mode: int, trouble: str) -> None:
    shell = Shell()
    shell.closed_ways = trouble == "here"
    shell.up(1, carrier="ipc")
    (fetch,) = shell.pull(X, 30, mode=mode)
    if trouble == "error":
        asked = shell.answer(fetch, error=[WAY_CLOSED, "no such file"], path=None)
    elif trouble == "length":
        asked = shell.answer(fetch, length=29)
    elif mode == MODE_INTO:
        asked = shell.tell(WayFailed(X, "cannot be shared", shell.now))
    else:
        asked = shell.answer(fetch)
    assert {fetch.mode for fetch in asked} == {MODE_BYTES}
    shell.answer_all(asked)
    assert shell.objects[X] == blob(X, 1, 30)


def test_over_tcp_it_is_bytes_whatever_was_wished() -> None:
    shell = Shell()
    shell.up(1)
    assert {
        fetch.mode for fetch in shell.pull(X, 30, mode=MODE_PATH) + shell.pull(Y, 30, mode=MODE_INTO)
    } == {MODE_BYTES}


@pytest.mark.parametrize("mode", [MODE_PATH, MODE_INTO])
def test_a_link_within_the_machine_that_comes_second_still_saves_the_bytes(mode: int) -> None:
    shell = Shell()
    shell.up(1)
    first = shell.pull(X, 100, mode=mode)
    shell.answer(first[0])
    (fetch, *_) = [fetch for fetch in shell.up(2, carrier="ipc") if fetch.link == 2]
    assert fetch.mode == mode
    for late in first[1:]:
        shell.answer(late)
    shell.answer(fetch)
    assert shell.outcome() == Done(X, 1, A, 100, {"ipc": 100})
    assert shell.objects[X] == blob(X, 1, 100)


def test_a_file_that_was_handed_out_is_never_used_again_after_a_doubt() -> None:
    """INTO: after a broken link nobody knows whether the source still writes, so it gets no second chance."""
    shell = Shell()
    shell.up(1, carrier="ipc")
    (into,) = shell.pull(X, 30, mode=MODE_INTO)
    shell.down(1)
    assert shell.aborted == [X]
    asked = shell.up(1, carrier="ipc")
    assert {fetch.mode for fetch in asked} == {MODE_BYTES}
    shell.answer_all(asked)
    assert shell.objects[X] == blob(X, 1, 30)
    shell.answer(into)
    assert len(shell.ended) == 1


def test_a_large_file_has_more_time() -> None:
    shell = Shell()
    shell.up(1, carrier="ipc")
    size = 1 << 40
    shell.brain.handle(Pull(X, 1, size, A, None, MODE_PATH, None, 0.0))
    assert shell.brain.deadline == TIMEOUT_S + size / transfer.WHOLE_BYTES_PER_S


# ------------------------------------------------------------------------------------------- whatever happens

IDS = (X, Y, Z)
LINKS = (1, 2, 3, 4)
LINK_FACTS = {1: (A, "direct"), 2: (A, "ipc"), 3: (B, "direct"), 4: (A, "broker")}


class Chaos:
    """A network that loses, repeats, delays and spoils, with a source that tells the truth."""

    def __init__(self) -> None:
        self.shell = Shell()
        self.up: set[int] = set()
        self.pulled: dict[bytes, tuple[int, int]] = {}
        self.sizes: dict[tuple[bytes, int], int] = {}

    def step(self, data: st.DataObject) -> None:
        what = data.draw(
            st.sampled_from(
                (
                    "pull",
                    "answer",
                    "answer",
                    "answer",
                    "spoil",
                    "error",
                    "up",
                    "down",
                    "wait",
                    "cancel",
                    "break",
                )
            )
        )
        getattr(self, f"do_{what}")(data)
        self.shell.brain.validate()

    def do_pull(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(IDS))
        attempt = data.draw(st.integers(1, 2))
        # The bytes of an attempt never change, and so neither does their number.
        size = self.sizes.setdefault((id, attempt), data.draw(st.integers(0, 60)))
        source = B if id == Z else A
        self.pulled[id] = (attempt, size)
        mode = data.draw(st.sampled_from((MODE_BYTES, MODE_PATH, MODE_INTO)))
        self.shell.objects.pop(id, None)
        self.shell.pull(id, size, attempt=attempt, source=source, mode=mode)

    def draw_question(self, data: st.DataObject) -> Fetch | None:
        # Any question ever asked may be answered now: in order, late, twice.
        asked = self.shell.asked
        return asked[data.draw(st.integers(0, len(asked) - 1))] if asked else None

    def do_answer(self, data: st.DataObject) -> None:
        fetch = self.draw_question(data)
        if fetch is not None:
            self.shell.answer(fetch)

    def do_spoil(self, data: st.DataObject) -> None:
        fetch = self.draw_question(data)
        if fetch is not None and fetch.mode == MODE_BYTES:
            spoils: list[dict[str, Any]] = [
                {"data": b"\xff" * fetch.length, "checksum": 7},
                {"data": b""},
                {"attempt": fetch.attempt + 1},
                {"offset": fetch.offset + RANGE},
                {"link": 3},
                {"request": fetch.request + 1, "link": 1},
            ]
            self.shell.answer(fetch, **data.draw(st.sampled_from(spoils)))

    def do_error(self, data: st.DataObject) -> None:
        fetch = self.draw_question(data)
        if fetch is not None:
            code = data.draw(st.sampled_from((NO_SUCH_OBJECT, WAY_CLOSED)))
            self.shell.answer(fetch, error=[code, "no"], data=b"", path=None)

    def do_refuse(self, data: st.DataObject) -> None:
        fetch = self.draw_question(data)
        if fetch is not None:
            self.shell.tell(Unsent(fetch.link, fetch.request, self.shell.now))

    def do_up(self, data: st.DataObject) -> None:
        self.raise_link(data.draw(st.sampled_from(LINKS)))

    def raise_link(self, link: int) -> None:
        party, carrier = LINK_FACTS[link]
        self.up.add(link)
        self.shell.up(link, party, carrier)

    def do_down(self, data: st.DataObject) -> None:
        link = data.draw(st.sampled_from(LINKS))
        self.up.discard(link)
        self.shell.down(link)

    def do_wait(self, data: st.DataObject) -> None:
        self.shell.wait(data.draw(st.sampled_from((0.1, 10.0, 31.0, 100.0))))

    def do_cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(IDS))
        self.shell.tell(Cancel(id, self.shell.now))
        self.pulled.pop(id, None)

    def do_break(self, data: st.DataObject) -> None:
        self.shell.broken_disk = self.shell.closed_ways = data.draw(st.booleans())

    def settle(self) -> None:
        """Everything works from now on."""
        self.shell.broken_disk = self.shell.closed_ways = False
        for link in LINKS:
            self.raise_link(link)
        at = 0
        while at < len(self.shell.asked):
            self.shell.answer(self.shell.asked[at])
            at += 1
        self.shell.wait(1000.0)


@hypothesis.given(st.data())
def test_whatever_happens_it_ends_in_exact_bytes_or_a_typed_failure(data: st.DataObject) -> None:
    chaos = Chaos()
    for _ in range(data.draw(st.integers(5, 60))):
        chaos.step(data)
    chaos.settle()
    shell = chaos.shell
    assert shell.brain.deadline is None, "every pull has ended"
    assert not shell.files
    last = {outcome.id: outcome for outcome in shell.ended}
    for id, (attempt, size) in chaos.pulled.items():
        outcome = last[id]
        assert (outcome.attempt, outcome.source) == (attempt, B if id == Z else A)
        if isinstance(outcome, Done):
            assert outcome.size == size
            assert shell.objects[id] == blob(id, attempt, size)
            assert sum(outcome.carriers.values()) == size
    for outcome in shell.ended:
        assert isinstance(outcome, Done) or outcome.message


@hypothesis.given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.randoms(use_true_random=True))
def test_loss_and_disorder_alone_never_fail_a_pull(sizes: list[int], random: object) -> None:
    """Each answer is lost with one chance in three, or comes twice, in any order: the clock repairs it."""
    shell = Shell()
    shell.up(1)
    draw = random.random  # type: ignore[attr-defined]
    for number, size in enumerate(sizes):
        shell.pull(bytes([number]) * 16, size)
    at, losses = 0, 0
    while len(shell.ended) < len(sizes):
        waiting = shell.asked[at:]
        at = len(shell.asked)
        for fetch in sorted(waiting, key=lambda _: draw()):
            if draw() < 0.33 and losses < STRIKES_MAX // STRIKE_BAD - 1:
                losses += 1
                continue
            shell.answer(fetch)
            shell.answer(fetch)
        shell.wait(TIMEOUT_S / 2)
    for number, size in enumerate(sizes):
        assert shell.objects[bytes([number]) * 16] == blob(bytes([number]) * 16, 1, size)
