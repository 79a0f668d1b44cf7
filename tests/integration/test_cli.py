"""An endpoint as its owner runs it: init, start, status, list, logs, stop, and everything that can be wrong with that."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcref import Executor, errors
from gcref.carriers import keys
from gcref.config import disk_dir, host_dir
from gcref.directory import records
from tests.support.leaks import run_processes
from tests.support.programs import ROOT
from tests.support.waiting import patience, wait_until


class Said:
    """What a command said and how it ended."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code = done.returncode
        self.out = done.stdout
        self.err = done.stderr

    def __repr__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


def run(module: str, *arguments: str) -> Said:
    """Run one of the commands to its end, as a person would."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patience(60),
        stdin=subprocess.DEVNULL,
        check=False,
    )
    said = Said(done)
    assert "Traceback" not in said.err, said
    return said


def worker(*arguments: str) -> Said:
    return run("endpoint_worker", *arguments)


def succeed(*arguments: str) -> str:
    said = worker(*arguments)
    assert said.code == 0, said
    return said.out


@pytest.fixture
def polaris(home: Path) -> Iterator[Path]:
    """The folder of an endpoint that has been made and not started; stopped and swept at the end."""
    succeed("init", "polaris", "--workers", "1", "--bind", "127.0.0.1")
    yield home / "endpoints" / "polaris"
    record = records.read("polaris")
    assert record is not None
    if record.alive():
        succeed("stop", "polaris")
    # Its journal would wait there for the next start of an endpoint that is no more.
    folder = disk_dir(record.id)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def pid_of(name: str) -> int:
    record = records.read(name)
    assert record is not None
    return record.pid


def test_the_life_of_an_endpoint(polaris: Path, home: Path) -> None:
    started = succeed("start", "polaris")
    record = records.read("polaris")
    assert record is not None
    assert record.running
    assert record.alive()
    assert str(record.pid) in started
    assert all(address in started for address in record.control)
    assert any(address.startswith("tcp://127.0.0.1:") for address in record.control)
    assert os.getsid(record.pid) != os.getsid(0), "it must survive this terminal"

    with Executor("polaris") as executor:
        assert executor.submit(pow, 2, 10).result(timeout=patience(30)) == 1024

    shown = succeed("status", "polaris")
    for word in ("polaris: running", str(record.pid), "idle", "1 submitted, 1 done", "store", "journal"):
        assert word in shown, shown
    facts = json.loads(succeed("status", "polaris", "--json"))
    assert facts["alive"] is True
    assert facts["agent"]["tasks"]["done"] == 1
    assert "running, process" in succeed("list")
    assert "running" in run("gcref.cli", "endpoints").out

    stopped = succeed("stop", "polaris")
    assert "stopped" in stopped
    assert "killed" not in stopped
    record = records.read("polaris")
    assert record is not None
    assert not record.running
    wait_until(lambda: not run_processes(), what=lambda: f"the end of {run_processes()}")
    assert not (host_dir(None) / record.id.hex()).exists()
    assert "polaris: stopped" in worker("status", "polaris").out
    assert worker("status", "polaris").code == 3
    assert "was not running" in succeed("stop", "polaris")

    for line in succeed("logs", "polaris").splitlines():
        assert isinstance(json.loads(line), dict), line


def test_the_files_of_an_endpoint_are_closed_to_others_and_kept(polaris: Path) -> None:
    assert stat.S_IMODE(polaris.stat().st_mode) == 0o700
    for name in ("config.toml", "key", "authorized_keys", "record.json"):
        assert stat.S_IMODE((polaris / name).stat().st_mode) == 0o600, name
    record = records.read("polaris")
    assert record is not None
    again = worker("init", "polaris")
    assert again.code == 1
    assert "ConfigError" in again.err
    assert "exists already" in again.err
    # What is lost is made anew; the rest stays, and with it who the endpoint is.
    (polaris / "authorized_keys").unlink()
    succeed("init", "polaris")
    assert records.read("polaris") == record
    assert keys.public_of(polaris / "key") == record.public_key.encode()
    assert "workers = 1" in (polaris / "config.toml").read_text()


def test_a_second_agent_of_the_same_name_is_refused_with_pid_and_remedy(polaris: Path) -> None:
    succeed("start", "polaris")
    second = worker("start", "polaris")
    assert second.code == 1
    assert "ConfigError" in second.err
    assert f"process {pid_of('polaris')}" in second.err
    assert "endpoint-worker stop polaris" in second.err


def test_two_starts_at_once_leave_one_agent(polaris: Path) -> None:
    starts = [
        subprocess.Popen(
            [sys.executable, "-m", "endpoint_worker", "start", "polaris"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    ends = [(*start.communicate(timeout=patience(60)), start.returncode) for start in starts]
    assert sorted(code for _out, _err, code in ends) == [0, 1, 1], ends
    assert all("ConfigError" in err for _out, err, code in ends if code), ends
    record = records.read("polaris")
    assert record is not None
    assert record.alive()


def test_a_taken_port_names_port_and_remedy(polaris: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        _set(polaris, "port", port)
        refused = worker("start", "polaris")
    assert refused.code == 1
    assert "ConfigError" in refused.err
    assert str(port) in refused.err
    record = records.read("polaris")
    assert record is not None
    assert not record.alive()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("workrs = 2", ("workrs", "workers")),
        ("store_limit_bytes = -1", ("store_limit_bytes", "8 GiB")),
        ("workers = = 2", ("line", "TOML")),
    ],
)
def test_a_bad_configuration_names_file_key_and_remedy(
    polaris: Path, line: str, words: tuple[str, ...]
) -> None:
    with (polaris / "config.toml").open("a") as file:
        file.write(f"\n{line}\n")
    refused = worker("start", "polaris")
    assert refused.code == 1
    for word in ("ConfigError", str(polaris / "config.toml"), *words):
        assert word in refused.err, refused
    assert not run_processes()


def test_a_key_that_others_can_read_is_refused(polaris: Path) -> None:
    (polaris / "key").chmod(0o644)
    refused = worker("start", "polaris")
    assert refused.code == 1
    assert "chmod 600" in refused.err


def test_a_list_of_allowed_keys_with_a_slip_names_the_line(polaris: Path) -> None:
    with (polaris / "authorized_keys").open("a") as file:
        file.write("not-a-key user ada\n")
    refused = worker("start", "polaris")
    assert refused.code == 1
    assert "ConfigError" in refused.err
    assert str(polaris / "authorized_keys") in refused.err
    assert "line 4" in refused.err


def test_after_a_crash_it_is_seen_and_starts_again(polaris: Path) -> None:
    """L4: what a killed agent leaves in shared memory is swept at the latest by the next start."""
    succeed("start", "polaris")
    first = pid_of("polaris")
    os.kill(first, signal.SIGKILL)
    record = records.read("polaris")
    assert record is not None
    wait_until(lambda: record.alive() is False, what="the lock to be free")
    assert "polaris: died" in worker("status", "polaris").out
    started = worker("start", "polaris")
    assert started.code == 0, started
    assert "did not end in order" in started.err
    assert pid_of("polaris") != first
    with Executor("polaris") as executor:
        assert executor.submit(pow, 2, 3).result(timeout=patience(30)) == 8


def test_stop_of_a_frozen_agent_kills_it(polaris: Path) -> None:
    succeed("start", "polaris")
    os.kill(pid_of("polaris"), signal.SIGSTOP)
    said = succeed("stop", "polaris", "--timeout", "0.5")
    assert "killed" in said
    record = records.read("polaris")
    assert record is not None
    assert record.alive() is False
    wait_until(lambda: not run_processes(), what=lambda: f"the end of {run_processes()}")


def test_stop_kills_nobody_else(polaris: Path) -> None:
    """A record that names a process which is not the agent: that process is left alone."""
    succeed("start", "polaris")
    record = records.read("polaris")
    assert record is not None
    with subprocess.Popen(["sleep", "600"]) as bystander:
        try:
            path = polaris / "record.json"
            text = path.read_text()
            path.write_text(json.dumps(json.loads(text) | {"pid": bystander.pid}))
            said = worker("stop", "polaris")
            assert said.code == 1
            assert str(bystander.pid) in said.err
            assert bystander.poll() is None
            path.write_text(text)
        finally:
            bystander.kill()


def test_an_endpoint_that_answers_on_another_machine_is_left_alone(polaris: Path) -> None:
    """The record as another machine sharing this home would see it: a nonce that is not this machine's."""
    record = records.read("polaris")
    assert record is not None
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        table = record.as_json() | {"running": True, "control": [address], "host_nonce": "ab" * 16, "pid": 1}
        (polaris / "record.json").write_text(json.dumps(table))
        for command in ("start", "stop"):
            refused = worker(command, "polaris")
            assert refused.code == 1
            assert address in refused.err
            assert "another machine" in refused.err
    # Nobody listens there any more: it may be started here.
    started = worker("start", "polaris")
    assert started.code == 0, started
    assert "nobody answers" in started.err


