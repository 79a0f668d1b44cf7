"""How this process finds an endpoint: by its record, because it started it itself, through its own agent, or from the hub.

    party ──► an agent that was started here    ipc, once it has answered
          ──► inside a task: the own agent      ipc, whatever the home
          ──► $GCREF_HOME/endpoints             what its record says, as far as we may use it
          ──► the hub                           the same, once it has answered

Everything here is called by the I/O thread, except `name_of` and `remember`, which any thread may call.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gcref import ids
from gcref.brains.submitter_table import SEEN_GONE, SEEN_RUNNING, SEEN_STOPPED, SEEN_UNKNOWN
from gcref.errors import ConfigError, EndpointLostError, GcrefError, NotFoundError
from gcref.objects import failure as failures

if TYPE_CHECKING:
    from gcref.directory.launch import Ready
    from gcref.directory.records import Candidate, EndpointRecord
    from gcref.sdk.agent_process import AgentProcess
    from gcref.sdk.hub_link import HubLink
    from gcref.task_context import TaskContext

BROKER: Final = "broker"
"""The carrier that needs a hub."""

MAILBOX_WAIT_S: Final = 3.0
"""An endpoint that has just been started may take so long to get its mailbox."""


class Ways(NamedTuple):
    """Ways to an endpoint, best first.

    Attributes:
        control: to its control socket.
        bulk: to its bulk socket.
        process: tells the agent that listens there now from an earlier one at the same addresses.
    """

    control: list[Candidate]
    bulk: list[Candidate]
    process: tuple[float, int] = (0.0, 0)

    def uses_broker(self) -> bool:
        """Whether one of them leads through the broker."""
        return any(carrier == BROKER for carrier, _address, _key in self.control)

    def without_broker(self) -> Ways:
        """The others."""
        control, bulk = ([way for way in ways if way[0] != BROKER] for ways in (self.control, self.bulk))
        return self._replace(control=control, bulk=bulk)


class Seen(NamedTuple):
    """What a look at an endpoint found.

    Attributes:
        what: one of the SEEN constants.
        text: what is the matter, and what to do.
        ways: how to reach it; None: no news.
        failure: what tasks end with, should it never be found; None: that it was out of reach.
    """

    what: str
    text: str
    ways: Ways | None
    failure: list[Any] | None = None


class Whereabouts:
    """Finds endpoints.

    Args:
        carriers: the ways that may be used.
        context: inside a task: its surroundings.
        hub: where to ask for endpoints that have no record here; None: nowhere.
    """

    def __init__(
        self, carriers: frozenset[str], context: TaskContext | None, hub: HubLink | None = None
    ) -> None:
        self._carriers = carriers
        self._usable = carriers if hub is not None else carriers - {BROKER}
        self._context = context
        self._hub = hub
        self._unposted: dict[bytes, float] = {}  # endpoints that may get a mailbox any moment, and since when
        self._names: dict[bytes, str] = {}
        self._processes: dict[bytes, AgentProcess] = {}
        self._ready: dict[bytes, Ready] = {}
        self._gone: dict[bytes, GcrefError] = {}
        self._ephemeral: set[bytes] = set()

    def remember(self, record: EndpointRecord) -> None:
        """Notes the name of an endpoint, so that its record is found at once."""
        self._names[record.id] = record.name

    def name_of(self, party: bytes) -> str:
        """What to call an endpoint in texts for people."""
        if party in self._processes:
            return "the private endpoint"
        name = self._names.get(party)
        if name is None and self._hub is not None and (record := self._hub.record(party)) is not None:
            name = record.name
        return f"endpoint {ids.text(party)}" if name is None else f"endpoint {name!r}"

    def knows(self, party: bytes) -> bool:
        """Whether the endpoint was started here or met before."""
        return (
            party in self._processes
            or party in self._names
            or (self._hub is not None and self._hub.record(party) is not None)
        )

    def is_from_hub(self, party: bytes) -> bool:
        """Whether what is known of the endpoint was said by the hub."""
        return (
            party not in self._processes
            and party not in self._names
            and self._hub is not None
            and self._hub.record(party) is not None
        )

    def add_process(self, process: AgentProcess) -> None:
        """An agent was started here, for this process alone."""
        self._processes[process.id] = process

    def set_ready(self, party: bytes, ready: Ready) -> None:
        """That agent has said where it listens."""
        self._ready[party] = ready

    def has_answered(self, party: bytes) -> bool:
        """Whether that agent has said where it listens."""
        return party in self._ready

    def set_gone(self, party: bytes, error: GcrefError) -> None:
        """That agent has ended, or could not start: whoever looks for it hears so."""
        self._gone[party] = error
        self._ready.pop(party, None)

    def processes(self) -> list[AgentProcess]:
        """The agents that were started here."""
        return list(self._processes.values())

    def is_own(self, party: bytes) -> bool:
        """Whether the endpoint was started here, and ends with this process."""
        return party in self._processes

    def find(self, party: bytes) -> Ways | None:
        """How to reach it; None: it was started here, or is being looked up, and there is no answer yet.

        Raises:
            NotFoundError: there is no record of it.
            ConfigError: none of its addresses can be used from here; or its record is damaged.
            GcrefError: it was started here, and has ended so.
        """
        context = self._context
        if context is not None:
            return Ways([("ipc", context.control_address, None)], [("ipc", context.bulk_address, None)])
        if party in self._gone:
            raise self._gone[party]
        if party in self._processes:
            ready = self._ready.get(party)
            return (
                None if ready is None else Ways([("ipc", ready.control, None)], [("ipc", ready.bulk, None)])
            )
        record = self._record(party)
        if record is None:
            if self._hub is None or party in self._names:
                return self._unknown(party)
            record = self._hub.record(party)
            if record is None:
                self._hub.ask(party)
                return None
        return self._ways(record)

    def look(self, party: bytes) -> Seen:
        """See whether it runs, and where.

        Raises:
            ConfigError: it was hoped that it would have a mailbox by now.
        """
        if self._context is not None:
            return Seen(SEEN_UNKNOWN, "the agent of this task does not answer", None)
        process = self._processes.get(party)
        if process is not None:
            return (
                Seen(SEEN_GONE, process.obituary(), None) if process.ended() else Seen(SEEN_RUNNING, "", None)
            )
        record = self._record(party)
        if record is None:
            if self._hub is not None and party not in self._names:
                return self._look_at_hub(self._hub, party)
            gone = SEEN_GONE if party in self._ephemeral else SEEN_STOPPED
            return Seen(gone, f"{self.name_of(party)} was stopped, and its record is gone", None)
        alive = record.alive_here()
        if alive is None:
            return Seen(SEEN_UNKNOWN, f"{self.name_of(party)} does not answer", self._news(record))
        if alive:
            return Seen(SEEN_RUNNING, f"{self.name_of(party)} runs, but does not answer", self._news(record))
        text = f"{self.name_of(party)} is not running"
        if record.ephemeral:
            return Seen(SEEN_GONE, f"{text} any more; it was started for one program only", None)
        return Seen(SEEN_STOPPED, f"{text}; start it with 'endpoint-worker start {record.name}'", None)

    def _look_at_hub(self, hub: HubLink, party: bytes) -> Seen:
        hub.ask(party)  # it may have moved
        name, record, problem = self.name_of(party), hub.record(party), hub.problem(party)
        if isinstance(problem, NotFoundError):
            gone = SEEN_GONE if record is not None and record.ephemeral else SEEN_STOPPED
            return Seen(gone, f"the hub does not know {name} any more, or it is not shared any more", None)
        if record is None:
            text = f"{name} is looked up at the hub" if problem is None else str(problem)
            return Seen(SEEN_UNKNOWN, text, None, None if problem is None else failures.from_error(problem))
        if not record.running:
            text = f"{name} is not running, says the hub; its owner starts it with 'endpoint-worker start {record.name}'"
            return Seen(SEEN_STOPPED, text, None)
        text = f"{name} does not answer" if problem is None else f"{name} does not answer, and {problem}"
        return Seen(SEEN_UNKNOWN, text, self._news(record))

    def _record(self, party: bytes) -> EndpointRecord | None:
        from gcref.directory import records  # here, so that a private endpoint starts without it

        name = self._names.get(party)
        record = records.read(name) if name is not None else None
        if record is None or record.id != party:
            record = records.find(party)
        if record is not None:
            self._names[party] = record.name
            if record.ephemeral:
                self._ephemeral.add(party)
        return record

    def _unknown(self, party: bytes) -> Ways:
        if party in self._names:
            raise EndpointLostError(
                f"{self.name_of(party)} was stopped, and its record is gone", endpoint_id=ids.text(party)
            )
        from gcref.directory import records

        records.resolve(party)  # says which ones there are
        raise NotFoundError(f"there is no endpoint {ids.text(party)}")

    def _ways(self, record: EndpointRecord) -> Ways | None:
        control = record.candidates(self._usable)
        if control or not (record.control or record.running):
            self._unposted.pop(record.id, None)
            return Ways(control, record.bulk_candidates(self._usable), (record.started, record.pid))
        if BROKER in self._usable and not record.mailbox and record.running:
            now = time.monotonic()
            if now < self._unposted.setdefault(record.id, now) + MAILBOX_WAIT_S:
                return None
            del self._unposted[record.id]
        raise ConfigError(self._unreachable(record), key="carriers")

    def _news(self, record: EndpointRecord) -> Ways | None:
        """How to reach it, as far as its record tells."""
        if record.id in self._unposted:
            return self._ways(record)  # by now it is an error that it has no mailbox
        try:
            return self._ways(record)
        except ConfigError:
            return None

    def _unreachable(self, record: EndpointRecord) -> str:
        offered = ", ".join(record.control) or "no address"
        text = (
            f"endpoint {record.name!r} cannot be reached from here: it listens on {offered}, and the carriers "
            f"allowed here are {', '.join(sorted(self._carriers))} (ipc works on its own machine only). "
        )
        if BROKER not in self._carriers:
            return f"{text}Allow another carrier, here or there"
        if self._hub is None:
            return (
                f"{text}The broker needs a hub, and none is configured here: set GCREF_HUB_URL and GCREF_TOKEN, or hub_url "
                "and token in config.toml, or allow another carrier"
            )
        return (
            f"{text}It has no mailbox at the broker: give it a hub (hub_url and token where it runs) that has a broker, and "
            'allow it the carrier "broker"; or allow another carrier, here or there'
        )
