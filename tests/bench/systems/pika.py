"""The measuring stick of the broker: `pika` itself, on the same RabbitMQ, with persistent messages and manual acknowledgements.

this process ── queue 1 ──► echo process ── queue 2 ──► this process      two hops
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import pika

from tests.bench.system import Setting, System, WrongAnswerError

MESSAGE_BYTES = (1 << 20) - (16 << 10)
"""As large as gcref's own messages through a mailbox."""
ACK_EVERY = 16
PERSISTENT = pika.BasicProperties(delivery_mode=2)


class Adapter(System):
    name = "pika"
    is_cold_once = False

    def start(self, setting: Setting) -> None:
        url = os.environ["GCREF_BENCH_BROKER"]
        self._queues = [f"bench.{os.getpid()}.{number}" for number in range(2)]
        self._control, theirs = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")
        self._echo = fork.Process(target=_echo, args=(url, self._queues, theirs), daemon=True)
        self._echo.start()
        theirs.close()
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        self._channel = self._connection.channel()
        for queue in self._queues:
            self._channel.queue_declare(queue, durable=True)
        self._control.send("begin")
        self._control.recv()
        self._back: deque[bytes] = deque()
        self._channel.basic_qos(prefetch_count=4 * ACK_EVERY)
        self._channel.basic_consume(self._queues[1], self._take)

    def _take(self, _channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        self._back.append(body)
        self._channel.basic_ack(method.delivery_tag)

    def submit(self, function: Callable[..., Any], *args: Any, site: int = 0) -> Any:
        self._channel.basic_publish("", self._queues[0], str(args[-1]).encode(), PERSISTENT)
        return args[-1]

    def result(self, future: Any) -> Any:
        while not self._back:
            self._connection.process_data_events(1)
        return int(self._back.popleft())

    def results(self, futures: Sequence[Any]) -> list[Any]:
        return [self.result(future) for future in futures]

    def carry(self, size_bytes: int, seed: int, to_site: int) -> float:
        """One hop of so many bytes, until the last one has been taken at the other side."""
        data = bytes([seed]) * MESSAGE_BYTES
        self._control.send(size_bytes)
        self._control.recv()
        start = time.perf_counter()
        for at in range(0, size_bytes, MESSAGE_BYTES):
            piece = data[: min(MESSAGE_BYTES, size_bytes - at)]
            self._channel.basic_publish("", self._queues[0], piece, PERSISTENT)
        while not self._control.poll():
            self._connection.process_data_events(0.01)
        last = self._control.recv()
        seconds = time.perf_counter() - start
        if last != seed:
            raise WrongAnswerError("what came is not what went")
        return seconds

    def stop(self) -> None:
        for queue in self._queues:
            self._channel.queue_delete(queue)
        self._connection.close()
        self._echo.terminate()
        self._echo.join()

    def version(self) -> str:
        return str(pika.__version__)


def _echo(url: str, queues: list[str], control: Connection) -> None:
    """Sends everything back; told a size, it takes that many bytes in instead."""
    control.recv()
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=4 * ACK_EVERY)
    left = 0

    def take(_channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        nonlocal left
        if not left:
            channel.basic_publish("", queues[1], body, PERSISTENT)
            channel.basic_ack(method.delivery_tag)
            return
        left -= len(body)
        if not left or method.delivery_tag % ACK_EVERY == 0:
            channel.basic_ack(method.delivery_tag, multiple=True)
        if not left:
            control.send(body[-1])

    channel.basic_consume(queues[0], take)
    control.send("ready")
    while True:
        if not left and control.poll():
            left = control.recv()
            control.send("ready")
        connection.process_data_events(0.01 if left else 0.05)
