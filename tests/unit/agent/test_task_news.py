"""Which tasks the hub is told of, and when."""

from __future__ import annotations

import pytest

from endpoint_worker.agent import task_news
from endpoint_worker.agent.task_news import GONE, LOOK_S, TELL_AFTER_S, Event, TaskNews
from gcref.brains.graph import UNCLAIMED
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DEFAULT_OPTIONS, DISPATCHED, DONE, READY, Task

A, B = b"a" * 16, b"b" * 16


@pytest.fixture
def resolver() -> Resolver:
    found = Resolver(b"m" * 16, unknown_object_s=60.0, lease_s=60.0)
    for id in (A, B):
        found.objects[id] = Task(id, b"m" * 16, UNCLAIMED, None, None, DEFAULT_OPTIONS, 0.0)
    return found


def state(resolver: Resolver, id: bytes, state: int) -> None:
    task = resolver.objects[id]
    assert isinstance(task, Task)
    task.state = state


def test_a_short_task_is_not_told(resolver: Resolver) -> None:
    told: list[list[Event]] = []
    news = TaskNews(resolver, told.append)
    news.submitted([A], 10.0)
    assert news.deadline == 10.0 + TELL_AFTER_S
    state(resolver, A, DONE)
    news.tick(12.0, 0.0)
    assert told == []
    assert news.deadline is None, "idle costs nothing"


def test_a_long_one_is_told_with_each_change_that_is_seen(resolver: Resolver) -> None:
    told: list[list[Event]] = []
    news = TaskNews(resolver, told.append)
    news.submitted([A, B], 10.0)
    state(resolver, B, READY)
    news.tick(12.0, 100.0)
    assert told.pop() == [(A, "waiting", 100.0), (B, "ready", 100.0)]
    assert news.deadline == 12.0 + LOOK_S
    state(resolver, B, DISPATCHED)
    news.tick(17.0, 105.0)
    assert told.pop() == [(B, "dispatched", 105.0)]
    state(resolver, A, DONE)
    del resolver.objects[B]
    news.tick(22.0, 110.0)
    assert told.pop() == [(A, "done", 110.0), (B, GONE, 110.0)]
    assert news.deadline is None


def test_a_flood_is_not_looked_at(resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_news, "WATCHED_MAX", 1)
    told: list[list[Event]] = []
    news = TaskNews(resolver, told.append)
    news.submitted([A], 10.0)
    news.submitted([B], 10.0)
    news.tick(12.0, 0.0)
    assert told == [[(A, "waiting", 0.0)]]
    news.submitted([B], 13.0)
    news.tick(17.0, 0.0)
    assert len(told) == 1
