"""All carriers of control messages as one: ZeroMQ's, and the mailbox at the broker.

    dial("ipc://…" | "tcp://…") ─► zeromq          dial("mailbox://…") ─► a link over the mailbox
    poll ─► takes what lies in the mailbox, else waits in zeromq.poll;   mail wakes that wait

A mailbox knows no connections, so links are made of who writes: each frame has one byte before it that tells whether it comes
from the side that dialled, or goes to it. Mail from somebody who dialled us comes in on the link `("mail", party, key)`.

A process without a mailbox uses ZeroMQ's carrier itself.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from gcref.brains.peers_events import Link, LinkDown, LinkUp, PacketIn
from gcref.carriers.base import Carrier, CarrierEvent
from gcref.carriers.mail.post import (
    CONTROL,
    FULL,
    SCHEME,
    Mail,
    Mailbox,
    MailDown,
    MailEvent,
    MailUp,
    party_of,
)
from gcref.wire.codec import DATA

KEEP_S: Final = 60.0
"""Greetings and signs of life are of no use after this, seconds."""

RETRY_S: Final = 1.0
"""A party whose mailbox does not take mail is tried again after this; doubles up to `RETRY_MAX_S`, seconds."""

RETRY_MAX_S: Final = 60.0

ACCEPTED_MAX: Final = 10_000
"""Parties that have written to us, remembered to tell that their mailbox is gone."""

_FROM_DIALLER: Final = b"\0"
_TO_DIALLER: Final = b"\1"
_KIND_AT: Final = 2  # in a frame: version, array of six, kind

Accepted: TypeAlias = tuple[str, bytes, bytes]
"""A link that somebody else dialled: "mail", the party, its key."""


class _MailLink:
    """A link that we dialled.

    Attributes:
        up: LinkUp was told.
        retry_at: when it is up again after its mail came back; None: it follows the mailbox.
        retry_s: how long to wait the next time.
    """

    __slots__ = ("key", "party", "retry_at", "retry_s", "up")

    def __init__(self, party: bytes, key: bytes) -> None:
        self.party = party
        self.key = key
        self.up = False
        self.retry_at: float | None = None
        self.retry_s = RETRY_S


class Carriers:
    """What it promises is said in `gcref.carriers.base.Carrier`.

    Args:
        zeromq: carries `ipc` and `direct`.
        mailbox: carries `broker`. Both are closed with this one.
    """

    def __init__(self, zeromq: Carrier, mailbox: Mailbox) -> None:
        self._zeromq = zeromq
        self._mailbox = mailbox
        self._links: dict[int, _MailLink] = {}
        self._dialled: dict[tuple[bytes, bytes], int] = {}
        self._down: str | None = "we have no mailbox yet"
        self._queued: list[CarrierEvent] = []
        self._accepted: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()
        self._retries = 0
        self._closed = False
        mailbox.attach(CONTROL, zeromq.wake)

    def dial(self, link: int, address: str, server_key: bytes | None) -> None:
        """See `Carrier.dial`."""
        if not address.startswith(SCHEME):
            self._zeromq.dial(link, address, server_key)
            return
        if link in self._links:
            return
        now = time.monotonic()
        try:
            party = party_of(address)
        except ValueError as error:
            self._queued.append(LinkDown(link, str(error), now))
            return
        if server_key is None:
            self._queued.append(LinkDown(link, f"{address} needs keys on both sides", now))
            return
        found = self._links[link] = _MailLink(party, server_key)
        self._dialled[party, server_key] = link
        if self._down is None:
            found.up = True
            self._queued.append(LinkUp(link, now))
        else:
            self._queued.append(LinkDown(link, self._down, now))

    def listen(self, address: str) -> str:
        """See `Carrier.listen`. A mailbox listens by itself."""
        return self._zeromq.listen(address)

    def send(self, link: Link, frame: bytes) -> bool:
        """See `Carrier.send`."""
        if type(link) is int:
            found = self._links.get(link)
            if found is None:
                return self._zeromq.send(link, frame)
            if not found.up:
                return False
            party, key, side = found.party, found.key, _FROM_DIALLER
        elif type(link) is tuple and len(link) == 3:
            _, party, key = link
            side = _TO_DIALLER
        else:
            return self._zeromq.send(link, frame)
        keep_s = None if frame[_KIND_AT : _KIND_AT + 1] == _DATA else KEEP_S
        return self._mailbox.post(party, key, CONTROL, (side, frame), keep_s)

    def hangup(self, link: Link) -> None:
        """See `Carrier.hangup`."""
        found = self._links.pop(link, None) if type(link) is int else None
        if found is None:
            if type(link) is tuple and len(link) == 3:
                self._accepted.pop(link[1:], None)
            else:
                self._zeromq.hangup(link)
            return
        if found.retry_at is not None:
            self._retries -= 1
        if self._dialled.get((found.party, found.key)) == link:
            del self._dialled[found.party, found.key]
            for number, other in self._links.items():
                if (other.party, other.key) == (found.party, found.key):
                    self._dialled[found.party, found.key] = number

    def poll(self, timeout_s: float | None, fds: Sequence[Any] = ()) -> list[CarrierEvent]:
        """See `Carrier.poll`. Who calls it again has dealt with, and journalled, what it gave."""
        mailbox = self._mailbox
        mailbox.done(CONTROL)
        events, self._queued = self._queued, []
        mail = mailbox.take(CONTROL)
        if mail:
            self._read(mail, events)
        if self._retries:
            timeout_s = self._retry(timeout_s, events)
        events += self._zeromq.poll(0 if events else timeout_s, fds)
        mail = mailbox.take(CONTROL)
        if mail:
            self._read(mail, events)
        return events

    def wake(self) -> None:
        """See `Carrier.wake`."""
        self._zeromq.wake()

    def set_allowed(self, keys: Mapping[bytes, str]) -> None:
        """See `Carrier.set_allowed`. Mail is sealed by somebody's key; what that may do is asked for each session."""
        self._zeromq.set_allowed(keys)

    def close(self) -> None:
        """See `Carrier.close`."""
        if self._closed:
            return
        self._closed = True
        self._mailbox.close()
        self._zeromq.close()

    # ------------------------------------------------------------------------------------------------- mail

    def _read(self, mail: list[MailEvent], events: list[CarrierEvent]) -> None:
        now = time.monotonic()
        for event in mail:
            if isinstance(event, Mail):
                self._read_mail(event, events, now)
            elif isinstance(event, MailUp):
                self._down = None
                for number, link in self._links.items():
                    self._goes_up(number, link, events, now)
                # What was sent to these meanwhile was dropped, and they may be away: nobody else would have it sent again.
                events += [LinkUp(("mail", party, key), now) for party, key in self._accepted]
            elif isinstance(event, MailDown):
                if event.reason == self._down:
                    continue
                self._down = event.reason
                for number, link in self._links.items():
                    self._goes_down(number, link, event.reason, events, now)
            else:
                self._returned(event.to, event.reason, events, now)

    def _read_mail(self, mail: Mail, events: list[CarrierEvent], now: float) -> None:
        data = bytes(mail.data)
        link: Link
        if data[:1] == _FROM_DIALLER:
            link = ("mail", mail.sender, mail.key)
            self._accepted[mail.sender, mail.key] = None
            if len(self._accepted) > ACCEPTED_MAX:
                self._accepted.popitem(last=False)
        else:
            number = self._dialled.get((mail.sender, mail.key))
            if number is None or data[:1] != _TO_DIALLER:
                return  # it was hung up meanwhile
            found = self._links[number]
            found.retry_s = RETRY_S
            if found.retry_at is not None and self._down is None:
                self._goes_up(number, found, events, now)
            link = number
        events.append(PacketIn(link, data[1:], mail.key, now, "broker"))

    def _goes_up(self, number: int, link: _MailLink, events: list[CarrierEvent], now: float) -> None:
        if link.retry_at is not None:
            self._retries -= 1
            link.retry_at = None
        if not link.up:
            link.up = True
            events.append(LinkUp(number, now))

    def _goes_down(
        self, number: int, link: _MailLink, reason: str, events: list[CarrierEvent], now: float
    ) -> None:
        if link.retry_at is not None:
            self._retries -= 1
            link.retry_at = None
        link.up = False
        events.append(LinkDown(number, reason, now))

    def _returned(self, to: bytes, reason: str, events: list[CarrierEvent], now: float) -> None:
        for number, link in self._links.items():
            if link.party == to and link.up:
                self._goes_down(number, link, reason, events, now)
                link.retry_at = now + link.retry_s
                link.retry_s = min(2 * link.retry_s, RETRY_MAX_S)
                self._retries += 1
        if reason != FULL:
            for party, key in [each for each in self._accepted if each[0] == to]:
                del self._accepted[party, key]
                events.append(LinkDown(("mail", party, key), reason, now))

    def _retry(self, timeout_s: float | None, events: list[CarrierEvent]) -> float | None:
        """Bring up again what is due; how long to wait for the next one, at most."""
        now = time.monotonic()
        for number, link in self._links.items():
            if link.retry_at is None:
                continue
            if link.retry_at <= now:
                self._goes_up(number, link, events, now)
            elif timeout_s is None or link.retry_at - now < timeout_s:
                timeout_s = link.retry_at - now
        return timeout_s


_DATA: Final = bytes([DATA])
