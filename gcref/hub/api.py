"""What the hub answers: `/v1/…`, JSON, each call in the name of the token's user.

    PUT    /v1/parties/{id}                register, or register anew
    POST   /v1/parties/{id}/heartbeat      it lives; what has changed for it
    POST   /v1/parties/{id}/events         what became of tasks there
    DELETE /v1/parties/{id}                it goes
    GET    /v1/endpoints                   those that the user may use
    GET    /v1/endpoints/find?endpoint=    one of them, by id, name or owner/name
    GET·PUT·DELETE /v1/shares?endpoint=&user=
    GET·PUT /v1/functions/{digest}         bytes
    GET    /v1/tasks/{id}                  what is known of a task
    GET    /v1/me · GET /v1/health

Handlers are plain functions, each run on a thread of the web server's pool: they check, and hand on to `parties`, `sharing`,
`shelf` and `mailboxes`.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field

from gcref import ids
from gcref.carriers.mail.post import MailboxAccess
from gcref.directory.records import MAX_RECORD_BYTES, NAME_PATTERN, EndpointRecord
from gcref.errors import AuthError, RejectedError
from gcref.hub import parties, sharing, shelf, users
from gcref.hub.database import Database
from gcref.hub.mailboxes import Mailboxes
from gcref.hub.parties import Described, Standing
from gcref.hub.who import Who

MAX_EVENTS: Final = 1_000
_MAX_ADDRESSES: Final = 64
_MAX_ADDRESS: Final = 256
# Z85: the letters of ZeroMQ's text form of 32 bytes (rfc.zeromq.org/spec/32).
_KEY: Final = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_ID_TEXT: Final = r"^[0-9a-fA-F]{32}$|^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"
_PRINTABLE: Final = r"^[!-~]+$"


class State:
    """What the handlers work with.

    Args:
        database: the hub's tables.
        mailboxes: at the broker.
        heartbeat_s: how often parties are to report.
    """

    def __init__(self, database: Database, mailboxes: Mailboxes, heartbeat_s: float) -> None:
        self.database = database
        self.mailboxes = mailboxes
        self.heartbeat_s = heartbeat_s


class TokenError(AuthError):
    """No token, or none of ours."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class RegistrationBody(_Body):
    """What a party says of itself."""

    kind: Literal["endpoint", "client"]
    name: Annotated[str, Field(min_length=1, max_length=64, description="letters, digits, '.', '_' and '-'")]
    public_key: Annotated[str, Field(min_length=40, max_length=40, description="owner key, Z85")]
    record: Annotated[dict[str, Any] | None, Field(description="an endpoint's record")] = None
    trust_hub: bool = False
    wants_mailbox: bool = True


class HeartbeatBody(_Body):
    """A sign of life."""

    running: bool = True


class EventsBody(BaseModel):
    """What became of tasks: their id, a state, and when (Unix seconds)."""

    events: Annotated[
        list[
            tuple[
                Annotated[str, Field(pattern=_ID_TEXT)],
                Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")],
                Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)],
            ]
        ],
        Field(max_length=MAX_EVENTS),
    ]


class MailboxAnswer(BaseModel):
    """What opens a mailbox. A secret."""

    url: str
    queue: str


class RegisteredAnswer(BaseModel):
    """How a party stands with the hub."""

    mailbox: Annotated[MailboxAnswer | None, Field(description="null: none, or as it was")]
    mailbox_reason: Annotated[str | None, Field(description="why it has none")]
    allowed: Annotated[dict[str, str], Field(description="keys to let in, with their roles")]
    heartbeat_s: float
    owner: str


def _state(request: Request) -> State:
    state: State = request.app.state.hub
    return state


_bearer = HTTPBearer(
    auto_error=False, description="the token that `gcref hub user add` or `gcref hub token new` printed"
)


