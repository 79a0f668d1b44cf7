"""Worker processes: how they start, how they end, and that none is left (F1, L4)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from endpoint_worker.worker import channel
from gcref.errors import LostError
from gcref.wire.messages import STORED
from tests.support.waiting import patience, wait_until
from tests.unit.worker.fake_agent import FakeAgent, Result, exists, value_of

ROOT = Path(__file__).resolve().parents[3]


def noop() -> None:
    return None


def die(how: str) -> None:
    sys.stderr.write("first line\nlast words\n")
    if how == "exit":
        os._exit(7)
    os.kill(os.getpid(), signal.SIGKILL)


def die_late(n: int) -> int:
    if n == 0:
        os._exit(3)
    return n


def descendants() -> list[int]:
    """Start a child in this process group, and one that leaves it as daemons do; both sleep."""
    sleep = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
    near = subprocess.Popen(sleep, stdout=subprocess.PIPE)
    far = subprocess.Popen(sleep, stdout=subprocess.PIPE, start_new_session=True)
    assert near.stdout is not None
    assert far.stdout is not None
    return [int(near.stdout.readline()), int(far.stdout.readline())]


@pytest.mark.parametrize(("how", "code", "number"), [("exit", 7, None), ("signal", None, signal.SIGKILL)])
def test_f1_a_death_is_reported_with_its_reason(how: str, code: int | None, number: int | None) -> None:
    """F1: exit code or signal, the last lines of stderr, and which entry was running, within 2 s."""
    with FakeAgent() as agent:
        before = agent.entry(noop)
        deadly = agent.entry(die, how)
        after = agent.entry(noop)
        started = time.monotonic()
        agent.tasks([before, deadly, after])
        exited = agent.exited()
        assert time.monotonic() - started < patience(2)
        assert (exited.pid, exited.exit_code, exited.signal) == (agent.pids[1], code, number)
        assert exited.stderr == "first line\nlast words"
        assert exited.progress == deadly[0]
        assert [Result(*item).seq for item in exited.results] == [before[0]]
        assert (agent.folder / "logs" / "worker-1.err").exists()
        assert not list((agent.folder / "pages").iterdir())
        agent.spawn(2)
        agent.expect(channel.READY, 2)
        assert value_of(agent.run(noop, worker=2)) is None


def test_f1_nothing_that_ended_before_a_death_is_lost() -> None:
    """F1: the results of the same batch are known, whether they were sent or not; later entries never started."""
    with FakeAgent() as agent:
        agent.run(die_late, 1)  # known to be short: nothing is sent ahead of it
        entries = [agent.entry(die_late, n) for n in (*range(1, 300), 0, *range(1, 10))]
        agent.tasks(entries)
        exited = agent.exited()
        assert exited.exit_code == 3
        assert exited.progress == entries[299][0]
        found = {Result(*item).seq: Result(*item) for item in exited.results}
        assert [value_of(found[entry[0]]) for entry in entries[:299]] == list(range(1, 300))
        assert not any(entry[0] in found for entry in entries[299:])


def test_who_dies_before_its_lease_is_renewed_has_begun_nothing() -> None:
    with FakeAgent() as agent:
        entries = [agent.entry(noop) for _ in range(2)]
        agent.tasks(entries[:1])
        agent.results(1)
        agent.tasks(entries[1:], lease_s=-1.0)
        agent.expect(channel.ASK)
        agent.zygote.kill(1)
        assert agent.exited().progress == entries[0][0]


def test_what_was_received_is_not_told_again() -> None:
    with FakeAgent() as agent:
        entries = [agent.entry(noop) for _ in range(20)]
        agent.tasks(entries)
        agent.results(20)
        agent.zygote.received(1, entries[14][0])
        agent.zygote.received(99, 1)
        agent.zygote.kill(1)
        assert [Result(*item).seq for item in agent.exited().results] == [entry[0] for entry in entries[15:]]


def test_f1_a_large_result_that_was_written_is_known_after_a_death(tmp_path: Path) -> None:
    with FakeAgent() as agent:
        large = agent.entry(bytes, 200_000)
        agent.tasks([large, agent.entry(die, "exit")])
        size = agent.expect(channel.ALLOC)[1]
        agent.send(1, channel.segment(str(tmp_path / "segment"), size, False))
        result = Result(*agent.exited().results[0])
        assert (result.id, result.status, result.value) == (
            large[1],
            STORED,
            [str(tmp_path / "segment"), size],
        )


def test_c1_a_worker_is_killed_with_all_that_it_started() -> None:
    """C1: by force; and what a task left in its process group is gone before the exit is told."""
    with FakeAgent() as agent:
        near, far = agent.value(descendants)
        assert exists(near)
        agent.zygote.kill(1)
        exited = agent.exited()
        assert (exited.exit_code, exited.signal) == (None, signal.SIGKILL)
        wait_until(lambda: not exists(near), what="the child to be reaped")
        assert exists(far), "a daemon goes with the endpoint, not with the worker"
        agent.zygote.kill(1)  # once more does nothing
        agent.zygote.kill(99)
    wait_until(lambda: not exists(far), what="the daemon to be gone")


def test_workers_have_groups_and_a_session_of_their_own() -> None:
    """A Ctrl-C in the agent's terminal does not reach them."""
    with FakeAgent() as agent:
        pid = agent.pids[1]
        assert os.getsid(pid) == agent.zygote.pid != os.getsid(0)
        assert os.getpgid(pid) == pid


