"""The door to HTTP: sessions, time limits, retries and translated errors. `requests` is imported here alone.

    caller ── Http.call ──► a free session (or a new one) ── request ──► server
                              ▲ again, with back-off ────────┘ no answer, or 502, 503, 504, 429

Rules:
    - Any thread may call; each request has a session, and with it a connection, of its own while it lasts.
    - Only calls that may be made twice are repeated.
    - Who proves who we are is given to each request as `auth`. A header would be replaced by what `~/.netrc` says.
    - Redirects are not followed: a secret goes where the settings say, nowhere else.
    - No message, log line or representation holds a secret.
"""

from __future__ import annotations

import json as jsonlib
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import requests

from gcref.errors import (
    AuthError,
    ConfigError,
    HubUnavailableError,
    NotFoundError,
    RejectedError,
)

CONNECT_S: Final = 3.0
READ_S: Final = 10.0
# A server that restarts is back within a second or so; whoever can wait for longer has a rhythm of its own.
ATTEMPTS: Final = 3
_FIRST_PAUSE_S: Final = 0.2
# An answer above this is not one of ours.
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
_PIECE_BYTES: Final = 64 * 1024
_AGAIN: Final = frozenset((429, 500, 502, 503, 504))
_IDEMPOTENT: Final = frozenset(("GET", "PUT", "DELETE", "HEAD"))

Auth = Callable[[requests.PreparedRequest], requests.PreparedRequest]


class Answer(NamedTuple):
    """What a server answered, at last.

    Attributes:
        status: the HTTP status.
        body: the bytes behind the header.
    """

    status: int
    body: bytes

    def json(self) -> Any:
        """The body as JSON; None if it is none."""
        try:
            return jsonlib.loads(self.body)
        except (ValueError, RecursionError):
            return None


