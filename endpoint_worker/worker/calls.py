"""The functions that a worker calls, and what there is to know of what they give and raise."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Coroutine
from typing import Any, Final

from gcref.errors import LocalProtocolError
from gcref.objects.functions import load_function

UNMEASURED: Final = float("inf")

PLAIN_TYPES: Final = frozenset((type(None), bool, int, float, str, bytes, list, tuple, dict, set))
"""Values of these types are neither coroutines nor futures."""


class Function:
    """A function that entries name by its digest; rebuilt when it is first called, so that its task has the trouble."""

    __slots__ = ("call", "data", "seconds")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.call: Callable[..., Any] | None = None
        self.seconds = UNMEASURED

    def load(self) -> Callable[..., Any]:
        """Rebuild it. What that raises is the task's own."""
        self.call = load_function(self.data)
        return self.call


class ToldError(Exception):
    """The agent has answered with the failure that the task is to end with."""

    def __init__(self, told: list[Any]) -> None:
        super().__init__()
        self.told = told


def is_future(kind: type) -> bool:
    """Futures of ours: told by what they can do, because the SDK is loaded only by tasks that use it."""
    return hasattr(kind, "ref") and hasattr(kind, "add_done_callback")


def no_dependency(index: int) -> Any:
    """What an entry without dependencies has for its arguments.

    Raises:
        LocalProtocolError: they name one.
    """
    raise LocalProtocolError(f"the arguments name dependency {index}, the entry has none")


def forget_frames(error: BaseException) -> None:
    """Let go of what the task's frames hold.

    An error that a future keeps makes a cycle of them, and an idle worker collects none.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            one.__traceback__ = None  # our own frames run, and cannot be cleared
            pending += (one.__cause__, one.__context__)


def run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What an `async def` task comes to."""
    import asyncio

    return asyncio.run(coroutine)
