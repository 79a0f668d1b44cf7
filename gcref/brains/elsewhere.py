"""The objects of other homes: what tasks here need from elsewhere, and what they send elsewhere.

    needs   reference ──► SUBSCRIBE ──► OUTCOME small: here · large: wanted? one Pull ──► Pulled: here
    sends   SUBMIT or OFFER of a task here for another endpoint ──► argument blob here first ──► Relay

Only an object's home speaks for it. A copy stays after its last use, without a pin, until its home says FORGET or the store
needs the room, so that a value travels to this site once.
"""

from __future__ import annotations

from typing import Any

from gcref.brains import resolver_events as ev
from gcref.brains.graph import Graph
from gcref.brains.tasks import CANCELLED, DONE, FAILED, LOST, NOBODY, WAITING, Extra, Group, Obj
from gcref.errors import LostReason
from gcref.objects import failure as failures
from gcref.objects.ref import read_token
from gcref.wire import messages as m


class Elsewhere:
    """The resolver's dealings with other homes.

    Args:
        graph: the table that it shares with the resolver.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    # --------------------------------------------------------------------------- what tasks here send elsewhere

    def relay_submit(self, event: ev.Submitted, group: Group) -> None:
        """A task of ours submits to another endpoint: we are the submitter there, and it is our subscriber."""
        at_once = []
        head = [m.SUBMIT, event.home, event.group, event.secret, event.opts, event.fns]
        for spec in event.tasks:
            id, args = spec[0], spec[5]
            obj = self._relayed(id, event.home, group)
            if obj is None:
                continue
            assert obj.extra is not None
            if args is None:
                at_once.append(spec)
                obj.extra.unsaid = (head, spec)
                continue
            upload = Obj(args[0], self._graph.me, group, NOBODY)
            upload.size = args[1]
            upload.holds = 1
            upload.extra = Extra()
            upload.extra.pulling = True
            upload.extra.relay = [*head, [spec]]
            self._graph.objects[upload.id] = upload
            obj.extra.deferred = upload  # kept until the task's outcome
            self._graph.out.append(ev.Pull(upload, event.who.party))
        if at_once:
            self._graph.out.append(ev.Relay(event.home, [*head, at_once]))
        self._graph.settle()

    def relay_offer(self, event: ev.Offered, group: Group, id: bytes, size: int, blob: bytes | None) -> None:
        """A task of ours puts an object at another endpoint."""
        obj = self._relayed(id, event.home, group)
        if obj is None:
            return
        assert obj.extra is not None
        head = [m.OFFER, event.home, event.group, event.secret]
        message = [*head, [[id, size, blob]]]
        if blob is not None:
            self._graph.out.append(ev.Relay(event.home, message))
            obj.extra.unsaid = (head, [id, size, blob])
            return
        obj.size = size
        obj.extra.pulling = True
        obj.extra.relay = message
        self._graph.out.append(ev.Pull(obj, event.who.party))

    def _relayed(self, id: bytes, home: bytes, group: Group) -> Obj | None:
        """The object that a task of ours makes at another home; None when its SUBMIT or OFFER went out before."""
        obj = self._graph.objects.get(id)
        if obj is None:
            obj = self._graph.objects[id] = Obj(id, home, group, group.only_submitter)
            obj.extra = Extra(read_token(group.secret, id))
        elif obj.home != home or obj.extra is None or obj.extra.submitted:
            self._graph.counts["duplicates"] += 1
            return None
        else:  # a reference to it came first, as the result of the task that submits it
            obj.group = group
            obj.pins |= group.only_submitter
        obj.extra.subscribed = obj.extra.submitted = True
        self._graph.homes.add(home)
        return obj

    # ------------------------------------------------------------------------------------ what comes from there

    def outcomes(self, event: ev.Outcomes) -> None:
        """OUTCOME items of another home have come."""
        graph = self._graph
        for item in event.items:
            obj = graph.objects.get(item[0])
            if obj is None or obj.home != event.home or obj.extra is None:
                continue  # only its home may speak for an object
            extra = obj.extra
            if not extra.confirmed:
                extra.confirmed = True
                extra.unsaid = None
                graph.pin_confirmed(obj)
                if not obj.pins and obj.holds == 0:
                    graph.garbage.append(obj)
            if item[1] == m.PENDING:
                continue
            if obj.state < DONE:
                self._take(obj, item, event.carrier)
            elif item[3] > obj.attempt and graph.lies_in_store(obj):
                extra.newer = (
                    item  # the bytes that are here stay; what the home has now counts once they are gone
                )
        graph.settle()

    def _take(self, obj: Obj, item: list[Any], carrier: str) -> None:
        """The home says how an object stands whose value is not here."""
        graph, extra = self._graph, obj.extra
        assert extra is not None
        status, value, attempt, record = item[1:5]
        if attempt != obj.attempt and extra.pulling and obj.home != graph.me and extra.relay is None:
            extra.pulling = False  # of an earlier attempt
            graph.out.append(ev.CancelPull(obj.id))
        obj.record = record
        obj.attempt = attempt
        if status == m.OK:
            extra.moved = {carrier: len(value)}
            graph.end(obj, DONE, value, len(value))
        elif status == m.STORED:
            obj.size = value
            extra.at_home = True
            if extra.relay is not None:  # a relayed put: we hold the bytes already
                extra.relay = None
                graph.end(obj, DONE, None, value)
            elif obj.waiters or obj.pins:
                graph.want(obj)
            if isinstance(extra.deferred, Obj):  # the arguments of a task that we relayed: it has run
                upload, extra.deferred = extra.deferred, None
                graph.drop(upload)
                if not obj.pins and obj.holds == 0:
                    graph.garbage.append(obj)
            graph.end_aliases_of(obj)
        elif status == m.FAILED:
            graph.end(obj, FAILED, None, 0, value)
        elif status == m.CANCELLED_STATUS:
            graph.end(obj, CANCELLED, None, 0, failures.cancelled())
        elif status == m.LOST:
            graph.end(obj, LOST, None, 0, failures.make("ObjectLostError", value[1], reason=value[0]))
        elif status == m.ALIAS and extra.target is None:
            graph.alias(obj, value)

    def copy_gone(self, obj: Obj) -> None:
        """The store does not have its copy of an object any more: whoever needs it waits until it is brought again."""
        graph, extra = self._graph, obj.extra
        assert extra is not None
        if not obj.pins and obj.holds == 0:
            graph.objects.pop(obj.id, None)
            return
        obj.state = WAITING
        extra.at_home = True
        extra.pulling = False
        newer, extra.newer = extra.newer, None
        if newer is not None:
            extra.at_home = False
            self._take(obj, newer, "")

    def pulled(self, event: ev.Pulled) -> None:
        """The bytes of objects are in the store."""
        for id, attempt, moved, refs in event.items:
            obj = self._graph.objects.get(id)
            if obj is None or obj.extra is None or not obj.extra.pulling:
                # Nobody wants it any more.
                if obj is None or not self._graph.lies_in_store(obj):
                    self._graph.frees.append(id)
                continue
            relay, of_other = obj.extra.relay, obj.home != self._graph.me
            if of_other and relay is None and attempt != obj.attempt:
                continue  # the home has spoken of a later attempt since, whose pull is on its way
            obj.extra.pulling = False
            obj.extra.at_home = False
            if relay is not None:
                self._graph.out.append(ev.Relay(relay[1], relay))
                if of_other:
                    continue  # a relayed put: done when its home says so
            obj.attempt = attempt
            obj.extra.moved = moved if of_other else None
            if refs and obj.group is not None:
                who = ev.Who(obj.group.submitter, "user", obj.group.owner, "client")
                self._graph.done(obj, None, obj.size, refs, who)
            else:
                self._graph.end(obj, DONE, None, obj.size)
        self._graph.settle()

    def pull_failed(self, event: ev.PullFailed) -> None:
        """The bytes of an object cannot be had."""
        obj = self._graph.objects.get(event.id)
        if obj is None or obj.extra is None or obj.state >= DONE:
            return
        extra = obj.extra
        of_other = obj.home != self._graph.me
        if event.attempt is not None and of_other and extra.relay is None:
            # Of an object of another home: its home may have spoken of a later attempt since.
            if event.attempt != obj.attempt or (extra.at_home and not extra.pulling):
                return
        elif not extra.pulling:
            return
        self._not_to_be_had(obj, event.failure)
        self._graph.settle()

    def submitter_gone(self, party: bytes) -> None:
        """A party is gone: what it was to upload, and has not, will never come."""
        graph = self._graph
        failure = failures.make(
            "ObjectLostError",
            "the bytes are lost: the process that submitted them ended before they were fetched",
            reason=LostReason.HOME_LOST.value,
        )
        uploads = [
            obj
            for obj in graph.objects.values()
            if obj.extra is not None
            and obj.extra.pulling
            and (obj.home == graph.me or obj.extra.relay is not None)
            and obj.group is not None
            and obj.group.submitter == party
        ]
        for obj in uploads:
            graph.out.append(ev.CancelPull(obj.id))
            self._not_to_be_had(obj, failure)

    def _not_to_be_had(self, obj: Obj, failure: list[Any]) -> None:
        """An object ends without the bytes that were being fetched."""
        graph, extra = self._graph, obj.extra
        assert extra is not None
        extra.pulling = False
        state = LOST if failure[0] == "ObjectLostError" else FAILED
        graph.end(obj, state, None, 0, failure)
        if extra.relay is not None and obj.home == graph.me:
            # The argument blob of a task that was to be relayed: that task will never reach its home.
            task = graph.objects.get(extra.relay[6][0][0])
            if task is not None and task.state < DONE:
                graph.end(task, state, None, 0, failure)

    def pull_waits(self, event: ev.PullWaits) -> None:
        """The home has not the bytes that it spoke of: it will speak of the object again."""
        obj = self._graph.objects.get(event.id)
        if obj is None or obj.extra is None or obj.home == self._graph.me or obj.extra.relay is not None:
            return
        if obj.extra.pulling and obj.attempt == event.attempt:
            obj.extra.pulling = obj.extra.at_home = False

    def forgotten(self, event: ev.Forgotten) -> None:
        """A home has let objects go: so do we, where nobody needs our copy."""
        for id in event.ids:
            obj = self._graph.objects.get(id)
            if obj is not None and obj.home == event.home and not obj.pins and obj.holds == 0:
                self._graph.delete(obj)
        self._graph.settle()

    def evicted(self, event: ev.Evicted) -> None:
        """The store has dropped copies to make room."""
        for id in event.ids:
            obj = self._graph.objects.get(id)
            if obj is None or obj.home == self._graph.me or obj.extra is None or obj.state != DONE:
                continue
            self.copy_gone(obj)
        self._graph.settle()

    def home_lost(self, event: ev.HomeLost) -> None:
        """An endpoint is lost, or has lost its memory."""
        for obj in list(self._graph.objects.values()):
            if obj.home != event.home:
                continue
            if obj.state == DONE and not obj.pins and obj.holds == 0:
                self._graph.delete(obj)  # a copy that its home cannot tell us to forget any more
            elif obj.state < DONE:
                if obj.extra is not None and obj.extra.awaited_by:
                    self._graph.pin_confirmed(obj)
                self._graph.end(obj, FAILED, None, 0, event.failure)
        self._graph.settle()
