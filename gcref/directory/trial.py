"""Trying every way to an endpoint: does it work, how fast is it, and if not, why not and what helps.

    record ── ways ──► one thread each:  TCP connection ─► handshake and a knock (TRY) ─► its data (ECHO): latency, speed
                                             │ fails            │ fails                       │ fails
                                             └──────────────────┴─────────────► problem and remedy

Each way is a stranger to the others: a party of its own, with one candidate, as though there were no better one. Connections
are tried all at once, because those that fail take the longest; what works is measured one after the other.
An agent does this for its owner (`TRY`), and `gcref doctor` for the client that it runs for.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

from gcref import ids
from gcref.brains import peers_events as pe
from gcref.carriers.base import Carrier
from gcref.carriers.bulk.link import BulkIdentity
from gcref.carriers.bulk.ports import Pulled
from gcref.carriers.bulk.thread import BulkThread
from gcref.carriers.combined import Carriers
from gcref.carriers.keys import KeyPair
from gcref.carriers.mail import post
from gcref.carriers.mail.post import Mailbox
from gcref.carriers.zeromq import ZeroMQCarrier
from gcref.directory import asking
from gcref.directory.records import EndpointRecord
from gcref.directory.visit import Postbox
from gcref.errors import AuthError, GcrefError, VersionMismatchError
from gcref.wire import messages as m

CONNECT_S: Final = 3.0
"""How long a TCP connection may take. Where a firewall drops silently nothing ever comes."""
ANSWER_S: Final = 5.0
"""How long a handshake, or the first byte of data, may take."""
ROUNDS: Final = 7
"""Round trips of which the median is the latency; one more before them warms the link."""
ENOUGH_S: Final = 0.4
"""A transfer that took so long tells the speed."""
FIRST_BYTES: Final = 256 * 1024
MOST_BYTES: Final = 512 * 1024 * 1024
MOST_BYTES_BY_BROKER: Final = 32 * 1024 * 1024
"""Other people's messages pass through it too."""
TRANSFER_S: Final = 15.0
"""No transfer takes longer: then what has come by then tells the speed."""
ALL_S: Final = 45.0
"""Everything together takes no longer; who asks an agent to try waits for so long."""


_TOKEN: Final = bytes(16)  # a peer must show one; for this object any will do
_TEXT_MAX: Final = 2000


class Rung(NamedTuple):
    """One way, and what became of it.

    Attributes:
        carrier: `ipc`, `direct` or `broker`.
        address: what was tried; empty: there was nothing to try.
        latency_s: seconds from asking for a byte until it is here; None: it does not work.
        bytes_per_s: of a transfer; None: it does not work.
        problem: why it does not work, in a sentence; empty: it works.
        remedy: what to do about that.
    """

    carrier: str
    address: str
    latency_s: float | None = None
    bytes_per_s: float | None = None
    problem: str = ""
    remedy: str = ""

    @property
    def works(self) -> bool:
        """Messages and data pass."""
        return self.latency_s is not None

    @classmethod
    def from_map(cls, told: Any) -> Rung:
        """What another process has found.

        Raises:
            ValueError: it is no such map.
        """
        if not isinstance(told, dict):
            raise ValueError("a rung is a map")
        texts = [told.get(key, "") for key in ("carrier", "address", "problem", "remedy")]
        numbers = [told.get(key) for key in ("latency_s", "bytes_per_s")]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a text of a rung is none")
        if not all(number is None or type(number) in (int, float) for number in numbers):
            raise ValueError("a figure of a rung is none")
        carrier, address, problem, remedy = (text[:_TEXT_MAX] for text in texts)
        return cls(carrier, address, numbers[0], numbers[1], problem, remedy)


def try_all(
    record: EndpointRecord,
    pair: KeyPair,
    allowed: frozenset[str],
    open_mail: Callable[[], Postbox],
    patient: bool = False,
) -> list[Rung]:
    """Try every way to an endpoint. Takes seconds: for a thread that may wait.

    Args:
        record: of the endpoint.
        pair: with whose key.
        allowed: the ways that may be used here.
        open_mail: gives a mailbox of a party of that key (`Visit.open_mail`); called if the endpoint has one too. Its
            GcrefErrors are problems of that way.
        patient: a key that is refused is tried again for a while: endpoints hear of new keys from the hub a moment later.

    Returns:
        One or more for each of ipc, direct, broker, in this order.
    """
    measuring = threading.Lock()
    jobs = list(_ways(record, allowed))
    with ThreadPoolExecutor(len(jobs), thread_name_prefix="gcref-trial") as threads:

        def work(job: Rung | pe.Candidate) -> Rung:
            return job if isinstance(job, Rung) else _try(record, job, pair, open_mail, patient, measuring)

        return list(threads.map(work, jobs))


