"""The hub's paths, asked over HTTP: what is malformed, too large or not for us is refused, with a reason in JSON."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from gcref import ids
from gcref.directory.http import Answer, Http, bearer
from gcref.directory.hub import EVENTS_AT_ONCE, NO_BROKER, HubClient, Registration
from gcref.errors import NotFoundError, RejectedError
from gcref.hub import users
from gcref.hub.api import MAX_EVENTS
from gcref.hub.app import MAX_BODY_BYTES, Hub, application
from gcref.hub.config import HubConfig
from tests.support.waiting import wait_until
from tests.unit.hub.people import described, key_of


class Served(Hub):
    """A hub without a broker, on a thread of this process."""

    def __init__(self, path: Path) -> None:
        super().__init__(HubConfig(f"sqlite:///{path}"))
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        settings = uvicorn.Config(application(self), log_config=None, access_log=False)
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve(sockets=[listening])), name="test-hub"
        )
        self._thread.start()
        wait_until(lambda: self._server.started, what="the hub")

    def end(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def served(_nothing_left: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = Served(tmp_path_factory.mktemp("hub") / "hub.db")
    yield found
    found.end()


@pytest.fixture(scope="module")
def token(served: Served) -> str:
    return users.add(served.database, "alice").secret


@pytest.fixture(scope="module")
def line(served: Served, token: str) -> Iterator[Http]:
    found = Http(served.url, "the hub", bearer(token))
    yield found
    found.close()


@pytest.fixture(scope="module")
def hub(served: Served, token: str) -> Iterator[HubClient]:
    found = HubClient(served.url, token)
    yield found
    found.close()


def registration(kind: str = "endpoint", name: str = "site", **more: Any) -> dict[str, Any]:
    """The body of one, and its id under `id`."""
    said = described(kind, name, key_of(1))
    body = {"kind": kind, "name": name, "public_key": said.public_key, "record": said.record}
    return {"id": said.id.hex(), **body, **more}


def put(line: Http, body: dict[str, Any]) -> Answer:
    return line.call("PUT", f"/v1/parties/{body.pop('id')}", json=body)


def refusal(answer: Answer, status: int, error: str) -> str:
    assert answer.status == status, answer
    said = answer.json()
    assert said.keys() == {"error", "message", "remedy"}
    assert said["error"] == error
    return str(said["message"])


def test_every_path_but_health_wants_a_token(served: Served, line: Http) -> None:
    """Also those that come later: whatever the description of the API lists."""
    stranger, guesser = Http(served.url, "the hub"), Http(served.url, "the hub", bearer("gcref_x"))
    paths = line.call("GET", "/openapi.json").json()["paths"]
    assert len(paths) >= 10
    for path, methods in paths.items():
        for method in methods:
            for somebody in (stranger, guesser):
                filled = path.replace("{id}", ids.new_id().hex()).replace("{digest}", ids.new_id().hex())
                answer = somebody.call(method.upper(), f"{filled}?endpoint=x&user=y", json={"kind": "client"})
                if path == "/v1/health":
                    assert answer.json()["status"] == "ok"
                else:
                    refusal(answer, 401, "AuthError")
    stranger.close()
    guesser.close()


def test_a_party_of_a_hub_without_broker_has_no_mailbox_and_hears_why(hub: HubClient) -> None:
    me = Registration(ids.new_id(), "client", "laptop", key_of(7))
    for found in (hub.register(me), hub.heartbeat(me.id)):
        assert (found.mailbox, found.mailbox_reason, found.owner) == (None, NO_BROKER, "alice")
    silent = hub.register(me._replace(wants_mailbox=False))
    assert (silent.mailbox, silent.mailbox_reason) == (None, None)
    hub.withdraw(me.id)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "worker"},
        {"name": ""},
        {"name": "a/b"},
        {"name": "x" * 65},
        {"public_key": "short"},
        {"public_key": "\x00" * 40},
        {"record": None},
        {"record": {"id": "x"}},
        {"record": {"id": ids.text(bytes(16)), "name": "site", "public_key": key_of(1)}},
        {"trust_hub": "yes"},
        {"wants_mailbox": 1},
        {"id": "not-an-id"},
        {"id": "0" * 31},
    ],
    ids=str,
)
def test_malformed_registrations_are_refused(line: Http, wrong: dict[str, Any]) -> None:
    answer = put(line, registration(**wrong))
    assert answer.status in (400, 422)
    refusal(answer, answer.status, "RejectedError")


@pytest.mark.parametrize(
    "wrong",
    [
        {"control": ["http://10.0.0.1:1"]},
        {"control": ["tcp://10.0.0.1:1"] * 65},
        {"control": ["tcp://" + "x" * 300]},
        {"control": ["tcp://a\nb"]},
        {"public_key": key_of(2)},
        {"name": "other"},
        {"host": "x" * 70_000},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_records_that_lie_or_are_too_large_are_refused(line: Http, wrong: dict[str, Any]) -> None:
    body = registration()
    body["record"].update(wrong)
    refusal(put(line, body), 400, "RejectedError")


def test_what_is_in_a_request_by_mistake_is_not_repeated(line: Http) -> None:
    answer = put(line, registration(public_key="a secret that was pasted here"))
    assert b"secret" not in answer.body


def test_bodies_are_bounded_whether_they_say_their_size_or_not(
    served: Served, line: Http, token: str
) -> None:
    large = b"x" * (MAX_BODY_BYTES + 1)
    refusal(line.call("PUT", f"/v1/functions/{'a' * 32}", data=large), 413, "RejectedError")
    host, _, port = served.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), 10) as raw:
        raw.sendall(
            f"PUT /v1/functions/{'a' * 32} HTTP/1.1\r\nHost: hub\r\nAuthorization: Bearer {token}\r\n"
            f"Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        try:
            for _ in range(MAX_BODY_BYTES // 65536 + 2):
                raw.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        except OSError:
            pass  # it has closed the door already
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"events": [["x", "done", 1]]}', b'{"events": 3}']
)
def test_bodies_that_are_no_json_of_ours_are_refused(line: Http, data: bytes) -> None:
    answer = line.call("POST", f"/v1/parties/{ids.new_id().hex()}/events", data=data)
    assert answer.status in (400, 422), answer
    refusal(answer, answer.status, "RejectedError")


@pytest.mark.parametrize(
    "event",
    [["DONE!", 1.0], ["x" * 33, 1.0], ["done", -1], ["done", float("nan")], ["done", 1e300], ["done"]],
    ids=str,
)
def test_events_that_make_no_sense_are_refused(line: Http, event: list[Any]) -> None:
    import json

    body = json.dumps({"events": [[ids.new_id().hex(), *event]]}).encode()
    refusal(line.call("POST", f"/v1/parties/{ids.new_id().hex()}/events", data=body), 422, "RejectedError")


def test_many_events_are_told_in_several_requests(hub: HubClient) -> None:
    assert EVENTS_AT_ONCE <= MAX_EVENTS
    body = registration(name="busy")
    id, task = bytes.fromhex(body["id"]), ids.new_id()
    hub.register(Registration(id, "endpoint", "busy", body["public_key"], body["record"]))
    hub.report(id, [])
    hub.report(id, [(ids.new_id(), "done", 1.0)] * (EVENTS_AT_ONCE + 1) + [(task, "done", 2.0)])
    assert [event.state for event in hub.where_is(task)] == ["done"]
    with pytest.raises(NotFoundError):
        hub.report(ids.new_id(), [(task, "done", 1.0)])


@pytest.mark.parametrize("path", ["/v2/anything", "/v3", "/v1/nothing", "/"])
def test_paths_that_are_not_there_are_no_things_that_are_not_there(line: Http, path: str) -> None:
    refusal(line.call("GET", path), 404, "RejectedError")


def test_functions_travel_as_bytes(hub: HubClient) -> None:
    from hashlib import blake2b

    code = bytes(range(256)) * 100
    digest = blake2b(code, digest_size=16).digest()
    with pytest.raises(NotFoundError):
        hub.get_function(digest)
    hub.put_function(digest, code)
    assert hub.get_function(digest) == code
    with pytest.raises(RejectedError, match="not those of"):
        hub.put_function(digest, code + b"x")


def test_requests_at_the_same_time_are_all_served(hub: HubClient) -> None:
    """Sixteen threads write at once; none is turned away, and nothing of it is lost."""
    registrations = []
    for number in range(24):
        body = registration(name=f"many-{number}")
        id = bytes.fromhex(body["id"])
        registrations.append(Registration(id, "endpoint", body["name"], body["public_key"], body["record"]))

    def live(one: Registration) -> None:
        hub.register(one)
        for _ in range(3):
            hub.heartbeat(one.id)
            hub.report(one.id, [(one.id, "done", 1.0)])
        assert hub.find(one.name).id == one.id

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(live, registrations))
        assert {one.id for one in registrations} <= {record.id for record in hub.endpoints()}
        assert all(len(hub.where_is(one.id)) == 3 for one in registrations)
        # The same party at once from everywhere, as after a time limit: the last one stands, and nobody fails.
        list(pool.map(hub.register, [registrations[0]] * 16))
        list(pool.map(lambda one: hub.withdraw(one.id), registrations * 2))
    assert not {one.id for one in registrations} & {record.id for record in hub.endpoints()}


def test_the_documentation_is_there(line: Http) -> None:
    assert line.call("GET", "/docs").status == 200
    assert "/v1/parties/{id}" in line.call("GET", "/openapi.json").json()["paths"]
