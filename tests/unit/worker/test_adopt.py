"""F2: workers outlive their agent, and the next one takes them over with the tasks that they run.

The agent dies here by closing its sockets, which is all that others see of a `kill -9`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from endpoint_worker.worker import channel, zygote_process
from endpoint_worker.worker import zygote as zygotes
from endpoint_worker.worker.remains import Remains
from endpoint_worker.worker.zygote import Zygote
from gcref.wire.messages import OK, STORED
from tests.support.waiting import wait_until
from tests.unit.worker.fake_agent import ADOPT_S, FakeAgent, Result, begun, exists, open_pipe, place, value_of
from tests.unit.worker.test_runtime import (
    Dependency,
    add,
    drop,
    keep,
    read_kept,
    total,
    wait_for,
    wait_lending,
)


def count(path: str, pipe: str) -> str:
    """A task with an effect, and an end that somebody else decides."""
    with open(path, "a") as effects:
        effects.write("x")
    return wait_for(pipe)


def speak_and_wait(pipe: str) -> None:
    sys.stderr.write("last words\n")
    wait_for(pipe)


def large(pipe: str) -> bytes:
    wait_for(pipe)
    return bytes(200_000)


def has_memory(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/maps").read_bytes())
    except OSError:
        return False


def found_by(agent: FakeAgent, worker: int = 1) -> Remains:
    (one,) = [found for found in agent.come_back() if found.worker == worker]
    return one


def adopted(agent: FakeAgent, worker: int = 1) -> tuple[int, int, bool]:
    """What ADOPTED says: running, last, lent."""
    said = agent.expect(channel.ADOPTED, worker)
    assert said[1:3] == [worker, agent.pids.get(worker, said[2])]
    return said[4], said[5], said[6]


# ------------------------------------------------------------------------------------------------ running tasks


def test_f2_a_running_task_ends_once_in_its_adopted_worker(
    agent: FakeAgent, pipe: str, tmp_path: Path
) -> None:
    """F2: it is found on the page, goes on, and its result reaches the new agent."""
    effects = str(tmp_path / "effects")
    before = agent.entry(add, 1)
    entry = agent.entry(count, effects, pipe)
    agent.tasks([before, entry])
    begun(agent, entry)
    agent.die()
    one = found_by(agent)
    assert (one.pid, one.exited, one.blocked) == (agent.pids[1], None, False)
    assert one.started == (entry[0], entry[1], 1)
    assert one.config.channel == agent.channel.address
    assert len(one.config.party) == 16
    assert [Result(*row).id for row in one.results] == [before[1]]
    agent.adopt()
    open_pipe(pipe)
    assert adopted(agent) == (0, entry[0], False)
    ended = [Result(*row) for _, message in agent.messages for row in message[1]]
    assert {(result.id, result.status) for result in ended} == {(before[1], OK), (entry[1], OK)}
    assert value_of(ended[-1]) == "here"
    assert Path(effects).read_text() == "x"
    agent.messages.clear()
    assert agent.value(add, 41) == 42


def test_f2_an_idle_worker_tells_again_what_it_has_done(agent: FakeAgent) -> None:
    entries = [agent.entry(add, n) for n in range(50)]
    agent.tasks(entries)
    agent.results(50)
    agent.die()
    one = found_by(agent)
    assert one.started is None
    assert [Result(*row).id for row in one.results] == [entry[1] for entry in entries]
    agent.adopt()
    assert adopted(agent) == (0, entries[-1][0], False)
    again = agent.results(50)
    assert [result.id for result in again] == [entry[1] for entry in entries]
    assert [value_of(result) for result in again] == list(range(1, 51))


def test_f2_what_was_held_does_not_run_and_functions_are_kept(agent: FakeAgent, pipe: str) -> None:
    """The lease is over with its agent; what it had sent ahead belongs to the next one again."""
    warm = agent.run(add, 1)
    running, held = agent.entry(wait_for, pipe), [agent.entry(add, n) for n in range(5)]
    until = time.monotonic() + 0.2
    agent.tasks([running, *held], lease_s=0.2)
    begun(agent, running)
    agent.die()
    assert found_by(agent).started == (running[0], running[1], 1)
    wait_until(lambda: time.monotonic() > until, what="the lease to be over, as it is for real agents")
    open_pipe(pipe)
    assert agent.expect(channel.ASK)[1] == held[0][0]
    agent.adopt(7)
    said = agent.expect(channel.ADOPTED)
    assert said[3:7] == [7, 0, held[0][0], False]
    assert held[0][3] in said[7]
    ended = [result.id for result in agent.results(3)]
    assert ended == [running[1], warm.id, running[1]], "as it ended, and all again"
    fresh = agent.entry(add, 100)
    agent.tasks([fresh])
    assert [result.id for result in agent.results(1)] == [fresh[1]]


def test_an_entry_that_waits_for_its_lease_has_not_started(agent: FakeAgent) -> None:
    """It asked, and its question died with the agent: nobody may take it for running."""
    entry = agent.entry(add, 1)
    agent.tasks([entry], lease_s=-1.0)
    agent.expect(channel.ASK)
    agent.die()
    one = found_by(agent)
    assert (one.started, one.results) == (None, [])
    agent.adopt()
    assert adopted(agent) == (0, entry[0], False)
    assert agent.results(0) == []
    assert agent.value(add, 1) == 2


# ------------------------------------------------------------------------------------------------ questions


def test_alloc_is_asked_again(agent: FakeAgent, pipe: str, tmp_path: Path) -> None:
    entry = agent.entry(large, pipe)
    agent.tasks([entry])
    open_pipe(pipe)
    size = agent.expect(channel.ALLOC)[1]
    agent.die()
    assert found_by(agent).started == (entry[0], entry[1], 1)
    agent.adopt()
    assert adopted(agent) == (entry[0], entry[0], False)
    assert agent.expect(channel.ALLOC)[1:] == [size, None]
    path = str(tmp_path / "segment")
    agent.send(1, channel.segment(path, size, False))
    agent.expect(channel.DONE)  # of its page
    result = agent.results(1)[0]
    assert (result.id, result.status, result.value) == (entry[1], STORED, [path, size])


def test_an_answer_of_the_old_agent_is_taken_when_it_comes_first(agent: FakeAgent, tmp_path: Path) -> None:
    """It was on its way when the agent died. The segment is the worker's, whoever gave it."""
    entry = agent.entry(bytes, 200_000)
    agent.tasks([entry])
    size = agent.expect(channel.ALLOC)[1]
    path = str(tmp_path / "segment")
    os.kill(agent.pids[1], signal.SIGSTOP)
    agent.send(1, channel.segment(path, size, False))
    os.kill(agent.pids[1], signal.SIGCONT)
    wait_until(lambda: os.path.exists(path), what="the answer to arrive")
    agent.die()
    one = found_by(agent)
    agent.adopt()
    assert adopted(agent)[0] == 0
    rows = [Result(*row) for _, message in agent.messages for row in message[1]]
    assert one.started in (None, (entry[0], entry[1], 1))
    assert {(row.id, row.status, tuple(row.value)) for row in rows} == {(entry[1], STORED, (path, size))}


