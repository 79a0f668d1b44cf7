"""The client's side of the bulk thread: uploads, and fetches of values that lie at their homes.

    submit, put ── upload ──► offered, until the endpoint has it
    result()    ── fetch ───► one Pull, however many wait ──► bulk thread ──► take_completions ──► Pull.finish

The bulk thread is started by the first large value, so that small work never pays for it. `fetch` and `upload` may be
called from any thread; everything else belongs to the I/O thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from gcref import ids
from gcref.brains import submitter_events as ev
from gcref.brains.submitter_table import Stored
from gcref.errors import AuthError, EndpointLostError, LostReason, ObjectLostError
from gcref.objects.blob import Encoded
from gcref.sdk.transfers import Arrivals, Pull, Upload, Uploads
from gcref.wire import messages as m

if TYPE_CHECKING:
    from gcref.carriers.bulk.thread import BulkThread
    from gcref.carriers.keys import KeyPair
    from gcref.carriers.mail.post import Mailbox
    from gcref.sdk.loop import Loop
    from gcref.sdk.whereabouts import Ways

Key = tuple[bytes, int]
"""A fetch: the object's id, and the attempt whose bytes are wanted."""

MakeError = Callable[[], BaseException]


class _Wanted(NamedTuple):
    """What is to be fetched: as it was when somebody asked, because a later attempt may take its place."""

    key: Key
    size: int
    source: bytes
    token: bytes | None