def test_environment_variables_are_the_workers_own() -> None:
    with FakeAgent(0) as agent:
        agent.spawn(1, {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "1"})
        agent.spawn(2)
        for worker in (1, 2):
            agent.expect(channel.READY, worker)

        def look() -> list[str | None]:
            return [os.environ.get("OMP_NUM_THREADS"), os.environ.get("CUDA_VISIBLE_DEVICES")]

        assert value_of(agent.run(look, worker=1)) == ["3", "1"]
        assert value_of(agent.run(look, worker=2)) == [os.environ.get("OMP_NUM_THREADS"), None]


def test_ready_names_worker_and_process() -> None:
    with FakeAgent(0) as agent:
        agent.spawn(5)
        assert agent.expect(channel.READY, 5)[1:] == [5, agent.wait(lambda: agent.pids.get(5), "the pid")]
        assert agent.zygote.progress(5) == 0
        assert agent.zygote.progress(6) == 0
        assert not agent.channel.send(6, channel.unmap()), "nobody is there"


def test_a_worker_that_cannot_start_has_exited() -> None:
    with FakeAgent(0) as agent:
        agent.channel.address = "ipc://" + "x" * 200
        agent.spawn(1)
        exited = agent.exited()
        assert exited.exit_code == 1
        assert "ZMQError" in exited.stderr


def test_logs_of_the_dead_are_few() -> None:
    with FakeAgent(0) as agent:
        for worker in range(1, 21):
            agent.spawn(worker)
            agent.expect(channel.READY, worker)
            agent.tasks([agent.entry(die, "exit", worker=worker)], worker=worker)
            agent.exited(worker)
        left = sorted(path.name for path in (agent.folder / "logs").glob("worker-*.err"))
        assert left == sorted(f"worker-{worker}.err" for worker in range(5, 21))


def test_the_end_leaves_no_process() -> None:
    """L4: busy workers, and what they started."""
    with FakeAgent(3) as agent:
        started = value_of(agent.run(descendants))
        agent.tasks([agent.entry(time.sleep, 600, worker=2)], worker=2)
        wait_until(lambda: agent.zygote.progress(2), what="the task to start")
        pids = [agent.zygote.pid, *agent.pids.values(), *started]
        assert all(map(exists, pids))
    assert not [pid for pid in pids if exists(pid)]


_AGENT = """
import sys, time
from tests.unit.worker.fake_agent import FakeAgent
from tests.unit.worker.test_zygote import descendants
agent = FakeAgent(2)
started = agent.value(descendants)
agent.tasks([agent.entry(time.sleep, 600)])
print(agent.folder, agent.zygote.pid, *agent.pids.values(), *started, flush=True)
time.sleep(600)
"""


def test_l4_a_killed_agent_leaves_no_process() -> None:
    """L4: also the zygote, busy workers, and what their tasks started."""
    import shutil

    process = subprocess.Popen([sys.executable, "-c", _AGENT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder, *numbers = process.stdout.readline().split()
    pids = [int(number) for number in numbers]
    assert len(pids) == 5
    assert all(map(exists, pids))
    process.kill()
    process.wait()
    process.stdout.close()
    try:
        wait_until(lambda: not [pid for pid in pids if exists(pid)], what="all processes to be gone")
    finally:
        shutil.rmtree(folder)


def test_a_killed_zygote_takes_its_workers_along() -> None:
    agent = FakeAgent(2)
    try:
        os.kill(agent.zygote.pid, signal.SIGKILL)
        wait_until(
            lambda: not [pid for pid in agent.pids.values() if psutil.pid_exists(pid)],
            what="the workers to die",
        )
        agent.zygote.read()  # what it told before it died
        with pytest.raises(LostError, match="start the endpoint again"):
            agent.zygote.read()
        with pytest.raises(LostError):
            agent.spawn(3)
    finally:
        agent.close()


def test_an_idle_worker_does_nothing() -> None:
    """No wake-up in a while: neither its tasks' thread nor ZeroMQ's."""
    with FakeAgent() as agent:
        agent.tasks([agent.entry(noop) for _ in range(100)])
        agent.results(100)

        def switches() -> int:
            total = 0
            for status in Path(f"/proc/{agent.pids[1]}/task").glob("*/status"):
                for line in status.read_text().splitlines():
                    if line.startswith("voluntary_ctxt_switches"):
                        total += int(line.split()[1])
            return total

        last: list[Any] = [switches(), time.monotonic()]

        def was_quiet() -> bool:
            now = switches()
            if now != last[0]:
                last[:] = [now, time.monotonic()]
            return bool(time.monotonic() - last[1] > 0.5)

        wait_until(was_quiet, what="half a second without a wake-up")


def test_processes_start_fast_and_share_their_memory() -> None:
    """A new worker costs some milliseconds and a few megabytes."""
    with FakeAgent(1) as agent:
        times = []
        for worker in range(2, 7):
            started = time.perf_counter()
            agent.spawn(worker)
            agent.expect(channel.READY, worker)
            times.append(time.perf_counter() - started)
        assert min(times) < 0.1
        assert value_of(agent.run(noop, worker=6)) is None
        # Their own pages only: what they share with this process is as large as the tests that ran in it before.
        own = [psutil.Process(pid).memory_full_info().uss for pid in agent.pids.values()]
        assert sum(own) / len(own) < 25e6
