"""What each message means: the rights of its sender, and the event that it is for the resolver.

The rights come from the *role* that the session proved for its party (DESIGN 11), and hold for each message:

    user     submits, puts, subscribes, cancels, asks: its own tasks and objects
    worker   the SDK inside a task of this endpoint; may do the same, and has its submits relayed to other endpoints
    peer     another endpoint: subscribes and fetches with read tokens, and answers for the objects of its own home; it may
             knock (TRY without a target)
"""

from __future__ import annotations

from typing import Any, Final

from gcref.brains import resolver_events as ev
from gcref.wire import messages as m

ID_BYTES: Final = 16

_ANSWERS: Final = frozenset((m.OUTCOME, m.FORGET, m.NEED_FUNCTION, m.STARTED, m.CANCELLED))
_PEER: Final = frozenset((m.SUBSCRIBE, m.UNSUBSCRIBE, m.PINS, m.TRY)) | _ANSWERS
_USER: Final = _PEER | frozenset((m.SUBMIT, m.FUNCTION, m.OFFER, m.CANCEL, m.ATTACH, m.EXPLAIN, m.STATUS))
RIGHTS: Final[dict[str, frozenset[int]]] = {"user": _USER, "worker": _USER, "peer": _PEER}
"""Kinds of messages that each role may send."""


def allowed(kind: int, who: ev.Who) -> bool:
    """Whether the party may send messages of this kind here; answers come from endpoints only."""
    return kind in RIGHTS.get(who.role, ()) and (kind not in _ANSWERS or who.kind == "endpoint")


def split_ids(joined: bytes) -> list[bytes]:
    """The ids of a message that carries them concatenated."""
    return [joined[at : at + ID_BYTES] for at in range(0, len(joined), ID_BYTES)]


def awaited(message: list[Any]) -> list[bytes]:
    """The ids whose outcome the sender of a message waits for: what it is told about when the message is refused."""
    kind = message[0]
    if kind == m.SUBMIT:
        return [task[0] for task in message[6]]
    return [item[0] for item in message[4]] if kind == m.OFFER else []


def event_of(message: list[Any], who: ev.Who, carrier: str, now: float, unix: float) -> Any:
    """The resolver's event for a message, or None for a kind that is not for the resolver.

    Args:
        message: checked by `gcref.wire.messages.check`.
        who: the sender.
        carrier: the way that it came.
        now: monotonic seconds.
        unix: seconds since the epoch, for records.
    """
    kind = message[0]
    if kind == m.SUBMIT:
        return ev.Submitted(
            who, message[1], message[2], message[3], message[4], message[5], message[6], now, unix
        )
    if kind == m.UNSUBSCRIBE:
        return ev.Unsubscribed(who, split_ids(message[1]))
    if kind == m.OUTCOME:
        return ev.Outcomes(who.party, message[1], carrier)
    if kind == m.SUBSCRIBE:
        return ev.Subscribed(who, message[1], message[2], now)
    if kind == m.OFFER:
        return ev.Offered(who, message[1], message[2], message[3], message[4], now)
    if kind == m.FORGET:
        return ev.Forgotten(who.party, split_ids(message[1]))
    if kind == m.ATTACH:
        return ev.Attached(who, message[1])
    if kind == m.PINS:
        return ev.Reclaimed(who, split_ids(message[1]), message[2])
    return None
