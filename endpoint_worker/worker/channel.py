"""The worker channel: what an agent and its workers say to each other, and the two sockets that carry it.

    agent  AgentChannel (ROUTER) ◄── ipc, one frame per message ──► WorkerChannel (DEALER)  worker

A message is an array whose first item is its kind; the frames are packed by `gcref.wire.codec`.

    agent → worker
    FUNCTION    digest, bytes                the function that entries name by its digest; sent before them, once
    TASKS       lease_until, entries         append these to your queue
    GRANT       lease_until, revoked seqs    the answer to ASK: forget the revoked ones, the others may start
    SEGMENT     path, capacity, warm         the answer to ALLOC: write the blob here, with `pwrite`
    NO_SEGMENT  failure                      the answer to ALLOC: the task ends with this failure
    SLOT        ok, failure                  the answer to BLOCKED and to RESUME (ok false: raise the failure)
    UNMAP                                    objects were freed: look again for mappings that can be closed
    EXIT                                     end, once what is held has been sent
    ADOPT       epoch                        a new agent speaks; what its predecessor handed out is void

    worker → agent
    READY       worker, pid                  the first message
    DONE        results, unmapped            what has ended, in order; unmapped: [path, grants, reusable]
    ASK         seq                          the lease is over and this one is next
    ALLOC       size, failed                 room for a result; failed: the path of the last SEGMENT, which had none
    GIVE_BACK   seqs                         held entries that this worker will not start
    BLOCKED     id                           the running task waits for a future: its slot may be lent
    RESUME      id                           it has its value and wants a slot again
    ADOPTED     worker, pid, epoch, running, last, lent, digests
                                             the answer to ADOPT: the seq that runs (0: none), the highest one that
                                             was ever begun, whether its slot is lent, the functions that are here

An entry is `[seq, id, attempt, fn_digest|None, payload|None, args_path|None, deps, flags, group, walltime_s|None]`.

    args_path   where the argument blob lies, when it is not in `payload`: a place
    deps        one for each index: bytes (an inline blob) · a place · [id] (a result made earlier in this queue)
    a place     [path, size] · [path, size, crc32] (a spilled blob; whoever maps it checks it first)
    flags       KEEP: entries that come later use this result by [id]

A result is `[seq, id, attempt, status, value, started_unix_s, duration_s, refs|None, extra|None]`; its statuses and
values are those of an OUTCOME item, except that STORED has the value `[path, size]`; extra is `[stdout tail, stderr tail]`.

Rules:
    - `seq` grows by at least one from entry to entry of one worker, and starts above zero.
    - Grants: each place in an entry that was sent is one grant to map it. The worker returns every grant once, with
      DONE, when it does not see the bytes any more (also those of entries that were revoked or given back). Counting
      them is what makes it safe to send a place again while the news of its release is on its way. `reusable` false:
      a child of the task may see the bytes still, so the segment may be unlinked but never filled again.
    - A worker answers nothing while it runs a task. Messages wait in the socket.
    - ADOPT is taken when any message would be. The worker drops its queue, returns no grant of before (a new agent has
      counted none; what is mapped stays mapped), sends all results of its page again, then ADOPTED, then again what it
      was waiting to be answered, except for ASK. Until ADOPTED has come, only the results of what a worker says count: the
      rest was said to the dead. `epoch` keeps the answers to two new agents apart.
    - Clocks are `time.monotonic`, which is one and the same for the processes of a machine.
"""

from __future__ import annotations

from typing import Any, Final

import zmq

from gcref.config import MAX_MESSAGE_BYTES
from gcref.wire import codec

# agent → worker
FUNCTION: Final = 1
TASKS: Final = 2
GRANT: Final = 3
SEGMENT: Final = 4
NO_SEGMENT: Final = 5
SLOT: Final = 6
UNMAP: Final = 7
EXIT: Final = 8
ADOPT: Final = 9

# worker → agent
READY: Final = 16
DONE: Final = 17
ASK: Final = 18
ALLOC: Final = 19
GIVE_BACK: Final = 20
BLOCKED: Final = 21
RESUME: Final = 22
ADOPTED: Final = 23

# As plain numbers: the arithmetic of enumerations costs a microsecond each time.
_EVENTS: Final[Any] = zmq.EVENTS
_POLLIN: Final = int(zmq.POLLIN)
_NOBLOCK: Final = int(zmq.NOBLOCK)
_NOBLOCK_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)

# Flags of an entry.
KEEP: Final = 1

# A worker starts freely until this long before its lease ends. The agent may take entries away when the lease is
# over *and* the progress page does not name them; the gap covers the instants in which a store of the one
# processor is not yet seen by the other.
LEASE_MARGIN_S: Final = 0.001
# While its agent is away a worker tries so often to reach a new one, in the thread of its socket.
_RECONNECT_MS: Final = 20
_RECONNECT_MAX_MS: Final = 160
# A worker that ends waits this long for its last messages to leave.
_LINGER_MS: Final = 2000


