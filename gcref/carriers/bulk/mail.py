"""Links through mailboxes: how the bulk thread reaches those that nobody can dial, and is reached by them.

    we want them:    connect(party, "mailbox://…", key) ── link, up while our mailbox is ──► FETCH ─► their mailbox
    they want us:    their FETCH in our mailbox ── link, of the sender and the key that sealed it ──► CHUNK ─► theirs

There is no connection, and so nobody says HELLO and nobody says good-bye: each question carries what must be known of
the asker. A link is up while our own mailbox is. The first thing that goes over it is a question about nothing (no bytes
of the echo), so that they know of us and may ask us too. Whether anybody reads their mailbox, only answers can tell; when
mail to them comes back, their link is down until something is heard of them, and the question is repeated now and then.

Rules:
    - Mail belongs to the link of its sender *and* of the key that sealed it. Whoever says that he is somebody else
      has a link of his own, which is not asked for what the other has.
    - Those who came by themselves have a link only while their key is on the list; others are told that they may not.
    - Links that others made are bounded in number: of too many, the one that was heard longest ago goes.
    - A message that does not fit into what waits to leave is not sent, and its sender told so. Nothing waits here.
"""

from __future__ import annotations

import logging
import math
import struct
import time
from typing import TYPE_CHECKING, Any, Final

from gcref import ids
from gcref.carriers.bulk.link import (
    MAIL_KEEP_S,
    BulkIdentity,
    Down,
    Link,
    LinkEvent,
    Message,
    Unreached,
    Up,
    read_header,
    write_header,
)
from gcref.carriers.mail.post import BULK, Mail, MailDown, MailUp, Returned, address_of, party_of
from gcref.errors import LocalProtocolError, RemoteProtocolError
from gcref.wire.messages import ECHO_ID, FETCH, MODE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gcref.carriers.mail.post import Buffer, Mailbox

log = logging.getLogger(__name__)

CARRIER: Final = "broker"

GUESTS_MAX: Final = 1024
"""Links that others have made. A client is a party of its own each time it starts, and never says that it ends."""

RETRY_S: Final = 1.0
RETRY_MAX_S: Final = 15.0
"""How long after mail came back it is asked whether somebody is there; doubles."""

GREET_AGAIN_S: Final = 10.0
"""How long after a greeting whoever is reached once more is greeted again: he may have been started anew."""

_GREETING: Final = 1 << 32
"""The number of the question that greets. Those of the brain are below."""

_LENGTH: Final = struct.Struct("!I")
_NO_MAILBOX: Final = "this side has no mailbox"


class MailLink(Link):
    """A way to one party through its mailbox.

    Attributes:
        greeted_at: when we greeted last, monotonic seconds.
        mailbox: ours, which posts.
        wanted: we want to reach them; else they came.
    """

    __slots__ = ("greeted_at", "mailbox", "wanted")

    def __init__(self, number: int, party: bytes, key: bytes, mailbox: Mailbox | None, wanted: bool) -> None:
        super().__init__(number, party, CARRIER, address_of(party), key)
        self.mailbox = mailbox
        self.wanted = wanted
        self.greeted_at = -math.inf

    @property
    def was_dialled(self) -> bool:
        """We wanted this link; else they came in, and the list of keys says what they may do."""
        return self.wanted

    def send(self, header: bytes, data: Any = None, *, copy: bool = True) -> bool:
        """Post a message now, or not at all. Returns whether it was taken. The data are copied.

        Args:
            header: what it says.
            data: the bytes that go with it.
            copy: as for other links; here it is always done, as nobody knows when the mailbox has sealed them.
        """
        if self.mailbox is None or self.key is None:
            return False
        frame: list[Buffer] = [_LENGTH.pack(len(header)) + header]
        if data is not None:
            frame.append(bytes(data))
        return self.mailbox.post(self.party, self.key, BULK, frame, MAIL_KEEP_S)


