"""All sessions of a party, and the links that they use: the one object that both control loops drive.

    carrier.poll ──► handle(event) ──► Deliver, PeerUp, Dial, …   (obey at once; journal what is delivered)
    brains ──► send(party, message)                                (queues; nothing leaves)
                     └──► flush(now) ──► Transmit, …               (one packet for each peer; acknowledgements)

Rules:
    - Nothing leaves before `flush`: no message, no acknowledgement, no handshake. So a shell that writes its journal
      between `handle` and `flush` never acknowledges what it might forget.
    - One session for each party, however many links it has; whoever dialled. The best link that is up carries
      everything (ipc before direct before broker, the newest of equals); a change of link sends what is
      unacknowledged once more.
    - A link carries messages only after a handshake on it. HELLO says who we are, which stream we send and
      what we have taken of theirs; WELCOME answers with the same. Each may come again at any time.
    - A party is bound to the owner key that it first showed; where the connection has an authenticated key, it must
      be that one. What a party may do (`authorize`) is asked in each handshake, and again after a `Revoke`.
    - A peer that starts anew has a new epoch. If it does not remember what it had acknowledged, `PeerReset` says so, and
      what it had not acknowledged is sent to it in a new epoch of ours.
    - What comes by mail may be old, and meant for an earlier process of ours: such a HELLO is believed only when it knows the
      present epoch of our stream, or its sender has answered ours. Mail goes on being sent to who is silent: it waits.
    - Strangers, garbage and other versions are counted, told once, and harm nobody else.

Source: the handshake and cumulative acknowledgement follow the session layers of MQTT 5 (section 4.1) and XEP-0198.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from gcref.brains.link import (
    CLOSING,
    CONNECTING,
    GREET_MAX_S,
    GREET_S,
    GREETING,
    MISSED_HEARTBEATS,
    REFUSED,
    RETRY_MAX_S,
    RETRY_S,
    SAY_HELLO,
    SILENT,
    SPARE,
    UP,
    VERSION,
    WAITING,
    LinkState,
    bye_frame,
    control_frame,
    hello_frame,
    read_bye,
    read_hello,
)
from gcref.brains.peer import Peer
from gcref.brains.peers_events import (
    CLIENT,
    ENDPOINT,
    PEER,
    USER,
    AuthRefused,
    Candidate,
    Deliver,
    Dial,
    DialBack,
    Event,
    Forget,
    Hangup,
    Hello,
    Identity,
    Instruction,
    Know,
    Link,
    LinkDown,
    LinkUp,
    Mismatch,
    PacketIn,
    PeerDown,
    PeerReset,
    PeerUp,
    Refused,
    Rejected,
    Revoke,
    Role,
    Tick,
    Transmit,
)
from gcref.brains.replaying import Replayed, only_good, replay
from gcref.brains.session import NEVER
from gcref.brains.strangers import Strangers
from gcref.config import HEARTBEAT_S, MAX_MESSAGE_BYTES, PROTOCOL_VERSION
from gcref.errors import LocalProtocolError, RemoteProtocolError, VersionMismatchError
from gcref.wire.codec import BYE, DATA, HELLO, PING, PONG, WELCOME, Packet, mismatch, pack, unpack_packet
from gcref.wire.messages import NAMES, check

__all__ = [
    "CLIENT", "ENDPOINT", "PEER", "USER", "AuthRefused", "Candidate", "Deliver", "Dial", "DialBack", "Event", "Forget",
    "Hangup", "Hello", "Identity", "Instruction", "Know", "Link", "LinkDown", "LinkUp", "Mismatch", "PacketIn", "PeerDown",
    "PeerReset", "PeerUp", "Peers", "Refused", "Rejected", "Replayed", "Revoke", "Role", "Tick", "Transmit", "replay",
]  # fmt: skip

MAX_LINKS: Final = 8
"""Accepted links of one party; beyond it the oldest is forgotten (its party dialled again and again)."""

_IN_STREAM: Final = (DATA, PING, PONG)


class Peers:
    """The sessions of this party with all others.

    Args:
        me: who this party is.
        authorize: says what a party may do, from the authenticated key of its connection (z85; None on ipc, whose
            sockets only our own user can reach; the expected key on a dialled link) and its HELLO; None refuses it.
        now: seconds.
        heartbeat_s: silence after which a link is asked for a sign of life, seconds.

    Attributes:
        counts: what was dropped, by kind: garbage, version, stranger, refused, message, stale.
    """

    def __init__(
        self,
        me: Identity,
        authorize: Callable[[bytes | None, Hello], Role | None],
        now: float = 0.0,
        *,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self.me = me
        self.counts = dict.fromkeys(("garbage", "version", "stranger", "refused", "message", "stale"), 0)
        self._authorize = authorize
        self._now = now
        self._heartbeat_s = heartbeat_s
        self._peers: dict[bytes, Peer] = {}
        self._links: dict[Link, LinkState] = {}
        self._epoch = me.epoch  # of new sessions
        self._next_link = 1
        self._next_nonce = me.epoch  # what answers an earlier process answers none of our HELLOs
        self._order = 0
        self._dirty: list[Peer] = []
        self._soon: list[Instruction] = []  # handshakes, heartbeats and good-byes, for the next flush
        self._deadline = NEVER  # not later than the next thing to do; often earlier
        self._strangers = Strangers()
        self._handlers: dict[type, Callable[[Any, list[Instruction]], None]] = {
            PacketIn: self._packet,
            LinkUp: self._link_up,
            LinkDown: self._link_down,
            Refused: self._refused,
            Know: self._know,
            Forget: self._forget,
            Revoke: self._revoke,
            Tick: self._on_tick,
        }

    # ------------------------------------------------------------------------------------------ what shells call

    def send(self, party: bytes, message: list[Any]) -> None:
        """Queue a message; it leaves with the next `flush` after which the party can be reached.

        Raises:
            LocalProtocolError: the message is not made of plain values, or larger than `MAX_MESSAGE_BYTES`. Nothing
                was queued.
        """
        body = pack(message)
        if len(body) > MAX_MESSAGE_BYTES:
            kind = NAMES.get(message[0], str(message[0]))
            raise LocalProtocolError(f"{kind} of {len(body)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
        peer = self._peers.get(party) or self._new_peer(party)
        peer.session.append(body)
        if not peer.dirty:
            peer.dirty = True
            self._dirty.append(peer)

    def handle(self, event: Event) -> list[Instruction]:
        """Take an event. The answers are to be obeyed in their order, before the next event."""
        out: list[Instruction] = []
        self._handlers[event.__class__](event, out)
        return out

    def flush(self, now: float) -> list[Instruction]:
        """Write what is to leave: queued messages, acknowledgements, resends, handshakes, heartbeats.

        Call it once in each turn of the loop, after what was delivered has been journalled.
        """
        self._now = now
        out: list[Instruction] = []
        if now >= self._deadline:
            self._tick(now, out)
        if self._soon:
            out += self._soon
            self._soon.clear()
        if self._dirty:
            dirty, self._dirty = self._dirty, []
            for peer in dirty:
                peer.dirty = False
                if peer.best is not None:
                    self._flush_peer(peer, peer.best.id, now, out)
        return out

    def _flush_peer(self, peer: Peer, link: Link, now: float, out: list[Instruction]) -> None:
        session = peer.session
        if peer.resend_to:
            out += [Transmit(link, frame) for frame in session.unacked_frames(peer.resend_to)]
            peer.resend_to = 0
            session.resent(now)
        if session.queued_bytes:
            out += [Transmit(link, frame) for frame in session.cut(now)]
        if session.ack_at <= now:
            out.append(Transmit(link, session.ack_frame()))
        if peer.asking and peer.link_up is not None:
            peer.asking = False
            out.append(Transmit(link, peer.link_up.ping_frame(session, now)))
        if session.resend_at < self._deadline:
            self._deadline = session.resend_at

    @property
    def deadline(self) -> float | None:
        """When `flush` is to be called at the latest, in the clock of `now`; None: nothing is due."""
        if self._soon or self._dirty:
            return self._now
        return None if self._deadline == NEVER else self._deadline

    def close(self, now: float) -> list[Instruction]:
        """Say good-bye to everybody, after a last flush. Nothing is to be sent or handled afterwards."""
        out = self.flush(now)
        out += [
            Transmit(link.id, bye_frame(CLOSING, "it ends", link.peer.session.peer_epoch))
            for link in self._links.values()
            if link.state in (UP, GREETING)
        ]
        return out

    # -------------------------------------------------------------------------------------------- what is known

    def parties(self) -> list[bytes]:
        """All parties that we have a session with, or have been told of."""
        return list(self._peers)

    def is_up(self, party: bytes) -> bool:
        """Whether a party can be talked to."""
        peer = self._peers.get(party)
        return peer is not None and peer.link_up is not None

    def carrier_of(self, party: bytes) -> str | None:
        """The carrier in use; None: it cannot be talked to."""
        peer = self._peers.get(party)
        link = peer.link_up if peer is not None else None
        return link.carrier if link is not None else None

    def kind_of(self, party: bytes) -> str:
        """What a party is: `CLIENT` or `ENDPOINT`; "" if it was never met."""
        peer = self._peers.get(party)
        return "" if peer is None else peer.kind

    def owner_of(self, party: bytes) -> bytes | None:
        """The owner key (z85) that a party has shown; None: it was never met."""
        peer = self._peers.get(party)
        return peer.owner_key if peer is not None else None

    def pending(self, party: bytes | None = None) -> int:
        """How many messages a party (None: all together) has not acknowledged, those that wait here included."""
        if party is None:
            return sum(peer.session.pending for peer in self._peers.values())
        peer = self._peers.get(party)
        return 0 if peer is None else peer.session.pending

    def sent(self, party: bytes) -> int:
        """How many messages were ever sent to a party, those that wait here included."""
        peer = self._peers.get(party)
        return 0 if peer is None else peer.session.appended

    def ask(self, party: bytes) -> None:
        """Have a party say at once what it has taken, behind what the next `flush` sends it: somebody waits for that."""
        peer = self._peers.get(party)
        if peer is not None:
            peer.asking = True
            self._touch(peer)

    def backlog_bytes(self, party: bytes) -> int:
        """Bytes of the messages that a party has not acknowledged, those that wait here included."""
        peer = self._peers.get(party)
        return 0 if peer is None else peer.session.queued_bytes + peer.session.unacked_bytes

    def describe(self, party: bytes) -> dict[str, Any]:
        """Give plain facts about a party, for explanations and status; {} for one that is not known.

        Times are in the clock of `now`. `mailbox`: it is away, and what is sent to it waits in its mailbox. `links` has an
        entry for each way tried: carrier, address, state, since when, attempts, the last error, round trip.
        """
        peer = self._peers.get(party)
        return {} if peer is None else peer.describe()

    def taken(self, party: bytes) -> tuple[int, int]:
        """Give (epoch, last number) of what was taken of a party's stream: what a snapshot keeps for `restore`."""
        peer = self._peers.get(party)
        return (0, 0) if peer is None else (peer.session.peer_epoch, peer.session.taken)

    def restore(self, party: bytes, kind: str, owner_key: bytes | None, epoch: int, taken: int) -> None:
        """Remember, after a restart, what had been taken of a party's stream: before anything is handled.

        Say it for the snapshot first and then for each frame of the journal, in order; the last word counts. A party
        that was forgotten must not be restored, or it would take for remembered what is gone.

        Args:
            party: its id.
            kind: `CLIENT` or `ENDPOINT`.
            owner_key: the only key that it may show from now on, z85; None: any.
            epoch: of its stream (`replay`, or a snapshot's `taken`).
            taken: the last number that was taken of it.
        """
        peer = self._peers.get(party) or self._new_peer(party)
        peer.kind = kind
        peer.owner_key = owner_key
        session = peer.session
        if (epoch, taken) > (session.peer_epoch, session.taken):
            session.peer_epoch = epoch
            session.taken = taken

    # ------------------------------------------------------------------------------------------- who there is

    def _new_peer(self, party: bytes) -> Peer:
        peer = self._peers[party] = Peer(party, self._epoch)
        return peer

    def _know(self, event: Know, out: list[Instruction]) -> None:
        peer = self._peers.get(event.party) or self._new_peer(event.party)
        wanted = dict.fromkeys(event.candidates)
        for link in [link for link in peer.links if link.dialled]:
            way = (link.carrier, link.address, link.server_key)
            if way in wanted:
                del wanted[way]
            else:
                self._say_bye(link)
                self._drop(link, "its address is no longer valid", event.now, out)
        for carrier, address, server_key in wanted:
            link = LinkState(
                0, peer, carrier, event.now, address=address, server_key=server_key, dialled=True
            )
            peer.links.append(link)
            if peer.link_up is not None and peer.link_up.rank < link.rank:
                link.become(SPARE, event.now)
            else:
                self._dial(link, event.now, out)

    def _forget(self, event: Forget, out: list[Instruction]) -> None:
        peer = self._peers.pop(event.party, None)
        if peer is None:
            return
        for link in peer.links:
            self._say_bye(link)
            self._links.pop(link.id, None)
        peer.links.clear()
        peer.best = None
        # Should we meet again, it has to see that we remember nothing.
        self._epoch = max(self._epoch, peer.session.epoch) + 1

    def _revoke(self, event: Revoke, out: list[Instruction]) -> None:
        now = event.now or self._now
        keys = frozenset(event.keys)
        for peer in list(self._peers.values()):
            for link in list(peer.links):
                if link.key not in keys and peer.owner_key not in keys:
                    continue
                if link.state in (UP, GREETING, SILENT):
                    frame = bye_frame(REFUSED, "the key was revoked", peer.session.peer_epoch)
                    self._soon.append(Transmit(link.id, frame))
                if link.dialled:
                    self._wait(link, "its key was revoked", now, out)
                else:
                    self._drop(link, "its key was revoked", now, out)

    # ----------------------------------------------------------------------------------------- links come and go

    def _dial(self, link: LinkState, now: float, out: list[Instruction]) -> None:
        link.id = self._next_link
        self._next_link += 1
        self._links[link.id] = link
        link.become(CONNECTING, now)
        out.append(Dial(link.peer.party, link.id, link.carrier, link.address, link.server_key))

    def _link_up(self, event: LinkUp, out: list[Instruction]) -> None:
        link = self._links.get(event.link)
        if link is None:
            return
        if not link.dialled:
            if link is link.peer.best:  # mail flows again: what was posted meanwhile has been dropped
                link.peer.resend_to = link.peer.session.next_seq - 1
                self._touch(link.peer)
            return
        if link.state != CONNECTING:
            # A new connection under the same number: what the old one knew is gone.
            link.become(CONNECTING, event.now)
            self._choose(link.peer, "the connection was lost", event.now, out)
        link.wait_s = GREET_S
        self._greet(link, event.now)

    def _greet(self, link: LinkState, now: float) -> None:
        if link.state != GREETING:
            link.greeting_since = now
        link.become(GREETING, now)
        link.due_at = now + link.wait_s
        self._arm(link.due_at)
        self._say_hello(link, now)

    def _say_hello(self, link: LinkState, now: float) -> None:
        link.nonce = self._next_nonce
        link.epoch, link.acked = link.peer.session.epoch, link.peer.session.acked
        self._next_nonce += 1
        link.ping_at = now
        self._soon.append(Transmit(link.id, hello_frame(HELLO, self.me, link.peer.session, link.nonce)))

    def _link_down(self, event: LinkDown, out: list[Instruction]) -> None:
        link = self._links.get(event.link)
        if link is None:
            return
        if not link.dialled:
            self._drop(link, event.reason, event.now, out)
            return
        if link.state == CONNECTING:
            link.attempts += 1
        link.become(CONNECTING, event.now, event.reason)
        self._choose(link.peer, event.reason, event.now, out)

    def _refused(self, event: Refused, out: list[Instruction]) -> None:
        self.counts["refused"] += 1
        if event.link is None:
            who = event.key or event.reason
            if self._strangers.first_time(who, "refused"):
                out.append(AuthRefused(None, event.reason))
            return
        link = self._links.get(event.link)
        if link is None:
            return
        reason = event.reason or "the key was refused"
        if not event.ours and link.server_key is not None and link.server_key == link.peer.owner_key:
            # It has shown this very key before: somebody on the way takes its connections while it is away.
            link.attempts += 1
            link.become(CONNECTING, event.now, reason)
            self._choose(link.peer, reason, event.now, out)
            return
        self._refused_by(link, reason, event.now, out, event.ours)

    def _refused_by(
        self, link: LinkState, reason: str, now: float, out: list[Instruction], ours: bool = True
    ) -> None:
        link.attempts += 1
        if not link.refused:
            link.refused = True
            out.append(AuthRefused(link.peer.party, reason, ours))
        self._wait(link, reason, now, out)

    def _wait(self, link: LinkState, reason: str, now: float, out: list[Instruction]) -> None:
        """Hang up a dialled link, and dial it again in a while."""
        self._hang_up(link)
        link.retry_s = min(link.retry_s * 2, RETRY_MAX_S) if link.retry_s else RETRY_S
        link.become(WAITING, now, reason)
        link.due_at = now + link.retry_s
        self._arm(link.due_at)
        self._choose(link.peer, reason, now, out)

    def _drop(self, link: LinkState, reason: str, now: float, out: list[Instruction]) -> None:
        """Forget a link altogether."""
        self._hang_up(link)
        link.peer.links.remove(link)
        link.become(CONNECTING, now)
        self._choose(link.peer, reason, now, out)

    def _hang_up(self, link: LinkState) -> None:
        # With the next flush, because a BYE may have to go before.
        if self._links.pop(link.id, None) is not None:
            self._soon.append(Hangup(link.id))

    def _say_bye(self, link: LinkState) -> None:
        if link.state in (UP, GREETING):
            frame = bye_frame(CLOSING, "this link is not needed", link.peer.session.peer_epoch)
            self._soon.append(Transmit(link.id, frame))
        if link.id in self._links:
            self._soon.append(Hangup(link.id))
            del self._links[link.id]

    def _comes_up(self, link: LinkState, now: float, out: list[Instruction]) -> None:
        if link.state != UP:
            self._order += 1
            link.order = self._order
            if link is link.peer.best:  # all of it lies in its mailbox; what is not there is found by asking
                link.peer.session.resent(now)
                self._arm(link.peer.session.resend_at)
        link.become(UP, now)
        link.heard_at = now
        link.beats = 0
        link.attempts = 0
        link.error = None
        link.refused = False
        link.wait_s = GREET_S
        link.retry_s = 0.0
        self._arm(link.heartbeat_at(self._heartbeat_s))
        self._choose(link.peer, "", now, out)

    def _choose(self, peer: Peer, reason: str, now: float, out: list[Instruction]) -> None:
        """Use the best link, and say what that changes."""
        best = peer.best_link()
        if best is not peer.best:
            peer.best = best
            if best is not None:
                peer.resend_to = peer.session.next_seq - 1
                self._touch(peer)
        if best is None or best.state != UP:
            if peer.announced is not None:
                peer.announced = None
                out.append(PeerDown(peer.party, reason))
            for link in [link for link in peer.links if link.state == SPARE]:
                self._dial(link, now, out)
            return
        self._spare_others(best, now)
        if peer.fresh or peer.announced != best.carrier:
            out.append(PeerUp(peer.party, best.carrier, peer.fresh))
            peer.fresh = False
            peer.announced = best.carrier

    def _spare_others(self, best: LinkState, now: float) -> None:
        """Hang up what we dialled and is no better; accepted links are their dialler's to judge.

        Where the best one is accepted, its equals stay: else both sides might hang up what the other one uses.
        """
        worse = best.rank if best.dialled else best.rank + 1
        for link in best.peer.links:
            if link is not best and link.dialled and link.rank >= worse and link.state != SPARE:
                self._say_bye(link)
                link.become(SPARE, now)

    def _touch(self, peer: Peer) -> None:
        if not peer.dirty:
            peer.dirty = True
            self._dirty.append(peer)

    def _arm(self, at: float) -> None:
        if at < self._deadline:
            self._deadline = at

    # ----------------------------------------------------------------------------------------------- packets in

    def _packet(self, event: PacketIn, out: list[Instruction]) -> None:
        link_id, frame, key, now, _ = event
        self._now = now
        link = self._links.get(link_id)
        if link is None or (key != link.key and (key is not None or not link.dialled)):
            self._from_stranger(event, link, out)
            return
        try:
            packet = unpack_packet(frame)
        except VersionMismatchError as error:
            self._other_version(link.peer.party, link, link_id, str(error), now, out)
            return
        except RemoteProtocolError as error:
            self._fault(link.peer.party, link_id, "garbage", str(error), out)
            return
        link.heard_at = now
        link.beats = 0
        kind = packet[0]
        if kind in _IN_STREAM:
            peer = link.peer
            current = packet[1] == peer.session.peer_epoch and link.state == UP
            if not current and not self._revives(link, packet, now, out):
                return
            if kind == DATA:
                self._data(peer, link, packet, frame, now, out)
            elif kind == PING:
                self._ping(peer, link, packet, now)
            else:
                self._pong(peer, link, packet, now)
        elif kind == HELLO:
            self._hello(event, link, packet, out)
        elif kind == WELCOME:
            self._welcome(link, packet, now, out)
        else:
            self._bye(link, packet, now, out)

    def _revives(self, link: LinkState, packet: Packet, now: float, out: list[Instruction]) -> bool:
        """Whether a packet on a link that is not up may be used after all: an accepted link is heard again."""
        if link.state == SILENT and packet[1] == link.peer.session.peer_epoch:
            self._comes_up(link, now, out)
            return True
        self.counts["stale"] += 1
        return False

    def _data(
        self, peer: Peer, link: LinkState, packet: Packet, frame: bytes, now: float, out: list[Instruction]
    ) -> None:
        session = peer.session
        if session.take_ack(packet[3], packet[4], now) and session.queued_bytes:
            self._touch(peer)  # credit came back
        if not packet[5]:
            return
        for messages, raw in session.receive(packet, frame, now):
            try:
                for message in messages:
                    check(message)
            except RemoteProtocolError as error:
                self._fault(peer.party, link.id, "message", str(error), out)
                messages = only_good(messages)
            out.append(
                Deliver(peer.party, link.role, peer.kind, peer.owner_key or b"", messages, raw, link.carrier)
            )
        if session.ack_at <= now:
            self._touch(peer)
        elif session.ack_at < self._deadline:
            self._deadline = session.ack_at

    def _ping(self, peer: Peer, link: LinkState, packet: Packet, now: float) -> None:
        self._heed_ack(peer, packet, now)
        n = packet[5][0] if packet[5] else 0
        peer.session.ack_said()
        self._soon.append(
            Transmit(link.id, control_frame(PONG, peer.session, [pack(n if type(n) is int else 0)]))
        )

    def _pong(self, peer: Peer, link: LinkState, packet: Packet, now: float) -> None:
        self._heed_ack(peer, packet, now)
        if not packet[5] or packet[5][0] != link.ping_n:
            return
        link.rtt_s = now - link.ping_at
        if link is peer.best and peer.session.acked < link.ping_seq:
            # Links keep order: the peer has seen the ping, so what went before it and is not taken is lost.
            peer.resend_to = link.ping_seq
            self._touch(peer)

    def _heed_ack(self, peer: Peer, packet: Packet, now: float) -> None:
        if peer.session.take_ack(packet[3], packet[4], now) and peer.session.queued_bytes:
            self._touch(peer)

    def _bye(self, link: LinkState, packet: Packet, now: float, out: list[Instruction]) -> None:
        if link.by_mail and packet.ack_epoch != link.peer.session.epoch:
            self.counts["stale"] += 1  # it was said to an earlier process, or in another life of the stream
            return
        code, text = read_bye(packet[5])
        if code == SAY_HELLO and link.dialled:
            if link.state != GREETING:
                self._greet(link, now)
                self._choose(link.peer, text, now, out)
        elif not link.dialled:
            self._drop(link, text, now, out)
        elif code == REFUSED:
            self._refused_by(link, text, now, out)
        elif code == VERSION:
            self._other_version(link.peer.party, link, link.id, text, now, out)
        else:
            # If it ends, its connection ends too, and comes again with its next process.
            link.become(GREETING, now, text)
            link.greeting_since = now
            link.wait_s = GREET_MAX_S
            link.due_at = now + GREET_MAX_S
            self._arm(link.due_at)
            self._choose(link.peer, text, now, out)

    # ------------------------------------------------------------------------------------------------ handshakes

    def _from_stranger(self, event: PacketIn, link: LinkState | None, out: list[Instruction]) -> None:
        """Take a packet of an accepted link that is not greeted yet, or that another connection has taken over."""
        if link is not None and link.dialled:
            self.counts["stranger"] += (
                1  # mail in the name of the party that we dialled, with a key that is not its
            )
            return
        if link is not None:
            self._drop(link, "another connection took its place", event.now, out)
        if type(event.link) is int and event.link < self._next_link and event.link > 0:
            return  # the last words of a link that we hung up
        try:
            packet = unpack_packet(event.frame)
        except VersionMismatchError as error:
            self._other_version(None, None, event.link, str(error), event.now, out)
            return
        except RemoteProtocolError as error:
            self._fault(None, event.key or event.link, "garbage", str(error), out)
            return
        if packet.kind == HELLO:
            self._hello(event, None, packet, out)
        elif packet.kind != BYE:
            self.counts["stranger"] += 1
            self._answer_stranger(
                event.link, bye_frame(SAY_HELLO, "say HELLO first", packet.epoch), event.now
            )

    def _hello(self, event: PacketIn, link: LinkState | None, packet: Packet, out: list[Instruction]) -> None:
        now = event.now
        try:
            hello = read_hello(packet.messages)
        except RemoteProtocolError as error:
            self._fault(link.peer.party if link is not None else None, event.link, "garbage", str(error), out)
            return
        if hello.protocol != PROTOCOL_VERSION:
            text = str(mismatch(hello.protocol))
            self._other_version(hello.party, link, event.link, text, now, out, hello.epoch)
            return
        if link is not None and link.peer.party != hello.party:
            if link.dialled:
                self._refused_by(link, "another party answers there", now, out)
                return
            self._drop(link, "another party speaks there", now, out)
            link = None
        key = link.key if link is not None else event.key
        role, reason = self._judge(key, hello)
        if role is None:
            self._refuse(hello, link, event.link, reason, now, out)
            return
        peer = self._peers.get(hello.party) or self._new_peer(hello.party)
        self._note(peer, hello)
        if link is None:
            link = self._accept(peer, event, out)
        link.role = role
        current = False
        if not link.by_mail or hello.taken_epoch == peer.session.epoch:
            current = self._meet(peer, link, hello, now, out, answer=False)
        else:
            self._ask_back(link, hello, now, out)
        self._soon.append(Transmit(link.id, hello_frame(WELCOME, self.me, peer.session, hello.nonce)))
        if current and (not link.dialled or link.state == UP):
            self._comes_up(link, now, out)
            self._tell_addresses(link, hello, out)

    def _ask_back(self, link: LinkState, hello: Hello, now: float, out: list[Instruction]) -> None:
        """Say HELLO to who may be long gone: mail may be old, and it does not name the present epoch of our stream.

        Nothing is believed until that is answered, with our nonce. The answer to theirs follows ours, so that theirs
        to ours comes before all that they send when they have it.
        """
        if link.state == SILENT:
            self._say_hello(link, now)
        elif link.state == UP:
            if hello.epoch > link.peer.session.peer_epoch:
                self._greet(link, now)
                self._choose(link.peer, "it has a new process", now, out)
        elif link.state == CONNECTING and not link.dialled:
            self._greet(link, now)

    def _tell_addresses(self, link: LinkState, hello: Hello, out: list[Instruction]) -> None:
        addresses = hello.control, hello.bulk
        if link.by_mail and any(addresses) and addresses != link.peer.addresses:
            link.peer.addresses = addresses
            out.append(DialBack(link.peer.party, hello.owner_key, *addresses))

    def _welcome(self, link: LinkState, packet: Packet, now: float, out: list[Instruction]) -> None:
        peer = link.peer
        try:
            hello = read_hello(packet.messages)
        except RemoteProtocolError as error:
            self._fault(peer.party, link.id, "garbage", str(error), out)
            return
        if link.state not in (GREETING, SILENT) or hello.nonce != link.nonce:
            self.counts["stale"] += 1
            return
        if hello.protocol != PROTOCOL_VERSION:
            text = str(mismatch(hello.protocol))
            self._other_version(peer.party, link, link.id, text, now, out, hello.epoch)
            return
        if hello.party != peer.party:
            self._refused_by(link, "another party answers there", now, out)
            return
        role, reason = self._judge(link.key, hello)
        if role is None:
            self._refuse(hello, link, link.id, reason, now, out)
            return
        self._note(peer, hello)
        link.role = role
        link.nonce = -1
        link.rtt_s = now - link.ping_at
        epoch = peer.session.epoch
        current = self._meet(peer, link, hello, now, out, answer=True)
        if peer.session.epoch != epoch:
            self._greet(link, now)  # our stream began anew: that must be known before it flows
        elif current:
            self._comes_up(link, now, out)
            self._tell_addresses(link, hello, out)

    def _judge(self, key: bytes | None, hello: Hello) -> tuple[Role | None, str]:
        """Say what a party may do, or why it may nothing."""
        if hello.party == self.me.party:
            return None, "this is the party itself"
        if key is not None and hello.owner_key != key:
            return None, "the owner key is not the key of the connection"
        known = self._peers.get(hello.party)
        if known is not None and known.owner_key is not None and known.owner_key != hello.owner_key:
            return None, "the party is known by another owner key"
        return self._authorize(key, hello), "the key has no rights here"

    def _note(self, peer: Peer, hello: Hello) -> None:
        peer.kind = hello.kind
        peer.owner_key = hello.owner_key
        peer.python = hello.python

    def _refuse(
        self, hello: Hello, link: LinkState | None, at: Link, reason: str, now: float, out: list[Instruction]
    ) -> None:
        self.counts["refused"] += 1
        if self._strangers.first_time((hello.party, hello.owner_key), "refused"):
            key = hello.owner_key.decode("ascii", "replace")
            out.append(AuthRefused(hello.party, f"the key {key} was refused: {reason}"))
        if link is None:
            self._answer_stranger(at, bye_frame(REFUSED, reason, hello.epoch), now)
            return
        self._soon.append(Transmit(at, bye_frame(REFUSED, reason, hello.epoch)))
        if link.dialled:
            self._wait(link, reason, now, out)
        else:
            self._drop(link, reason, now, out)

    def _accept(self, peer: Peer, event: PacketIn, out: list[Instruction]) -> LinkState:
        accepted = [link for link in peer.links if not link.dialled and link is not peer.best]
        if len(accepted) >= MAX_LINKS:
            self._drop(
                min(accepted, key=lambda link: link.heard_at), "it has many newer links", event.now, out
            )
        link = LinkState(event.link, peer, event.carrier, event.now, key=event.key, dialled=False)
        peer.links.append(link)
        self._links[event.link] = link
        self._strangers.is_met(event.link)
        return link

    def _meet(
        self, peer: Peer, link: LinkState, hello: Hello, now: float, out: list[Instruction], *, answer: bool
    ) -> bool:
        """Compare what both sides know of the streams.

        Args:
            answer: it answers our own HELLO on this link.

        Returns:
            False: it is an old packet of an earlier process.
        """
        session = peer.session
        if hello.epoch < session.peer_epoch:
            # Or its clock went back: our answer tells it the epoch that it must exceed. Ours may have gone back too.
            self.counts["stale"] += 1
            if hello.taken_epoch > session.epoch:
                session.restart(hello.taken_epoch + 1)
                self._began_anew(peer, link, now)
            return False
        anew = hello.epoch > session.peer_epoch
        if anew:
            restarted = session.peer_epoch != 0
            session.adopt(hello.epoch)
            peer.fresh = True
            if restarted:
                self._outdate_links(peer, link, now)
        knows = hello.taken_seq if hello.taken_epoch == session.epoch else 0
        # A process that we know may say less than it knows by now (a HELLO is overtaken by acknowledgements on
        # another link), but never less than it had acknowledged before it was asked.
        known = session.acked if anew else link.acked if answer and link.epoch == session.epoch else 0
        if knows < known:
            kept = session.restart(max(session.epoch, hello.taken_epoch) + 1)
            self._began_anew(peer, link, now)
            peer.announced = None
            out.append(PeerReset(peer.party, kept))
        elif hello.taken_epoch > session.epoch or knows >= session.next_seq:
            # It knows more of our stream than we do: an earlier process of ours, whose clock was ahead.
            session.restart(hello.taken_epoch + 1)
            self._began_anew(peer, link, now)
        elif session.take_ack(hello.taken_epoch, hello.taken_seq, now) and session.queued_bytes:
            self._touch(peer)
        if anew and session.next_seq - 1 > session.acked:
            # What was under way to its old process may never have arrived.
            peer.resend_to = session.next_seq - 1
            self._touch(peer)
        return True

    def _outdate_links(self, peer: Peer, current: LinkState, now: float) -> None:
        """The peer has a new process: links that its old one dialled are dead, whatever they look like."""
        for link in [link for link in peer.links if not link.dialled and link is not current]:
            self._hang_up(link)
            peer.links.remove(link)
        if peer.best is not None and peer.best not in peer.links:
            peer.best = None

    def _began_anew(self, peer: Peer, current: LinkState, now: float) -> None:
        """Our stream has a new epoch: what is kept goes out again, on links that have heard of it."""
        peer.resend_to = peer.session.next_seq - 1
        self._touch(peer)
        for link in peer.links:
            if link is not current and link.state == UP:
                self._greet(link, now)
        if peer.best is not None and peer.best.state != UP:
            peer.best = None

    # ------------------------------------------------------------------------------------------------- strangers

    def _other_version(
        self,
        party: bytes | None,
        link: LinkState | None,
        at: Link,
        text: str,
        now: float,
        out: list[Instruction],
        epoch: int = 0,
    ) -> None:
        self.counts["version"] += 1
        if self._strangers.first_time(party if party is not None else at, "version"):
            out.append(Mismatch(party, text))
        # The other side cannot read it, but sees our version in its first byte.
        if link is None:
            self._answer_stranger(at, bye_frame(VERSION, text, epoch), now)
            return
        self._soon.append(Transmit(at, bye_frame(VERSION, text, epoch)))
        if link.dialled:
            self._wait(link, text, now, out)
        else:
            self._drop(link, text, now, out)

    def _answer_stranger(self, link: Link, frame: bytes, now: float) -> None:
        if self._strangers.is_to_be_answered(link, now):
            self._soon += (Transmit(link, frame), Hangup(link))

    def _fault(self, party: bytes | None, link: Link, kind: str, text: str, out: list[Instruction]) -> None:
        self.counts[kind] += 1
        if self._strangers.first_time(party if party is not None else link, kind):
            out.append(Rejected(party, link, f"{kind}: {text}"))

    # ----------------------------------------------------------------------------------------------------- time

    def _on_tick(self, event: Tick, out: list[Instruction]) -> None:
        self._tick(event.now, out)

    def _tick(self, now: float, out: list[Instruction]) -> None:
        """Do what is due everywhere, and find out when the next thing is."""
        self._now = now
        deadline = NEVER
        for peer in list(self._peers.values()):
            session = peer.session
            if session.ack_at <= now:
                self._touch(peer)
            elif session.ack_at < deadline:
                deadline = session.ack_at
            if session.resend_at <= now:
                self._ask_what_is_taken(peer, now)
            deadline = min(deadline, session.resend_at)
            for link in list(peer.links):
                if link.due_at <= now:
                    self._due(link, now, out)
                elif link.heartbeat_at(self._heartbeat_s) <= now:
                    self._miss_heartbeat(link, now, out)
            for link in peer.links:
                deadline = min(deadline, link.due_at, link.heartbeat_at(self._heartbeat_s))
        self._deadline = deadline

    def _ask_what_is_taken(self, peer: Peer, now: float) -> None:
        link = peer.link_up
        if link is None:
            peer.session.resend_at = NEVER  # all of it goes out, or is asked for, when a link comes up
            return
        self._soon.append(Transmit(link.id, link.ping_frame(peer.session, now)))
        peer.session.back_off(now)

    def _due(self, link: LinkState, now: float, out: list[Instruction]) -> None:
        if link.state == WAITING:
            self._dial(link, now, out)
        elif link.state == GREETING:
            if now - link.greeting_since >= MISSED_HEARTBEATS * self._heartbeat_s:
                self._is_frozen(link, "connected, but no answer to HELLO", now, out)
            else:
                link.wait_s = min(link.wait_s * 2, GREET_MAX_S)
                self._greet(link, now)
        else:
            link.due_at = NEVER

    def _miss_heartbeat(self, link: LinkState, now: float, out: list[Instruction]) -> None:
        # Heartbeats are counted, not seconds: a process that was stopped itself must not judge by the clock.
        if link.beats + 1 >= MISSED_HEARTBEATS:
            silence_s = now - link.heard_at
            self._is_frozen(link, f"frozen: nothing was heard for {silence_s:.0f} s", now, out)
        else:
            link.beats += 1
            link.beat_at = now
            self._soon.append(Transmit(link.id, link.ping_frame(link.peer.session, now)))

    def _is_frozen(self, link: LinkState, reason: str, now: float, out: list[Instruction]) -> None:
        if not link.dialled and not link.order:
            self._drop(link, reason, now, out)  # it was never up: old mail
            return
        if not link.dialled:
            link.become(SILENT, now, reason)
            self._choose(link.peer, reason, now, out)
            return
        self._hang_up(link)
        link.attempts += 1
        self._dial(link, now, out)
        link.error = reason
        self._choose(link.peer, reason, now, out)
