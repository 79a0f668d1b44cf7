"""F2: how an agent takes over workers: whom it tells, what it believes, and what it passes on."""

from __future__ import annotations

import os
import signal
import time

import psutil

from endpoint_worker.agent.pool import Message, Pool
from endpoint_worker.agent.stopping import stop
from endpoint_worker.worker import channel
from gcref import ids
from gcref.wire.messages import OK
from tests.support.waiting import patience, wait_until
from tests.unit.worker.fake_agent import FakeAgent, Result, begun, open_pipe
from tests.unit.worker.test_runtime import add, wait_for, wait_lending


def pool_of(agent: FakeAgent) -> Pool:
    """A pool in the place of the dead agent, which has adopted what it left."""
    remains = agent.come_back()
    pool = Pool(
        agent.zygote,
        agent.channel,
        endpoint="polaris",
        agent_id=ids.new_id(),
        control_address="ipc:///control",
        bulk_address="ipc:///bulk",
        environment=lambda worker: {},
    )
    pool.adopt(remains)
    return pool


def said(pool: Pool, until: int, times: int = 1) -> list[Message]:
    """What the pool passes on, up to so many messages of that kind; its clock runs meanwhile."""
    found: list[Message] = []
    give_up = time.monotonic() + patience(20)
    while sum(message.body[0] == until for message in found) < times:
        now = time.monotonic()
        assert now < give_up, found
        if pool.deadline is not None and pool.deadline <= now:
            pool.tick(now)
        pool.channel.socket.poll(1)
        found += pool.receive()
    return found


def test_an_idle_worker_is_adopted_with_its_functions(agent: FakeAgent) -> None:
    entry = agent.entry(add, 1)
    agent.tasks([entry])
    agent.results(1)
    agent.die()
    pool = pool_of(agent)
    assert not pool.has_function(1, entry[3])
    done, last = said(pool, channel.ADOPTED)
    assert [Result(*row).id for row in done.body[1]] == [entry[1]]
    assert last.body[4:7] == [0, entry[0], False]
    assert pool.has_function(1, entry[3])
    assert pool.deadline is None, "nobody is left to be told"
    assert list(pool.progress()) == [1]
    pool.spawn(1)
    assert said(pool, channel.READY)[-1].worker == 2, "a number is not used twice"


def test_what_was_said_to_the_dead_is_not_passed_on_but_for_results(agent: FakeAgent, pipe: str) -> None:
    """BLOCKED crosses the death of its agent and is said again; an ASK is not."""
    before, waiting = agent.entry(add, 1), agent.entry(wait_lending, pipe)
    agent.tasks([before, waiting])
    agent.expect(channel.BLOCKED)
    agent.die()
    pool = pool_of(agent)
    kinds = [message.body[0] for message in said(pool, channel.BLOCKED)]
    assert kinds == [channel.DONE, channel.ADOPTED, channel.BLOCKED]
    pool.slot(1, None)
    open_pipe(pipe)
    assert [message.body[0] for message in said(pool, channel.RESUME)] == [channel.RESUME]
    pool.slot(1, None)
    (done,) = said(pool, channel.DONE)
    assert [Result(*row)[1:4] for row in done.body[1]] == [(waiting[1], 1, OK)]


def test_results_count_before_the_worker_knows_us(agent: FakeAgent, pipe: str) -> None:
    """Its socket reaches us while it runs its task; that it holds grants of another store is not our affair."""
    running, held = agent.entry(wait_for, pipe), agent.entry(add, 1)
    agent.tasks([running])
    begun(agent, running)
    agent.die()
    pool = pool_of(agent)
    open_pipe(pipe)
    messages = said(pool, channel.ADOPTED)
    assert {Result(*row).id for message in messages[:-1] for row in message.body[1]} == {running[1]}
    assert all(message.body[2] == [] for message in messages[:-1])
    assert pool.send_tasks(1, time.monotonic() + 60, [held])


def test_a_worker_that_came_up_while_nobody_was_there(agent: FakeAgent) -> None:
    agent.spawn(2)
    agent.die()
    pool = pool_of(agent)
    messages = said(pool, channel.ADOPTED, times=2)
    assert sorted(m.worker for m in messages if m.body[0] == channel.ADOPTED) == [1, 2]
    assert channel.READY not in [message.body[0] for message in messages]


def test_a_stopped_worker_is_tried_seldom_and_forgotten_when_it_dies(agent: FakeAgent) -> None:
    process = psutil.Process(agent.pids[1])
    assert stop(process.pid, agent.zygote.pid)
    agent.die()
    wait_until(
        lambda: process.status() != psutil.STATUS_STOPPED, what="what the dead agent had stopped to go on"
    )
    process.suspend()
    pool = pool_of(agent)
    tries, now = 0, 0.0
    while pool.deadline is not None and pool.deadline < 60:
        now = pool.deadline
        pool.tick(now)
        tries += 1
    assert tries < 100
    assert pool.worker_of_party(pool._parties[1]) == 1
    agent.zygote.kill(1)
    party = pool._parties[1]
    assert pool.gone(agent.exited()) == party
    pool.tick(now)
    assert pool.deadline is None


def test_a_worker_is_killed_for_what_it_runs_and_not_for_what_it_has_ended(
    agent: FakeAgent, pipe: str
) -> None:
    first, second = agent.entry(add, 1), agent.entry(wait_for, pipe)
    agent.tasks([first, second])
    begun(agent, second)
    agent.die()
    pool = pool_of(agent)
    assert not pool.kill_at(1, first[0])
    open_pipe(pipe)
    said(pool, channel.ADOPTED)
    assert not pool.kill_at(1, second[0]), "it has ended, and nothing has begun since"
    third = agent.entry(wait_for, pipe)
    assert pool.send_tasks(1, time.monotonic() + 60, [third])
    begun(agent, third)
    assert pool.kill_at(1, third[0])
    assert agent.exited().signal == signal.SIGKILL


def test_a_stopped_process_stands_still_and_somebody_elses_is_left_alone(agent: FakeAgent) -> None:
    pid = agent.pids[1]
    assert not stop(pid, os.getpid()), "it is the child of its zygote"
    assert stop(pid, agent.zygote.pid)
    assert psutil.Process(pid).status() == psutil.STATUS_STOPPED
    assert not stop(pid, agent.zygote.pid), "whoever stopped it first lets it go on"
    os.kill(pid, signal.SIGCONT)
    assert agent.value(add, 1) == 2
    os.kill(pid, signal.SIGKILL)
    agent.exited()
    assert not stop(pid, agent.zygote.pid)
