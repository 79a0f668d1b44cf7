"""The objects of other homes: what tasks here need from elsewhere, and what they send elsewhere.

    needs   reference ──► SUBSCRIBE ──► OUTCOME small: here · large: wanted? one Pull ──► Pulled: here
    sends   SUBMIT or OFFER of a task here for another endpoint ──► argument blob here first ──► Relay

Only an object's home speaks for it. A copy stays after its last use, without a pin, until its home says FORGET or the store
needs the room, so that a value travels to this site once.
"""

from __future__ import annotations

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
        for spec in event.tasks:
            id, args = spec[0], spec[5]
            obj = self._relayed(id, event.home, group)
            if obj is None:
                continue
            if args is None:
                at_once.append(spec)
                continue
            upload = Obj(args[0], self._graph.me, group, NOBODY)
            upload.size = args[1]
            upload.holds = 1
            upload.extra = Extra()
            upload.extra.pulling = True
            upload.extra.relay = [
                m.SUBMIT,
                event.home,
                event.group,
                event.secret,
                event.opts,
                event.fns,
                [spec],
            ]
            self._graph.objects[upload.id] = upload
            assert obj.extra is not None
            obj.extra.deferred = upload  # kept until the task's outcome
            self._graph.out.append(ev.Pull(upload, event.who.party))
        if at_once:
            message = [m.SUBMIT, event.home, event.group, event.secret, event.opts, event.fns, at_once]
            self._graph.out.append(ev.Relay(event.home, message))
        self._graph.settle()

    def relay_offer(self, event: ev.Offered, group: Group, id: bytes, size: int, blob: bytes | None) -> None:
        """A task of ours puts an object at another endpoint."""
        obj = self._relayed(id, event.home, group)
        if obj is None:
            return
        message = [m.OFFER, event.home, event.group, event.secret, [[id, size, blob]]]
        if blob is not None:
            self._graph.out.append(ev.Relay(event.home, message))
            return
        assert obj.extra is not None
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
        return obj

    # ------------------------------------------------------------------------------------ what comes from there

    def outcomes(self, event: ev.Outcomes) -> None:
        """OUTCOME items of another home have come."""
        for id, status, value, attempt, record, *_ in event.items:
            obj = self._graph.objects.get(id)
            if obj is None or obj.home != event.home or obj.extra is None:
                continue  # only its home may speak for an object
            extra = obj.extra
            if not extra.confirmed:
                extra.confirmed = True
                self._graph.pin_confirmed(obj)
            if obj.state >= DONE or status == m.PENDING:
                continue
            obj.record = record
            obj.attempt = attempt
            if status == m.OK:
                extra.moved = (event.carrier, len(value))
                self._graph.end(obj, DONE, value, len(value))
            elif status == m.STORED:
                obj.size = value
                extra.at_home = True
                if extra.relay is not None:  # a relayed put: we hold the bytes already
                    extra.relay = None
                    self._graph.end(obj, DONE, None, value)
                elif obj.waiters or obj.pins:
                    self._graph.want(obj)
                self._graph.end_aliases_of(obj)
            elif status == m.FAILED:
                self._graph.end(obj, FAILED, None, 0, value)
            elif status == m.CANCELLED_STATUS:
                self._graph.end(obj, CANCELLED, None, 0, failures.cancelled())
            elif status == m.LOST:
                self._graph.end(
                    obj, LOST, None, 0, failures.make("ObjectLostError", value[1], reason=value[0])
                )
            elif status == m.ALIAS:
                self._graph.alias(obj, value)
        self._graph.settle()

    def pulled(self, event: ev.Pulled) -> None:
        """The bytes of objects are in the store."""
        for id, attempt, carrier, moved, refs in event.items:
            obj = self._graph.objects.get(id)
            if obj is None or obj.extra is None or not obj.extra.pulling:
                self._graph.frees.append(id)  # nobody wants it any more
                continue
            obj.extra.pulling = False
            obj.extra.at_home = False
            if obj.extra.relay is not None:
                relay = obj.extra.relay
                self._graph.out.append(ev.Relay(relay[1], relay))
                if obj.home != self._graph.me:
                    continue  # a relayed put: done when its home says so
            obj.attempt = attempt
            obj.extra.moved = (carrier, moved) if obj.home != self._graph.me else None
            if refs and obj.group is not None:
                who = ev.Who(obj.group.submitter, "user", obj.group.owner, "client")
                self._graph.done(obj, None, obj.size, refs, who)
            else:
                self._graph.end(obj, DONE, None, obj.size)
        self._graph.settle()

    def pull_failed(self, event: ev.PullFailed) -> None:
        """The bytes of an object cannot be had."""
        obj = self._graph.objects.get(event.id)
        if obj is not None and obj.extra is not None and obj.extra.pulling:
            obj.extra.pulling = False
            state = LOST if event.failure[0] == "ObjectLostError" else FAILED
            if obj.state < DONE:
                self._graph.end(obj, state, None, 0, event.failure)
        self._graph.settle()

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
            if not obj.pins and obj.holds == 0:
                del self._graph.objects[id]
            else:
                obj.state = WAITING
                obj.extra.at_home = True
                obj.extra.pulling = False
        self._graph.settle()

    def argument_gone(self, event: ev.ArgumentGone) -> None:
        """An argument was dropped before its task was sent: bring it once more, or say that it is lost."""
        graph, task, obj = self._graph, event.task, event.obj
        task.state = WAITING
        if obj.home == graph.me or obj.extra is None:
            text = "the bytes of an argument are gone from its home's store"
            graph.fail(task, failures.make("ObjectLostError", text, reason=LostReason.BYTES_LOST.value))
        else:
            if obj.state == DONE:
                obj.state = WAITING
                obj.extra.at_home = True
            task.missing += graph.wait_for(task, obj)
        graph.settle()

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