class Http:
    """Requests to one server. Any thread may call anything.

    Args:
        url: how its addresses begin, `http://` or `https://`.
        who: what to call it in messages, as "the hub".
        auth: proves who we are.
        verify: a file with the certificates to trust; None: those of the system, or of `REQUESTS_CA_BUNDLE`.
        attempts: how often a call that may be repeated is made.

    Raises:
        ConfigError: that is no such address.
    """

    def __init__(
        self,
        url: str,
        who: str,
        auth: Auth | None = None,
        *,
        verify: str | None = None,
        attempts: int = ATTEMPTS,
    ) -> None:
        self.url = checked_url(url, who)
        self._who = who
        self._auth = auth
        self._verify = verify
        self._attempts = attempts
        self._lock = threading.Lock()
        self._free: list[requests.Session] = []
        self._closed = threading.Event()

    def __repr__(self) -> str:
        return f"Http({self.url!r})"

    def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        json: Any = None,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        idempotent: bool | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """Make a request and wait for its answer, whatever its status says.

        Args:
            method: GET, PUT, POST, DELETE.
            path: what follows the URL; begins with a slash.
            params: of the query.
            json: the body, as a value.
            data: the body, as bytes.
            headers: more of them; no secrets.
            idempotent: it may be made twice; None: as HTTP says of the method.
            timeout_s: give up after so many seconds in all; None: `CONNECT_S` and `READ_S` for each attempt.

        Raises:
            HubUnavailableError: no answer, or one that says that the server cannot serve now.
            AuthError: the server's certificate is not trusted.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        attempts = self._attempts if (method in _IDEMPOTENT if idempotent is None else idempotent) else 1
        pause_s = _FIRST_PAUSE_S
        body: dict[str, Any] = {"params": params, "json": json, "data": data, "headers": headers}
        for attempt in range(1, attempts + 1):
            try:
                return self._once(method, path, body, deadline)
            except HubUnavailableError:
                wait_s = pause_s * random.uniform(0.5, 1.5)
                if attempt == attempts or (deadline is not None and time.monotonic() + wait_s >= deadline):
                    raise
                if self._closed.wait(wait_s):
                    raise
            pause_s *= 3
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Let go of all connections; calls that wait to be repeated end. Idempotent."""
        self._closed.set()
        with self._lock:
            free, self._free = self._free, []
        for session in free:
            session.close()

    def unavailable(self, why: str) -> HubUnavailableError:
        """The error that says why the server cannot be used now."""
        return HubUnavailableError(
            f"{self._who} at {self.url} {why}. It is worth trying again; if it stays so, look whether it runs"
        )

    def _once(self, method: str, path: str, body: dict[str, Any], deadline: float | None) -> Answer:
        if self._closed.is_set():
            raise self.unavailable("is not asked any more: this client is closed")
        session = self._take()
        answer: Answer | None = None
        problem, untrusted = "", False
        try:
            answer = self._exchange(session, method, path, body, deadline)
        except (requests.RequestException, UnicodeError, OSError) as error:
            problem = _brief(error)
            untrusted = isinstance(error, requests.exceptions.SSLError)
        finally:
            self._give_back(session, keep=answer is not None)
        # Raised out here: the error below holds the request, and with it the secret.
        if answer is None and untrusted:
            raise AuthError(
                f"the certificate of {self._who} at {self.url} is not trusted: {problem}. Name the certificates to trust in "
                f"the environment variable REQUESTS_CA_BUNDLE"
            )
        if answer is None:
            raise self.unavailable(f"does not answer: {problem}")
        if answer.status in _AGAIN:
            raise self.unavailable(f"cannot serve now (status {answer.status}{_said(answer)})")
        return answer

    def _exchange(
        self, session: requests.Session, method: str, path: str, body: dict[str, Any], deadline: float | None
    ) -> Answer:
        left_s = None if deadline is None else max(0.05, deadline - time.monotonic())
        limits = (CONNECT_S, READ_S) if left_s is None else (min(CONNECT_S, left_s), min(READ_S, left_s))
        until = time.monotonic() + limits[0] + limits[1]
        with session.request(
            method,
            self.url + path,
            auth=self._auth,
            timeout=limits,
            verify=self._verify,
            allow_redirects=False,
            stream=True,
            **body,
        ) as response:
            pieces: list[bytes] = []
            size = 0
            for piece in response.iter_content(_PIECE_BYTES):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_ANSWER_BYTES:
                    raise requests.exceptions.ContentDecodingError(f"more than {MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > until:
                    raise requests.exceptions.ReadTimeout("the answer takes too long")
            return Answer(response.status_code, b"".join(pieces))

    def _take(self) -> requests.Session:
        with self._lock:
            if self._free:
                return self._free.pop()
        return requests.Session()

    def _give_back(self, session: requests.Session, keep: bool) -> None:
        with self._lock:
            if keep and not self._closed.is_set():
                self._free.append(session)
                return
        session.close()


def bearer(token: str) -> Auth:
    """Proof by a token."""

    def prove(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return prove


def password(user: str, secret: str) -> Auth:
    """Proof by name and password."""
    return requests.auth.HTTPBasicAuth(user, secret)


def checked_url(url: str, who: str) -> str:
    """The address without a slash at its end.

    Raises:
        ConfigError: it is no address of a web server.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        usable = usable and not (parts.username or parts.query or parts.fragment)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            f"the address of {who} must look like https://host:port, without user, password or query",
            key="url",
            remedy="write an address that starts with https:// or http://",
        )
    return url.rstrip("/")


def raise_for(answer: Answer, http: Http) -> None:
    """Turn a refusal into its error; anything below 300 is none.

    A server of ours says `{"error", "message", "remedy"}`. What does not is somebody else, such as a proxy whose server is
    down: its "not found" must not be taken for the hub's.

    Raises:
        AuthError: status 401 or 403.
        NotFoundError: the hub says that there is no such thing.
        RejectedError: any other refusal.
        HubUnavailableError: it was not the hub who answered.
    """
    if answer.status < 300:
        return
    said = answer.json()
    if not isinstance(said, dict) or not isinstance(said.get("message"), str):
        raise http.unavailable(f"answers like something else (status {answer.status}, and no reason)")
    message = said["message"]
    remedy = said.get("remedy")
    if isinstance(remedy, str) and remedy:
        message = f"{message}; {remedy}"
    if answer.status in (401, 403):
        raise AuthError(message)
    # A path that this hub does not have is not a thing that is not there.
    raise (NotFoundError if said.get("error") == "NotFoundError" else RejectedError)(message)


def _said(answer: Answer) -> str:
    said = answer.json()
    if isinstance(said, dict) and isinstance(said.get("message"), str):
        return f": {said['message'][:500]}"
    return ""


def _brief(error: BaseException) -> str:
    """The innermost reason, in a few words: urllib3 nests three of them, with addresses of objects."""
    seen = 0
    while seen < 6:
        inner = getattr(error, "reason", None) or next(
            (part for part in error.args if isinstance(part, BaseException)), None
        )
        if not isinstance(inner, BaseException):
            break
        error, seen = inner, seen + 1
    text = re.sub(r"^(<[^>]*>|\w+\([^)]*\)): ", "", str(error)) or type(error).__name__
    return text[:300]
