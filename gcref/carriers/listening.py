"""Why a carrier cannot listen at an address, in words for whoever configured it."""

from __future__ import annotations

import errno

import zmq

from gcref.errors import ConfigError


def cannot_listen(address: str, problem: str, remedy: str) -> ConfigError:
    """An address where nobody can listen, with what to do about it."""
    return ConfigError(f"cannot listen at {address}: it {problem}; {remedy}", key=address, remedy=remedy)


def bind_failed(scheme: str, place: str, address: str, error: zmq.ZMQError) -> ConfigError:
    """Why a socket could not be bound, and what to do about it."""
    if error.errno == errno.EADDRINUSE:
        if scheme == "tcp":
            port = place.rpartition(":")[2]
            remedy = "choose another port, or * for any free one"
            return ConfigError(
                f"cannot listen at {address}: port {port} is taken; {remedy}", key=port, remedy=remedy
            )
        return cannot_listen(address, "is in use", "end the process that has it")
    if error.errno in (errno.ENODEV, errno.EADDRNOTAVAIL):
        return cannot_listen(
            address, "is not an address of this machine", "use 0.0.0.0, or one of its addresses"
        )
    return cannot_listen(address, f"cannot be had ({error})", "check address and rights")
