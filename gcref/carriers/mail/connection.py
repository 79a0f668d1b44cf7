"""pika's connection on our loop, with a short way for what a mailbox does all the time.

Of a message's way through pika most is the making of objects: some 100 µs for a small one. And it reads 4 KiB at a time
into a buffer that is copied for each, which is slow for bodies of 1 MiB. So what we publish, what is delivered to us, and the
broker's confirmations are written and read here. Everything else (logging in, heartbeats, returns, errors) is pika's. A pika
that has changed inside (`FAST` is false then) is used by its public methods alone.

Bodies travel in frames of 128 KiB, the most that RabbitMQ allows unless it is told otherwise, and that pika allows at all.

Source: AMQP 0-9-1, 2.3.5 and 4.2: frames, content and properties.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from typing import Any, Final

import pika
from pika import exceptions, frame
from pika.adapters.select_connection import SelectConnection
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter

from gcref.carriers.mail.loop import Loop

log = logging.getLogger(__name__)

FAST: Final = all(
    hasattr(SelectConnection, name)
    for name in ("_on_data_available", "_output_marshaled_frames", "_process_frame", "_proto_connection_made")
)

READ_BYTES: Final = 256 * 1024
"""How much is read from the socket at once. pika takes 4 KiB."""

CONSUMER: Final = "mail"
"""The consumer tag of a mailbox's connection."""

_METHOD, _HEADER, _BODY, _END = 1, 2, 3, b"\xce"
_DELIVER: Final = b"\0\x3c\0\x3c"
_ACK: Final = b"\0\x3c\0\x50"
_NACK: Final = b"\0\x3c\0\x78"
_PUBLISH: Final = b"\0\x3c\0\x28\0\0\0"  # basic.publish; reserved; the default exchange
_MANDATORY: Final = b"\1"

# Flags of the properties that we use.
_HAS_MODE: Final = 1 << 12
_HAS_EXPIRATION: Final = 1 << 8
_HAS_TYPE: Final = 1 << 5
_PERSISTENT: Final = b"\2"

_frame_head: Final = struct.Struct(">BHI")
_content_head: Final = struct.Struct(">BHIHHQH")
_tag: Final = struct.Struct(">Q")
_body_size: Final = struct.Struct(">QH")

OnMail = Callable[[int, bool, str | None, bytes], None]
OnConfirm = Callable[[int, bool, bool], None]


