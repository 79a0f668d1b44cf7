"""Building an agent from its order: folders and lock, workers' zygote, sockets, brains, record, and the loop that ties them.

The order of the steps is what makes a start safe:

    lock (nobody else is this endpoint) ─► sweep (what the dead left) ─► zygote (forked while we have one thread and no
    sockets) ─► sockets ─► workers ─► record (now we can be found) ─► the answer on stdout
"""

from __future__ import annotations

import gc
import json
import logging
import os
import secrets
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from endpoint_worker.agent.control import Control
from endpoint_worker.agent.functions import Functions
from endpoint_worker.agent.hub_link import HubLink, OurMailbox
from endpoint_worker.agent.logs import log_to_stderr
from endpoint_worker.agent.memory import Memory
from endpoint_worker.agent.neighbours import KeyRing, Neighbours
from endpoint_worker.agent.pool import Pool
from endpoint_worker.agent.ports import StoreProvider, StoreSink
from endpoint_worker.agent.published import Published
from endpoint_worker.agent.recovery import NOTHING, TakenUp, take_up
from endpoint_worker.agent.start import MAX_LINE_BYTES, Order
from endpoint_worker.agent.trials import Trials
from endpoint_worker.config import EndpointConfig
from endpoint_worker.journal import Journal
from endpoint_worker.store import Store
from endpoint_worker.store.sweep import claim, mark_recoverable, release, sweep
from endpoint_worker.worker.channel import AgentChannel
from endpoint_worker.worker.remains import Remains
from endpoint_worker.worker.zygote import Zygote
from gcref import config as limits
from gcref import ids
from gcref.brains.dispatch import Dispatch
from gcref.brains.peers import Peers
from gcref.brains.peers_events import ENDPOINT, USER, Hello, Identity
from gcref.brains.resolver import Resolver
from gcref.carriers import keys
from gcref.carriers.base import Carrier
from gcref.carriers.bulk.link import BulkIdentity
from gcref.carriers.bulk.thread import BulkThread
from gcref.carriers.combined import Carriers
from gcref.carriers.zeromq import ZeroMQCarrier
from gcref.directory import records
from gcref.directory.hub import HubClient
from gcref.directory.records import EndpointRecord
from gcref.errors import ConfigError

log = logging.getLogger("gcref.agent")

EXTRA_WORKERS: Final = 4  # times the workers: processes that may exist beside them for lent slots
_LEFT: Final = ("workers", "segments")  # in the endpoint's folder in memory: what the next life looks at
GC_THRESHOLD: Final = 50_000  # our own tables have no cycles: collecting often only costs time