def test_in_the_foreground_it_ends_with_the_command(polaris: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        command = subprocess.Popen(
            [sys.executable, "-m", "endpoint_worker", "start", "polaris", "--foreground"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        with command:
            assert command.stdout is not None
            assert "runs, process" in command.stdout.readline()
            command.send_signal(number)
            code = command.wait(timeout=patience(30))
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        wait_until(lambda: not run_processes(), what=lambda: f"the end of {run_processes()}")


def test_logs_can_be_followed(polaris: Path) -> None:
    unborn = worker("logs", "polaris")
    assert unborn.code == 1
    assert "has not been started" in unborn.err
    succeed("start", "polaris")
    with subprocess.Popen(
        [sys.executable, "-m", "endpoint_worker", "logs", "polaris", "-f", "-n", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    ) as follower:
        assert follower.stdout is not None
        try:
            # It shows nothing of before; when it has begun to look is not known, so there is a line for each look of ours.
            ready, output = select.poll(), follower.stdout.fileno()
            ready.register(output, select.POLLIN)
            with (polaris / "agent.log").open("a", buffering=1) as log:
                wait_until(lambda: log.write('{"probe": 1}\n') and ready.poll(50), what="a line of the log")
            assert b"probe" in os.read(output, 4096)
        finally:
            follower.terminate()


@pytest.mark.parametrize("command", ["start", "stop", "status", "logs"])
def test_an_unknown_endpoint_is_named_with_what_is_known(polaris: Path, command: str) -> None:
    said = worker(command, "polarsi")
    assert said.code == 1
    assert "NotFoundError" in said.err
    assert "polarsi" in said.err
    assert "known: polaris" in said.err


def test_names_that_cannot_be_and_folders_that_cannot_be_written(home: Path) -> None:
    for name in ("../escape", "", "a b", "12345678-1234-1234-1234-123456789abc"):
        said = worker("init", name)
        assert said.code == 1, said
        assert "ConfigError" in said.err
    assert worker("init", "x", "--workers", "0").code == 1
    assert not (home / "endpoints").exists()
    home.mkdir(exist_ok=True)
    (home / "endpoints").write_text("in the way")
    said = worker("init", "x")
    assert said.code == 1
    assert "GCREF_HOME" in said.err


def test_the_list_of_a_home_with_a_damaged_endpoint(polaris: Path, home: Path) -> None:
    (home / "endpoints" / "midway").mkdir()
    (home / "endpoints" / "midway" / "record.json").write_text("{")
    listed = succeed("list")
    assert "stopped" in listed
    assert "midway" in listed
    assert "damaged" in listed


def test_the_command_line_itself(home: Path) -> None:
    assert worker().code == 2
    assert worker("dance").code == 2
    assert "status" in succeed("--help")
    assert "no endpoints" in worker("list").err


def test_the_users_side(home: Path) -> None:
    assert "no endpoints" in run("gcref.cli", "endpoints").err
    versions = run("gcref.cli", "version")
    assert versions.code == 0
    assert "protocol 1" in versions.out
    first, second = run("gcref.cli", "key"), run("gcref.cli", "key")
    assert first.out == second.out
    listed = home / "authorized_keys"
    listed.write_text(first.out)
    key = keys.public_of(home / "keys" / "user.key")
    assert key is not None
    assert keys.read_authorized(listed) == {key: "user"}
    (home / "config.toml").write_text("carriers = 5\n")
    succeed("init", "polaris")
    wrong = run("gcref.cli", "endpoints")
    assert wrong.code == 1
    assert "ConfigError" in wrong.err
    assert "carriers" in wrong.err


def _set(folder: Path, key: str, value: object) -> None:
    with (folder / "config.toml").open("a") as file:
        file.write(f"\n{key} = {value}\n")


def test_not_found_is_the_sdk_s_error_too(polaris: Path) -> None:
    with pytest.raises(errors.NotFoundError, match="polaris"):
        Executor("polarsi")
