"""The bulk thread: moves the bytes of large objects, beside control and never in its way.

    control loop ──pull, connect, …──► queue ─► ┌─────────────────────────────┐ ◄─ FETCH ── other parties
                                                │ Links   sockets, who is who │ ── CHUNK ─►
    control loop ◄─take─ completions ◄── wake ─ │ Transfers  the brain        │ ── FETCH ─►
                                                └──┬───────────────────────┬──┘ ◄─ CHUNK ──
                                      Provider: whose bytes            Sink: where bytes go

A client and an agent have one each. Everything but `read`, `write` and the like of provider and sink is decided by
`gcref.brains.transfer` (what to ask, of whom, when to give up) and `gcref.carriers.bulk.links` (who is connected).

    bulk = BulkThread(BulkIdentity(party, "endpoint", keys), provider, sink, wake=loop.wake, allowed=roles)
    bulk.start()
    address = bulk.listen("tcp://127.0.0.1:*")
    bulk.connect(source, "tcp://site:4001", server_key, "direct")
    bulk.pull(id, attempt, size, source, token)
    … wake() is called; then …
    for done in bulk.take(): match done: Pulled(…) | PullFailed(…)

Rules:
    - A range is sent from where it lies. ZeroMQ keeps the buffer until it has gone out; the `Reading` is released then.
      What goes through a mailbox is sealed, and copied for that.
    - A range is copied once, from where ZeroMQ put it into the sink. Who writes decides whether that holds the GIL.
    - Rights are those of the key of each frame, looked up when the frame is handled. A peer shows a read token.
    - Provider and sink are called on the bulk thread; whatever they raise ends one pull or one question, nothing else.

A thread that computes in Python all the time makes this one wait for the GIL, up to `sys.getswitchinterval()` for each
system call: a process that is both busy and a source of bytes does well to lower it.

Measured on two cores with 1 GB from process to process into warm memory, beside `sendall` → `recv_into` of the same bytes
(1.9 to 2.1 GB/s): 0.6 to 0.7 GB/s over TCP with CURVE, 2.2 over ipc. Encryption is the limit: sender and receiver use 1.5 s
of processor time per GB each, so one link fills two cores; a second connection, with its own I/O thread, was slower (0.55),
and windows from 4 to 16 MiB made no difference.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from gcref import ids
from gcref.brains import transfer_events as ev
from gcref.brains.transfer import RANGE_TIMEOUT_S, Transfers
from gcref.carriers.bulk.link import BulkIdentity, Down, Link, Message, Unreached, Up, write_header
from gcref.carriers.bulk.links import Links
from gcref.carriers.bulk.outbox import Outbox, Waker
from gcref.carriers.bulk.ports import Completion, Provider, Pulled, PullFailed, Sink, Writable
from gcref.carriers.bulk.serving import Server
from gcref.config import ENDPOINT_LOST_S, HEARTBEAT_S
from gcref.wire.messages import CHUNK, FETCH, MODE_BYTES, MODE_INTO

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gcref.brains.peers_events import Candidate
    from gcref.carriers.mail.post import Mailbox

log = logging.getLogger(__name__)


class BulkThread:
    """Serves and pulls the bytes of one party. All methods may be called from any thread; none of them waits.

    Args:
        me: who this side is.
        provider: answers others.
        sink: takes what is pulled.
        wake: called on the bulk thread after completions were added; it must be quick, and never raise.
        allowed: role (`user` or `peer`) by owner key (z85) of those who may come in over TCP. It is looked at anew
            each time: it may be a live mapping that others change.
        range_timeout_s: patience with one range, in seconds.
        no_link_s: how long a pull waits for a link to its source, in seconds.
        heartbeat_s: silence after which a link is asked for a sign of life, seconds.
        mailbox: our mailbox, whose lane for bulk becomes this thread's; None: there is none. It is not closed here.

    Attributes:
        completions: what has ended and was not taken yet.
    """

    def __init__(
        self,
        me: BulkIdentity,
        provider: Provider,
        sink: Sink,
        *,
        wake: Callable[[], None],
        allowed: Mapping[bytes, str] | None = None,
        range_timeout_s: float = RANGE_TIMEOUT_S,
        no_link_s: float = ENDPOINT_LOST_S,
        heartbeat_s: float = HEARTBEAT_S,
        mailbox: Mailbox | None = None,
    ) -> None:
        self.completions: deque[Completion] = deque()
        self._kind = me.kind
        self._sink = sink
        self._wake_control = wake
        first_request = int.from_bytes(os.urandom(4), "big")
        self._brain = Transfers(
            range_timeout_s=range_timeout_s, no_link_s=no_link_s, first_request=first_request
        )
        self._links = Links(
            me,
            {} if allowed is None else allowed,
            partial(self._guarded, self._take_link_event),
            heartbeat_s=heartbeat_s,
            mailbox=mailbox,
        )
        self._by_number: dict[int, Link] = {}
        self._writables: dict[bytes, Writable] = {}
        self._causes: dict[bytes, BaseException] = {}
        self._waker = Waker()
        self._outbox = Outbox(self._waker.wake)
        self._server = Server(provider, self._links.requester, self._outbox)
        self._commands: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._closing = self._ended = False
        self._thread = threading.Thread(target=self._run, name="gcref-bulk", daemon=True)

    # ------------------------------------------------------------------------------------ from other threads

    def start(self) -> None:
        """Start the thread. Commands may be given before."""
        _settle_allocator()
        self._thread.start()

    def listen(self, address: str) -> str:
        """Let others come in. The one method that waits, for the socket to be bound: milliseconds.

        Args:
            address: `tcp://interface:port` (`*` for any), or `ipc://path` in a folder that is closed to others.

        Returns:
            The address with its port.

        Raises:
            ConfigError: the address is taken, or not possible, or its folder is open to others.
        """
        answer: Future[str] = Future()
        self._command(self._do_listen, address, answer)
        if self._ended:
            self._refuse_commands()
        return answer.result()

    def set_allowed(self, allowed: Mapping[bytes, str]) -> None:
        """Replace the list of those who may come in. It holds for open connections too."""
        self._command(self._links.set_allowed, dict(allowed))

    def connect(
        self, party: bytes, address: str, server_key: bytes | None, carrier: str, role: str | None = None
    ) -> None:
        """Dial a party, and keep dialling. Give all addresses at once; the best that answers is used.

        The same address again changes nothing, except that one that has refused us is tried anew.

        Args:
            party: who must answer there.
            address: `tcp://…`, `ipc://…` or `mailbox://…`.
            server_key: the key that he must prove (z85); None is possible over ipc only.
            carrier: `ipc`, `direct` or `broker`.
            role: what that party may do over this link; None: as the list says, else `peer`.
        """
        self._command(self._links.connect, party, address, server_key, carrier, role)

    def reach(self, party: bytes, ways: Sequence[Candidate], role: str | None = None) -> None:
        """Dial a party at all these addresses, and at no others any more; what is unchanged stays as it is.

        Pulls that are under way go on where they were, over whichever link answers.

        Args:
            party: who must answer there.
            ways: carrier, address and key of each, as in `connect`.
            role: as in `connect`.
        """
        self._command(self._links.reach, party, tuple(ways), role)

    def disconnect(self, party: bytes) -> None:
        """End the links with a party. Its pulls wait for another one, or to be cancelled."""
        self._command(self._links.disconnect, party)

    def pull(
        self,
        id: bytes,
        attempt: int,
        size: int,
        source: bytes,
        token: bytes | None = None,
        mode: int = MODE_BYTES,
        key: bytes | None = None,
    ) -> None:
        """Get an object. It ends in one completion, unless it is cancelled.

        It may be asked before there is a link to the source. The same pull again is no news; one for another attempt
        or from another source takes its place, and only that one is reported.

        Args:
            id: the object.
            attempt: the attempt whose bytes are wanted; any other is refused.
            size: bytes of the blob.
            source: the party that has it.
            token: read token, for a source that sees a peer in us.
            mode: what to do if the link is ipc: MODE_PATH (`Sink.adopt` is handed the source's own file), MODE_INTO (the
                source writes into the file of `Writable.share`), MODE_BYTES. Over other links it is always bytes,
                and also over ipc if the quick way does not work.
            key: the owner key (z85) that the source must have proven; None: any link that says it is the source.
        """
        self._command(self._do_pull, id, attempt, size, source, token, mode, key)

    def cancel(self, id: bytes) -> None:
        """Drop a pull. It is not reported any more, unless its completion is waiting to be taken already."""
        self._command(self._do_cancel, id)

    def take(self) -> list[Completion]:
        """Take what has ended."""
        taken: list[Completion] = []
        while True:
            try:
                taken.append(self.completions.popleft())
            except IndexError:
                return taken

    def counters(self) -> dict[tuple[bytes, str, str], int]:
        """Bytes of objects by (party, carrier, `in` or `out`). What was linked or mapped counts with its size."""
        found = {
            (party, carrier, "in"): count for (party, carrier), count in self._brain.received.copy().items()
        }
        for (party, carrier), count in self._server.sent.copy().items():
            found[party, carrier, "out"] = count
        return found

    def progress(self, id: bytes) -> tuple[int, int, str | None] | None:
        """Bytes here, bytes in all, and the carrier in use, of a pull that has not ended; else None."""
        return self._brain.progress(id)

    def pulls(self) -> list[bytes]:
        """The objects whose pulls have not ended."""
        return self._brain.pulls()

    def describe(self, party: bytes) -> list[dict[str, Any]]:
        """The links to a party: carrier, address, state, since when (unix seconds), last error."""
        return self._links.describe(party)

    def close(self) -> None:
        """End the thread. What is being pulled is aborted and not reported; what is being sent breaks off."""
        self._closing = True
        if self._thread.ident is None:
            if not self._ended:
                self._shut()
            return
        self._waker.wake()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def use_mailbox(self, mailbox: Mailbox) -> None:
        """Our mailbox, where it was opened only after this thread was made; a second one is not taken."""
        self._command(self._links.mail.use, mailbox, self._waker.wake)

    def _command(self, run: Callable[..., None], *args: Any) -> None:
        self._commands.append((run, args))
        self._waker.wake()

    # ---------------------------------------------------------------------------------------------- the loop

    def _run(self) -> None:
        links, brain, commands, server = self._links, self._brain, self._commands, self._server
        links.watch_descriptor(self._waker.descriptor, self._waker.clear)
        links.mail.attach(self._waker.wake)
        try:
            while not self._closing:
                deadline = brain.deadline
                moments = [at for at in (deadline, server.retry_at) if at is not None]
                timeout_s = min(moments) - time.monotonic() if moments else None
                links.poll(0 if commands else timeout_s)
                while commands:
                    run, args = commands.popleft()
                    self._guarded(run, *args)
                self._guarded(links.mail.take)
                self._outbox.release()
                if server.retry_at is not None and time.monotonic() >= server.retry_at:
                    self._guarded(server.serve_waiting)
                if deadline is not None and time.monotonic() >= deadline:
                    self._guarded(self._tell, ev.Tick(time.monotonic()))
        finally:
            self._shut()

    def _guarded(self, run: Callable[..., None], *args: Any) -> None:
        try:
            run(*args)
        except Exception:
            log.exception("bulk: %s failed", getattr(run, "__name__", run))

    def _shut(self) -> None:
        for writable in self._writables.values():
            self._guarded(writable.abort)
        self._writables.clear()
        self._links.close()
        self._outbox.close(self._waker)
        self._waker.close()
        self._ended = True
        self._refuse_commands()

    def _refuse_commands(self) -> None:
        """After the end: nobody must wait for an answer."""
        while True:
            try:
                run, args = self._commands.popleft()
            except IndexError:
                return
            if run == self._do_listen:
                args[1].set_exception(RuntimeError("the bulk thread has ended"))

    def _do_listen(self, address: str, answer: Future[str]) -> None:
        try:
            answer.set_result(self._links.listen(address))
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            answer.set_exception(error)

    def _do_pull(
        self,
        id: bytes,
        attempt: int,
        size: int,
        source: bytes,
        token: bytes | None,
        mode: int,
        key: bytes | None,
    ) -> None:
        self._tell(ev.Pull(id, attempt, size, source, token, mode, key, time.monotonic()))

    def _do_cancel(self, id: bytes) -> None:
        self._tell(ev.Cancel(id, time.monotonic()))

    def _take_link_event(self, event: Up | Down | Unreached | Message) -> None:
        link = event.link
        match event:
            case Message(_, fields, data):
                if fields[0] == CHUNK:
                    self._tell(ev.Chunk._make((link.number, *fields[1:9], data, time.monotonic())))
                elif fields[0] == FETCH:
                    self._server.serve(link, fields)
            case Up():
                self._by_number[link.number] = link
                self._tell(ev.LinkUp(link.number, link.party, link.carrier, link.key, time.monotonic()))
            case Down(_, reason):
                self._by_number.pop(link.number, None)
                self._tell(ev.LinkDown(link.number, reason, time.monotonic()))
            case Unreached(_, reason, refused):
                self._tell(ev.Trouble(link.party, reason, refused))

    # ----------------------------------------------------------------------------------------------- pulling

    def _tell(self, event: ev.Event) -> None:
        """Tell the brain, and do what it says until it says nothing more."""
        completed = False  # not by counting: others take what has completed at any time
        events: deque[ev.Event] = deque((event,))
        while events:
            failed: set[bytes] = set()
            for instruction in self._brain.handle(events.popleft()):
                completed |= isinstance(instruction, ev.Done | ev.Failed)
                if instruction.id not in failed and (news := self._obey(instruction)) is not None:
                    events.append(news)
                    if not isinstance(news, ev.Unsent):
                        failed.add(instruction.id)
        if completed:
            self._wake_control()

    def _obey(self, instruction: ev.Instruction) -> ev.Event | None:
        """Do it. Returns what the brain must hear, and then the rest about this object is void."""
        id = instruction.id
        try:
            match instruction:
                case ev.Write(_, offset, data):
                    self._writables[id].write(offset, data)
                case ev.Fetch():
                    return self._fetch(instruction)
                case ev.Begin(_, attempt, size):
                    self._writables[id] = self._sink.begin(id, attempt, size)
                case ev.Seal():
                    self._writables[id].seal()
                    del self._writables[id]
                    return ev.Sealed(id, time.monotonic())
                case ev.Adopt(_, attempt, path, size):
                    return self._adopt(id, attempt, path, size)
                case ev.Abort():
                    writable = self._writables.pop(id, None)
                    if writable is not None:
                        writable.abort()
                case ev.Done():
                    self._causes.pop(id, None)
                    self.completions.append(Pulled(*instruction[:5]))
                case ev.Failed(_, attempt, source, reason, message):
                    cause = self._causes.pop(id, None)
                    log.info("bulk: pull of %s failed: %s, %s", ids.text(id), reason, message)
                    self.completions.append(PullFailed(id, attempt, source, reason, message, cause))
        except Exception as error:
            if isinstance(instruction, ev.Abort):
                log.exception("bulk: giving up %s failed", ids.text(id))
                return None
            self._causes[id] = error
            return ev.SinkFailed(id, f"{type(error).__name__}: {error}", time.monotonic())
        return None

    def _fetch(self, fetch: ev.Fetch) -> ev.Event | None:
        path = None
        if fetch.mode == MODE_INTO:
            path = self._writables[fetch.id].share()
            if path is None:
                return ev.WayFailed(fetch.id, "the store cannot be shared", time.monotonic())
        link = self._by_number[fetch.link]
        if link.send(write_header([FETCH, *fetch[1:], path, self._kind])):
            return None
        return ev.Unsent(fetch.link, fetch.request, time.monotonic())

    def _adopt(self, id: bytes, attempt: int, path: str, size: int) -> ev.Event:
        try:
            self._sink.adopt(id, attempt, path, size)
        except (OSError, NotImplementedError) as error:
            log.info("bulk: %s comes as bytes, its file cannot be had: %s", ids.text(id), error)
            return ev.WayFailed(id, str(error), time.monotonic())
        return ev.Sealed(id, time.monotonic())


def _settle_allocator() -> None:
    """Have the allocator keep the memory of messages, instead of giving it back and getting it zeroed for each.

    glibc takes the size of the largest block that it has ever unmapped for what this process deals in, and keeps
    twice as much. The block is never touched, so this costs nothing; elsewhere it does nothing. Measured: 50 000 page
    faults per 2 GB become 1 600, and the receiver needs a tenth less of processor time.

    Source: mallopt(3), M_MMAP_THRESHOLD.
    """
    bytearray(31 * 1024 * 1024)