def function(digest: bytes, data: bytes) -> bytes:
    """FUNCTION, packed."""
    return codec.pack([FUNCTION, digest, data])


def tasks(lease_until: float, entries: list[Any]) -> bytes:
    """TASKS, packed; `entries` as the module describes them."""
    return codec.pack([TASKS, lease_until, entries])


def grant(lease_until: float, revoked: list[int]) -> bytes:
    """GRANT, packed."""
    return codec.pack([GRANT, lease_until, revoked])


def segment(path: str, capacity: int, warm: bool) -> bytes:
    """SEGMENT, packed."""
    return codec.pack([SEGMENT, path, capacity, warm])


def no_segment(failure: list[Any]) -> bytes:
    """NO_SEGMENT, packed."""
    return codec.pack([NO_SEGMENT, failure])


def slot(ok: bool, failure: list[Any] | None = None) -> bytes:
    """SLOT, packed; `failure` says why not."""
    return codec.pack([SLOT, ok, failure])


def unmap() -> bytes:
    """UNMAP, packed."""
    return codec.pack([UNMAP])


def exit() -> bytes:
    """EXIT, packed."""
    return codec.pack([EXIT])


def adopt(epoch: int) -> bytes:
    """ADOPT, packed; `epoch` is another number for each agent."""
    return codec.pack([ADOPT, epoch])


def routing_id(worker: int) -> bytes:
    """The routing id of a worker's socket. Not just its number: ids that start with a zero byte are ZeroMQ's own."""
    return b"w%d" % worker


def done(results: list[bytes], unmapped: list[Any]) -> bytes:
    """DONE around results that are packed already, each by itself: they were written to the page like that."""
    # The two msgpack heads that this takes: an array of three, and one with a length of 32 bits.
    head = b"\x93" + codec.pack(DONE) + b"\xdd" + len(results).to_bytes(4, "big")
    return b"".join((head, *results, codec.pack(unmapped)))


class AgentChannel:
    """The agent's end: one socket for all workers. Used by one thread.

    Args:
        address: `ipc://…` to listen on.
        context: the agent's context; None: one of its own.
    """

    def __init__(self, address: str, context: zmq.Context[zmq.Socket[bytes]] | None = None) -> None:
        self._own_context = zmq.Context() if context is None else None
        self.socket: zmq.Socket[bytes] = (context or self._own_context).socket(zmq.ROUTER)  # type: ignore[union-attr]
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.SNDHWM, 0)
        self.socket.set(zmq.RCVHWM, 0)
        self.socket.set(zmq.ROUTER_MANDATORY, 1)
        self.socket.bind(address)
        self.address = address
        # Readable when something *may* have come: ZeroMQ's descriptor signals edges. So after it was readable, and
        # after any `send`, call `receive` until it returns nothing before waiting for it again.
        self.fd = self.socket.fileno()

    def send(self, worker: int, frame: bytes) -> bool:
        """Send a packed message; never blocks. False: this worker is not connected (not yet READY, or gone)."""
        send = self.socket.send
        try:
            send(b"w%d" % worker, _NOBLOCK_MORE)
            send(frame, _NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def receive(self, limit: int = 64) -> list[tuple[int, list[Any], bytes]]:
        """Take the messages that are here, at most `limit`: (worker, message, its frame). Never blocks.

        Raises:
            ProtocolError: a worker sent what is no message.
        """
        found: list[tuple[int, list[Any], bytes]] = []
        socket: Any = self.socket
        take = socket.recv
        try:
            while len(found) < limit:
                sender = take(_NOBLOCK)
                frame = take(_NOBLOCK)
                found.append((int(sender[1:]), codec.unpack(frame, MAX_MESSAGE_BYTES), frame))
                if not socket.get(_EVENTS) & _POLLIN:  # cheaper than to be told by an exception
                    break
        except zmq.Again:
            pass
        return found

    def close(self) -> None:
        """Close the socket; what is not sent is dropped."""
        self.socket.close()
        if self._own_context is not None:
            self._own_context.term()


class WorkerChannel:
    """A worker's end. One thread receives; whoever sends holds the runtime's lock."""

    def __init__(self, address: str, worker: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.set(zmq.ROUTING_ID, routing_id(worker))
        self.socket.set(zmq.LINGER, _LINGER_MS)
        self.socket.set(zmq.SNDHWM, 0)
        self.socket.set(zmq.RCVHWM, 0)
        self.socket.set(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self.socket.set(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        self.socket.connect(address)
        self.send = self.socket.send

    def has_input(self, timeout_ms: int = 0) -> bool:
        """Whether a message is here, or comes in time. For the thread that receives."""
        if timeout_ms:
            return bool(self.socket.poll(timeout_ms))
        return bool(int(self.socket.get(_EVENTS)) & _POLLIN)

    def close(self) -> None:
        """Send what is left, for a moment, and close."""
        self.socket.close()
        self._context.term()
