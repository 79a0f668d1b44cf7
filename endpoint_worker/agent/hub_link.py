"""The agent's line to the hub: it registers, says that it lives, and asks where others are.

    register ─► mailbox, allowed keys ─► heartbeat, heartbeat, …         the hub forgot us, or our mailbox fails: register again
       └── refused: told in log and status, tried again in a while

Everything is said on the thread of `gcref.directory.hub_thread`; what matters to the control loop is posted there. The hub is
out of every hot path: while it is down all goes on that does not need to look somebody up.

Rules:
    - A key that the hub names is pinned at first contact; another one later is refused until its owner's word is trusted.
    - Whom the hub let in stays while the hub is down. A hub that refuses *us* vouches for nobody any more.
    - At an orderly end the hub is told, within `LAST_WORD_S`: whoever returns keeps its mailbox, and its mail.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from endpoint_worker.agent.neighbours import KeyRing
from endpoint_worker.agent.published import Published
from gcref import ids
from gcref.carriers.mail.post import Mailbox, MailboxAccess
from gcref.directory import pins
from gcref.directory.hub import HubClient, Registered, Registration
from gcref.directory.hub_thread import HubThread
from gcref.directory.records import EndpointRecord
from gcref.errors import AuthError, ConfigError, GcrefError, HubUnavailableError, NotFoundError

log = logging.getLogger("gcref.agent")

HEARTBEAT_S: Final = 30.0
"""How often the hub hears from us until it has said how often it wants to, seconds."""

REFUSED_AGAIN_S: Final = 60.0
"""How long a hub that has refused us is left alone, seconds: tokens are made and shared by people."""

REFRESH_S: Final = 1.0
"""The shortest time between two questions about keys that nobody knows, seconds: strangers can ask often."""

FIRST_WORD_S: Final = 3.0
"""How long the start of the agent may be held up by the hub, seconds: whoever has started it may look for it there at once."""

LAST_WORD_S: Final = 2.0
"""How long the end of the agent may be held up by the hub, seconds."""


class OurMailbox(Mailbox, Protocol):
    """A mailbox whose place the hub tells."""

    def use(self, access: MailboxAccess) -> None:
        """Here it is. From any thread; again with another access: it is there from now on."""
        ...

    def unavailable(self, reason: str) -> None:
        """There is none at present."""
        ...


class HubLink:
    """What the agent has to do with the hub. Any thread may call anything; only `begin` and `close` wait.

    Args:
        me: the endpoint's id.
        name: its name.
        url: the hub's address.
        token: the owner's; None: there is none, which the status will say.
        home: its `GCREF_HOME`.
        mailbox: where mail comes in; None: the endpoint may not use the broker.
        trust_hub: let in the keys that the hub names.
        returns: it will be started again; else the hub forgets it at the end.
    """

    def __init__(
        self,
        *,
        me: bytes,
        name: str,
        url: str,
        token: str | None,
        home: Path,
        mailbox: OurMailbox | None,
        trust_hub: bool,
        returns: bool,
    ) -> None:
        self._me = me
        self._name = name
        self._url = url
        self._home = home
        self._mailbox = mailbox
        self._trust_hub = trust_hub
        self._returns = returns
        self._thread = HubThread(lambda: HubClient(url, token))
        self._published: Published | None = None
        self._allowed: KeyRing | None = None
        self._post: Callable[[Callable[[float], None]], None] = lambda fn: None
        self._registered: float | None = None  # since when, Unix seconds
        self._error: str | None = None
        self._owner: str | None = None
        self._heartbeat_s = HEARTBEAT_S
        self._refreshed_at = -math.inf
        self._mail_failed = False  # at the last heartbeat
        self._first_word = threading.Event()

    def attach(self, post: Callable[[Callable[[float], None]], None]) -> None:
        """Hand answers over like this: `post` has the control loop call something. Before anything is asked."""
        self._post = post

    def begin(self, published: Published, allowed: KeyRing) -> None:
        """Register, and stay registered. Waits for the first answer, or the first failure to get one, up to `FIRST_WORD_S`.

        Args:
            published: our record, which tells of the mailbox once it is there.
            allowed: whom we let in.
        """
        self._published = published
        self._allowed = allowed
        if self._trust_hub:
            allowed.when_unknown = self.refresh
        self._register()
        self._first_word.wait(FIRST_WORD_S)

    def refresh(self) -> None:
        """Ask for the present list of allowed keys, unless that was done a moment ago."""
        now = time.monotonic()
        if self._trust_hub and now - self._refreshed_at >= REFRESH_S:
            self._refreshed_at = now
            self._thread.submit(self._heartbeat, self._heard_beside)

    def find(
        self,
        endpoint: bytes,
        done: Callable[[EndpointRecord | GcrefError, float], None],
        retry_for_s: float = 0.0,
    ) -> None:
        """Look an endpoint up.

        Args:
            endpoint: its id.
            done: called in the control loop, with its record or the reason why there is none, and the time.
            retry_for_s: how long to go on while the hub cannot be reached, seconds.
        """

        def call(client: HubClient) -> EndpointRecord:
            record = client.find(endpoint)
            if record.id != endpoint:
                raise NotFoundError(f"the hub answered with another endpoint than {ids.text(endpoint)}")
            pins.check(record.id, record.public_key.encode(), record.name, self._home)
            return record

        self._thread.submit(
            call, lambda told: self._post(lambda now: done(told, now)), retry_for_s=retry_for_s
        )

    def report(self, events: list[tuple[bytes, str, float]]) -> None:
        """Tell what became of tasks: (id, state, Unix seconds) each. What cannot be said now is not said."""
        if self._registered is not None and self._error is None:
            self._thread.submit(lambda client: client.report(self._me, events), lambda told: None)

    def close(self, *, in_order: bool) -> None:
        """Say nothing more, after a last word if we end in order: at most `LAST_WORD_S`."""
        last: Callable[[HubClient], Any] | None = None
        if in_order and self._registered is not None:
            if self._returns:
                last = lambda client: client.heartbeat(self._me, False, timeout_s=LAST_WORD_S)  # noqa: E731
            else:
                last = lambda client: client.withdraw(self._me, timeout_s=LAST_WORD_S)  # noqa: E731
        self._post = lambda fn: None
        self._thread.close(LAST_WORD_S if in_order else 0.0, last)

    def describe(self) -> dict[str, Any]:
        """For STATUS."""
        return {
            "url": self._url,
            "registered_unix_s": self._registered,
            "owner": self._owner,
            "error": self._error,
            "trusted": self._trust_hub,
            "mailbox": self._mailbox.describe() if self._mailbox is not None else None,
        }

    # -------------------------------------------------------------------------------------- on the hub's thread

    def _register(self, after_s: float = 0.0) -> None:
        self._thread.submit(self._say_who_we_are, self._answered, retry_for_s=math.inf, after_s=after_s)

    def _say_who_we_are(self, client: HubClient) -> Registered:
        assert self._published is not None, "the record comes first"
        record = self._published.record
        registration = Registration(
            id=self._me,
            kind="endpoint",
            name=self._name,
            public_key=record.public_key,
            record=record.as_json(),
            trust_hub=self._trust_hub,
            wants_mailbox=self._mailbox is not None,
        )
        return self._noting_errors(lambda: client.register(registration))

    def _heartbeat(self, client: HubClient) -> Registered:
        return self._noting_errors(lambda: client.heartbeat(self._me))

    def _noting_errors(self, call: Callable[[], Registered]) -> Registered:
        """Errors are to be seen in the status while they last, also those after which it is tried again."""
        try:
            told = call()
        except HubUnavailableError as error:
            if self._error is None:
                log.warning("%s", error)
            self._error = str(error)
            self._first_word.set()
            raise
        if self._error is not None:
            log.info("the hub at %s can be reached again", self._url)
        self._error = None
        return told

    def _answered(self, told: Registered | GcrefError) -> None:
        """What the hub says to a registration."""
        if isinstance(told, Registered):
            self._registered = time.time()
            log.info("registered with the hub at %s as %s/%s", self._url, told.owner, self._name)
            self._take(told)
            self._beat_later()
        elif not isinstance(told, HubUnavailableError):  # which comes at the end alone
            self._is_refused(told)
        self._first_word.set()

    def _heard(self, told: Registered | GcrefError) -> None:
        """What the hub says to a heartbeat."""
        if isinstance(told, NotFoundError):
            self._register()
        elif isinstance(told, Registered):
            self._take(told)
            self._beat_later()
        elif not isinstance(told, HubUnavailableError):
            self._is_refused(told)

    def _heard_beside(self, told: Registered | GcrefError) -> None:
        """What it says to a heartbeat out of the rhythm; the next one in it deals with what is wrong."""
        if isinstance(told, Registered):
            self._take(told)

    def _beat_later(self) -> None:
        if self._mail_has_failed():
            self._register(after_s=self._heartbeat_s)  # makes the mailbox and its password anew
        else:
            self._thread.submit(self._heartbeat, self._heard, retry_for_s=math.inf, after_s=self._heartbeat_s)

    def _mail_has_failed(self) -> bool:
        """Whether the broker was out of reach at two heartbeats in turn."""
        before = self._mail_failed
        self._mail_failed = self._mailbox is not None and not self._mailbox.describe().get("up")
        return before and self._mail_failed

    def _take(self, told: Registered) -> None:
        self._heartbeat_s = told.heartbeat_s
        self._owner = told.owner
        if self._mailbox is not None:
            if told.mailbox is not None:
                self._mailbox.use(told.mailbox)
                self._publish(mailbox=True)
            elif told.mailbox_reason is not None:
                self._mailbox.unavailable(told.mailbox_reason)
        self._let_in(told.allowed)

    def _publish(self, *, mailbox: bool) -> None:
        """Tell those who look into our `GCREF_HOME`."""
        assert self._published is not None
        try:
            self._published.change(mailbox=mailbox)
        except ConfigError as error:
            log.error("others here cannot be told of our mailbox: %s", error)

    def _let_in(self, allowed: dict[bytes, str]) -> None:
        ring = self._allowed
        if self._trust_hub and ring is not None:
            self._post(lambda now: ring.set_from_hub(allowed))

    def _is_refused(self, error: GcrefError) -> None:
        self._error = str(error)
        log.error("the hub at %s refuses this endpoint: %s", self._url, error)
        self._registered = None
        if self._mailbox is not None:
            self._mailbox.unavailable(str(error))
            self._publish(mailbox=False)
        if isinstance(error, AuthError):
            self._let_in({})
        self._register(after_s=REFUSED_AGAIN_S)
