"""TRY: finds out, for the endpoint's owner, how it reaches another endpoint (`gcref doctor A B`).

    TRY ── control loop ── asked ──► a thread: look it up, try every way ── post ──► control loop ── TRIED

It takes seconds, so each trial has a thread of its own, of which there are few. The trial is a party beside the agent's own
sessions, with the agent's key: what it does and sees, the agent would.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gcref import ids
from gcref.brains.resolver_events import Who
from gcref.directory import pins, records, trial
from gcref.directory.records import EndpointRecord
from gcref.directory.visit import Visit
from gcref.errors import GcrefError, NotFoundError
from gcref.wire import messages as m

if TYPE_CHECKING:
    from gcref.carriers.keys import KeyPair
    from gcref.directory.hub import HubClient

log = logging.getLogger("gcref.agent")

TRIALS_MAX: Final = 2
"""At a time: each takes threads, sockets, and the bandwidth of a link."""


class Trials:
    """Answers TRY. `asked` and `close` belong to the control loop.

    Args:
        name: of this endpoint, for the text of errors.
        pair: its keys.
        home: its `GCREF_HOME`; None: it is private, and knows nobody.
        carriers: the ways it may use.
        connect: gives its line to the hub, or None where it has none.
        post: has a function called in the control loop; from any thread.
        say: sends a message to a party; in the control loop.
    """

    def __init__(
        self,
        *,
        name: str,
        pair: KeyPair,
        home: Path | None,
        carriers: frozenset[str],
        connect: Callable[[], HubClient | None],
        post: Callable[[Callable[[float], None]], None],
        say: Callable[[bytes, list[Any]], None],
    ) -> None:
        self._name = name
        self._pair = pair
        self._home = home
        self._carriers = carriers
        self._connect = connect
        self._post = post
        self._say = say
        self._running = 0

    def asked(self, message: list[Any], who: Who) -> None:
        """Take a TRY."""
        _kind, request, target, about = message[:4]
        if target is None:
            self._answer(who.party, request, {})
        elif who.role == "peer":
            error = f"AuthError: endpoint {self._name} lets your key in as a peer, which may not have it try others"
            self._answer(who.party, request, {"error": error})
        elif self._running >= TRIALS_MAX:
            self._answer(who.party, request, {"error": f"{self._name} is busy with other trials; ask again"})
        else:
            self._running += 1
            log.info("trying the ways to %s, asked by %s", ids.text(target), ids.text(who.party))
            threading.Thread(
                target=self._run, args=(who.party, request, target, about), name="gcref-try", daemon=True
            ).start()

    def _run(self, party: bytes, request: int, target: bytes, about: dict[str, Any] | None) -> None:
        try:
            found = self._try(target, about)
        except GcrefError as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        except Exception as error:
            log.exception("the trial of %s failed", ids.text(target))
            found = {"error": f"{type(error).__name__}: {error}"}
        self._post(lambda _now: self._ended(party, request, found))

    def _ended(self, party: bytes, request: int, found: dict[str, Any]) -> None:
        self._running -= 1
        self._answer(party, request, found)

    def _answer(self, party: bytes, request: int, found: dict[str, Any]) -> None:
        self._say(party, [m.TRIED, request, {"name": self._name, **found}])

    def _try(self, target: bytes, about: dict[str, Any] | None) -> dict[str, Any]:
        with Visit(self._pair, self._connect(), f"{self._name[:50]}.trial") as visit:
            record, known = self._look_up(target, about, visit.hub)
            visit.announce()
            rungs = trial.try_all(record, self._pair, self._carriers, visit.open_mail, visit.hub is not None)
        return {"known": known, "rungs": [rung._asdict() for rung in rungs]}

    def _look_up(
        self, target: bytes, about: dict[str, Any] | None, hub: HubClient | None
    ) -> tuple[EndpointRecord, str]:
        """The record of the other one, and where it is from: as the agent itself would find it, else as it was told."""
        record = None if self._home is None else records.find(target, self._home)
        if record is not None:
            return record, "GCREF_HOME"
        problem = "no hub is named here, and its record is not in GCREF_HOME"
        if hub is not None:
            try:
                record = hub.find(target)
                pins.check(record.id, record.public_key.encode("ascii"), record.name, self._home)
                return record, "hub"
            except NotFoundError as error:
                problem = str(error)
        try:
            told = EndpointRecord.from_json(about)
        except ValueError:
            told = None
        if told is None or told.id != target:
            raise NotFoundError(f"endpoint {ids.text(target)} is not known at {self._name}: {problem}")
        return told, f"not known at {self._name} ({problem}); tried with what the asker knows"
