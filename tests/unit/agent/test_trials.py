"""TRY at an agent: who may ask for what, and that nobody has it busy with nothing else."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from endpoint_worker.agent.trials import TRIALS_MAX, Trials
from gcref import ids
from gcref.brains.resolver_events import Who
from gcref.carriers import keys
from gcref.directory.records import EndpointRecord
from gcref.wire import codec
from gcref.wire import messages as m
from tests.support.waiting import patience

ASKER = b"a" * 16


class Agent:
    """What the control loop does for trials."""

    def __init__(self, home: Path) -> None:
        self.said: list[tuple[bytes, list[Any]]] = []
        self.posted: queue.Queue[Callable[[float], None]] = queue.Queue()
        self.trials = Trials(
            name="polaris",
            pair=keys.generate(),
            home=home,
            carriers=frozenset(("direct",)),
            connect=lambda: None,
            post=self.posted.put,
            say=lambda party, message: self.said.append((party, message)),
        )

    def ask(self, role: str, target: bytes | None, about: dict[str, Any] | None = None) -> None:
        self.trials.asked([m.TRY, 7, target, about], Who(ASKER, role, b"k" * 40, "client"))

    def turn(self) -> None:
        """Wait for what a thread has posted, and call it in the loop."""
        self.posted.get(timeout=patience(20))(time.monotonic())

    def answer(self) -> dict[str, Any]:
        party, message = self.said.pop(0)
        assert party == ASKER
        assert m.check(message) == m.TRIED
        assert message[1] == 7
        told: dict[str, Any] = message[2]
        return told


def test_a_knock_is_answered_at_once_to_peers_too(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    for role in ("user", "peer"):
        agent.ask(role, None)
        assert agent.answer() == {"name": "polaris"}


def test_a_peer_may_have_nothing_tried(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    agent.ask("peer", ids.new_id())
    assert "AuthError" in agent.answer()["error"]
    assert agent.posted.empty()


def test_an_endpoint_that_nobody_knows_is_an_error_in_the_answer(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    agent.ask("user", ids.new_id())
    agent.turn()
    assert "NotFoundError" in agent.answer()["error"]


def test_one_that_only_the_asker_knows_is_tried_and_that_is_said(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    key = keys.generate().public.decode("ascii")
    other = EndpointRecord(ids.new_id(), "midway", key, ("tcp://127.0.0.1:1",), running=True)
    told_of = codec.unpack(codec.pack(other.as_json()))
    agent.ask("user", other.id, told_of)
    agent.turn()
    told = agent.answer()
    assert "not known at polaris" in told["known"]
    assert [rung["carrier"] for rung in told["rungs"]] == ["ipc", "direct", "broker"]
    # The record of somebody else, or nonsense, is no answer to the question.
    for about in ({**told_of, "id": ids.text(ids.new_id())}, {"name": 5}):
        agent.ask("user", other.id, about)
        agent.turn()
        assert "NotFoundError" in agent.answer()["error"]


def test_there_are_few_trials_at_a_time(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    for _ in range(TRIALS_MAX):
        agent.ask("user", ids.new_id())
    agent.ask("user", ids.new_id())
    assert "busy" in agent.answer()["error"]
    for _ in range(TRIALS_MAX):
        agent.turn()
        assert "NotFoundError" in agent.answer()["error"]
    agent.ask("user", ids.new_id())
    agent.turn()
    assert "NotFoundError" in agent.answer()["error"], "there is room again"
