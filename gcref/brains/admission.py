"""The admission brain: which objects may be pulled now, so that many tasks with large arguments share a small store.

    Want ──► waiting, in the queue of its task ──Start──► in flight ──Arrived──► held ──Released──► forgotten
                ▲                                            │
                └───────────── Refused (the store is full) ◄─┘          … for too long: GiveUp

What a pull brings is *taken* from its start until nobody needs it any more. Rules:
    - As long as less than half of the limit is taken, whatever keeps it below half is pulled at once.
    - Above that, tasks come in the order in which they were submitted, and of each task all that it wants is pulled, or
      nothing: a task that has half of its arguments holds memory and helps nobody.
    - Nobody starves, nothing stands still. The first in the queue waits as long as something goes on by itself that
      will give memory back: a pull, or a task that has all its arguments and is not blocked in a wait of its own (`Ask`
      finds out: it is rare that nobody else tells). When there is no such thing, it starts whatever is taken, and copies
      that other tasks have gathered in vain are dropped for it: they can be pulled again.
    - Those behind the first may overtake it with what it could not use anyway: they start if it would still fit beside
      all that overtook it; and with a bounded number of bytes if they stay below half.
    - A pull that the store refuses goes back into the queue, and until one has arrived they go one by one. It is tried
      again when memory was given back, or after a while; after `wait_s` it is given up.

Pure like all brains: `now` and the order of tasks are handed in. An event costs a bounded look at the queue.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

_OVERTAKERS_MAX: Final = 16
"""So many tasks behind the first are looked at; more would make each event cost as much as the queue is long."""

_ASK_S: Final = 1.0
"""While the first in the queue waits for tasks to end, one of them is asked about after this long."""

_RETRY_FIRST_S: Final = 0.05
_RETRY_MAX_S: Final = 1.0
"""A refused pull is tried again after this long, then after twice as long, and so on: the disk may be somebody else's too."""


# --------------------------------------------------------------------------------------------------------- events


class Want(NamedTuple):
    """These bytes are wanted here.

    Attributes:
        id: of the object.
        size: of its blob, in bytes.
        task: the task that waits for it; None: nobody does, it is to lie here.
        order: of that task among all; the smaller comes first.
        copy: it can be had again, so it may be dropped.
    """

    id: bytes
    size: int
    task: bytes | None
    order: float
    copy: bool


class Arrived(NamedTuple):
    """The bytes are here."""

    id: bytes


class Gone(NamedTuple):
    """The pull failed or was cancelled."""

    id: bytes


class Refused(NamedTuple):
    """The store had no room for it; `why` is what `GiveUp` brings back."""

    id: bytes
    why: Any
    now: float


class Released(NamedTuple):
    """Nobody needs these any more, or they are not here any more. Unknown ids are passed over."""

    ids: Iterable[bytes]


class Runnable(NamedTuple):
    """These tasks have all they need: each with the objects it uses. They will end without our help.

    To be said before the last of those objects has `Arrived`, so that nobody is let in between the two.
    """

    tasks: list[tuple[bytes, list[bytes]]]


class Paused(NamedTuple):
    """The answer to `Ask`, if so: the task has ended, is blocked in a wait, or misses something again."""

    task: bytes


class Tick(NamedTuple):
    """Time has passed."""

    now: float


# --------------------------------------------------------------------------------------------------- instructions


class Start(NamedTuple):
    """Pull it."""

    id: bytes


class Drop(NamedTuple):
    """These copies may be evicted: others need the room more."""

    ids: list[bytes]


class Ask(NamedTuple):
    """Is this task still going to end without our help? If not, say `Paused`."""

    task: bytes


class GiveUp(NamedTuple):
    """The store has refused it for too long."""

    id: bytes
    why: Any


Event = Want | Arrived | Gone | Refused | Released | Runnable | Paused | Tick
Instruction = Start | Drop | Ask | GiveUp

_Key = tuple[float, int]  # of a task in the queue: its order, and a number that makes it unique


