"""The thread for the hub: in turn, again while it cannot be reached, and nobody is left waiting."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gcref.directory.hub import HubClient
from gcref.directory.hub_thread import HubThread
from gcref.errors import AuthError, HubError, HubUnavailableError, NotFoundError
from tests.support.waiting import patience, wait_until

NOBODY = "http://127.0.0.1:9"  # no test speaks to it
SOON_S = patience(10)


def connect() -> HubClient:
    return HubClient(NOBODY, "token")


@pytest.fixture
def thread() -> Iterator[HubThread]:
    found = HubThread(connect)
    yield found
    found.close(SOON_S)


class Answers:
    """What `done` was handed."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Any] = queue.Queue()

    def __call__(self, answer: Any) -> None:
        self._queue.put((answer, threading.current_thread().name))

    def next(self) -> Any:
        answer, thread = self._queue.get(timeout=SOON_S)
        assert thread == "gcref-hub"
        return answer

    def empty(self) -> bool:
        return self._queue.empty()


class Hub:
    """A call that cannot reach the hub so many times."""

    def __init__(self, failures: float, value: object = "here") -> None:
        self.failures = failures
        self.value = value
        self.calls = 0

    def __call__(self, client: HubClient) -> object:
        assert isinstance(client, HubClient)
        self.calls += 1
        if self.calls <= self.failures:
            raise HubUnavailableError("it does not answer")
        return self.value


def test_calls_are_made_in_turn_and_answered_on_the_thread(thread: HubThread) -> None:
    answers = Answers()
    for number in range(20):
        thread.submit(Hub(0, number), answers)
    assert [answers.next() for _ in range(20)] == list(range(20))


def test_an_error_is_an_answer_and_harms_no_other_call(thread: HubThread) -> None:
    answers = Answers()

    def lost(client: HubClient) -> None:
        raise NotFoundError("no such endpoint")

    def broken(client: HubClient) -> None:
        raise ZeroDivisionError

    def impolite(answer: object) -> None:
        raise ValueError("on purpose")

    thread.submit(lost, answers, retry_for_s=math.inf)
    thread.submit(broken, answers)
    thread.submit(Hub(0), impolite)
    thread.submit(Hub(0), answers)
    assert isinstance(answers.next(), NotFoundError)
    error = answers.next()
    assert isinstance(error, HubError)
    assert "ZeroDivisionError" in str(error)
    assert answers.next() == "here"


def test_it_is_tried_again_while_there_is_time(thread: HubThread) -> None:
    answers = Answers()
    hub = Hub(2)
    thread.submit(hub, answers, retry_for_s=math.inf)
    assert answers.next() == "here"
    assert hub.calls == 3
    assert answers.empty()


def test_without_time_it_is_tried_once(thread: HubThread) -> None:
    answers = Answers()
    hub = Hub(math.inf)
    thread.submit(hub, answers)
    assert isinstance(answers.next(), HubUnavailableError)
    assert hub.calls == 1


def test_one_that_gets_through_hurries_the_others(thread: HubThread) -> None:
    answers = Answers()
    away = threading.Event()

    def lookup(client: HubClient) -> str:
        if not away.is_set():
            away.set()
            raise HubUnavailableError("it does not answer")
        return "found"

    thread.submit(lookup, answers, retry_for_s=math.inf)
    assert away.wait(SOON_S)
    wait_until(lambda: thread._jobs, what="it to be put off")
    with thread._changed:
        thread._jobs = [(due + 3600, at, job) for due, at, job in thread._jobs]  # as after many failures
    thread.submit(Hub(0, "heartbeat"), answers)
    assert {answers.next(), answers.next()} == {"found", "heartbeat"}


def test_every_goes_on_through_failures_and_tells_of_each(thread: HubThread) -> None:
    answers = Answers()
    thread.every(lambda: 0.001, Hub(2), answers)
    told = [answers.next() for _ in range(5)]
    assert [isinstance(answer, HubUnavailableError) for answer in told] == [True, True, False, False, False]


def test_a_client_that_cannot_be_made_is_the_answer_of_each_call() -> None:
    answers = Answers()
    thread = HubThread(lambda: HubClient(NOBODY, None))
    thread.submit(Hub(0), answers, retry_for_s=math.inf)
    thread.submit(Hub(0), answers)
    assert isinstance(answers.next(), AuthError)
    assert isinstance(answers.next(), AuthError)
    thread.close(SOON_S, last=lambda client: pytest.fail("there is nobody to say it to"))


def test_close_tells_who_waits_and_says_the_last_word() -> None:
    answers, said = Answers(), Answers()
    thread = HubThread(connect)
    began = threading.Event()

    def unreachable(client: HubClient) -> None:
        began.set()
        raise HubUnavailableError("it does not answer")

    thread.submit(unreachable, answers, retry_for_s=math.inf)
    thread.every(lambda: 3600.0, Hub(0), answers)
    assert began.wait(SOON_S)
    thread.close(SOON_S, last=lambda client: said("good-bye"))
    assert isinstance(answers.next(), HubUnavailableError)
    assert said.next() == "good-bye"
    assert answers.empty()
    late: list[object] = []
    thread.submit(Hub(0), late.append)
    assert isinstance(late[0], HubUnavailableError)
    thread.close(SOON_S)


def test_close_does_not_wait_longer_than_it_is_told() -> None:
    thread = HubThread(connect)
    stuck, go = threading.Event(), threading.Event()

    def hang(client: HubClient) -> None:
        stuck.set()
        go.wait(SOON_S)

    thread.submit(hang, lambda answer: None)
    assert stuck.wait(SOON_S)
    thread.close(0.01)
    assert thread._thread.is_alive()
    go.set()
    thread.close(SOON_S)
    assert not thread._thread.is_alive()


def test_one_that_was_never_used_has_no_thread() -> None:
    thread = HubThread(lambda: pytest.fail("nobody needs a client"))
    thread.close(SOON_S, last=lambda client: pytest.fail("it was never spoken to"))
    assert thread._thread.ident is None
