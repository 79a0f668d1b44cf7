"""The hub, for one client: where endpoints are, and this client's own mailbox. Each only when it is needed.

    I/O thread ── ask, mailbox ──► HubThread ──► hub            answers are posted back: Reaching.looked_up, mail_changed
    user's thread ── resolve ────► HubClient ──► hub            an Executor's name, a registered function: it waits

Rules:
    - The I/O thread never waits for the hub. Without it, whoever is connected goes on.
    - A record from the hub is believed once its key is the one that was pinned at first contact.
    - A client is known to the hub as long as it uses what it found there: endpoints that trust the hub let in the keys that
      it names, and the hub makes the mailbox. At the end the client is withdrawn, if that takes no time.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from gcref.errors import ConfigError, GcrefError, HubUnavailableError, NotFoundError

if TYPE_CHECKING:
    from gcref.carriers.keys import KeyPair
    from gcref.carriers.mail.amqp import AmqpMailbox
    from gcref.carriers.mail.post import Mailbox
    from gcref.directory.hub import HubClient, Registered
    from gcref.directory.hub_thread import HubThread
    from gcref.directory.records import EndpointRecord
    from gcref.sdk.loop import Loop

log: Final = logging.getLogger("gcref.sdk")

ASK_AGAIN_S: Final = 1.0
"""An endpoint that is away is looked up anew after so long; each next time waits twice as long, up to `ASK_RARELY_S`."""

ASK_RARELY_S: Final = 10.0

REGISTER_AGAIN_S: Final = 5.0
"""A hub that has refused to register us is asked again, when somebody needs it, after so long."""

FIND_S: Final = 10.0
"""How long one look-up may take, however often it is tried."""

TURN_S: Final = 3.0
"""How long an earlier I/O thread of the same client may take to withdraw, before the next one registers."""


class HubLink:
    """What a client has to do with its hub. Everything belongs to the I/O thread, except where it says otherwise.

    Args:
        url: the hub's address.
        token: proves who the user is.
        me: the client's party id.
        keys: its owner's keys.
        before: that of an earlier I/O thread of this client, which may be about to end.

    Attributes:
        url: the hub's address.
        obstacle: why there can be no mailbox, and what to do; None: there is one, or it is not known yet.
    """

    def __init__(
        self, url: str, token: str | None, me: bytes, keys: KeyPair, before: HubLink | None = None
    ) -> None:
        self.url = url
        self.obstacle: GcrefError | None = None
        self._token = token
        self._me = me
        self._keys = keys
        self._before = before
        if before is not None:
            before._before = None  # they are no chain
        self._ended = threading.Event()
        self._making = threading.Lock()
        self._client: HubClient | None = None
        self._thread: HubThread | None = None
        self._loop: Loop | None = None
        self._records: dict[bytes, EndpointRecord] = {}
        self._errors: dict[bytes, GcrefError] = {}
        self._pauses: dict[bytes, tuple[float, float]] = {}  # when it may be asked about again, and the pause
        self._mailbox: AmqpMailbox | None = None
        self._known = False  # the hub knows us, or is being told
        self._tried_at = 0.0
        self._heartbeat_s = 0.0
        self._without_s = 0.0  # of waiting, while the hub has promised us a mailbox and cannot make it

    def attach(self, loop: Loop) -> None:
        """This I/O thread is told what the hub says."""
        self._loop = loop

    # ------------------------------------------------------------------------------------- from any thread; it waits

    def client(self) -> HubClient:
        """The user's line to the hub.

        Raises:
            AuthError: there is no token.
            ConfigError: the hub's address is none.
        """
        with self._making:
            if self._client is None:
                from gcref.directory.hub import HubClient

                self._client = HubClient(self.url, self._token)
            return self._client

    def resolve(self, endpoint: uuid.UUID | str | bytes) -> EndpointRecord:
        """The record of an endpoint, given its id, the name of one of ours, or `owner/name`.

        Raises:
            HubError: the hub does not answer, does not know us, or knows no such endpoint that we may use.
            AuthError: the endpoint's key is not the one that was pinned.
        """
        asked = str(endpoint) if isinstance(endpoint, uuid.UUID) else endpoint
        record = _pinned(self.client().find(asked, timeout_s=FIND_S))
        self._records[record.id] = record
        return record

    # ------------------------------------------------------------------------------------------ where endpoints are

    def record(self, party: bytes) -> EndpointRecord | None:
        """What the hub said last of an endpoint. Any thread may ask."""
        return self._records.get(party)

    def problem(self, party: bytes) -> GcrefError | None:
        """Why the last look-up has failed; None if it has not."""
        return self._errors.get(party)

    def ask(self, party: bytes) -> None:
        """Have an endpoint looked up, unless that was done a moment ago; `Reaching.looked_up` is told."""
        due, pause_s = self._pauses.get(party, (0.0, ASK_AGAIN_S / 2))
        if time.monotonic() < due:
            return
        self._pauses[party] = (float("inf"), min(2 * pause_s, ASK_RARELY_S))
        self._hub().submit(
            lambda client: _pinned(client.find(party, timeout_s=FIND_S)),
            self._later(lambda said: self._told(party, said)),
        )

    def _told(self, party: bytes, said: EndpointRecord | GcrefError) -> None:
        pause_s = self._pauses[party][1]
        if isinstance(said, GcrefError):
            self._errors[party] = said
        else:
            self._errors.pop(party, None)
            before, self._records[party] = self._records.get(party), said
            if before is None or said != before:
                pause_s = ASK_AGAIN_S
        self._pauses[party] = (time.monotonic() + pause_s, pause_s)
        assert self._loop is not None
        self._loop.reaching.looked_up(party, said)

    def forget(self, party: bytes) -> None:
        """Nobody tries to reach it any more: the next who does asks at once."""
        self._errors.pop(party, None)
        due, _pause_s = self._pauses.get(party, (0.0, 0.0))
        if due != float("inf"):
            self._pauses.pop(party, None)

    # ------------------------------------------------------------------------------------------------ who we are

    @property
    def opened(self) -> Mailbox | None:
        """Our mailbox, if there is one."""
        return self._mailbox

    def mailbox(self) -> Mailbox:
        """Our mailbox; the hub is asked to make it."""
        if self._mailbox is None:
            from gcref.carriers.mail.amqp import AmqpMailbox

            self._mailbox = AmqpMailbox(self._me, self._keys)
            self._known = False
            assert self._loop is not None
            self._loop.large.mail_opened(self._mailbox)
        self.introduce()
        return self._mailbox

    def introduce(self) -> None:
        """Have the hub know us, so that endpoints let us in; with a mailbox, if we have made one."""
        now = time.monotonic()
        if self._known or (now < self._tried_at + REGISTER_AGAIN_S and self.obstacle is not None):
            return
        self._known = True
        self._tried_at = now
        self.obstacle = None  # perhaps it was dealt with
        self._register()

    def _register(self, after_s: float = 0.0) -> None:
        from gcref.directory.hub import Registration

        me = Registration(
            self._me,
            "client",
            _name(),
            self._keys.public.decode("ascii"),
            wants_mailbox=self._mailbox is not None,
        )

        def register(client: HubClient) -> Registered:
            before, self._before = self._before, None
            if before is not None:
                before._ended.wait(TURN_S)  # else its withdrawal would come after our registration
            return client.register(me)

        again_s = min(max(2 * after_s, ASK_AGAIN_S), ASK_RARELY_S)
        self._hub().submit(
            register, self._later(lambda said: self._registered(said, again_s)), after_s=after_s
        )

    def _registered(self, said: Registered | GcrefError, again_s: float) -> None:
        if isinstance(said, HubUnavailableError):
            self._no_mailbox(str(said))
            self._register(again_s)
        elif isinstance(said, GcrefError):
            self._known = False
            self._refused(said)
        else:
            first, self._heartbeat_s = not self._heartbeat_s, said.heartbeat_s
            self._take(said)
            if first:
                self._hub().every(
                    self._period,
                    lambda client: client.heartbeat(self._me),
                    self._later(self._heard),
                )

    def _period(self) -> float:
        """How long to wait for the next heartbeat: it also asks for the mailbox, while there is none."""
        self._without_s = min(2 * self._without_s, self._heartbeat_s)
        return self._without_s or self._heartbeat_s

    def _heard(self, said: Registered | GcrefError) -> None:
        if isinstance(said, NotFoundError):
            self._register()
        elif isinstance(said, HubUnavailableError):
            pass  # what we have goes on without it
        elif isinstance(said, GcrefError):
            self._refused(said)
        else:
            self._take(said)

    def _take(self, said: Registered) -> None:
        from gcref.directory.hub import NO_BROKER

        if self._mailbox is None:
            return
        if said.mailbox is not None:
            self._without_s = 0.0
            self._mailbox.use(said.mailbox)
            self._changed(None)
        elif said.mailbox_reason is not None:
            self._without_s = self._without_s or ASK_AGAIN_S / 2
            if said.mailbox_reason == NO_BROKER:
                text = f"{said.mailbox_reason} (the hub at {self.url})"
                remedy = "have its administrator add one, or allow another carrier"
                self._refused(ConfigError(f"{text}; {remedy}", key="broker", remedy=remedy))
            else:
                self._no_mailbox(said.mailbox_reason)

    def _refused(self, error: GcrefError) -> None:
        log.warning("the hub at %s does not take us: %s", self.url, error)
        self._no_mailbox(str(error))
        self._changed(error)

    def _no_mailbox(self, reason: str) -> None:
        if self._mailbox is not None:
            self._mailbox.unavailable(reason)

    def _changed(self, obstacle: GcrefError | None) -> None:
        if (obstacle is None) != (self.obstacle is None) or obstacle is not None:
            self.obstacle = obstacle
            assert self._loop is not None
            self._loop.reaching.mail_changed()

    # ------------------------------------------------------------------------------------------------------ the end

    def close(self, timeout_s: float) -> None:
        """Lets go of the mailbox and takes leave of the hub.

        Args:
            timeout_s: how long that may take, seconds.
        """
        if self._mailbox is not None:
            self._mailbox.close()
        until = time.monotonic() + timeout_s

        def leave(client: HubClient) -> None:
            try:
                if self._known:
                    client.withdraw(self._me, timeout_s=max(0.1, until - time.monotonic()))
            finally:
                self._ended.set()

        if self._thread is None:
            self._ended.set()
        else:
            self._thread.close(timeout_s, leave)
        if self._client is None:
            self._ended.set()
        else:
            self._client.close()

    def _hub(self) -> HubThread:
        if self._thread is None:
            from gcref.directory.hub_thread import HubThread

            self._thread = HubThread(self.client)
        return self._thread

    def _later(self, fn: Callable[[Any], None]) -> Callable[[Any], None]:
        """Has what the hub says handled on the I/O thread."""

        def hand_over(said: Any) -> None:
            assert self._loop is not None
            try:
                self._loop.post(lambda: fn(said))
            except RuntimeError:
                pass  # it has ended, and nobody wants to know

        return hand_over


def _name() -> str:
    """What people who look at the hub see of this process."""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", platform.node()).strip(".-") or "client"
    return f"{host[:50]}-{os.getpid()}"


def _pinned(record: EndpointRecord) -> EndpointRecord:
    """The record, whose key is the one that was pinned; or is pinned now."""
    from gcref.directory import pins

    pins.check(record.id, record.public_key.encode("ascii"), record.name)
    return record
