"""The door to HTTP, against a server of the standard library that answers as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gcref.directory import http
from gcref.directory.http import Http, bearer, raise_for
from gcref.directory.hub import HubClient, Registration
from gcref.errors import AuthError, ConfigError, HubUnavailableError, NotFoundError, RejectedError


class Server(ThreadingHTTPServer):
    """Answers with what is in `answers`, and with the last of them for ever."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes]] = [(200, b"{}")]
        self.seen: list[tuple[str, str, str | None]] = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path, self.headers.get("Authorization")))
        status, body = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        if status == 0:
            self.close_connection = True
            return
        self.send_response(status)
        if status in (301, 307):
            self.send_header("Location", f"{self.server.url}/elsewhere")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = answer  # noqa: N815 - the names that the library looks for

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


@pytest.fixture
def line(server: Server) -> Iterator[Http]:
    found = Http(server.url, "the hub", bearer("geheim"))
    yield found
    found.close()


@pytest.mark.parametrize("failure", [(503, b""), (502, b"<html>"), (429, b""), (500, b""), (0, b"")])
def test_what_may_be_repeated_is_repeated(server: Server, line: Http, failure: tuple[int, bytes]) -> None:
    server.answers = [failure, failure, (200, b'{"a": 1}')]
    assert line.call("GET", "/x").json() == {"a": 1}
    assert len(server.seen) == 3


def test_it_is_not_repeated_for_ever(server: Server, line: Http) -> None:
    server.answers = [(503, b'{"message": "the database is away"}')]
    with pytest.raises(HubUnavailableError, match="the database is away") as caught:
        line.call("GET", "/x")
    assert len(server.seen) == http.ATTEMPTS
    assert caught.value.retryable


def test_what_may_happen_twice_is_not_repeated(server: Server, line: Http) -> None:
    server.answers = [(503, b""), (200, b"{}")]
    with pytest.raises(HubUnavailableError):
        line.call("POST", "/x", json={})
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, b'{"error": "AuthError", "message": "no"}', AuthError),
        (403, b'{"error": "AuthError", "message": "no"}', AuthError),
        (404, b'{"error": "NotFoundError", "message": "no"}', NotFoundError),
        (404, b'{"error": "RejectedError", "message": "no"}', RejectedError),
        (422, b'{"error": "RejectedError", "message": "no", "remedy": "do better"}', RejectedError),
        # A proxy whose server is down, or somebody else's server.
        (404, b"<html>not found</html>", HubUnavailableError),
        (404, b"[]", HubUnavailableError),
        (307, b"", HubUnavailableError),
    ],
)
def test_refusals_become_our_errors(
    server: Server, line: Http, status: int, body: bytes, kind: type[Exception]
) -> None:
    server.answers = [(status, body)]
    with pytest.raises(kind) as caught:
        raise_for(line.call("GET", "/x"), line)
    assert type(caught.value) is kind
    assert len(server.seen) == 1  # also: no redirect is followed


def test_the_token_is_ours_whatever_netrc_says_and_is_in_no_error(
    server: Server, line: Http, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    line.call("GET", "/x")
    assert server.seen[0][2] == "Bearer geheim"
    server.answers = [(0, b"")]
    with pytest.raises(HubUnavailableError) as caught:
        line.call("GET", "/x")
    assert "geheim" not in f"{caught.value!r}{caught.value.__cause__!r}{caught.value.__context__!r}{line!r}"


def test_who_does_not_answer_is_unavailable_and_says_why(server: Server) -> None:
    closed = Server()
    closed.server_close()
    line = Http(closed.url, "the hub")
    with pytest.raises(
        HubUnavailableError, match=r"the hub at http://127.* does not answer: .*refused"
    ) as caught:
        line.call("GET", "/x")
    assert caught.value.__context__ is None
    line.close()


def test_a_time_limit_holds_for_all_attempts_together(server: Server, line: Http) -> None:
    server.answers = [(503, b"")]
    began = time.monotonic()
    with pytest.raises(HubUnavailableError):
        line.call("GET", "/x", timeout_s=0.05)
    assert time.monotonic() - began < 5
    assert len(server.seen) < http.ATTEMPTS


def test_an_answer_that_is_too_large_is_none(
    server: Server, line: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "MAX_ANSWER_BYTES", 1000)
    server.answers = [(200, b"x" * 1001)]
    with pytest.raises(HubUnavailableError, match="more than 1000 bytes"):
        line.call("POST", "/x")


def test_any_thread_may_call(server: Server, line: Http) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda number: line.call("GET", f"/{number}").status, range(100)))
    assert answers == [200] * 100
    assert sorted(int(path[1:]) for _method, path, _token in server.seen) == list(range(100))


def test_a_closed_line_makes_no_call(server: Server, line: Http) -> None:
    line.call("GET", "/x")
    line.close()
    with pytest.raises(HubUnavailableError, match="closed"):
        line.call("GET", "/x")
    assert len(server.seen) == 1


def test_closing_ends_the_wait_for_the_next_attempt(
    server: Server, line: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_FIRST_PAUSE_S", 1000.0)
    server.answers = [(503, b"")]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(line.call, "GET", "/x")
        while not server.seen:
            assert not waiting.done()
        line.close()
        with pytest.raises(HubUnavailableError):
            waiting.result()


@pytest.mark.parametrize(
    "url", ["", "hub", "ftp://hub", "http://", "http://hub:port", "http://me:pw@hub", "http://hub?x=1"]
)
def test_what_is_no_address_is_a_setting_that_is_wrong(url: str) -> None:
    with pytest.raises(ConfigError, match="must look like") as caught:
        Http(url, "the hub")
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("token", [None, "", "two\nlines", "ä"])
def test_a_hub_client_needs_a_token(token: str | None) -> None:
    with pytest.raises(AuthError, match="GCREF_TOKEN"):
        HubClient("http://127.0.0.1:1", token)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"mailbox": 3}', b'{"mailbox": null, "mailbox_reason": null, "allowed": []}'],
)
def test_what_no_hub_says_is_not_believed(server: Server, body: bytes) -> None:
    hub = HubClient(server.url, "geheim")
    server.answers = [(200, body)]
    registration = Registration(bytes(16), "client", "laptop", "x" * 40)
    for call in (
        lambda: hub.register(registration),
        lambda: hub.heartbeat(bytes(16)),
        lambda: hub.find("site"),
        hub.endpoints,
        lambda: hub.shared_with("site"),
        hub.whoami,
        lambda: hub.get_function(bytes(16)),
    ):
        with pytest.raises(HubUnavailableError):
            call()
    hub.close()