class MailLinks:
    """All links through mailboxes of one party. Lives on the bulk thread.

    Args:
        me: who this side is.
        mailbox: ours; None: there is none, and nobody is reached this way.
        allowed: gives role by owner key (z85) as things stand.
        number: gives a new link its number.
        report: is told what happens, as in `links.Links`.
    """

    def __init__(
        self,
        me: BulkIdentity,
        mailbox: Mailbox | None,
        allowed: Callable[[], Mapping[bytes, str]],
        number: Callable[[], int],
        report: Callable[[LinkEvent], None],
    ) -> None:
        self._mailbox = mailbox
        self._allowed = allowed
        self._number = number
        self._report = report
        self._is_up = False
        self._error = _NO_MAILBOX if mailbox is None else "the mailbox has not been opened yet"
        self._wanted: dict[bytes, MailLink] = {}
        self._guests: dict[tuple[bytes, bytes], MailLink] = {}  # the one heard last is the last
        greeting: list[Any] = [FETCH, _GREETING, ECHO_ID, 0, 0, 0, MODE_BYTES, None, None, me.kind]
        self._greeting = write_header(greeting)

    def attach(self, wake: Callable[[], None]) -> None:
        """From now on mail comes. `wake` is called, on any thread, when `take` is to be."""
        if self._mailbox is not None:
            self._mailbox.attach(BULK, wake)

    def use(self, mailbox: Mailbox, wake: Callable[[], None]) -> None:
        """This is ours, which was not there before. `wake` as for `attach`."""
        if self._mailbox is None:
            self._mailbox = mailbox
            for link in self._wanted.values():
                link.mailbox = mailbox
            self.attach(wake)

    # ------------------------------------------------------------------------------------------ coming to be

    def connect(self, party: bytes, address: str, key: bytes | None, role: str | None) -> None:
        """Reach a party through its mailbox. One that is reached already is left alone, unless its key is another now."""
        try:
            is_theirs = party_of(address) == party
        except ValueError:
            is_theirs = False
        if not is_theirs or key is None:
            raise LocalProtocolError(
                f"{address} is not the mailbox of party {ids.text(party)}, or has no key"
            )
        link = self._wanted.get(party)
        if link is not None and link.key == key:
            link.role = role
            if not link.is_up and self._is_up:
                self._set_up(link)  # tried anew
            elif link.is_up and time.monotonic() >= link.greeted_at + GREET_AGAIN_S:
                self._greet(link)
            return
        if link is not None:
            self._set_down(link, "reached anew")
        link = self._guests.pop((party, key), None)
        if link is None:
            link = MailLink(self._number(), party, key, self._mailbox, wanted=True)
        link.wanted, link.wanted_key, link.role = True, key, role
        self._wanted[party] = link
        if link.is_up:
            self._greet(link)
        elif self._is_up:
            self._set_up(link)
        else:
            link.become("dialling", self._error)
            self._report(Unreached(link, self._error, refused=False))

    def forget(self, party: bytes, address: str | None, reason: str) -> None:
        """Do not reach a party any more, unless through this address."""
        link = self._wanted.get(party)
        if link is not None and link.address != address:
            del self._wanted[party]
            self._set_down(link, reason)

    def disconnect(self, party: bytes, reason: str) -> None:
        """Forget a party, and do not use the links that it made, until it asks for something again."""
        self.forget(party, None, reason)
        for link in [link for link in self._guests.values() if link.party == party]:
            self._set_down(link, reason)

    def judge_guests(self) -> None:
        """The list has changed: links of those who are not on it any more go down."""
        allowed = self._allowed()
        for link in list(self._guests.values()):
            if link.key not in allowed:
                self._set_down(link, "its key is not allowed any more")

    def links(self) -> list[Link]:
        """All links. Any thread may ask."""
        return [*list(self._wanted.values()), *list(self._guests.values())]

    def probe(self, now: float) -> float:
        """Ask those whose mail came back whether they are there by now.

        Returns:
            How long it is, in seconds, until the next is due.
        """
        patience_s = math.inf
        for link in self._wanted.values():
            if link.retry_at is None or not self._is_up:
                continue
            if link.retry_at <= now:
                link.retry_s = min(2 * link.retry_s, RETRY_MAX_S)
                link.retry_at = now + link.retry_s
                self._greet(link)
            patience_s = min(patience_s, link.retry_at - now)
        return patience_s

    # -------------------------------------------------------------------------------------------------- mail

    def take(self) -> None:
        """Handle what has come, then let the broker forget it."""
        if self._mailbox is None:
            return
        events = self._mailbox.take(BULK)
        if not events:
            return
        events.reverse()
        while events:
            match events.pop():
                case Mail(sender, key, data):
                    self._take_mail(sender, key, memoryview(data))
                case MailUp():
                    self._mailbox_up()
                case MailDown(reason):
                    self._mailbox_down(reason)
                case Returned(to, reason):
                    self._returned(to, reason)
        self._mailbox.done(BULK)

    def _mailbox_up(self) -> None:
        self._is_up = True
        for link in list(self._wanted.values()):
            if not link.is_up:
                self._set_up(link)
        allowed = self._allowed()
        for link in list(self._guests.values()):
            if not link.is_up and link.key in allowed:
                self._set_up(link)

    def _mailbox_down(self, reason: str) -> None:
        self._is_up = False
        self._error = reason
        for link in [*self._wanted.values(), *self._guests.values()]:
            self._set_down(link, reason)
        for link in self._wanted.values():
            link.retry_at = None
            link.become("dialling", reason)
            self._report(Unreached(link, reason, refused=False))

    def _returned(self, party: bytes, reason: str) -> None:
        for key, guest in list(self._guests.items()):
            if guest.party == party:
                del self._guests[key]
                self._set_down(guest, reason)
        link = self._wanted.get(party)
        if link is not None and link.retry_at is None:
            self._set_down(link, reason)
            link.become("dialling", reason)
            link.retry_s = RETRY_S
            link.retry_at = time.monotonic() + link.retry_s
            self._report(Unreached(link, reason, refused=False))

    def _take_mail(self, sender: bytes, key: bytes, mail: memoryview) -> None:
        try:
            header, data = _split(mail)
            fields = read_header(header)
        except RemoteProtocolError as error:
            log.warning("bulk: dropped mail of party %s: %s", ids.text(sender), error)
            return
        link = self._link_of(sender, key, fields[0])
        if link is None:
            return
        if fields[0] == FETCH:
            if len(fields) > 9:
                link.kind = fields[9]
        elif fields[1] == _GREETING:
            return
        self._report(Message(link, fields, data))

    def _link_of(self, sender: bytes, key: bytes, kind: int) -> MailLink | None:
        """The link that this mail came over. A question makes one, an answer does not."""
        link = self._wanted.get(sender)
        if link is None or link.key != key:
            link = self._guests.pop((sender, key), None)
            is_new = link is None
            if link is None:
                if kind != FETCH:
                    return None
                link = MailLink(self._number(), sender, key, self._mailbox, wanted=False)
            is_allowed = key in self._allowed()
            if is_allowed or not is_new:
                self._guests[sender, key] = link
                self._bound_guests()
            if not is_allowed:
                if link.is_up or is_new:
                    self._set_down(link, "its key is not allowed")
                return link  # to be told that he may not
        if not link.is_up and self._is_up and (link.wanted or kind == FETCH):
            self._set_up(link)
        return link

    def _bound_guests(self) -> None:
        if len(self._guests) > GUESTS_MAX:
            link = self._guests.pop(next(iter(self._guests)))
            self._set_down(link, "others were heard since")

    def _set_up(self, link: MailLink) -> None:
        link.is_up = link.was_up = True
        link.retry_at = None
        link.retry_s = 0.0
        link.become("up")
        self._report(Up(link))
        log.info("bulk link up: %s %s", ids.text(link.party), link.address)
        if link.wanted:
            self._greet(link)

    def _greet(self, link: MailLink) -> None:
        link.greeted_at = time.monotonic()
        link.send(self._greeting)

    def _set_down(self, link: MailLink, reason: str) -> None:
        link.become("down", reason)
        if link.is_up:
            link.is_up = False
            self._report(Down(link, reason))
            log.info("bulk link down: %s %s (%s)", ids.text(link.party), link.address, reason)


def _split(mail: memoryview) -> tuple[memoryview, memoryview]:
    """Header and data of a mail.

    Raises:
        RemoteProtocolError: it is shorter than it says.
    """
    if len(mail) < _LENGTH.size:
        raise RemoteProtocolError("mail without a header")
    end = _LENGTH.size + _LENGTH.unpack_from(mail)[0]
    if end > len(mail):
        raise RemoteProtocolError("mail that ends within its header")
    return mail[_LENGTH.size : end], mail[end:]
