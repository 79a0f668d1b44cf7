"""Where is my task? `explain` of futures and of the command, `endpoint-worker status`, and what SIGUSR1 writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gcref import Client, Executor, LocalEndpoint
from gcref.carriers import keys
from gcref.directory import records
from tests.support.endpoints import ask
from tests.support.tasks import Gate, blob_of, die_once, fail, hold, inc
from tests.support.waiting import patience, wait_until

WAIT_S = patience(30)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    found = Gate.at(tmp_path)
    yield found
    found.open()


def command(module: str, *arguments: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ) | ({} if home is None else {"GCREF_HOME": str(home)})
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


def said(module: str, *arguments: str) -> str:
    done = command(module, *arguments)
    assert done.returncode == 0, done
    return done.stdout


def test_a_task_that_waits_at_two_sites(polaris: Executor, midway: Executor, gate: Gate) -> None:
    """What a task waits for is told by those who know: its own endpoint, and the homes of its arguments."""
    near = polaris.submit(hold, gate, 1)
    far = midway.submit(hold, gate, 2)
    both = polaris.submit(max, near, far)
    wait_until(lambda: near.running() and far.running(), what="both to run")
    words = (
        f"task {both.task_id} (max) at endpoint 'polaris': waiting for 2 arguments",
        f"task {near.task_id} (hold) at endpoint 'polaris': running on worker polaris/",
        f"task {far.task_id} (hold) at endpoint 'midway': running on worker midway/",
        "endpoint 'midway' is reached by ipc since",
        "submitted",
    )
    for text in (both.explain(), said("gcref.cli", "explain", both.task_id)):
        for word in words:
            assert word in text, text
    assert "from here endpoint 'polaris' is reached by ipc since" in both.explain()
    gate.open()
    assert both.result(WAIT_S) == 2
    assert "done, a value of" in both.explain()
    assert "on worker polaris/" in both.explain()


def test_queued_failed_retried_and_released(tmp_path: Path, gate: Gate) -> None:
    with LocalEndpoint("queues", workers=1), Executor("queues", retries=2) as executor:
        retried = executor.submit(die_once, str(tmp_path / "died"))
        assert retried.result(WAIT_S) == "second"
        for text in (retried.explain(), said("gcref.cli", "explain", retried.task_id)):
            assert "attempt 1 failed: WorkerLostError: the worker process exited with code 7" in text, text
        failed = executor.submit(fail, "no such mesh")
        assert failed.exception(WAIT_S) is not None
        for text in (failed.explain(), said("gcref.cli", "explain", failed.task_id)):
            assert "failed: ValueError: no such mesh" in text, text
        held = executor.submit(hold, gate)
        wait_until(held.running, what="the task to run")
        behind = [executor.submit(inc, n) for n in range(3)]
        wait_until(lambda: "queued" in behind[-1].explain(), what=behind[-1].explain)
        text = behind[-1].explain()
        assert "queued, behind 2 other tasks" in text, text
        assert "attempt 1 of 3" in text, text
        gate.open()
        assert [f.result(WAIT_S) for f in behind] == [1, 2, 3]


def test_bytes_on_their_way_and_where_they_came_from(polaris: Executor, midway: Executor) -> None:
    big = midway.submit(blob_of, 3_000_000)
    size = polaris.submit(len, big)
    assert size.result(WAIT_S) == 3_000_000
    assert "its arguments came from elsewhere: 2.9 MiB by ipc" in size.explain()
    assert "done, a value of 3,000" in big.explain(), big.explain()
    assert "done, a value of 2.9 MiB; it ran" in said(
        "gcref.cli", "explain", big.task_id, "--endpoint", "midway"
    )


def test_the_command_names_what_is_wrong(polaris: Executor) -> None:
    wrong = command("gcref.cli", "explain", "not-an-id")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "is no task's id" in wrong.stderr
    unknown = command("gcref.cli", "explain", "00000000-0000-4000-8000-000000000001")
    assert unknown.returncode == 1
    assert "NotFoundError" in unknown.stderr
    assert "midway, polaris" in unknown.stderr
    nowhere = command("gcref.cli", "explain", "00000000-0000-4000-8000-000000000001", "--endpoint", "polarsi")
    assert "known here: midway, polaris" in nowhere.stderr


def test_the_command_as_json(polaris: Executor, gate: Gate) -> None:
    held = polaris.submit(hold, gate)
    wait_until(held.running, what="the task to run")
    told = json.loads(said("gcref.cli", "explain", held.task_id, "--json"))["task"]
    assert (told["id"], told["state"], told["function"]) == (held.task_id, "dispatched", "hold")
    assert told["running_s"] >= 0
    gate.open()
    assert held.result(WAIT_S) == 1


def test_a_stranger_is_told_nothing(tmp_path: Path, gate: Gate) -> None:
    """Another user's key, which the endpoint lets in as a user: its own tasks are all that it learns of."""
    with (
        LocalEndpoint("shared", workers=1, config={"bind": "127.0.0.1"}) as site,
        Executor("shared") as executor,
    ):
        held = executor.submit(hold, gate)
        wait_until(held.running, what="the task to run")
        other = tmp_path / "other"
        folder = records.endpoint_dir("shared")
        record = records.resolve(site.endpoint_id)
        pair = keys.load_or_create(other / "keys" / "user.key")
        (folder / "authorized_keys").write_text(f"{pair.public.decode()} user other\n")
        (folder / "authorized_keys").chmod(0o600)
        records.write(record, other)
        refused = command("gcref.cli", "explain", held.task_id, home=other)
        assert refused.returncode == 1, refused
        assert "it is not yours" in refused.stderr, refused
        gate.open()