def chosen(rungs: list[Rung]) -> Rung | None:
    """The way that is used, of those that work; None: none does."""
    return next((rung for rung in rungs if rung.works), None)


def _ways(record: EndpointRecord, allowed: frozenset[str]) -> list[Rung | pe.Candidate]:
    """What there is to try, and for what there is not, why."""
    key = record.public_key.encode("ascii")
    found: list[Rung | pe.Candidate] = []
    for carrier in ("ipc", "direct", "broker"):
        if carrier not in allowed:
            problem = "the settings on this side leave it out"
            found.append(Rung(carrier, "", problem=problem))
            continue
        if carrier == "ipc":
            ways = [("ipc", address, None) for address in record.control if address.startswith("ipc://")]
            if not ways or not record.same_host():
                problem = "not on the same machine under the same user"
                if record.same_host():
                    problem = "its settings leave it out"
                found.append(Rung("ipc", "", problem=problem))
                continue
            found += ways
        elif carrier == "direct":
            addresses = [address for address in record.control if address.startswith("tcp://")]
            found += [("direct", address, key) for address in addresses]
            if not addresses:
                problem = "it listens on no TCP port"
                remedy = (
                    f"if it is to be dialled, allow direct in the configuration of endpoint {record.name!r}"
                )
                found.append(Rung("direct", "", problem=problem, remedy=remedy))
        elif record.mailbox:
            found.append(("broker", post.address_of(record.id), key))
        else:
            problem = "it has no mailbox"
            remedy = f"give {record.name!r} a hub: GCREF_HUB_URL and GCREF_TOKEN where it is started"
            found.append(Rung("broker", "", problem=problem, remedy=remedy))
    return found


class _Failed(Exception):  # noqa: N818 - it never leaves this module
    """A way does not work."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


def _try(
    record: EndpointRecord,
    way: pe.Candidate,
    pair: KeyPair,
    open_mail: Callable[[], Postbox],
    patient: bool,
    measuring: threading.Lock,
) -> Rung:
    carrier, address, _key = way
    party, mailbox = ids.new_id(), None
    moves: Carrier = ZeroMQCarrier(pair, {})
    try:
        if carrier == "direct":
            _connect(address)
        elif carrier == "broker":
            party, mailbox = open_mail()
            moves = Carriers(moves, mailbox)
        question = {record: [m.TRY, 1, None, None]}
        answers = asking.converse(
            moves,
            party,
            pair.public,
            question,
            {record.id: [way]},
            timeout_s=ANSWER_S,
            patient=patient,
        )
        _judge(answers[record.id], carrier, mailbox)
        with measuring:
            latency_s, bytes_per_s = _measure(record, way, BulkIdentity(party, pe.CLIENT, pair), mailbox)
        return Rung(carrier, address, latency_s, bytes_per_s)
    except _Failed as failed:
        return Rung(carrier, address, problem=failed.problem, remedy=failed.remedy)
    except GcrefError as error:
        return Rung(carrier, address, problem=f"{type(error).__name__}: {error}")
    finally:
        moves.close()


def _connect(address: str) -> None:
    """See whether anybody takes a connection there: the system's own words say best why not."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except TimeoutError:
        raise _Failed(
            f"no answer within {CONNECT_S:g} s: a firewall drops it, or the machine is away",
            "have the port opened (a fixed one by `port` and `bulk_port` in its config.toml), or do without: the broker needs "
            "no open port",
        ) from None
    except ConnectionRefusedError:
        raise _Failed(
            "refused: nobody listens there, or a firewall answers for it",
            "see whether it runs (`endpoint-worker status NAME`), and whether `advertise` in its config.toml names it right",
        ) from None
    except socket.gaierror as error:
        raise _Failed(
            f"the name cannot be resolved here: {error.strerror}",
            "set `advertise` in its config.toml to what others can dial",
        ) from None
    except OSError as error:
        raise _Failed(
            f"no way there: {error.strerror or error}",
            "set `advertise` in its config.toml to what others can dial; an address of an inner network is of no use outside",
        ) from None