def _who(request: Request, proof: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Who:
    if proof is None:
        raise TokenError("this needs a token", remedy="send 'Authorization: Bearer TOKEN'")
    who = users.authenticate(_state(request).database, proof.credentials)
    if who is None:
        raise TokenError(
            "the hub does not know this token, or it was revoked",
            remedy="ask for one: 'gcref hub token new NAME'",
        )
    return who


Hub = Annotated[State, Depends(_state)]
User = Annotated[Who, Depends(_who)]
Id = Annotated[str, Path(pattern=_ID_TEXT, description="32 hexadecimal digits, or a UUID's text")]
Digest = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$", description="BLAKE2b-128 of the bytes, hexadecimal")]
EndpointName = Annotated[
    str,
    Query(
        alias="endpoint",
        min_length=1,
        max_length=140,
        pattern=_PRINTABLE,
        description="id, name or owner/name",
    ),
]
UserName = Annotated[str, Query(alias="user", min_length=1, max_length=64, pattern=_PRINTABLE)]

router: Final = APIRouter(prefix="/v1")


@router.get("/health", tags=["hub"])
def health(hub: Hub) -> dict[str, str]:
    """Whether the hub serves, and how its broker is: `ok`, `unavailable` or `none`; needs no token."""
    hub.database.check()
    return {"status": "ok", "mailboxes": hub.mailboxes.state()}


@router.get("/me", tags=["hub"])
def me(user: User) -> dict[str, str]:
    """Whose token this is."""
    return {"user": user.name}


@router.put("/parties/{id}", tags=["parties"])
def register(id: Id, body: RegistrationBody, hub: Hub, user: User) -> RegisteredAnswer:
    """Make a party known, or say anew what it is; a mailbox gets a new password."""
    said = _described(ids.parse(id), body)
    with hub.mailboxes.held(said.id):
        parties.register(hub.database, user, said)
        access, reason = hub.mailboxes.provide(said.id) if said.wants_mailbox else (None, None)
    if not said.wants_mailbox:
        hub.mailboxes.clear([said.id])
    return _answer(hub, parties.standing(hub.database, user, said.id), access, reason)


@router.post("/parties/{id}/heartbeat", tags=["parties"])
def heartbeat(id: Id, body: HeartbeatBody, hub: Hub, user: User) -> RegisteredAnswer:
    """Say that a party lives. Its mailbox comes along only if it has just been made."""
    party = ids.parse(id)
    found = parties.heartbeat(hub.database, user, party, body.running)
    access, reason = None, found.mailbox_reason
    if found.wants_mailbox and not found.mailbox_ready and body.running:
        with hub.mailboxes.held(party):
            if not parties.standing(hub.database, user, party).mailbox_ready:
                access, reason = hub.mailboxes.provide(party)
    return _answer(hub, found, access, reason)


@router.delete("/parties/{id}", tags=["parties"])
def withdraw(id: Id, hub: Hub, user: User) -> dict[str, bool]:
    """The party goes, with its mailbox and what opens it."""
    gone = parties.withdraw(hub.database, user, ids.parse(id))
    # What the broker does not take now is written down for later.
    return {"gone": not hub.mailboxes.clear(gone)}


@router.post("/parties/{id}/events", tags=["tasks"])
def events(id: Id, body: EventsBody, hub: Hub, user: User) -> dict[str, int]:
    """Tell what became of tasks at an endpoint."""
    rows = [(ids.parse(task), state, at) for task, state, at in body.events]
    shelf.note_events(hub.database, user, ids.parse(id), rows)
    return {"noted": len(rows)}


@router.get("/tasks/{id}", tags=["tasks"])
def task(id: Id, hub: Hub, user: User) -> dict[str, Any]:
    """What endpoints that the user may use have told of a task."""
    return {"events": shelf.events_of(hub.database, user, ids.parse(id))}


@router.get("/endpoints", tags=["endpoints"])
def endpoints(hub: Hub, user: User) -> dict[str, Any]:
    """The endpoints that the user may use."""
    return {"endpoints": sharing.endpoints(hub.database, user)}


@router.get("/endpoints/find", tags=["endpoints"])
def find(endpoint: EndpointName, hub: Hub, user: User) -> dict[str, Any]:
    """One of them."""
    return sharing.find(hub.database, user, endpoint)


@router.get("/shares", tags=["endpoints"])
def shares(endpoint: EndpointName, hub: Hub, user: User) -> dict[str, Any]:
    """Whom an endpoint of the user is shared with."""
    return {"users": sharing.shared_with(hub.database, user, endpoint)}


@router.put("/shares", tags=["endpoints"])
def share(endpoint: EndpointName, other: UserName, hub: Hub, user: User) -> dict[str, bool]:
    """Let another user use it."""
    sharing.share(hub.database, user, endpoint, other)
    return {"shared": True}


@router.delete("/shares", tags=["endpoints"])
def unshare(endpoint: EndpointName, other: UserName, hub: Hub, user: User) -> dict[str, bool]:
    """Take that back."""
    sharing.unshare(hub.database, user, endpoint, other)
    return {"shared": False}


@router.put(
    "/functions/{digest}",
    tags=["functions"],
    openapi_extra={"requestBody": {"content": {"application/octet-stream": {}}, "required": True}},
)
async def put_function(digest: Digest, request: Request, hub: Hub, user: User) -> dict[str, bool]:
    """Keep a function's bytes."""
    code = await request.body()
    await run_in_threadpool(shelf.put_function, hub.database, user, bytes.fromhex(digest), code)
    return {"kept": True}


@router.get("/functions/{digest}", tags=["functions"], response_class=Response)
def get_function(digest: Digest, hub: Hub, user: User) -> Response:
    """A function's bytes."""
    code = shelf.get_function(hub.database, user, bytes.fromhex(digest))
    return Response(code, media_type="application/octet-stream")


def _described(id: bytes, body: RegistrationBody) -> Described:
    if not NAME_PATTERN.fullmatch(body.name):
        raise RejectedError(
            f"{body.name!r} cannot name a party", remedy="use letters, digits, '.', '_' and '-' (at most 64)"
        )
    if not _KEY.fullmatch(body.public_key):
        raise RejectedError("the public key is none", remedy="send 32 bytes as 40 characters of Z85")
    record = _checked_record(id, body) if body.kind == "endpoint" else None
    return Described(
        id,
        body.kind,
        body.name,
        body.public_key,
        record,
        body.trust_hub and body.kind == "endpoint",
        body.wants_mailbox,
    )


def _checked_record(id: bytes, body: RegistrationBody) -> dict[str, Any]:
    if body.record is None:
        raise RejectedError("an endpoint registers with its record")
    if len(json.dumps(body.record)) > MAX_RECORD_BYTES:
        raise RejectedError(f"a record has at most {MAX_RECORD_BYTES} bytes")
    try:
        record = EndpointRecord.from_json(body.record)
    except (ValueError, TypeError) as error:
        raise RejectedError(f"the record is none: {error}") from error
    if (record.id, record.name, record.public_key) != (id, body.name, body.public_key):
        raise RejectedError("the record is somebody else's: its id, name and key must be the party's")
    addresses = (*record.control, *record.bulk)
    if len(addresses) > _MAX_ADDRESSES or any(
        len(text) > _MAX_ADDRESS or not text.isascii() or not text.isprintable() for text in addresses
    ):
        raise RejectedError(
            f"a record has at most {_MAX_ADDRESSES} addresses of at most {_MAX_ADDRESS} characters"
        )
    return record.as_json()


def _answer(
    hub: State, found: Standing, access: MailboxAccess | None, reason: str | None
) -> RegisteredAnswer:
    return RegisteredAnswer(
        mailbox=None if access is None else MailboxAnswer(url=access.url, queue=access.queue),
        mailbox_reason=reason,
        allowed=dict(found.allowed),
        heartbeat_s=hub.heartbeat_s,
        owner=found.owner,
    )