def test_blocked_is_asked_again(agent: FakeAgent, pipe: str) -> None:
    waiting = agent.entry(wait_lending, pipe)
    agent.tasks([waiting])
    agent.expect(channel.BLOCKED)
    agent.die()
    one = found_by(agent)
    assert (one.started, one.blocked) == ((waiting[0], waiting[1], 1), False)
    agent.adopt()
    assert adopted(agent) == (waiting[0], waiting[0], False)
    assert agent.expect(channel.BLOCKED)[1] == waiting[1]
    agent.send(1, channel.slot(True))
    open_pipe(pipe)
    assert agent.expect(channel.RESUME)[1] == waiting[1]
    agent.send(1, channel.slot(True))
    agent.expect(channel.DONE)  # of its page
    assert value_of(agent.results(1)[0]) == "here"


def test_a_lent_slot_is_found_and_resumed_with_the_new_agent(agent: FakeAgent, pipe: str) -> None:
    waiting = agent.entry(wait_lending, pipe)
    agent.tasks([waiting])
    agent.expect(channel.BLOCKED)
    agent.send(1, channel.slot(True))
    page = agent.zygote._workers[1][0]
    wait_until(lambda: page.blocked, what="the slot to be lent")
    agent.die()
    one = found_by(agent)
    assert (one.started, one.blocked) == ((waiting[0], waiting[1], 1), True)
    agent.adopt()
    open_pipe(pipe)
    assert agent.expect(channel.RESUME)[1] == waiting[1]  # before it has looked for messages
    assert adopted(agent) == (waiting[0], waiting[0], True)
    assert agent.expect(channel.RESUME)[1] == waiting[1]
    agent.send(1, channel.slot(True))
    agent.expect(channel.DONE)  # of its page
    assert value_of(agent.results(1)[0]) == "here"
    agent.tasks([after := agent.entry(add, 1)])
    assert agent.results(1)[0].id == after[1]
    assert not agent.zygote._workers[1][0].blocked