def _judge(answer: Any, carrier: str, mailbox: Mailbox | None) -> None:
    """What came of the handshake, and of one message there and back."""
    match answer:
        case AuthError() as error:
            raise _Failed(
                f"the handshake was refused: {error}",
                "have this side's key let in there: `gcref share ENDPOINT USER` with a hub, else a line in its authorized_keys",
            )
        case VersionMismatchError() as error:
            raise _Failed(str(error), "install the same version of gcref on both sides")
        case GcrefError() if carrier == "direct":
            raise _Failed(
                f"it takes connections, but does not answer within {ANSWER_S:g} s",
                "see whether it runs (`endpoint-worker status NAME`); a tunnel takes connections for the dead too",
            )
        case GcrefError():
            detail = "" if mailbox is None else f" ({_mail_trouble(mailbox)})"
            raise _Failed(
                f"no answer within {ANSWER_S:g} s{detail}",
                "see whether it runs: `endpoint-worker status NAME`",
            )
        case _:
            pass


def _mail_trouble(mailbox: Mailbox) -> str:
    facts = mailbox.describe()
    return (
        "the broker is connected"
        if facts.get("up")
        else f"the broker: {facts.get('error') or 'not connected'}"
    )


def _measure(
    record: EndpointRecord, way: pe.Candidate, me: BulkIdentity, mailbox: Mailbox | None
) -> tuple[float, float]:
    """Latency in seconds, and speed in bytes per second, of data by this way."""
    come = threading.Event()
    bulk = BulkThread(
        me,
        _Nobody(),
        _Nowhere(),
        wake=come.set,
        no_link_s=ANSWER_S,
        range_timeout_s=ANSWER_S,
        mailbox=mailbox,
    )
    bulk.start()
    try:
        bulk.reach(record.id, [_bulk_way(record, way)])

        def pull(size: int) -> tuple[int, float]:
            come.clear()
            start = time.monotonic()
            bulk.pull(m.ECHO_ID, 0, size, record.id, _TOKEN)
            finished = come.wait(TRANSFER_S)
            seconds = time.monotonic() - start
            if finished:
                (done,) = bulk.take()
                if not isinstance(done, Pulled):
                    raise _Failed(
                        f"messages pass, but data does not: {done.message}",
                        f"data has a port of its own ({_bulk_way(record, way)[1]}): open `bulk_port` like `port`"
                        if way[0] == "direct"
                        else "",
                    )
                return size, seconds
            here, _all, _carrier = bulk.progress(m.ECHO_ID) or (0, 0, None)
            if not here:
                raise _Failed(f"messages pass, but no data came within {TRANSFER_S:g} s")
            return here, seconds

        pull(1)
        latency_s = statistics.median(pull(1)[1] for _ in range(ROUNDS))
        most = MOST_BYTES_BY_BROKER if way[0] == "broker" else MOST_BYTES
        size = FIRST_BYTES
        while True:
            count, seconds = pull(size)
            if seconds >= ENOUGH_S or size >= most:
                return latency_s, count / seconds
            size = min(most, int(size * min(16.0, 1.5 * ENOUGH_S / max(seconds, 1e-4))) + 1)
    finally:
        bulk.close()


def _bulk_way(record: EndpointRecord, way: pe.Candidate) -> pe.Candidate:
    """The way of the data beside that of the messages: the same host, another port."""
    carrier, address, key = way
    if carrier == "broker":
        return way
    host = address.rpartition(":")[0]
    for other in record.bulk:
        if other.startswith("ipc://") if carrier == "ipc" else other.rpartition(":")[0] == host:
            return carrier, other, key
    raise _Failed("it names an address for messages, but none for data", "start it again")


class _Nobody:
    """Nobody is served here."""

    def read(self, *_asked: Any) -> Any:
        raise LookupError("nothing is kept here")

    expose = fill = read


class _Nowhere:
    """Takes bytes, and lets them go."""

    def begin(self, _id: bytes, _attempt: int, _size: int) -> _Nowhere:
        return self

    def adopt(self, _id: bytes, _attempt: int, _path: str, _size: int) -> object:
        raise NotImplementedError("bytes are wanted")

    def write(self, _offset: int, _data: Any) -> None: ...

    def share(self) -> str | None:
        return None

    def seal(self) -> None: ...

    def abort(self) -> None: ...
