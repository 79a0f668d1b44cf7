"""The one interface through which every system is measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from tests.bench import tasks


class WrongAnswerError(AssertionError):
    """A system gave back something else than the task's value: the whole run has failed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """How a system is to be set up for a workload.

    Attributes:
        sites: 1, or 2 places that share no process but the submitter.
        workers: worker processes per site.
        carriers: the ways that ours may use (`None`: all). Other systems have no such choice.
    """

    sites: int = 1
    workers: int = 2
    carriers: tuple[str, ...] | None = None


class System:
    """A system under measurement. An adapter overrides what raises here, and what it does in other ways.

    One process has one started system, used by one thread.
    """

    name: ClassVar[str]
    passes_futures: ClassVar[bool] = True
    """A future may be the argument of another task. Where not, the measuring code forwards values by hand."""
    quiet: ClassVar[bool] = True
    """Idle, it does nothing: its process may live on while others are measured. Else each turn starts it."""
    is_cold_once: ClassVar[bool] = True
    """The first array of a size takes longer than the next, so it is not the one that is timed."""
    first_result: ClassVar[str] = ""
    """A script that prints the seconds from its own first line to its first result."""

    def start(self, setting: Setting) -> None:
        """Be ready for work: the first tasks pay for imports in the workers, not for their start."""
        raise NotImplementedError

    def submit(self, function: Callable[..., Any], *args: Any, site: int = 0) -> Any:
        """Start one task. Never waits for an argument if `passes_futures`."""
        raise NotImplementedError

    def result(self, future: Any) -> Any:
        """Wait for a task's value, and bring it here."""
        raise NotImplementedError

    def results(self, futures: Sequence[Any]) -> list[Any]:
        """The values of many tasks, in order."""
        return [self.result(future) for future in futures]

    def wait(self, future: Any) -> None:
        """Wait until a task has ended; its value may stay where it is."""
        raise NotImplementedError

    def stop(self) -> None:
        """End every process that `start` made."""
        raise NotImplementedError

    def version(self) -> str:
        """What is being measured, for the record."""
        return ""

    def carry(self, size_bytes: int, seed: int, to_site: int) -> float:
        """Time how long an array takes from a task of site 0 to one of `to_site`, which touches every page.

        Returns:
            Seconds from the submit to the consumer's answer.
        """
        made = self.submit(tasks.make_array, size_bytes, seed, site=0)
        self.wait(made)
        start = time.perf_counter()
        if not self.passes_futures:
            made = self.result(made)
        seen = self.result(self.submit(tasks.touch_array, made, site=to_site))
        seconds = time.perf_counter() - start
        if (seen[0], seen[2]) != (size_bytes, tasks.touched(size_bytes, seed)):
            raise WrongAnswerError(f"an array of {size_bytes} bytes arrived as {seen}")
        if not self.result(self.submit(tasks.is_intact, made, seed, site=to_site)):
            raise WrongAnswerError(f"an array of {size_bytes} bytes arrived with other numbers in it")
        return seconds
