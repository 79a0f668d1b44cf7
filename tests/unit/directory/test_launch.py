"""Starting an agent: what it is told, and how its answer is understood."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from endpoint_worker.agent.start import Order
from gcref.directory import launch
from gcref.directory.launch import Ready
from gcref.errors import ConfigError, EndpointLostError
from tests.support.waiting import wait_until

ID = bytes(range(16))


def answer(**told: Any) -> bytes:
    return json.dumps(told).encode()


def test_an_agent_understands_what_it_is_told() -> None:
    told = launch.order_for(
        ID, name="site", home=Path("/home/gcref"), config={"port": 1}, watch_stdin=False, workers=2
    )
    assert Order.from_json(json.loads(json.dumps(told))) == Order(
        name="site",
        id=ID,
        home="/home/gcref",
        private=False,
        workers=2,
        carriers=None,
        sys_path=[],
        config={"port": 1},
        watch_stdin=False,
    )
    told = launch.order_for(
        ID, name=None, home=None, config={}, watch_stdin=True, carriers=["ipc"], sys_path=["/lib"]
    )
    order = Order.from_json(told)
    assert (order.private, order.home, order.watch_stdin) == (True, None, True)
    assert (order.carriers, order.sys_path) == (["ipc"], ["/lib"])


def test_the_token_reaches_the_agent_by_the_order_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment is that of its workers, whose tasks may be somebody else's."""
    monkeypatch.setenv("GCREF_TOKEN", "a secret")
    told = launch.order_for(
        ID, name="site", home=Path("/h"), config={}, watch_stdin=True, hub_url="https://hub", token="a secret"
    )
    order = Order.from_json(told)
    assert (order.hub_url, order.token) == ("https://hub", "a secret")
    assert "secret" not in repr(order)
    with launch.start_process(subprocess.DEVNULL) as process:
        try:
            # A process that has just been started has none for a moment.
            environment = wait_until(Path(f"/proc/{process.pid}/environ").read_bytes, what="its environment")
        finally:
            process.kill()
    assert b"PATH=" in environment
    assert b"a secret" not in environment


def test_an_agent_that_is_ready_says_where() -> None:
    assert launch.read_answer(answer(ready=True, control="c", bulk="b", pid=1)) == Ready("c", "b")


def test_an_agents_own_error_is_raised_with_its_fields() -> None:
    with pytest.raises(ConfigError, match="port is taken") as caught:
        launch.read_answer(answer(error="ConfigError", message="port is taken", fields={"key": "port"}))
    assert caught.value.key == "port"
    with pytest.raises(ConfigError, match="no fields"):
        launch.read_answer(answer(error="ConfigError", message="no fields"))


@pytest.mark.parametrize("kind", ["KeyError", "annotations", "no_such_name"])
def test_an_error_that_is_not_ours_says_what_it_was(kind: str) -> None:
    with pytest.raises(EndpointLostError, match=f"{kind}: why"):
        launch.read_answer(answer(error=kind, message="why"))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff",
        b"Hello",
        b"[]",
        b"null",
        b"{}",
        answer(ready=True, control="c"),
        answer(error="E"),
        answer(error="E", message="m", fields=1),
    ],
)
def test_a_line_that_is_no_answer(line: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the text is json's, or ours
        launch.read_answer(line)


def test_one_that_is_gone_is_told_nothing() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as stdin:
        launch.tell(stdin, {"stop": True})
    launch.tell(stdin, {"stop": True})


def test_a_long_order_arrives_whole(tmp_path: Path) -> None:
    order = {"sys_path": ["x" * 1000] * 500}
    path = tmp_path / "stdin"
    with path.open("wb", buffering=0) as stdin:
        launch.tell(stdin, order)
    assert path.read_bytes() == json.dumps(order).encode() + b"\n"


@pytest.mark.parametrize(("code", "said"), [(3, "exited with code 3"), (-9, "was killed by signal 9")])
def test_how_it_ended(code: int, said: str) -> None:
    assert launch.how_it_ended(code) == said
