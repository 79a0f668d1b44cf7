"""Reaching endpoints: what the I/O thread does when the brain wants one, wonders about one, or gives one up.

    Reach ──► where.find ──► dial, or PeerFailed      Look ──► where.look ──► PeerSeen      Leave ──► hang up
    an agent that was started here ──► its stdout: where it listens; later its end
    the hub ──► where an endpoint is ──► dial; whether we have a mailbox ──► dial by the broker, or not

Everything here belongs to the I/O thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from gcref import ids
from gcref.brains import submitter_events as ev
from gcref.errors import EndpointLostError, GcrefError, HubUnavailableError
from gcref.objects import failure as failures
from gcref.sdk.agent_process import AgentProcess
from gcref.sdk.whereabouts import Ways

if TYPE_CHECKING:
    from gcref.directory.records import EndpointRecord
    from gcref.sdk.loop import Loop

INTRODUCED_S: Final = 2.5
"""So long an endpoint that trusts the hub may refuse us: it may have to hear of our key first."""


class Reaching:
    """Finds and leaves endpoints for one client.

    Args:
        loop: the I/O thread.
        public_key: the owner's, z85.

    Attributes:
        descriptors: what the loop is to wait for beside its sockets.
    """

    def __init__(self, loop: Loop, public_key: bytes) -> None:
        self.descriptors: list[int] = []
        self._loop = loop
        self._public_key = public_key
        self._ready: dict[int, Callable[[], None]] = {}
        self._ways: dict[bytes, Ways] = {}
        self._refused_at: dict[bytes, float] = {}  # the first time, by endpoints that the hub has told of

    # ------------------------------------------------------------------------------------------- what the brain wants

    def reach(self, party: bytes) -> None:
        """Finds a way to the party, or says why there is none."""
        try:
            ways = self._loop.where.find(party)
        except GcrefError as error:
            self._loop.tell(ev.PeerFailed(party, failures.from_error(error)))
            return
        if ways is not None:
            self._use(party, ways)

    def look(self, party: bytes) -> None:
        """Sees whether the party runs; it may have moved."""
        try:
            seen = self._loop.where.look(party)
        except GcrefError as error:
            self._loop.tell(ev.PeerFailed(party, failures.from_error(error)))
            return
        known = self._ways.get(party)
        if seen.ways is not None and seen.ways != known:
            if known is not None and known.process != seen.ways.process:
                # It was started again: what is dialled already tries the more rarely the longer it was away.
                self._loop.dial_all(party, [])
            self._use(party, seen.ways)
        self._loop.tell(
            ev.PeerSeen(
                party, seen.what, self._with_obstacle(party, seen.text), time.monotonic(), seen.failure
            )
        )

    def leave(self, party: bytes) -> None:
        """Stops trying. The session stays: what was said counts, should the endpoint come back."""
        if self._ways.pop(party, None) is not None:
            self._loop.dial_all(party, [])
        self._refused_at.pop(party, None)
        if self._loop.hub is not None:
            self._loop.hub.forget(party)
        text = f"{self._loop.where.name_of(party)} cannot be reached"
        self._loop.large.leave(party, lambda: EndpointLostError(text, endpoint_id=ids.text(party)))

    def refused(self, party: bytes | None, kind: str, text: str, ours: bool = False) -> None:
        """The party does not want us, or speaks another version.

        Args:
            party: who; None: a stranger.
            kind: the error's name.
            text: for people.
            ours: our key is what was refused.
        """
        if party is None:
            return  # a stranger, whom nobody waits for
        now = time.monotonic()
        from_hub = ours and self._loop.where.is_from_hub(party)
        if from_hub and now < self._refused_at.setdefault(party, now) + INTRODUCED_S:
            return
        text = f"{self._loop.where.name_of(party)}: {text}"
        if ours:
            key = self._public_key.decode()
            text += f"; its owner lets you in by adding this line to its authorized_keys: {key} user"
            if self._loop.where.is_from_hub(party):
                text += (
                    " (or by trust_hub = true in its config.toml: then the hub says whom it is shared with)"
                )
        self._loop.tell(ev.PeerRefused(party, failures.make(kind, text), now))

    def ways_to(self, party: bytes) -> Ways | None:
        """The ways to a party that is being reached."""
        return self._ways.get(party)

    def _use(self, party: bytes, ways: Ways) -> None:
        hub, usable = self._loop.hub, ways
        if hub is not None and (ways.uses_broker() or self._loop.where.is_from_hub(party)):
            if ways.uses_broker():
                hub.mailbox()
                if hub.obstacle is not None:
                    usable = ways.without_broker()
                    if not usable.control:
                        self._loop.tell(ev.PeerFailed(party, failures.from_error(hub.obstacle)))
                        return
            else:
                hub.introduce()
        self._ways[party] = ways
        self._loop.dial_all(party, usable.control)
        self._loop.large.ways_changed(party, usable)

    def _with_obstacle(self, party: bytes, text: str) -> str:
        """What is the matter, also with the broker, where that could have helped."""
        hub, ways = self._loop.hub, self._ways.get(party)
        if hub is None or hub.obstacle is None or ways is None or not ways.uses_broker():
            return text
        return f"{text}; the broker does not help: {hub.obstacle}"

    # ------------------------------------------------------------------------------------------------------- the hub

    def looked_up(self, party: bytes, said: EndpointRecord | GcrefError) -> None:
        """The hub has said where an endpoint is, or why it does not say."""
        if not self._loop.is_away(party):
            return
        if party in self._ways or isinstance(said, HubUnavailableError):
            self.look(party)
        elif isinstance(said, GcrefError):
            self._loop.tell(ev.PeerFailed(party, failures.from_error(said)))
        else:
            self.reach(party)

    def mail_changed(self) -> None:
        """There is a mailbox at the broker now, or there can be none."""
        for party, ways in list(self._ways.items()):
            if ways.uses_broker():
                self._use(party, ways)

    # ------------------------------------------------------------------------------------------- own agent processes

    def watch(self, process: AgentProcess) -> None:
        """Hears what an agent says that was started here."""
        self._set(process.fd, lambda: self._process_says(process))

    def process_ends(self, process: AgentProcess) -> None:
        """That agent is about to be stopped; what is open there is lost."""
        text = "the private endpoint was stopped, because its executor was shut down"
        self._process_gone(process, EndpointLostError(text, endpoint_id=ids.text(process.id)))

    def descriptor_ready(self, descriptor: int) -> None:
        """One of `descriptors` can be read."""
        ready = self._ready.get(descriptor)
        if ready is not None:
            ready()

    def _set(self, descriptor: int, ready: Callable[[], None] | None) -> None:
        if ready is None:
            self._ready.pop(descriptor, None)
        else:
            self._ready[descriptor] = ready
        self.descriptors = list(self._ready)

    def _process_says(self, process: AgentProcess) -> None:
        try:
            ready = process.read_answer()
        except GcrefError as error:
            self._process_gone(process, error)
            return
        if ready is not None:
            self._loop.where.set_ready(process.id, ready)
            self._set(process.fd, lambda: self._process_may_have_ended(process))
            if self._loop.is_away(process.id):
                self.reach(process.id)

    def _process_may_have_ended(self, process: AgentProcess) -> None:
        if not process.is_open():
            text = process.obituary()
            self._process_gone(process, EndpointLostError(text, endpoint_id=ids.text(process.id)))

    def _process_gone(self, process: AgentProcess, error: GcrefError) -> None:
        self._set(process.fd, None)
        self._loop.where.set_gone(process.id, error)
        self._loop.tell(ev.PeerFailed(process.id, failures.from_error(error)))
