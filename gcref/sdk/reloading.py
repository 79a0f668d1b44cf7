"""Taking up a task group again: what a new process of the user does about the tasks of an earlier one.

    reload ──► ATTACH ──► TASKS: ids and states ──► a future for each, SUBSCRIBE ──► OUTCOME of those that have ended

The endpoint pins the tasks with the ATTACH, so nothing is lost between that and the subscriptions.
"""

from __future__ import annotations

import concurrent.futures
import time
import weakref
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gcref import ids
from gcref.brains import submitter_events as ev
from gcref.errors import EndpointLostError
from gcref.objects import failure as failures
from gcref.sdk.future import ComputeFuture, mark_running
from gcref.sdk.request import Request

if TYPE_CHECKING:
    from gcref.sdk.client import FutureLane
    from gcref.sdk.loop import Loop

SETTLE_S: Final = 5.0
"""How long to wait, once the tasks are known, for the ends of those that have ended."""

_RUNNING: Final = "dispatched"
_UNENDED: Final = ("waiting", "ready", _RUNNING)


class _TakenUp(NamedTuple):
    """The futures of a group's tasks, and those among them whose tasks have ended."""

    found: list[ComputeFuture[Any]]
    ended: list[ComputeFuture[Any]]


def reload(loop: Loop, lane: FutureLane, timeout: float) -> list[ComputeFuture[Any]]:
    """Futures for the tasks of a lane's group that its home knows; those that have ended there have ended here.

    Args:
        loop: the client's I/O thread; this must not be called on it.
        lane: home and group, and what the futures are told to belong to.
        timeout: how long to wait for the endpoint, seconds.

    Raises:
        GcrefError: the endpoint cannot be asked, or does not answer in time.
    """
    request = Request(lambda answer: _take_up(loop, lane, answer))
    now = time.monotonic()
    loop.post(ev.AttachAsked(request, lane.home, lane.group, now + timeout, now))
    answer = request.wait(None)
    if isinstance(answer, ev.Failure):
        raise failures.to_exception(answer.failure)
    if answer is None:
        raise EndpointLostError("the client has ended", endpoint_id=ids.text(lane.home))
    taken_up: _TakenUp = answer
    until = time.monotonic() + SETTLE_S
    # They are told in this order, so one wait is enough, except where an end is told by another endpoint.
    for future in reversed(taken_up.ended):
        if not future.done() and (left := until - time.monotonic()) > 0:
            concurrent.futures.wait([future], left)
    return taken_up.found


def _take_up(loop: Loop, lane: FutureLane, answer: Any) -> Any:
    """On the I/O thread, with the answer to the ATTACH: all tasks get futures before anything else is heard."""
    if isinstance(answer, ev.Failure):
        return answer
    secret, items = answer
    if secret and secret != lane.secret:
        lane = lane.of_group(lane.group, secret)
    taken_up = _TakenUp([], [])
    opened: list[Any] = []
    running: list[ComputeFuture[Any]] = []
    for id, state, *_ in items:
        future = loop.future_of(id)
        if future is None:
            future = ComputeFuture(lane, id)
            opened.append((id, lane.home, None, lane, weakref.ref(future)))
        taken_up.found.append(future)
        if state == _RUNNING:
            running.append(future)
        elif state not in _UNENDED:
            taken_up.ended.append(future)
    if opened:
        loop.tell(ev.Opened(opened, time.monotonic()))
    mark_running(running)
    return taken_up