class Agent:
    """A running agent.

    Args:
        order: what to start.

    Raises:
        ConfigError: the configuration is wrong, the endpoint runs already, or a port is taken.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self._closing = ExitStack()
        self._is_needed = False  # what there is of workers and values: if we fail, the next one takes it up
        try:
            self._build(order)
        except BaseException:
            self._closing.close()
            raise

    # ------------------------------------------------------------------------------------------------- building

    def _build(self, order: Order) -> None:
        table = dict(order.config)
        if order.workers is not None:
            table["workers"] = order.workers
        settings = EndpointConfig.from_table(table)
        ways = limits.carriers_allowed(order.carriers if order.carriers is not None else settings.carriers)
        log_to_stderr(order.name, settings.log_level)
        home = Path(order.home) if order.home is not None else None
        folder = records.endpoint_dir(order.name, home) if home is not None else None
        pair = keys.load_or_create(folder / "key") if folder is not None else keys.generate()
        if home is not None:  # our owner's: to be known before their first program runs
            keys.load_or_create(home / "keys" / "user.key")

        before = records.read(order.name, home) if home is not None else None
        self._ephemeral = before.ephemeral if before is not None else order.watch_stdin
        # Whoever may be started again takes up what it left; nobody starts the others again.
        self._returns = settings.journal and not order.private and not self._ephemeral

        place = self._lock(order)
        nonce = secrets.token_hex(16)
        (place / "nonce").write_text(nonce, encoding="ascii")
        zygote, remains = self._zygote(order, place, settings.adopt_s)
        self._closing.callback(lambda: zygote.leave() if self._is_needed else zygote.close())

        allowed = KeyRing(folder / "authorized_keys" if folder is not None else None, home)
        hub, mailbox = self._hub(order, settings, home, pair, ways)
        carrier: Carrier = ZeroMQCarrier(pair, allowed)
        if mailbox is not None:
            carrier = Carriers(carrier, mailbox)
        self._closing.callback(carrier.close)
        pool_channel = AgentChannel(f"ipc://{place}/workers.sock")
        self._closing.callback(pool_channel.close)

        store = Store(
            place / "segments",
            self._spill_folder(order, settings),
            settings.store_limit_bytes,
            recover=self._returns,
            wake=carrier.wake,
        )
        self._closing.callback(self._close_store, store)
        resolver = Resolver(order.id, unknown_object_s=settings.unknown_object_s, lease_s=settings.lease_s)
        now = time.monotonic()

        control_ipc = carrier.listen(f"ipc://{place}/control.sock")
        bulk_ipc = f"ipc://{place}/bulk.sock"
        pool = Pool(
            zygote,
            pool_channel,
            endpoint=order.name,
            agent_id=order.id,
            control_address=control_ipc,
            bulk_address=bulk_ipc,
            environment=settings.environment,
            memory_bytes=settings.worker_memory_bytes,
        )
        bulk = BulkThread(
            BulkIdentity(order.id, ENDPOINT, pair),
            StoreProvider(resolver, store, lambda party: pool.worker_of_party(party) is not None),
            StoreSink(store),
            wake=carrier.wake,
            allowed=allowed,
            no_link_s=settings.endpoint_lost_s,
            heartbeat_s=settings.heartbeat_s,
            mailbox=mailbox,
        )
        bulk.start()
        self._closing.callback(bulk.close)
        bulk.listen(bulk_ipc)
        control, bulks = [control_ipc] if "ipc" in ways else [], [bulk_ipc] if "ipc" in ways else []
        if "direct" in ways and not order.private:
            ports = _ports_of(before)
            control += self._listen_tcp(carrier.listen, settings, settings.listen_address, "port", ports[0])
            bulks += self._listen_tcp(
                bulk.listen, settings, settings.bulk_listen_address, "bulk_port", ports[1]
            )

        neighbours = Neighbours(home, ways)

        def authorize(key: bytes | None, hello: Hello) -> str | None:
            if key is None:  # ipc: whoever can open the socket is this very user
                return "worker" if pool.worker_of_party(hello.party) is not None else USER
            # Who may come in may still not come as another endpoint.
            return None if neighbours.is_somebody_else(hello.party, key) else allowed.get(key)

        epoch = time.time_ns() // 1000
        tcp = [tuple(each for each in found if each.startswith("tcp://")) for found in (control, bulks)]
        identity = Identity(order.id, ENDPOINT, pair.public, epoch, *tcp)
        peers = Peers(identity, authorize, now, heartbeat_s=settings.heartbeat_s)
        functions = Functions()
        journal = self._journal(order, settings)
        memory = Memory(journal, resolver, peers, functions, order.name)
        taken_up = self._take_up(memory, remains, resolver, store, now)
        self.control = Control(
            me=order.id,
            name=order.name,
            carrier=carrier,
            peers=peers,
            resolver=resolver,
            dispatch=Dispatch(settings.workers, max_extra=EXTRA_WORKERS * settings.workers, now=now),
            pool=pool,
            store=store,
            bulk=bulk,
            neighbours=neighbours,
            allowed=allowed,
            functions=functions,
            memory=memory,
            hub=hub,
            endpoint_lost_s=settings.endpoint_lost_s,
            lease_s=settings.lease_s,
            store_wait_s=settings.store_wait_s,
        )
        self.control.trials = Trials(
            name=order.name,
            pair=pair,
            home=home,
            carriers=ways,
            connect=lambda: _hub_client(order),
            post=self.control.post,
            say=self.control.say,
        )
        self.control.begin(taken_up, now)
        self.control.watch_workers(pool_channel.socket, zygote.fd)
        if order.watch_stdin:
            self.control.watch(0, self._stdin_ready)
        self._answer = {
            "ready": True,
            "id": order.id.hex(),
            "pid": os.getpid(),
            "control": control_ipc,
            "bulk": bulk_ipc,
        }
        self.control.dump.install()
        if home is not None:
            published = self._publish(order, pair, control, bulks, nonce, home)
            if hub is not None:
                hub.begin(published, allowed)

    def _hub(
        self,
        order: Order,
        settings: EndpointConfig,
        home: Path | None,
        pair: keys.KeyPair,
        ways: frozenset[str],
    ) -> tuple[HubLink | None, OurMailbox | None]:
        """The line to the hub, and the mailbox that it is to open; None where there is none."""
        if order.hub_url is None or home is None:
            return None, None
        mailbox: OurMailbox | None = None
        if "broker" in ways:
            from gcref.carriers.mail.amqp import AmqpMailbox  # here: who has no hub does without the library

            mailbox = AmqpMailbox(order.id, pair)
        hub = HubLink(
            me=order.id,
            name=order.name,
            url=order.hub_url,
            token=order.token,
            home=home,
            mailbox=mailbox,
            trust_hub=settings.trust_hub,
            returns=self._returns,
        )
        # The last word comes after all that is said by mail; the next life goes on with the mailbox of a failed one.
        self._closing.callback(lambda: hub.close(in_order=not self._is_needed))
        return hub, mailbox

    def _lock(self, order: Order) -> Path:
        """Be the only process of this endpoint on this machine, and clear away what dead ones left."""
        sweep(limits.host_dir(), limits.disk_dir())
        place = limits.host_dir(order.id)
        try:
            lock = claim(place, keep=_LEFT if self._returns else ())
        except BlockingIOError:
            raise ConfigError(
                f"endpoint {order.name!r} runs already on this machine; stop it with "
                f"'endpoint-worker stop {order.name}', or choose another name",
                key="name",
                remedy=f"endpoint-worker stop {order.name}",
            ) from None
        self._kept: tuple[str, ...] = ()
        self._closing.callback(lambda: release(place, lock, keep=self._kept))
        self._closing.callback(self._remove_disk, limits.disk_dir(order.id))
        return place

    def _zygote(self, order: Order, place: Path, adopt_s: float) -> tuple[Zygote, list[Remains]]:
        """The process that makes the workers: the one that an earlier life left, or a new one; and what is left of workers."""
        folder = place / "workers"
        remains: list[Remains] = []
        if self._returns:
            adopted = Zygote.adopt(folder, folder)
            if adopted is not None:
                self._is_needed = True
                return adopted, adopted.workers()
            remains = Zygote.remains(folder, folder)
        # Forked with the import path that tasks are to have.
        own = list(sys.path)
        if order.sys_path:
            sys.path[:] = order.sys_path + [entry for entry in own if entry not in order.sys_path]
        try:
            return Zygote.start(folder, folder, adopt_s=adopt_s if self._returns else 0.0), remains
        finally:
            sys.path[:] = own

    def _take_up(
        self, memory: Memory, remains: list[Remains], resolver: Resolver, store: Store, now: float
    ) -> TakenUp:
        """Be who we were. From here on the journal tells of this life."""
        if not self._returns:
            return NOTHING
        taken_up = take_up(memory.recall(), remains, resolver, store, self.order.name, now)
        memory.compact()
        assert self.order.home is not None, "an endpoint that comes back has a home"
        folder = records.endpoint_dir(self.order.name, Path(self.order.home))
        mark_recoverable(limits.disk_dir(self.order.id), needs=[self._journal_folder(), folder])
        return taken_up

    def _close_store(self, store: Store) -> None:
        if self._is_needed:
            self._kept = _LEFT
        elif store.close(keep=self._returns):
            self._kept = ("segments",)

    def _remove_disk(self, folder: Path) -> None:
        """Remove what is of no use without us from the endpoint's folder on disk, and the folder if that was all."""
        if not self._returns:
            shutil.rmtree(folder / "spill", ignore_errors=True)
        with suppress(OSError):  # a journal is there
            folder.rmdir()

    def _spill_folder(self, order: Order, settings: EndpointConfig) -> Path:
        if settings.spill_dir is not None:
            # Named by us, because others may have been told the same place.
            folder = settings.spill_dir / f"gcref-{order.id.hex()}"
            if not self._returns:
                self._closing.callback(shutil.rmtree, folder, ignore_errors=True)
            return folder
        return limits.disk_dir(order.id) / "spill" / "objects"

    def _listen_tcp(
        self,
        listen: Callable[[str], str],
        settings: EndpointConfig,
        address: Callable[[int], str],
        key: str,
        before: int,
    ) -> list[str]:
        """Listen, where it was free to choose on the port of before: those who know it need not look for us again."""
        if before and not getattr(settings, key):
            with suppress(ConfigError):  # somebody else has it now
                return list(settings.advertised(listen(address(before))))
        try:
            return list(settings.advertised(listen(address(0))))
        except ConfigError as error:
            remedy = f"set bind and {key} to what is free; {key} = 0 takes any free port"
            raise ConfigError(
                f"{error} (in the endpoint's configuration: {remedy})", key=key, remedy=remedy
            ) from error

    def _journal(self, order: Order, settings: EndpointConfig) -> Journal | None:
        if not self._returns:
            return None
        journal = Journal(self._journal_folder(), fsync=settings.journal_fsync)
        self._closing.callback(journal.close)
        return journal

    def _journal_folder(self) -> Path:
        return limits.disk_dir(self.order.id) / "journal"

    def _publish(
        self, order: Order, pair: keys.KeyPair, control: list[str], bulk: list[str], nonce: str, home: Path
    ) -> Published:
        record = EndpointRecord(
            id=order.id,
            name=order.name,
            public_key=pair.public.decode("ascii"),
            control=tuple(control),
            bulk=tuple(bulk),
            host_nonce=nonce,
            pid=os.getpid(),
            started=time.time(),
            running=True,
            ephemeral=self._ephemeral,
        )
        published = Published(record, home)
        self._closing.callback(published.withdraw)
        return published

    # -------------------------------------------------------------------------------------------------- serving

    def serve(self) -> int:
        """Say that we are ready, and serve until we are told to stop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: self.control.stop())
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD, 50, 100)
        with self._closing:
            sys.stdout.write(json.dumps(self._answer) + "\n")
            sys.stdout.flush()
            log.info("endpoint %s (%s) is ready", self.order.name, ids.text(self.order.id))
            self._is_needed = self._returns
            self.control.run()
            self._is_needed = False
            log.info("endpoint %s stops", self.order.name)
        return 1 if self.control.failed else 0

    def _stdin_ready(self, now: float) -> None:
        """Whoever started us said stop, or is gone."""
        if select.select([0], [], [], 0)[0]:
            told = os.read(0, MAX_LINE_BYTES)
            if not told or b'"stop"' in told:
                self.control.stop()


def _hub_client(order: Order) -> HubClient | None:
    """A line to the hub of its own, for those who may wait."""
    return None if order.hub_url is None else HubClient(order.hub_url, order.token)


def _ports_of(record: EndpointRecord | None) -> tuple[int, int]:
    """The TCP ports of an earlier life, for messages and for bulk; 0: none."""
    if record is None:
        return 0, 0
    found = [
        [int(address.rpartition(":")[2]) for address in addresses if address.startswith("tcp://")]
        for addresses in (record.control, record.bulk)
    ]
    return (found[0] or [0])[0], (found[1] or [0])[0]