# -------------------------------------------------------------------------------------------------- mappings


def test_grants_of_before_are_void_and_what_is_seen_stays(agent: FakeAgent, tmp_path: Path) -> None:
    kept, _ = place(tmp_path / "kept", np.ones(1000))
    held, _ = place(tmp_path / "held", np.ones(1000))
    agent.run(keep, Dependency(), deps=[kept])
    blocking = agent.entry(add, 1)
    agent.tasks([blocking, agent.entry(keep, Dependency(), deps=[held])], lease_s=-1.0)
    agent.expect(channel.ASK)
    agent.die()
    agent.come_back()
    agent.adopt()
    adopted(agent)
    agent.messages.clear()
    again = agent.run(keep, Dependency(), deps=[kept])
    assert again.status == OK
    agent.value(drop)
    agent.send(1, channel.unmap())
    agent.wait(lambda: agent.returned(kept[0]), "the mapping to be closed")
    assert agent.unmapped == [(1, [kept[0], 1, True])], (
        "one grant of this agent, and none of the entry that fell"
    )


def test_a_path_of_the_new_agent_is_not_what_the_old_one_had_there(agent: FakeAgent, tmp_path: Path) -> None:
    path = tmp_path / "segment"
    where, _ = place(path, np.ones(1000))
    agent.run(keep, Dependency(), deps=[where])
    agent.die()
    agent.come_back()
    agent.adopt()
    adopted(agent)
    agent.messages.clear()
    path.unlink()
    where, _ = place(path, np.full(1000, 2.0))
    assert agent.value(total, Dependency(), deps=[where]) == 2000.0
    assert agent.value(read_kept) == [1000.0]
    assert agent.returned(where[0]) == [where[0], 1, True]
    agent.value(drop)
    agent.value(add, 1)
    assert len(agent.unmapped) == 1


# ------------------------------------------------------------------------------------------------- the dead


def test_what_died_meanwhile_is_told_with_its_reason(agent: FakeAgent, pipe: str) -> None:
    before, entry = agent.entry(add, 1), agent.entry(speak_and_wait, pipe)
    agent.tasks([before, entry])
    begun(agent, entry)
    wait_until((agent.folders[1] / "worker-1.err").read_bytes, what="the task to speak")
    pid = agent.pids[1]
    agent.die()
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not exists(pid), what="the worker to be reaped")
    one = found_by(agent)
    assert one.pid == 0
    assert one.started == (entry[0], entry[1], 1)
    exited = one.exited
    assert exited is not None
    assert (exited.worker, exited.pid, exited.exit_code, exited.signal) == (1, pid, None, signal.SIGTERM)
    assert (exited.stderr, exited.progress) == ("last words", entry[0])
    assert [Result(*row).id for row in one.results] == [before[1]]
    assert exited.results == one.results
    page = agent.folders[0] / "worker-1.page"
    assert page.exists(), "somebody has yet to write it down"
    assert agent.zygote.read() == []
    assert not page.exists()
    agent.spawn(2)
    agent.expect(channel.READY, 2)


@pytest.mark.parametrize("was_read", [False, True])
def test_a_death_that_the_agent_did_not_write_down_is_told_again(agent: FakeAgent, was_read: bool) -> None:
    entry = agent.entry(os._exit, 9)
    agent.tasks([entry])
    if was_read:
        agent.exited()
    else:
        wait_until(lambda: not exists(agent.pids[1]), what="the worker to be reaped")
    agent.die()
    one = found_by(agent)
    assert one.exited is not None
    assert (one.exited.exit_code, one.started) == (9, (entry[0], entry[1], 1))
    agent.zygote.read()
    agent.die()
    assert agent.come_back() == []


def test_a_task_that_spoils_its_page_spoils_nothing_else(agent: FakeAgent) -> None:
    agent.spawn(2)
    agent.expect(channel.READY, 2)
    agent.zygote._workers[1][0].mapping[256:300] = b"\xff" * 44
    agent.die()
    assert [one.worker for one in agent.come_back()] == [2]
    wait_until(lambda: not exists(agent.pids[1]), what="nobody's worker to be killed")
    assert agent.zygote.read() == []


# ------------------------------------------------------------------------------------------------- the zygote


