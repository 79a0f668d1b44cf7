"""The transfer brain: pulls objects range by range, over whatever links there are, to exact bytes or a typed failure.

    Pull ──► [ranges to ask] ──Fetch──► in flight ──Chunk──► checked ──Write──► … all here ──Seal──► Sealed ──► Done
                  ▲                         │
                  └── link down, no answer, wrong bytes (counted) ──► too often: Abort, Failed

The receiver decides everything; whoever has the object only answers single questions and remembers nothing. So any
range may come over any link: a broken one costs the ranges that were in flight, and the rest goes on elsewhere.

Rules:
    - An answer counts only if it answers a question that is still open, from the link that was asked, about the same
      object, attempt and range, with the length asked for and the right checksum. All else is dropped: duplicates,
      late answers, other attempts, strangers.
    - A range is in exactly one state: not asked yet, to be asked again, in flight, or here. `Seal` is given once all
      are here and never before; what fails or is cancelled is aborted as a whole.
    - Each source has a window of bytes, all sources together another, and there are narrower ones for what comes
      through mailboxes; sources take turns, and so do the pulls of one source, so a small object never waits behind
      a large one.
    - Between parties on one machine no bytes need to move. PATH asks for a file to link or map; INTO hands the source
      a file to write to. INTO is asked once: after a doubt nobody can say whether the source still writes, so that
      file is given up and the bytes are pulled into a fresh one.
    - Time is judged by progress: a range is overdue when its link has said nothing for `range_timeout_s`, or has
      answered a later question while this one lies open for that long. Mail never overtakes mail: there, a question
      that was passed over is lost, and is asked again at once.
    - What does not fit into what waits to leave is no loss: it is asked again after a pause of that link.

Pure like all brains: `now` is handed in, and checksums are arithmetic.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from gcref.brains.transfer_answers import find_wrong, mark_passed_over
from gcref.brains.transfer_events import (
    Abort,
    Adopt,
    Begin,
    Cancel,
    Chunk,
    Done,
    Event,
    Failed,
    Fetch,
    Instruction,
    LinkDown,
    LinkUp,
    Pull,
    PullReason,
    Seal,
    Sealed,
    SinkFailed,
    Tick,
    Trouble,
    Unsent,
    WayFailed,
    Write,
)
from gcref.brains.transfer_state import BROKER, LinkState, PullState, Request, Source
from gcref.brains.transfer_windows import (
    MAIL_TOTAL_BYTES,
    MAIL_WINDOW_BYTES,
    RANGE_BYTES,
    TOTAL_WINDOW_BYTES,
    WINDOW_BYTES,
    Windows,
    pause,
)
from gcref.config import ENDPOINT_LOST_S
from gcref.errors import LocalProtocolError
from gcref.ids import text
from gcref.wire.messages import MAY_NOT, MODE_BYTES, MODE_INTO, MODE_PATH, NO_SUCH_OBJECT, WAY_CLOSED

if TYPE_CHECKING:
    from collections.abc import Callable

RANGE_TIMEOUT_S: Final = 30.0
"""A range on a link of 1 Mbit/s, with room for those before it: they extend it by arriving."""

WHOLE_BYTES_PER_S: Final = 50e6
"""What a source on this machine writes at the very least when it is asked to fill or restore a whole file."""

_REQUEST_MASK: Final = 0xFFFFFFFF

STRIKES_MAX: Final = 20
STRIKE_BAD: Final = 4
STRIKE_CUT: Final = 1
"""A range is given up after five wrong or missing answers, or after its link went down twenty times under it."""


# ------------------------------------------------------------------------------------------------------- brain


class Transfers:
    """All pulls of a party.

    Args:
        range_bytes: size of a range.
        window_bytes: in flight from one source.
        total_window_bytes: in flight from all.
        mail_window_bytes: in flight from one source through its mailbox.
        mail_total_bytes: in flight through mailboxes from all.
        first_request: the number of the first question. A number that no earlier process of this party has used of
            late keeps answers to that one's questions out, which may wait in a mailbox.
        range_timeout_s: patience with one range, in seconds.
        no_link_s: how long a pull waits for a link to its source, in seconds.

    Attributes:
        received: bytes that were accepted, by (party, carrier). An object that was linked, mapped or filled in
            by its source counts with its size.
    """

    def __init__(
        self,
        *,
        range_bytes: int = RANGE_BYTES,
        window_bytes: int = WINDOW_BYTES,
        total_window_bytes: int = TOTAL_WINDOW_BYTES,
        mail_window_bytes: int = MAIL_WINDOW_BYTES,
        mail_total_bytes: int = MAIL_TOTAL_BYTES,
        first_request: int = 0,
        range_timeout_s: float = RANGE_TIMEOUT_S,
        no_link_s: float = ENDPOINT_LOST_S,
    ) -> None:
        self.received: dict[tuple[bytes, str], int] = {}
        self._range_bytes = range_bytes
        self._windows = Windows(window_bytes, total_window_bytes, mail_window_bytes, mail_total_bytes)
        self._range_timeout_s = range_timeout_s
        self._no_link_s = no_link_s
        self._pulls: dict[bytes, PullState] = {}
        self._sources: dict[bytes, Source] = {}
        self._links: dict[int, LinkState] = {}
        self._troubles: dict[bytes, tuple[str, bool]] = {}  # why a party has no link; whether it refused us
        self._requests: dict[int, Request] = {}
        self._hungry: deque[Source] = deque()
        self._next_request = first_request & _REQUEST_MASK
        self._next_order = 0
        self._check_at: float | None = None
        self._handlers: dict[type[Any], Callable[[Any, list[Instruction]], None]] = {
            Pull: self._pull,
            Cancel: self._cancel,
            LinkUp: self._link_up,
            LinkDown: self._link_down,
            Trouble: self._trouble,
            Unsent: self._unsent,
            Chunk: self._chunk,
            WayFailed: self._way_failed,
            Sealed: self._sealed,
            SinkFailed: self._sink_failed,
            Tick: self._tick,
        }

    @property
    def deadline(self) -> float | None:
        """When a `Tick` is due, in monotonic seconds; None while nothing is being pulled."""
        return self._check_at if self._pulls else None

    def handle(self, event: Event) -> list[Instruction]:
        """Take one event.

        Returns:
            What to do, in this order. When `Begin`, `Write` or `Seal` of an object fails, the rest that concerns
            this object is to be skipped, and `SinkFailed` said afterwards.

        Raises:
            LocalProtocolError: the shell said something that cannot be; nothing has changed.
        """
        out: list[Instruction] = []
        self._handlers[type(event)](event, out)
        return out

    def pulls(self) -> list[bytes]:
        """What is being pulled; any thread may ask."""
        return list(self._pulls)

    def progress(self, id: bytes) -> tuple[int, int, str | None] | None:
        """Bytes here, bytes in all, and the carrier that would be asked next; None: no such pull."""
        pull = self._pulls.get(id)
        if pull is None:
            return None
        link = pull.choose()
        return sum(pull.carriers.values()), pull.size, link.carrier if link else None

    # ------------------------------------------------------------------------------------- pulls come and go

    def _pull(self, event: Pull, out: list[Instruction]) -> None:
        old = self._pulls.get(event.id)
        if old is not None:
            if (old.attempt, old.size, old.source.party) == (event.attempt, event.size, event.source):
                return
            self._drop(old, out)
        source = self._sources.get(event.source)
        if source is None:
            source = self._sources[event.source] = Source(event.source)
        pull = PullState(event, source)
        self._pulls[pull.id] = source.pulls[pull.id] = pull
        self._judge_reach(pull, event.now)
        self._list(pull)
        self._ask_all(event.now, out)

    def _cancel(self, event: Cancel, out: list[Instruction]) -> None:
        pull = self._pulls.get(event.id)
        if pull is not None:
            self._drop(pull, out)
            self._ask_all(event.now, out)

    def _sealed(self, event: Sealed, out: list[Instruction]) -> None:
        pull = self._pulls.get(event.id)
        if pull is None or not pull.sealing:
            raise LocalProtocolError(f"object {text(event.id)} was sealed without being asked to")
        pull.way = None  # nothing is left to abort
        self._drop(pull, out)
        out.append(Done(pull.id, pull.attempt, pull.source.party, pull.size, pull.carriers))

    def _sink_failed(self, event: SinkFailed, out: list[Instruction]) -> None:
        pull = self._pulls.get(event.id)
        if pull is not None:
            self._fail(pull, PullReason.STORE, event.message, out)
            self._ask_all(event.now, out)

    def _way_failed(self, event: WayFailed, out: list[Instruction]) -> None:
        pull = self._pulls.get(event.id)
        if pull is not None and pull.way != MODE_BYTES:
            pull.way_closed = True
            self._restart(pull, out)
            self._ask_all(event.now, out)

    def _fail(self, pull: PullState, reason: PullReason, message: str, out: list[Instruction]) -> None:
        self._drop(pull, out)
        out.append(Failed(pull.id, pull.attempt, pull.source.party, reason, message))

    def _drop(self, pull: PullState, out: list[Instruction]) -> None:
        self._forget_all(pull)
        if pull.begun():
            out.append(Abort(pull.id))
        pull.ended = True
        source = pull.source
        del self._pulls[pull.id]
        del source.pulls[pull.id]
        # What was held against its links may have been this object's fault; the next one starts afresh.
        for link in source.links.values():
            link.strikes = 0
        self._wake(source)
        if not source.pulls and not source.links:
            del self._sources[source.party]

    def _restart(self, pull: PullState, out: list[Instruction]) -> None:
        self._forget_all(pull)
        if pull.begun():
            out.append(Abort(pull.id))
        pull.restart()
        self._list(pull)

    # ------------------------------------------------------------------------------------- links come and go

    def _link_up(self, event: LinkUp, out: list[Instruction]) -> None:
        if event.link in self._links:
            self._link_down(LinkDown(event.link, "it came up anew", event.now), out)
        source = self._sources.get(event.party)
        if source is None:
            source = self._sources[event.party] = Source(event.party)
        self._next_order += 1
        link = LinkState(event, source, self._next_order)
        self._links[link.number] = source.links[link.number] = link
        self._troubles.pop(event.party, None)
        for pull in list(source.pulls.values()):
            self._judge_reach(pull, event.now)
            if self._gains_by(pull, link):
                self._restart(pull, out)
        self._wake(source)
        self._ask_all(event.now, out)

    def _link_down(self, event: LinkDown, out: list[Instruction]) -> None:
        link = self._links.pop(event.link, None)
        if link is None:
            return
        source = link.source
        requests = list(link.requests.values())
        for request in requests:
            self._forget(request)
        del source.links[link.number]
        if not source.links:
            self._troubles[source.party] = event.reason, False
        for request in requests:
            if not request.pull.ended and request.pull.asked.get(request.offset) is None:
                self._again(request, STRIKE_CUT, PullReason.UNREACHABLE, event.reason, out)
        for pull in source.pulls.values():
            self._judge_reach(pull, event.now)
        if not source.pulls and not source.links:
            self._sources.pop(source.party, None)
        self._ask_all(event.now, out)

    def _trouble(self, event: Trouble, out: list[Instruction]) -> None:
        self._troubles[event.party] = event.message, event.refused

    def _judge_reach(self, pull: PullState, now: float) -> None:
        """Note since when no link will do for this pull."""
        if pull.choose() is not None:
            pull.stranded_at = None
        elif pull.stranded_at is None:
            pull.stranded_at = now
            self._check_by(now + self._no_link_s)

    def _gains_by(self, pull: PullState, link: LinkState) -> bool:
        """Whether bytes are on their way that need not move at all, now that there is a link within the machine."""
        if link.rank != 0 or pull.way != MODE_BYTES or pull.way_closed or pull.sealing:
            return False
        return 2 * sum(pull.carriers.values()) <= pull.size and pull.choose() is link

    # ------------------------------------------------------------------------------------------------ asking

    def _list(self, pull: PullState) -> None:
        """Put a pull, and its source, in the queues of those that have something to ask."""
        if not pull.listed and not pull.ended and pull.wants():
            pull.listed = True
            pull.source.wanting.append(pull)
        self._wake(pull.source)

    def _wake(self, source: Source) -> None:
        if source.wanting and not source.listed:
            source.listed = True
            self._hungry.append(source)

    def _ask_all(self, now: float, out: list[Instruction]) -> None:
        """Fill the windows, one range of one source after the other. Who cannot go on leaves until woken."""
        hungry = self._hungry
        while hungry and self._windows.are_open():
            source = hungry.popleft()
            if self._ask_one(source, now, out):
                hungry.append(source)
            else:
                source.listed = False

    def _ask_one(self, source: Source, now: float, out: list[Instruction]) -> bool:
        if not self._windows.admit_source(source, now):
            return False
        wanting = source.wanting
        for _ in range(len(wanting)):
            pull = wanting.popleft()
            pull.listed = False
            if pull.ended or not pull.wants():
                continue
            link = pull.choose()
            asked = link is not None and self._windows.admit(link, now)
            if link is not None and asked:
                self._ask(pull, link, now, out)
            if pull.wants():
                pull.listed = True
                wanting.append(pull)
            if asked:
                return True
        return False

    def _ask(self, pull: PullState, link: LinkState, now: float, out: list[Instruction]) -> None:
        near = link.rank == 0
        if pull.way == MODE_PATH and not near:
            pull.restart()
        if pull.way is None:
            pull.start(pull.mode if near and not pull.way_closed else MODE_BYTES, self._range_bytes)
            if pull.begun():
                out.append(Begin(pull.id, pull.attempt, pull.size))
        assert pull.way is not None
        if pull.again:
            offset = pull.again.popleft()
        else:
            offset = pull.frontier
            pull.frontier = min(offset + self._range_bytes, pull.size)
        length = pull.length(offset, self._range_bytes)
        number = self._next_request
        self._next_request = (number + 1) & _REQUEST_MASK
        patience_s = self._range_timeout_s
        if pull.way != MODE_BYTES:
            patience_s += pull.size / WHOLE_BYTES_PER_S
        request = Request(number, pull, offset, length, link, now, patience_s)
        self._requests[number] = link.requests[number] = pull.asked[offset] = request
        self._windows.add(request)
        self._check_by(now + patience_s)
        out.append(Fetch(link.number, number, pull.id, pull.attempt, offset, length, pull.way, pull.token))

    def _forget(self, request: Request) -> None:
        """Close a question: its answer will be dropped."""
        pull = request.pull
        del self._requests[request.number]
        del request.link.requests[request.number]
        del pull.asked[request.offset]
        request.link.owed += 1
        for source in self._windows.remove(request):
            self._wake(source)

    def _forget_all(self, pull: PullState) -> None:
        for request in list(pull.asked.values()):
            self._forget(request)

    def _again(
        self, request: Request, strike: int, reason: PullReason, message: str, out: list[Instruction]
    ) -> None:
        """Ask this range again, unless it has been asked too often. The question has been closed."""
        pull = request.pull
        strikes = pull.strikes.get(request.offset, 0) + strike
        if pull.way == MODE_INTO or (pull.way == MODE_PATH and strike >= STRIKE_BAD):
            pull.way_closed = True
            self._restart(pull, out)
        elif strikes >= STRIKES_MAX:
            self._fail(pull, reason, f"gave up on range {request.offset}+{request.length}: {message}", out)
        else:
            pull.strikes[request.offset] = strikes
            pull.again.append(request.offset)
            self._list(pull)

    def _unsent(self, event: Unsent, out: list[Instruction]) -> None:
        request = self._requests.get(event.request)
        if request is None or request.link.number != event.link:
            return
        link, pull = request.link, request.pull
        self._forget(request)
        link.owed -= 1
        pull.again.appendleft(request.offset)
        self._list(pull)
        # Others of the same batch did not leave either: that is one trouble, not many.
        if event.now >= link.paused_until:
            pause(link, event.now)
        self._check_by(link.paused_until)

    # ----------------------------------------------------------------------------------------------- answers

    def _chunk(self, event: Chunk, out: list[Instruction]) -> None:
        request = self._requests.get(event.request)
        if request is None or request.link.number != event.link:
            late = self._links.get(event.link)
            if late is not None and late.owed > 0:
                # Not wanted any more, yet a sign that those behind it are coming.
                late.owed -= 1
                late.heard_at = event.now
            return
        link, pull = request.link, request.pull
        link.heard_at = event.now
        link.pause_s = link.paused_until = 0.0
        passed_over = mark_passed_over(request)
        self._forget(request)
        link.owed -= 1
        self._wake(pull.source)
        wrong = find_wrong(event, request)
        if wrong is not None:
            link.strikes += 1
            self._again(request, STRIKE_BAD, PullReason.CORRUPT, wrong, out)
        elif event.error is not None:
            self._take_error(request, event.error, out)
        else:
            self._take(request, event, out)
        if link.rank == BROKER:
            self._ask_lost(passed_over, out)
        self._ask_all(event.now, out)

    def _ask_lost(self, requests: list[Request], out: list[Instruction]) -> None:
        """Mail keeps its order: these questions, or their answers, are lost."""
        for request in requests:
            if self._requests.get(request.number) is request:  # else it was closed, together with its pull
                self._forget(request)
                self._again(request, STRIKE_CUT, PullReason.TIMEOUT, "mail was lost", out)

    def _take(self, request: Request, event: Chunk, out: list[Instruction]) -> None:
        pull, link = request.pull, request.link
        link.strikes = 0
        carrier = link.carrier
        pull.carriers[carrier] = pull.carriers.get(carrier, 0) + request.length
        count = (pull.source.party, carrier)
        self.received[count] = self.received.get(count, 0) + request.length
        pull.strikes.pop(request.offset, None)
        pull.missing -= 1
        if pull.way == MODE_PATH:
            assert event.path is not None
            pull.sealing = True
            out.append(Adopt(pull.id, pull.attempt, event.path, pull.size))
            return
        if pull.way == MODE_BYTES:
            out.append(Write(pull.id, request.offset, event.data))
        if pull.missing == 0:
            pull.sealing = True
            out.append(Seal(pull.id))

    def _take_error(self, request: Request, error: list[Any], out: list[Instruction]) -> None:
        pull = request.pull
        code, message = error[0], str(error[1])
        if code == WAY_CLOSED and pull.way != MODE_BYTES:
            pull.way_closed = True
            self._restart(pull, out)
        elif code == NO_SUCH_OBJECT:
            self._fail(pull, PullReason.NOT_FOUND, message, out)
        elif code == MAY_NOT:
            self._fail(pull, PullReason.REFUSED, message, out)
        else:
            self._fail(pull, PullReason.SOURCE, message, out)

    # -------------------------------------------------------------------------------------------------- time

    def _check_by(self, moment: float) -> None:
        if self._check_at is None or moment < self._check_at:
            self._check_at = moment

    def _tick(self, event: Tick, out: list[Instruction]) -> None:
        now = event.now
        if self._check_at is None or now < self._check_at:
            return
        self._check_at = None
        for pull in [pull for pull in self._pulls.values() if pull.stranded_at is not None]:
            assert pull.stranded_at is not None
            if now >= pull.stranded_at + self._no_link_s:
                self._give_up_waiting(pull, out)
            else:
                self._check_by(pull.stranded_at + self._no_link_s)
        for link in self._links.values():
            if now < link.paused_until:
                self._check_by(link.paused_until)
            elif link.pause_s:
                self._wake(link.source)
        for request in list(self._requests.values()):
            if self._requests.get(request.number) is not request:
                continue  # closed meanwhile, together with its pull
            if now >= request.due():
                request.link.strikes += 1
                self._forget(request)
                silence = f"no answer for {request.patience_s:g} s"
                self._again(request, STRIKE_BAD, PullReason.TIMEOUT, silence, out)
            else:
                self._check_by(request.due())
        self._ask_all(now, out)

    def _give_up_waiting(self, pull: PullState, out: list[Instruction]) -> None:
        party = pull.source.party
        trouble, refused = self._troubles.get(party, ("", False))
        reason = PullReason.REFUSED if refused else PullReason.UNREACHABLE
        why = f": {trouble}" if trouble else ""
        message = f"no link to party {text(party)} for {self._no_link_s:g} s{why}"
        self._fail(pull, reason, message, out)

    # ------------------------------------------------------------------------------------------------- tests

    def validate(self) -> None:
        """Assert what always holds. For tests, after each event."""
        windows = self._windows
        assert windows.in_flight == sum(request.weight for request in self._requests.values())
        assert windows.mail_in_flight == sum(source.mail_in_flight for source in self._sources.values())
        assert windows.mail_in_flight < windows.mail_total_bytes + self._range_bytes
        assert sum(len(link.requests) for link in self._links.values()) == len(self._requests)
        for source in self._sources.values():
            assert source.links or source.pulls
            mine = [r for r in self._requests.values() if r.pull.source is source]
            assert source.in_flight == sum(request.weight for request in mine)
            assert source.in_flight < windows.window_bytes + self._range_bytes
            assert source.mail_in_flight == sum(r.weight for r in mine if r.link.rank == BROKER)
            assert source.mail_in_flight < windows.mail_window_bytes + self._range_bytes
            for pull in source.pulls.values():
                assert self._pulls[pull.id] is pull
                assert not pull.ended
                self._validate_pull(pull)

    def _validate_pull(self, pull: PullState) -> None:
        for offset, request in pull.asked.items():
            assert request.offset == offset
            assert self._requests[request.number] is request
            assert self._links[request.link.number] is request.link
        assert not set(pull.again) & set(pull.asked)
        unasked = -(-(pull.size - pull.frontier) // self._range_bytes) if pull.way == MODE_BYTES else 0
        assert pull.missing == len(pull.again) + len(pull.asked) + unasked
        assert pull.sealing == (pull.missing == 0)
        assert (pull.choose() is None) == (pull.stranded_at is not None)
        assert not pull.wants() or pull.listed