class _Pull:
    """One object that was wanted.

    Attributes:
        key: of the task in whose name it is pulled.
        until: when it is given up; None: it was never refused.
        why: of the last refusal.
    """

    __slots__ = ("copy", "id", "key", "size", "task", "until", "why")

    def __init__(self, event: Want, key: _Key) -> None:
        self.id = event.id
        self.size = event.size
        self.task = event.task
        self.copy = event.copy
        self.key = key
        self.until: float | None = None
        self.why: Any = None


class _Group:
    """What one task still waits to have pulled."""

    __slots__ = ("bytes", "pulls", "task")

    def __init__(self, task: bytes) -> None:
        self.task = task
        self.pulls: dict[bytes, _Pull] = {}
        self.bytes = 0


class Admission:
    """The queue of all pulls of an endpoint.

    Args:
        limit_bytes: of the store.
        wait_s: how long a pull that the store refuses is tried again, in seconds.

    Attributes:
        taken: bytes of what is in flight or held.
        held: what has arrived and is still needed, by id.
    """

    def __init__(self, limit_bytes: int, wait_s: float) -> None:
        self.taken = 0
        self.held: dict[bytes, _Pull] = {}
        self._limit_bytes = limit_bytes
        self._wait_s = wait_s
        self._queue: list[_Key] = []
        self._groups: dict[_Key, _Group] = {}
        self._keys: dict[bytes, _Key] = {}  # of tasks that have a place in the queue
        self._waiting: dict[bytes, _Pull] = {}
        self._flying: dict[bytes, _Pull] = {}
        self._refused: dict[
            bytes, _Pull
        ] = {}  # those of the waiting that were; the first to be given up first
        # Tasks that will end by themselves, and how many of those taken they use; the same by object.
        self._users: dict[bytes, int] = {}
        self._used_by: dict[bytes, set[bytes]] = {}
        self._overtakers: set[_Pull] = set()  # of those taken: what overtook the present first in the queue
        self._overtakers_bytes = 0
        self._passed_bytes = 0  # all that ever overtook it
        self._ask_at: float | None = None
        self._next = 0
        self._one_by_one = False
        self._retry_at: float | None = None
        self._retry_s = _RETRY_FIRST_S

    @property
    def busy(self) -> bool:
        """Whether anything but `Want` concerns it."""
        return bool(self.taken or self._waiting or self._users)

    @property
    def deadline(self) -> float | None:
        """When a `Tick` is due, in monotonic seconds; None: never, as things are."""
        if self._waits_for_users:
            return 0.0 if self._ask_at is None else self._ask_at  # once at once, to learn what time it is
        if self._retry_at is None or not self._refused:
            return None
        first = next(iter(self._refused.values())).until
        assert first is not None
        return min(first, self._retry_at)

    @property
    def _waits_for_users(self) -> bool:
        return bool(self._queue and self._users) and not (self._flying or self._one_by_one)

    def handle(self, event: Event) -> list[Instruction]:
        """Take one event.

        Returns:
            What to do, in this order.
        """
        out: list[Instruction] = []
        match event:
            case Want():
                self._want(event)
            case Arrived(id):
                self._arrived(id)
            case Gone(id):
                self._forget(id)
            case Refused(id, why, now):
                self._refuse(id, why, now)
            case Released(ids):
                self._release(ids)
            case Runnable(tasks):
                self._runnable(tasks)
            case Paused(task):
                if self._users.pop(task, None) is not None:
                    self._ask(out)
            case Tick(now):
                self._tick(now, out)
        self._admit(out)
        return out

    def describe(self) -> dict[str, int]:
        """Figures for people."""
        return {
            "pulls_waiting": len(self._waiting),
            "pulls_in_flight": len(self._flying),
            "pulls_refused": len(self._refused),
            "pulled_bytes": self.taken,
        }

    def is_waiting(self, id: bytes) -> bool:
        """Whether this pull was not started yet."""
        return id in self._waiting

    # ---------------------------------------------------------------------------------------------- come and go

    def _want(self, event: Want) -> None:
        self._forget(event.id)
        task = event.task or event.id
        key = self._keys.get(task)
        if key is None:
            self._next += 1
            key = self._keys[task] = (event.order, self._next)
            self._groups[key] = _Group(task)
            insort(self._queue, key)
        self._wait(_Pull(event, key))

    def _wait(self, pull: _Pull) -> None:
        group = self._groups[pull.key]
        group.pulls[pull.id] = pull
        group.bytes += pull.size
        self._waiting[pull.id] = pull

    def _arrived(self, id: bytes) -> None:
        if id in self._waiting:  # from a pull of before, that had been given up too late
            self._leave_queue(self._waiting[id])
            return
        pull = self._flying.pop(id, None)
        if pull is None:
            return
        self._one_by_one = False
        self._retry_at = None
        self._retry_s = _RETRY_FIRST_S
        if pull.task is None:
            self._give_back(pull)
        else:
            self.held[id] = pull

    def _forget(self, id: bytes) -> None:
        pull = self._flying.pop(id, None) or self.held.pop(id, None)
        if pull is not None:
            self._give_back(pull)
        pull = self._waiting.get(id)
        if pull is not None:
            self._leave_queue(pull)

    def _give_back(self, pull: _Pull) -> None:
        self.taken -= pull.size
        for task in self._used_by.pop(pull.id, ()):
            left = self._users.get(task, 0) - 1
            if left > 0:
                self._users[task] = left
            else:
                self._users.pop(task, None)
        if pull in self._overtakers:
            self._overtakers.remove(pull)
            self._overtakers_bytes -= pull.size
        if self._refused:
            self._retry_at = None  # now

    def _leave_queue(self, pull: _Pull) -> None:
        del self._waiting[pull.id]
        self._refused.pop(pull.id, None)
        group = self._groups[pull.key]
        del group.pulls[pull.id]
        group.bytes -= pull.size
        if not group.pulls:
            del self._groups[pull.key]
            del self._keys[group.task]
            del self._queue[bisect_left(self._queue, pull.key)]

    def _refuse(self, id: bytes, why: Any, now: float) -> None:
        pull = self._flying.pop(id, None)
        if pull is None:
            return
        self._give_back(pull)
        pull.why = why
        if pull.until is None:
            pull.until = now + self._wait_s
        self._enter_again(pull)
        self._refused[id] = pull
        if len(self._refused) > 1:
            self._refused = dict(sorted(self._refused.items(), key=lambda item: item[1].until or 0.0))
        self._one_by_one = True
        self._retry_at = now + self._retry_s
        self._retry_s = min(_RETRY_MAX_S, 2 * self._retry_s)

    def _enter_again(self, pull: _Pull) -> None:
        task = pull.task or pull.id
        key = self._keys.get(task)
        if key is None:
            key = self._keys[task] = pull.key
            self._groups[key] = _Group(task)
            insort(self._queue, key)
        pull.key = key
        self._wait(pull)

    def _release(self, ids: Iterable[bytes]) -> None:
        for id in ids:
            pull = self.held.pop(id, None) or self._flying.pop(id, None)
            if pull is not None:
                self._give_back(pull)

    def _runnable(self, tasks: list[tuple[bytes, list[bytes]]]) -> None:
        for task, uses in tasks:
            used = [id for id in uses if id in self.held or id in self._flying]
            if used and task not in self._users:
                self._users[task] = len(used)
                for id in used:
                    self._used_by.setdefault(id, set()).add(task)

    def _tick(self, now: float, out: list[Instruction]) -> None:
        for pull in list(self._refused.values()):
            if pull.until is None or pull.until > now:
                break
            self._leave_queue(pull)
            out.append(GiveUp(pull.id, pull.why))
        if self._retry_at is not None and self._retry_at <= now:
            self._retry_at = None
        if self._waits_for_users and (self._ask_at is None or self._ask_at <= now):
            if self._ask_at is not None:
                self._ask(out)
            self._ask_at = now + _ASK_S

    def _ask(self, out: list[Instruction]) -> None:
        """Ask about one of those that the first in the queue waits for; another one the next time."""
        if self._waits_for_users:
            task = next(iter(self._users))
            self._users[task] = self._users.pop(task)
            out.append(Ask(task))

    # ------------------------------------------------------------------------------------------------ admission

    def _admit(self, out: list[Instruction]) -> None:
        """Start what may start: the first in the queue as long as it may, then those that may overtake it."""
        while self._queue and self._may_start():
            group = self._groups[self._queue[0]]
            if self._one_by_one:
                self._start(next(iter(group.pulls.values())), out)
            elif self._fits(group.bytes):
                self._start_first(group, out)
            elif not self._goes_on():
                self._drop_for(group, out)
                self._start_first(group, out)
            else:
                self._start_below_half(group, out)
                if group.pulls:
                    self._overtake(group, out)
                    break
        if not self._waits_for_users:
            self._ask_at = None

    def _may_start(self) -> bool:
        if not self._one_by_one:
            return True
        return not self._flying and (self._retry_at is None or not self._refused)

    def _fits(self, size: int) -> bool:
        return self.taken + size <= self._limit_bytes

    def _is_below_half(self, size: int) -> bool:
        return 2 * (self.taken + size) <= self._limit_bytes

    def _goes_on(self) -> bool:
        """Whether something will give memory back by itself."""
        return bool(self._flying or self._users)

    def _start_first(self, group: _Group, out: list[Instruction]) -> None:
        for pull in list(group.pulls.values()):
            self._start(pull, out)
        self._overtakers.clear()
        self._overtakers_bytes = self._passed_bytes = 0

    def _start_below_half(self, group: _Group, out: list[Instruction]) -> None:
        for pull in list(group.pulls.values()):
            if not self._is_below_half(pull.size):
                return
            self._start(pull, out)

    def _overtake(self, first: _Group, out: list[Instruction]) -> None:
        for key in self._queue[1 : 1 + _OVERTAKERS_MAX]:
            group = self._groups[key]
            size = group.bytes
            fits_beside = self._overtakers_bytes + size + first.bytes <= self._limit_bytes and self._fits(
                size
            )
            may_pass = self._passed_bytes + size <= self._limit_bytes and self._is_below_half(size)
            if fits_beside or may_pass:
                self._passed_bytes += size
                self._overtakers_bytes += size
                for pull in list(group.pulls.values()):
                    self._overtakers.add(pull)
                    self._start(pull, out)

    def _drop_for(self, group: _Group, out: list[Instruction]) -> None:
        """Nothing goes on by itself: let go of copies for the first in the queue, those of the last first."""
        over = self.taken + group.bytes - self._limit_bytes
        dropped: list[bytes] = []
        for pull in sorted(self.held.values(), key=lambda held: held.key, reverse=True):
            if over <= 0:
                break
            if pull.copy and pull.task != group.task:
                dropped.append(pull.id)
                over -= pull.size
        if dropped:
            self._release(dropped)
            out.append(Drop(dropped))

    def _start(self, pull: _Pull, out: list[Instruction]) -> None:
        self._leave_queue(pull)
        self._flying[pull.id] = pull
        self.taken += pull.size
        out.append(Start(pull.id))

    # -------------------------------------------------------------------------------------------------- checks

    def validate(self) -> None:
        """Check the accounts against themselves. For tests.

        Raises:
            AssertionError: they disagree.
        """
        known = [*self._flying.values(), *self.held.values()]
        assert self.taken == sum(pull.size for pull in known)
        assert self._used_by.keys() <= self._flying.keys() | self.held.keys()
        assert self._users.keys() <= {task for tasks in self._used_by.values() for task in tasks}
        assert self._overtakers <= set(known)
        assert self._overtakers_bytes == sum(pull.size for pull in self._overtakers)
        assert not self._waiting.keys() & self._flying.keys()
        assert self._queue == sorted(self._groups)
        assert {group.task: key for key, group in self._groups.items()} == self._keys
        assert {id for group in self._groups.values() for id in group.pulls} == self._waiting.keys()
        for group in self._groups.values():
            assert group.bytes == sum(pull.size for pull in group.pulls.values())
            assert group.pulls
        assert self._refused.keys() <= self._waiting.keys()
        untils = [pull.until or 0.0 for pull in self._refused.values()]
        assert untils == sorted(untils)
        if self._waiting:
            going = self._flying or self._users or self.deadline is not None
            assert going, "what waits has something to wait for"
