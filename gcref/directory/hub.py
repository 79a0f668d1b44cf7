"""The hub as its clients see it: who is where, whose key is allowed, and a mailbox at the broker.

    client, agent ── HubClient ── HTTPS, with the user's token ──► hub ──► database, RabbitMQ

Each call waits for the network, so it belongs on a thread of its own, never on an I/O loop. The hub is in no hot path: who
is connected goes on without it. `requests` is loaded with the first `HubClient`, not with this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gcref import ids
from gcref.carriers.mail.post import MailboxAccess
from gcref.directory.records import EndpointRecord

if TYPE_CHECKING:
    from gcref.directory.http import Answer, Http

NO_BROKER: Final = "this hub has no broker: its hub.toml has no table [broker]"
"""The `mailbox_reason` where there will never be a mailbox; any other may pass."""

# As many events as one request carries: some 100 KB.
EVENTS_AT_ONCE: Final = 1000


class Registration(NamedTuple):
    """What a party tells the hub of itself.

    Attributes:
        id: its id, 16 bytes.
        kind: `endpoint` or `client`.
        name: what people call it; a client's is for people only.
        public_key: its owner key, the public half, as Z85 text.
        record: an endpoint's record, as `EndpointRecord.as_json` gives it; None for clients.
        trust_hub: the endpoint wants to be told whose keys to let in.
        wants_mailbox: it is to have a mailbox at the broker.
    """

    id: bytes
    kind: str
    name: str
    public_key: str
    record: dict[str, Any] | None = None
    trust_hub: bool = False
    wants_mailbox: bool = True


class Registered(NamedTuple):
    """What the hub tells a party.

    Attributes:
        mailbox: where its mailbox is. None: it has none, or, answering a heartbeat, it is as it was.
        allowed: keys that the endpoint may let in (Z85), each with its role, `user` or `peer`; empty unless it trusts the hub.
        heartbeat_s: how often the hub wants to hear from it, seconds.
        owner: the name of the user that it belongs to.
        mailbox_reason: why it has no mailbox, although it wants one: the hub tries again at each heartbeat. None: it has one.
    """

    mailbox: MailboxAccess | None
    allowed: dict[bytes, str]
    heartbeat_s: float
    owner: str
    mailbox_reason: str | None = None


class TaskEvent(NamedTuple):
    """What an endpoint has told of a task.

    Attributes:
        endpoint: its id.
        endpoint_name: its name, as `owner/name`.
        state: as the endpoint said it.
        at: when, Unix seconds.
    """

    endpoint: bytes
    endpoint_name: str
    state: str
    at: float


class HubClient:
    """A user's line to the hub. Any thread may call anything; every call but `close` waits.

    Every call may raise:
        HubUnavailableError: the hub does not answer (retryable); it has been tried a few times already.
        AuthError: the token is refused, or this is the owner's to do.
        NotFoundError: there is no such thing, or it is not yours to see.
        RejectedError: the request itself is wrong.

    Args:
        url: the hub's address, `https://…` or `http://…`.
        token: proves who the user is.

    Raises:
        ConfigError: the address is none.
        AuthError: there is no token.
    """

    def __init__(self, url: str, token: str | None) -> None:
        from gcref.directory import http
        from gcref.errors import AuthError

        if not token or not token.isascii() or not token.isprintable():
            raise AuthError(
                "the hub wants a token and there is none that could be one: set GCREF_TOKEN, or token in config.toml, to what "
                "'gcref hub token new NAME' printed"
            )
        self._raise_for = http.raise_for
        self._http: Http = http.Http(url, "the hub", http.bearer(token))

    def __repr__(self) -> str:
        return f"HubClient({self._http.url!r})"

    @property
    def url(self) -> str:
        """The hub's address."""
        return self._http.url

    def register(self, registration: Registration) -> Registered:
        """Make a party known, or say anew what it is. Idempotent; again, its mailbox stays and its password changes.

        Raises:
            RejectedError: the id belongs to somebody else, or something about the party is malformed.
        """
        body = {
            "kind": registration.kind,
            "name": registration.name,
            "public_key": registration.public_key,
            "record": registration.record,
            "trust_hub": registration.trust_hub,
            "wants_mailbox": registration.wants_mailbox,
        }
        return self._registered(self._call("PUT", f"/v1/parties/{registration.id.hex()}", json=body))

    def heartbeat(self, id: bytes, running: bool = True, *, timeout_s: float | None = None) -> Registered:
        """Say that a party lives.

        Args:
            id: of the party.
            running: False: it stops now, in order, and comes back some day.
            timeout_s: wait no longer than that in all; None: the usual limits.

        Raises:
            NotFoundError: the hub does not know it (any more): register again.
        """
        path = f"/v1/parties/{id.hex()}/heartbeat"
        return self._registered(
            self._call("POST", path, json={"running": running}, idempotent=True, timeout_s=timeout_s)
        )

    def withdraw(self, id: bytes, *, timeout_s: float | None = None) -> None:
        """The party goes, with its mailbox and what opens it. Idempotent: who is not known is gone.

        Args:
            id: of the party.
            timeout_s: wait no longer than that in all; None: the usual limits.
        """
        self._call("DELETE", f"/v1/parties/{id.hex()}", timeout_s=timeout_s)

    def find(self, endpoint: bytes | str, *, timeout_s: float | None = None) -> EndpointRecord:
        """The record of an endpoint that we may use.

        Args:
            endpoint: its id, the id's text, the name of one of ours, or `owner/name`.
            timeout_s: wait no longer than that in all; None: the usual limits.

        Raises:
            NotFoundError: there is none that we may use.
            RejectedError: the name fits more than one that runs.
        """
        answer = self._call(
            "GET", "/v1/endpoints/find", params={"endpoint": _text(endpoint)}, timeout_s=timeout_s
        )
        return self._record(answer.json())

    def endpoints(self) -> list[EndpointRecord]:
        """Every endpoint that we may use: ours, and those shared with us."""
        found = self._table(self._call("GET", "/v1/endpoints")).get("endpoints")
        if not isinstance(found, list):
            raise self._not_a_hub()
        return [self._record(table) for table in found]

    def share(self, endpoint: bytes | str, user: str) -> None:
        """Let a user use an endpoint of ours. Idempotent.

        Raises:
            NotFoundError: no such endpoint, or no such user.
            AuthError: the endpoint is not ours.
        """
        self._call("PUT", "/v1/shares", params={"endpoint": _text(endpoint), "user": user})

    def unshare(self, endpoint: bytes | str, user: str) -> None:
        """Take that back. Idempotent. Raises as `share` does."""
        self._call("DELETE", "/v1/shares", params={"endpoint": _text(endpoint), "user": user})

    def shared_with(self, endpoint: bytes | str) -> list[str]:
        """The users that an endpoint of ours is shared with. Raises as `share` does."""
        found = self._table(self._call("GET", "/v1/shares", params={"endpoint": _text(endpoint)})).get(
            "users"
        )
        if not isinstance(found, list) or not all(isinstance(user, str) for user in found):
            raise self._not_a_hub()
        return found

    def put_function(self, digest: bytes, code: bytes) -> None:
        """Keep a function's bytes for this user. Idempotent.

        Raises:
            RejectedError: it is too large, or the digest is not that of the bytes.
        """
        self._call("PUT", f"/v1/functions/{digest.hex()}", data=code)

    def get_function(self, digest: bytes) -> bytes:
        """The bytes of a function that this user has put there.

        Raises:
            NotFoundError: there is none of that digest.
            HubUnavailableError: what came is something else.
        """
        from hashlib import blake2b

        code = self._call("GET", f"/v1/functions/{digest.hex()}").body
        # They are going to be run: the digest is the caller's, so nobody on the way can change them.
        if blake2b(code, digest_size=len(digest)).digest() != digest:
            raise self._http.unavailable(f"sends other bytes than function {digest.hex()} has")
        return code

    def report(self, id: bytes, events: Sequence[tuple[bytes, str, float]]) -> None:
        """Tell what became of tasks at an endpoint of ours: (task id, state, Unix seconds) each.

        Raises:
            NotFoundError: the endpoint is not registered.
        """
        for at in range(0, len(events), EVENTS_AT_ONCE):
            rows = [[task.hex(), state, when] for task, state, when in events[at : at + EVENTS_AT_ONCE]]
            self._call("POST", f"/v1/parties/{id.hex()}/events", json={"events": rows})

    def where_is(self, task: bytes) -> list[TaskEvent]:
        """What endpoints that we may use have told of a task, oldest first; empty where nothing is known."""
        found = self._table(self._call("GET", f"/v1/tasks/{task.hex()}")).get("events")
        try:
            return [
                TaskEvent(
                    ids.parse(event["endpoint"]), str(event["name"]), str(event["state"]), float(event["at"])
                )
                for event in found or ()
            ]
        except (TypeError, KeyError, ValueError):
            raise self._not_a_hub() from None

    def whoami(self) -> str:
        """The name of the user that the token belongs to."""
        name = self._table(self._call("GET", "/v1/me")).get("user")
        if not isinstance(name, str):
            raise self._not_a_hub()
        return name

    def close(self) -> None:
        """Let go of the connections; calls that wait to be repeated end. Idempotent, and does not wait."""
        self._http.close()

    def _call(self, method: str, path: str, **how: Any) -> Answer:
        answer = self._http.call(method, path, **how)
        self._raise_for(answer, self._http)
        return answer

    def _table(self, answer: Answer) -> dict[str, Any]:
        table = answer.json()
        if not isinstance(table, dict):
            raise self._not_a_hub()
        return table

    def _registered(self, answer: Answer) -> Registered:
        table = self._table(answer)
        try:
            mailbox = table["mailbox"]
            reason = table["mailbox_reason"]
            return Registered(
                None if mailbox is None else MailboxAccess(str(mailbox["url"]), str(mailbox["queue"])),
                {key.encode("ascii"): str(role) for key, role in table["allowed"].items()},
                float(table["heartbeat_s"]),
                str(table["owner"]),
                None if reason is None else str(reason),
            )
        except (TypeError, KeyError, ValueError, AttributeError):
            raise self._not_a_hub() from None

    def _record(self, table: Any) -> EndpointRecord:
        try:
            return EndpointRecord.from_json(table)
        except (ValueError, TypeError):
            raise self._not_a_hub() from None

    def _not_a_hub(self) -> Exception:
        return self._http.unavailable("answers what no hub of this version says")


def _text(endpoint: bytes | str) -> str:
    return ids.text(endpoint) if isinstance(endpoint, bytes) else endpoint
