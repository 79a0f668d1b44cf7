"""What the agent tells people: EXPLAIN about a task, STATUS about itself, and the dump of everything for its log.

The brains know their part each, in their own words (`explain`, `describe`); here the parts are put together, worker
numbers become names, digests become names of functions, and moments of our clock become ages, which mean the same to
whoever reads them elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from endpoint_worker.agent.functions import Functions
from endpoint_worker.agent.pool import Pool
from endpoint_worker.agent.presence import Presence
from endpoint_worker.agent.rates import Rates
from endpoint_worker.store import Store
from gcref import ids
from gcref.brains import resolver_events as ev
from gcref.brains.dispatch import Dispatch
from gcref.brains.peers import Peers
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DISPATCHED, READY, Obj, Task, is_task
from gcref.carriers.bulk.thread import BulkThread
from gcref.objects.function_names import name_of

PARTIES_MAX: Final = 50
"""Parties that a dump tells of."""
NAMES_MAX: Final = 4096
"""Names of functions that are remembered."""


class Teller:
    """Puts into plain values what the agent's parts know.

    Args:
        me: the endpoint's id.
        resolver, dispatch, peers: the brains.
        pool, store, bulk, functions: the rest.
        presence: knows who is away.
        now: monotonic seconds.
    """

    def __init__(
        self,
        *,
        me: bytes,
        resolver: Resolver,
        dispatch: Dispatch,
        peers: Peers,
        pool: Pool,
        store: Store,
        bulk: BulkThread,
        functions: Functions,
        presence: Presence,
        now: float,
    ) -> None:
        self._me = me
        self._resolver = resolver
        self._dispatch = dispatch
        self._peers = peers
        self._pool = pool
        self._store = store
        self._bulk = bulk
        self._functions = functions
        self._presence = presence
        self._names: dict[bytes, str | None] = {}
        self.rates = Rates(self._counters, now)

    def _counters(self) -> dict[Any, int]:
        return {**self._resolver.counts, **self._bulk.counters()}

    # --------------------------------------------------------------------------------------------------- EXPLAIN

    def explain(self, id: bytes, who: ev.Who) -> dict[str, Any]:
        """What `who` may know of an object: where it is, what it waits for, since when."""
        now, unix = time.monotonic(), time.time()
        nodes = self._resolver.explain(id, who, now)
        placed = [node.obj for node in nodes if is_task(node.obj) and node.obj.state in (READY, DISPATCHED)]
        places = self._dispatch.places_of(placed, self._pool.progress(), now)
        homes: set[bytes] = set()
        for obj, told, may_see in nodes:
            if obj is None:
                continue
            if obj.home != self._me:
                homes.add(obj.home)
                self._tell_pull(obj.id, told)
            if not may_see:
                continue
            if (upload := told.get("upload")) is not None:
                self._tell_pull(upload["id"], upload)
            if told.get("pulling") and obj.home == self._me:
                self._tell_pull(obj.id, told)
            if is_task(obj):
                self._tell_task(obj, told, places.get(obj) or {}, unix)
        root = nodes[0].told
        root["told_by"] = self._me
        if homes:
            root["links"] = {home: self._link(home, now) for home in homes}
        return root

    def _tell_task(self, task: Task, told: dict[str, Any], place: dict[str, Any], unix: float) -> None:
        told |= place
        told["function"] = self._name_of(task.fn)
        told["age_s"] = max(0.0, unix - told.pop("received_unix_s"))
        if (number := told.get("worker")) is not None:
            told["worker"] = self._pool.name_of(number)
            told["pid"] = self._pool.pid_of(number)

    def _tell_pull(self, id: bytes, told: dict[str, Any]) -> None:
        pull = self._bulk.progress(id)
        if pull is not None:
            told["pull"] = list(pull)

    def _link(self, party: bytes, now: float) -> dict[str, Any]:
        """How another party is reached, in ages."""
        told = self._aged(self._peers.describe(party), now)
        if (until := self._presence.until(party)) is not None:
            told["given_up_in_s"] = until - now
        return told

    @staticmethod
    def _aged(told: dict[str, Any], now: float) -> dict[str, Any]:
        """The facts of a party, with ages for moments of our clock."""
        for facts in (told, *told.get("links", ())):
            for key in ("since", "heard_at"):
                if facts.get(key) is not None:
                    facts[f"{key.removesuffix('_at')}_s"] = now - facts[key]
                facts.pop(key, None)
        return told

    def _name_of(self, digest: bytes | None) -> str | None:
        if digest is None:
            return None
        if digest not in self._names:
            code = self._functions.get(digest)
            if code is None:
                return None
            if len(self._names) >= NAMES_MAX:
                self._names.clear()
            self._names[digest] = name_of(code)
        return self._names[digest]

    # ---------------------------------------------------------------------------------------------------- STATUS

    def status(self, asker: bytes) -> dict[str, Any]:
        """How the endpoint is: queue, workers and what each runs, store, links, rates; plain values only.

        Args:
            asker: a party whose own link is of no interest.
        """
        now = time.monotonic()
        over_s, rates = self.rates.now(now)
        dispatch = self._dispatch.describe(self._pool.progress(), now)
        for worker in dispatch["workers"]:
            number = worker["worker"]
            worker["worker"] = self._pool.name_of(number)
            worker["pid"] = self._pool.pid_of(number)
            worker["function"] = self._name_of(worker.get("function"))
        moved: dict[bytes, dict[str, list[float]]] = {}
        for (party, carrier, way), total in self._bulk.counters().items():
            both = moved.setdefault(party, {}).setdefault(carrier, [0.0, 0.0, 0.0, 0.0])
            at = 0 if way == "in" else 2
            both[at] += total
            both[at + 1] += rates.get((party, carrier, way), 0.0)
        links = {}
        for party in self._peers.parties():
            if party == asker:
                continue
            told = links[ids.text(party)] = self._link(party, now)
            told["moved"] = moved.get(party, {})
            if (worker_number := self._pool.worker_of_party(party)) is not None:
                told["worker"] = self._pool.name_of(worker_number)
        names = self._resolver.counts
        return {
            "tasks": dict(names),
            "rates": {"over_s": over_s, **{name: rates[name] for name in names}},
            "objects": len(self._resolver.objects),
            "workers": self._pool.describe(),
            "dispatch": dispatch,
            "store": self._store.stats(),
            "links": links,
        }

    # ------------------------------------------------------------------------------------------------------ dump

    def parts(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Every part's name, and a function that tells its state: bounded in time and size."""
        now = time.monotonic()
        yield "resolver", self._resolver.describe
        yield "dispatch", lambda: self._dispatch.describe(self._pool.progress(), now)
        yield "queue", lambda: [self._brief(task) for task in self._dispatch.head(PARTIES_MAX)]
        yield (
            "peers",
            lambda: {
                ids.text(party): self._link(party, now) for party in self._peers.parties()[:PARTIES_MAX]
            },
        )
        yield (
            "pulls",
            lambda: {ids.text(id): self._bulk.progress(id) for id in self._bulk.pulls()[:PARTIES_MAX]},
        )
        yield "store", self._store.describe
        yield (
            "deadlines",
            lambda: {
                name: at - now
                for name, brain in (
                    ("peers", self._peers),
                    ("resolver", self._resolver),
                    ("dispatch", self._dispatch),
                    ("store", self._store),
                )
                if (at := brain.deadline) is not None
            },
        )

    def _brief(self, task: Obj) -> dict[str, Any]:
        told: dict[str, Any] = {"id": task.id, "attempt": task.attempt}
        return told | ({"function": self._name_of(task.fn)} if is_task(task) else {})