class LargeValues:
    """Moves large blobs for one client.

    Args:
        loop: the I/O thread.
        keys: the owner's keys.
        relay: the one party to speak to (inside a task); None speaks to each home.
        no_link_s: how long a fetch waits for a link, seconds.
    """

    def __init__(self, loop: Loop, keys: KeyPair, relay: bytes | None, no_link_s: float) -> None:
        self._loop = loop
        self._keys = keys
        self._relay = relay
        self._no_link_s = no_link_s
        self._uploads = Uploads()
        self._arrivals = Arrivals()
        self._lock = threading.Lock()  # guards `_pulls`, and the `pull` of each Stored
        self._pulls: dict[Key, Pull] = {}
        self._sources: dict[Key, bytes] = {}
        self._waiting: list[_Wanted] = []  # until there is a bulk thread
        self._wanted: set[bytes] = set()  # parties that bytes are to flow to or from
        self._bulk: BulkThread | None = None

    # ------------------------------------------------------------------------------------------- from any thread

    def upload(self, id: bytes, encoded: Encoded, home: bytes) -> Upload:
        """Offers a blob to an endpoint; it can be fetched as long as the caller keeps what this returns."""
        reader = self._relay or home
        upload = Upload(id, encoded, reader)
        self._uploads.add(upload)
        self._loop.post(lambda: self._meet(reader))
        return upload

    def fetch(self, stored: Stored) -> Pull:
        """Starts to fetch a value, or joins the fetch under way."""
        with self._lock:
            key = (stored.id, stored.attempt)
            wanted = _Wanted(key, stored.size, self._relay or stored.home, stored.token)
            pull: Pull | None = stored.pull or self._pulls.get(key)
            if pull is not None and not pull.has_failed:
                stored.pull = pull
                return pull
            pull = stored.pull = self._pulls[key] = Pull()
        try:
            self._loop.post(lambda: self._start(wanted))
        except RuntimeError:
            self._end(key, None, lambda: EndpointLostError("the client has ended"))
        return pull

    def bytes_moved(self) -> dict[tuple[bytes, str, str], int]:
        """Bytes of large blobs by (party, carrier, "in" or "out")."""
        bulk = self._bulk
        return {} if bulk is None else bulk.counters()

    # -------------------------------------------------------------------------------------------- on the I/O thread

    def is_busy(self) -> bool:
        """Whether something is being fetched."""
        return bool(self._pulls)

    def uploads(self) -> list[bytes]:
        """What was offered and has not been fetched yet."""
        return self._uploads.ids()

    def is_uploading(self, id: bytes) -> bool:
        """Whether that was offered and has not been fetched yet."""
        return id in self._uploads

    def forget_uploads(self, ids: Iterable[bytes]) -> None:
        """An endpoint has these."""
        for id in ids:
            self._uploads.forget(id)

    def renewed(self, items: Iterable[tuple[Any, int, Any, int]]) -> None:
        """Later attempts have made these: (holder, OK or STORED, blob or size, attempt)."""
        for holder, status, value, attempt in items:
            future = holder()
            raw = None if future is None else future._raw
            if type(raw) is Stored:
                small = value if status == m.OK else None
                self.renew(raw, attempt, value if small is None else len(small), small)

    def renew(self, stored: Stored, attempt: int, size: int, value: bytes | None) -> None:
        """The home of a value that was not fetched yet has made it once more, and has the bytes of that attempt alone.

        Args:
            stored: where it is fetched from.
            attempt: the new one.
            size: bytes of its blob.
            value: the blob, where it is small by now; None: it lies at its home.
        """
        with self._lock:
            if attempt <= stored.attempt:
                return
            stored.attempt, stored.size, stored.pull = attempt, size, None
            if value is not None:
                stored.pull = Pull()
                stored.pull.finish(memoryview(value))

    def ways_changed(self, party: bytes, ways: Ways) -> None:
        """A party is reached by these ways, and by no others: its earlier process is gone."""
        if party in self._wanted:
            if self._bulk is not None:
                self._bulk.disconnect(party)  # what is being fetched goes on by the new ways
            self._connect(party, ways)

    def mail_opened(self, mailbox: Mailbox) -> None:
        """We have a mailbox now: those whom we cannot dial are reached through theirs."""
        if self._bulk is not None:
            self._bulk.use_mailbox(mailbox)

    def leave(self, party: bytes, error: MakeError) -> None:
        """Nobody tries to reach that party any more: fetches from there fail."""
        if party in self._wanted and self._bulk is not None:
            self._wanted.discard(party)
            self._bulk.disconnect(party)
        for key in [key for key, source in self._sources.items() if source == party]:
            if self._bulk is not None:
                self._bulk.cancel(key[0])
            self._end(key, None, error)

    def take_completions(self) -> None:
        """Takes what the bulk thread has done."""
        bulk = self._bulk
        if bulk is None or not bulk.completions:
            return
        for done in bulk.take():
            key = (done.id, done.attempt)
            buffer = self._arrivals.take(*key)
            self._end(key, buffer, None if buffer is not None else _error(done))

    def end_all(self, error: MakeError) -> None:
        """Every fetch fails."""
        for key in list(self._pulls):
            self._end(key, None, error)

    def close(self) -> None:
        """Ends the bulk thread."""
        if self._bulk is not None:
            self._bulk.close()

    def _meet(self, party: bytes) -> None:
        """Makes sure that bytes can flow between here and there."""
        if party in self._wanted:
            return
        self._wanted.add(party)
        ways = self._loop.reaching.ways_to(party)
        if ways is not None:
            self._connect(party, ways)

    def _connect(self, party: bytes, ways: Ways) -> None:
        bulk = self._bulk or self._start_bulk()
        for carrier, address, key in ways.bulk:
            bulk.connect(party, address, key, carrier, "user")
        waiting, self._waiting = self._waiting, []
        for wanted in waiting:
            self._pull(bulk, wanted)

    def _start_bulk(self) -> BulkThread:
        from gcref.carriers.bulk.link import BulkIdentity
        from gcref.carriers.bulk.thread import BulkThread

        identity = BulkIdentity(self._loop.me, "client", self._keys)
        hub = self._loop.hub
        bulk = self._bulk = BulkThread(
            identity,
            self._uploads,
            self._arrivals,
            wake=self._loop.wake,
            no_link_s=self._no_link_s,
            mailbox=None if hub is None else hub.opened,
        )
        bulk.start()
        return bulk

    def _start(self, wanted: _Wanted) -> None:
        source = self._sources[wanted.key] = wanted.source
        self._meet(source)
        # The endpoint is needed now: should it be out of reach, somebody has to notice.
        self._loop.tell(ev.FetchBegan(source, time.monotonic()))
        if self._bulk is None:
            self._waiting.append(wanted)
        else:
            self._pull(self._bulk, wanted)

    def _pull(self, bulk: BulkThread, wanted: _Wanted) -> None:
        if wanted.key in self._sources:  # else it was given up meanwhile
            id, attempt = wanted.key
            bulk.pull(id, attempt, wanted.size, wanted.source, wanted.token, m.MODE_PATH)

    def _end(self, key: Key, buffer: memoryview | None, error: MakeError | None) -> None:
        source = self._sources.pop(key, None)
        if source is not None:
            self._loop.tell(ev.FetchEnded(source))
        with self._lock:
            pull = self._pulls.pop(key, None)
        if pull is not None:
            pull.finish(buffer, error)


def _error(done: Any) -> MakeError:
    """What makes the error for a pull that failed."""
    text = f"the value of {ids.text(done.id)} could not be fetched: {getattr(done, 'message', 'it vanished')}"
    reason = getattr(done, "reason", "")
    if reason == "refused":
        return lambda: AuthError(text)
    if reason == "unreachable":
        return lambda: EndpointLostError(text, endpoint_id=ids.text(done.source))
    lost = {"corrupt": LostReason.CORRUPT, "timeout": LostReason.TIMEOUT}.get(reason, LostReason.BYTES_LOST)
    return lambda: ObjectLostError(text, reason=lost, object_id=ids.text(done.id))