def test_status_shows_what_runs_where_and_since_when(polaris: Executor, midway: Executor, gate: Gate) -> None:
    from endpoint_worker import status

    held = polaris.submit(hold, gate, 5)
    waiting = polaris.submit(inc, midway.submit(hold, gate, 1))
    wait_until(held.running, what="the task to run")
    text = ""

    def shown() -> bool:
        nonlocal text
        record = records.resolve("polaris")
        text = "\n".join(status.lines(record, "running", status.ask(record)))
        return f"hold  {held.task_id}" in text and "1 waiting for arguments" in text

    wait_until(shown, what=lambda: text)
    for word in (
        "tasks now",
        "1 running",
        "rates",
        "WORKER",
        "busy",
        "idle",
        "LINK",
        "midway",
        "client",
        "ipc",
    ):
        assert word in text, text
    gate.open()
    assert (held.result(WAIT_S), waiting.result(WAIT_S)) == (5, 2)


def test_who_only_asks_leaves_nothing_behind(polaris: Executor) -> None:
    """A monitor that asks once a second must not fill the agent with sessions."""
    before = len(ask("polaris")["links"])
    for _ in range(5):
        ask("polaris")
    wait_until(lambda: len(ask("polaris")["links"]) <= before, what=lambda: str(ask("polaris")["links"]))


def test_sigusr1_writes_stacks_and_brains_and_the_agent_goes_on(tmp_path: Path, gate: Gate) -> None:
    def worker(*arguments: str) -> str:
        return said("endpoint_worker", *arguments)

    worker("init", "dumped", "--workers", "1", "--bind", "127.0.0.1")
    worker("start", "dumped")
    try:
        with Client() as client, Executor("dumped", client) as executor:
            held = executor.submit(hold, gate)
            wait_until(held.running, what="the task to run")
            queued = executor.submit(inc, 1)
            wait_until(lambda: "queued" in queued.explain(), what=queued.explain)
            log = records.endpoint_dir("dumped") / "agent.log"
            os.kill(records.resolve("dumped").pid, signal.SIGUSR1)
            lines: dict[str, Any] = {}

            def dumped() -> bool:
                for line in log.read_text().splitlines():
                    told = json.loads(line)
                    if told["from"] == "gcref.dump":
                        lines[told["text"]] = told
                return "state of deadlines" in lines

            wait_until(dumped, what=lambda: str(list(lines)))
            assert "stack of thread MainThread, innermost first" in lines
            assert "stack of thread gcref-bulk, innermost first" in lines
            assert any(
                "control.py" in frame
                for frame in lines["stack of thread MainThread, innermost first"]["stack"]
            )
            assert lines["state of dispatch"]["state"]["workers"][0]["running"] == held.task_id
            assert [task["id"] for task in lines["state of queue"]["state"]] == [queued.task_id]
            assert lines["state of resolver"]["state"]["objects"] == 2
            gate.open()
            assert queued.result(WAIT_S) == 2
    finally:
        gate.open()
        worker("stop", "dumped")
