"""The waits of a task that has returned: for what it submitted, for large arguments, and never for ever."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from gcref.brains.submitter_table import APART, CONNECTING, UP
from gcref.sdk import handover
from gcref.sdk.handover import Handover
from gcref.task_context import TaskContext
from tests.support.waiting import patience

AGENT = b"agent..." * 2


class FakeLoop:
    """The I/O thread, played by the test: `turn` does what one turn of it does for the hand-over."""

    def __init__(self) -> None:
        self.wishes: list[Any] = []
        self.messages = self.acknowledged = self.asked = 0
        self.uploading: set[bytes] = set()
        self.broken = False
        self.posted = threading.Event()
        self.peers = SimpleNamespace(
            sent=lambda party: self.messages,
            pending=lambda party: self.messages - self.acknowledged,
            ask=self.ask,
        )
        self.large = SimpleNamespace(
            uploads=lambda: list(self.uploading), is_uploading=lambda id: id in self.uploading
        )

    def ask(self, party: bytes) -> None:
        assert party == AGENT
        self.asked += 1

    def is_broken(self) -> bool:
        return self.broken

    def post(self, wish: Any) -> None:
        if self.broken:
            raise RuntimeError("it has ended")
        self.wishes.append(wish)
        self.posted.set()


class Play:
    """A worker that hands over, in a thread of its own."""

    def __init__(self) -> None:
        self.loop = FakeLoop()
        self.peer = SimpleNamespace(state=UP, outbox=[])
        context = TaskContext(AGENT, "ipc://c", "ipc://b", b"party..." * 2, contextlib.nullcontext)
        brain = SimpleNamespace(peers={AGENT: self.peer})
        self.handover = Handover(self.loop, brain, context)  # type: ignore[arg-type]
        assert context.hand_over is not None
        self.worker = threading.Thread(target=context.hand_over, args=((),), daemon=True)

    def submit(self) -> None:
        self.loop.messages += 1
        self.handover.sent_submit()

    def begin(self) -> None:
        self.worker.start()
        assert self.loop.posted.wait(patience(10))
        for wish in self.loop.wishes:
            wish()

    def deadline(self) -> float | None:
        return self.handover.deadline

    def turn(self) -> bool:
        """Whether the worker has gone on by now."""
        waits = self.handover._waiting
        self.handover.look()
        if self.handover._waiting is None and waits is not None:
            self.worker.join(patience(10))
        return not self.worker.is_alive()


@pytest.fixture
def play() -> Play:
    return Play()


def test_it_waits_for_the_acknowledgement_of_what_was_submitted_and_for_no_other(play: Play) -> None:
    play.submit()
    play.begin()
    play.loop.messages += 5  # releases, and what another thread sends
    assert not play.turn()
    assert not play.turn()
    assert play.loop.asked == 1
    play.loop.acknowledged = 1
    assert play.turn()


def test_what_is_not_sent_yet_is_waited_for_too(play: Play) -> None:
    play.peer.state, play.peer.outbox = CONNECTING, ["a task"]
    play.begin()
    assert not play.turn()
    assert play.deadline() is None
    play.peer.state, play.peer.outbox = UP, []
    play.submit()
    assert not play.turn()
    play.loop.acknowledged = 1
    assert play.turn()


def test_large_arguments_are_waited_for_but_not_for_ever(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(handover, "time", SimpleNamespace(monotonic=lambda: now))
    play.loop.uploading = {b"one", b"two"}
    play.submit()
    play.begin()
    play.loop.uploading |= {b"of another thread, and later"}
    assert not play.turn()
    assert play.deadline() is None, "nothing is due while the agent is away"
    now, play.loop.acknowledged = 200.0, 1
    assert not play.turn()
    assert play.deadline() == 200.0 + handover.UPLOADS_WAIT_S
    play.loop.uploading -= {b"one"}
    now = 204.9
    assert not play.turn()
    now = 205.0
    assert play.turn()
    assert play.deadline() is None


def test_fetched_arguments_end_the_wait(play: Play) -> None:
    play.loop.uploading = {b"one"}
    play.begin()
    assert not play.turn()
    play.loop.uploading.clear()
    assert play.turn()


def test_an_agent_that_is_given_up_is_not_waited_for(play: Play) -> None:
    play.submit()
    play.begin()
    assert not play.turn()
    play.peer.state = APART
    assert play.turn()


@pytest.mark.parametrize("when", ["before", "while it waits", "in between"])
def test_an_io_thread_that_has_ended_lets_it_go_on(play: Play, when: str) -> None:
    play.submit()
    if when == "before":
        play.loop.broken = True
        play.worker.start()
    elif when == "while it waits":
        play.begin()
        assert not play.turn()
        play.handover.end()
    else:
        play.worker.start()
        assert play.loop.posted.wait(patience(10))
        play.loop.broken = True
        play.loop.wishes[0]()
    play.worker.join(patience(10))
    assert not play.worker.is_alive()