class Connection(SelectConnection):  # type: ignore[misc]
    """A connection with a broker, and its one channel that publishes, is confirmed, and consumes.

    Args:
        parameters: where it is, and who we are.
        loop: whose thread it lives on.
        on_open: it is open.
        on_open_failed: it could not be opened.
        on_closed: it is no longer open.
        on_mail: delivery tag, delivered before, type property, body.
        on_confirm: delivery tag, all before it too, taken (else rejected).
    """

    def __init__(
        self,
        parameters: pika.ConnectionParameters,
        loop: Loop,
        on_open: Callable[[Any], None],
        on_open_failed: Callable[[Any, BaseException], None],
        on_closed: Callable[[Any, BaseException], None],
        on_mail: OnMail,
        on_confirm: OnConfirm,
    ) -> None:
        self._on_mail = on_mail
        self._on_confirm = on_confirm
        self._abandoned = False
        self._fast = False
        self._number = 0
        self._rest: list[bytes] = []
        self._rest_size = 0
        self._needed = 0
        self._delivery: tuple[int, bool] | None = None
        self._kind: str | None = None
        self._body: list[bytes] = []
        self._body_left = 0
        self._heads: dict[str, bytes] = {}
        self._out: list[bytes | memoryview] = []
        self._mail_channel: Any = None

        def unless_abandoned(callback: Callable[..., None]) -> Callable[..., None]:
            return lambda *args: None if self._abandoned else callback(*args)

        super().__init__(
            parameters,
            unless_abandoned(on_open),
            unless_abandoned(on_open_failed),
            unless_abandoned(on_closed),
            custom_ioloop=SelectorIOServicesAdapter(loop),
        )

    def consume(self, channel: Any, queue: str, on_consuming: Callable[[Any], None]) -> None:
        """From now on give what comes to `on_mail`, and confirmations to `on_confirm`.

        Args:
            channel: an open channel in confirm mode, whose callbacks are `confirm` and `deliver`.
            queue: our mailbox.
            on_consuming: the broker has agreed.
        """
        self._mail_channel = channel
        self._number = channel.channel_number
        self._fast = FAST
        channel.basic_consume(queue, self.deliver, consumer_tag=CONSUMER, callback=on_consuming)

    def confirm(self, frame: Any) -> None:
        """What pika calls for `on_confirm`."""
        method = frame.method
        self._on_confirm(method.delivery_tag, method.multiple, method.NAME == "Basic.Ack")

    def deliver(self, _: Any, method: Any, properties: Any, body: bytes) -> None:
        """What pika calls for `on_mail`."""
        self._on_mail(method.delivery_tag, method.redelivered, properties.type, body)

    def abandon(self) -> None:
        """Let go of it at once, whatever state it is in, and hear nothing of it any more."""
        self._abandoned = True
        self._fast = False
        self._out.clear()
        if self.is_closed:
            return
        try:
            # As pika's own heartbeat does: there may be nobody left to say good-bye to.
            self._terminate_stream(exceptions.AMQPHeartbeatTimeout("abandoned"))
        except Exception:
            # It may be in any state; its socket goes with it in the end.
            log.debug("mail: a connection was in the way of its end", exc_info=True)

    # ------------------------------------------------------------------------------------------------ publishing

    def publish(self, queue: str, body: bytes, kind: str | None, keep_ms: int | None) -> None:
        """Publish to a mailbox: persistent, mandatory. It leaves with `flush`."""
        if not self._fast:
            properties = pika.BasicProperties(
                delivery_mode=2, type=kind, expiration=None if keep_ms is None else str(keep_ms)
            )
            self._mail_channel.basic_publish("", queue, body, properties, mandatory=True)
            return
        out, channel, size = self._out, self._number, len(body)
        head = self._heads.get(queue)
        if head is None:
            if len(self._heads) > 1000:
                self._heads.clear()
            name = queue.encode()
            method = _PUBLISH + bytes([len(name)]) + name + _MANDATORY
            head = self._heads[queue] = _frame_head.pack(_METHOD, channel, len(method)) + method + _END
        flags, properties = _HAS_MODE, _PERSISTENT
        if keep_ms is not None:
            text = b"%d" % keep_ms
            flags |= _HAS_EXPIRATION
            properties += bytes([len(text)]) + text
        if kind is not None:
            flags |= _HAS_TYPE
            properties += bytes([len(kind)]) + kind.encode()
        out.append(head)
        out.append(_content_head.pack(_HEADER, channel, 14 + len(properties), 60, 0, size, flags))
        out.append(properties)
        out.append(_END)
        most = self._body_max_length
        if size <= most:
            out.append(_frame_head.pack(_BODY, channel, size))
            out.append(body)
            out.append(_END)
            return
        whole = memoryview(body)
        for at in range(0, size, most):
            part = whole[at : at + most]
            out.append(_frame_head.pack(_BODY, channel, len(part)))
            out.append(part)
            out.append(_END)

    def flush(self) -> None:
        """Send what was published, all at once."""
        if self._out:
            data, self._out = b"".join(self._out), []
            if self.is_open:
                # A view: pika cuts off what has been sent, which copies the rest of anything else.
                self._output_marshaled_frames([memoryview(data)])

    # --------------------------------------------------------------------------------------------------- reading

    def _proto_connection_made(self, transport: Any) -> None:
        if hasattr(transport, "_MAX_RECV_BYTES"):
            transport._MAX_RECV_BYTES = READ_BYTES
            transport._MAX_CONSUME_BYTES = 4 * READ_BYTES
        super()._proto_connection_made(transport)

    def _on_data_available(self, data_in: bytes) -> None:
        """Cut what has come into frames."""
        rest = self._rest
        if rest:
            rest.append(data_in)
            self._rest_size += len(data_in)
            if self._rest_size < self._needed:
                return
            data_in = b"".join(rest)
            rest.clear()
        at, size = 0, len(data_in)
        needed = 8
        while size - at >= 8:
            kind, channel, length = _frame_head.unpack_from(data_in, at)
            end = at + length + 8
            if end > size:
                needed = end - at
                break
            if not (self._fast and channel == self._number and self._read(kind, data_in, at + 7, end - 1)):
                _, value = frame.decode_frame(data_in[at:end])
                self.bytes_received += end - at
                if value is not None:
                    self._process_frame(value)
            else:
                self.bytes_received += end - at
                self.frames_received += 1
            at = end
        if at < size:
            rest.append(data_in[at:] if at else data_in)
            self._rest_size = size - at
            self._needed = needed

    def _read(self, kind: int, data: bytes, at: int, end: int) -> bool:
        """Take a frame of our channel, if it is one of those that we know."""
        if data[end] != 0xCE:
            return False
        if kind == _BODY and self._delivery is not None:
            self._body.append(data[at:end])
            self._body_left -= end - at
            if self._body_left <= 0:
                self._give()
            return True
        if kind == _HEADER and self._delivery is not None:
            size, flags = _body_size.unpack_from(data, at + 4)
            self._body_left = size
            self._kind = None
            if flags & _HAS_TYPE:
                properties = pika.BasicProperties()
                properties.decode(data[at + 12 : end])
                self._kind = properties.type
            if not size:
                self._give()
            return True
        if kind != _METHOD:
            return False
        method = data[at : at + 4]
        if method == _DELIVER:
            # consumer tag, delivery tag, redelivered; exchange and routing key are of no interest
            at += 5 + data[at + 4]
            self._delivery = (_tag.unpack_from(data, at)[0], bool(data[at + 8] & 1))
            return True
        if method in (_ACK, _NACK):
            self._on_confirm(_tag.unpack_from(data, at + 4)[0], bool(data[at + 12] & 1), method == _ACK)
            return True
        return False

    def _give(self) -> None:
        assert self._delivery is not None
        tag, again = self._delivery
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._delivery = None
        self._body = []
        self._on_mail(tag, again, self._kind, body)
