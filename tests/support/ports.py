"""Ports for servers that are known before they listen, and that stay free while such a server is down.

The system hands out ports from 32768 upwards to whoever connects somewhere, so these lie below. Test processes that run side by
side have a block each: a lock holds it, as long as the process lives, in the network namespace that the ports belong to.
"""

from __future__ import annotations

import itertools
import random
import socket
from typing import Final

_BLOCKS: Final = range(20_000, 32_000, 100)
_BLOCK_PORTS: Final = 100


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports at which nobody listens; other calls give others, as long as there are any."""
    found: list[int] = []
    for port in itertools.islice(_ports, _BLOCK_PORTS):
        if _is_free(host, port):
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"no {count} ports of {_block}–{_block + _BLOCK_PORTS - 1} are free at {host}")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _claim() -> tuple[int, socket.socket]:
    """A block of ports, and what holds it."""
    for block in random.sample(_BLOCKS, len(_BLOCKS)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0gcref-test-ports-{block}")
        except OSError:
            claim.close()
        else:
            return block, claim
    raise AssertionError("too many test processes: each has its block of ports")


_block, _claimed = _claim()
_ports = itertools.cycle(range(_block, _block + _BLOCK_PORTS))