def test_again_and_again(agent: FakeAgent, pipe: str) -> None:
    """Three agents die while one task runs; new workers come meanwhile, and each is found."""
    entry = agent.entry(wait_for, pipe)
    agent.tasks([entry])
    begun(agent, entry)
    for epoch in range(2, 5):
        agent.die()
        assert [(one.worker, one.pid > 0) for one in agent.come_back()] == [
            (n, True) for n in range(1, epoch)
        ]
        agent.spawn(epoch)
        agent.expect(channel.READY, epoch)
        for worker in range(1, epoch):
            agent.adopt(epoch, worker)
        for worker in range(2, epoch):
            assert agent.expect(channel.ADOPTED, worker)[3] == epoch
    open_pipe(pipe)
    assert [agent.expect(channel.ADOPTED)[3] for _ in range(3)] == [2, 3, 4]
    assert value_of(Result(*agent.expect(channel.DONE)[1][0])) == "here"


def test_l4_nobody_comes_and_nothing_is_left(pipe: str) -> None:
    """L4: after `adopt_s` all is killed; what had been done is in the pages."""
    with FakeAgent(2, adopt_s=0.3) as agent:
        done, entry = agent.entry(add, 1), agent.entry(wait_for, pipe)
        agent.tasks([done, entry])
        begun(agent, entry)
        pids = [agent.zygote.pid, *agent.pids.values()]
        agent.die()
        wait_until(lambda: not [pid for pid in pids[1:] if exists(pid)], what="the workers to be gone")
        os.waitpid(pids[0], 0)
        assert Zygote.adopt(*agent.folders) is None
        first, second = Zygote.remains(*agent.folders)
        assert (first.worker, second.worker, first.pid, second.pid) == (1, 2, 0, 0)
        assert first.started == (entry[0], entry[1], 1)
        assert first.exited is not None
        assert first.exited.signal == signal.SIGKILL
        assert [Result(*row).id for row in first.results] == [done[1]]
        assert (second.started, second.results) == (None, [])
        agent.zygote = Zygote.start(*agent.folders, ADOPT_S)
        assert len(Zygote.remains(*agent.folders)) == 2
        agent.zygote.read()
        assert Zygote.remains(*agent.folders) == []


def test_a_zygote_that_was_killed_has_taken_its_workers_along(agent: FakeAgent, pipe: str) -> None:
    entry = agent.entry(wait_for, pipe)
    agent.tasks([entry])
    begun(agent, entry)
    agent.die()
    os.kill(agent.zygote.pid, signal.SIGKILL)
    assert Zygote.adopt(*agent.folders) is None
    (one,) = Zygote.remains(*agent.folders)
    # Its process may be there for a moment, but without memory it does nothing any more.
    assert not has_memory(agent.pids[1])
    assert (one.pid, one.started) == (0, (entry[0], entry[1], 1))


def test_a_zygote_that_does_not_answer_is_killed(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygotes, "_ANSWER_S", 0.1)
    monkeypatch.setattr(zygotes, "_END_S", 0.1)
    agent.die()
    os.kill(agent.zygote.pid, signal.SIGSTOP)
    assert Zygote.adopt(*agent.folders) is None
    assert [one.pid for one in Zygote.remains(*agent.folders)] == [0]


def test_only_its_own_version_is_adopted(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    agent.die()
    monkeypatch.setattr(zygote_process, "VERSION", 99)
    assert Zygote.adopt(*agent.folders) is None
    assert not exists(agent.pids[1])


def test_who_connects_and_leaves_is_no_agent(agent: FakeAgent) -> None:
    agent.die()
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stranger.connect(str(agent.folders[0] / "zygote.sock"))
    stranger.close()
    assert len(agent.come_back()) == 1
    agent.adopt()
    adopted(agent)


def test_there_is_one_zygote_in_a_folder(agent: FakeAgent) -> None:
    with pytest.raises(BlockingIOError):
        Zygote.start(*agent.folders, ADOPT_S)


def test_a_clean_end_is_an_end_also_for_the_adopted(agent: FakeAgent) -> None:
    agent.die()
    agent.come_back()
    pids = [agent.zygote.pid, agent.pids[1]]
    agent.zygote.close()
    assert not [pid for pid in pids if exists(pid)]
    assert sorted(path.name for path in agent.folders[0].iterdir()) == []
    assert Zygote.adopt(*agent.folders) is None
    assert Zygote.remains(*agent.folders) == []
