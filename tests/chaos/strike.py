"""Carries out a plan of the nemesis: one thread that does what is due, and notes what it did."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable
from typing import Final

import psutil

from tests.chaos import tasks
from tests.chaos.history import History
from tests.chaos.nemesis import OF_AGENTS, OF_LINKS, Act, Blow, Fault
from tests.chaos.sites import Site, World

_FILLER: Final = "filler"


class Striker(threading.Thread):
    """Strikes at the times of the acts, from `start` on.

    Args:
        world: what is struck.
        acts: what to do when, in order.
        history: where it is noted.

    Attributes:
        error: what stopped it, if something did.
    """

    def __init__(self, world: World, acts: Iterable[Act], history: History) -> None:
        super().__init__(name="nemesis")
        self._world = world
        self._acts = list(acts)
        self._history = history
        self._stopped = threading.Event()
        self._frozen: dict[Blow, psutil.Process] = {}
        self._down: set[Blow] = set()  # agents that were struck and are to go on
        self.error: BaseException | None = None

    def run(self) -> None:
        """Strike."""
        begin = time.monotonic()
        try:
            for act in self._acts:
                if self._stopped.wait(max(0.0, begin + act.at_s - time.monotonic())):
                    return
                self._do(act)
        except BaseException as error:  # noqa: BLE001 - the run ends with it
            self.error = error

    def stop(self) -> None:
        """End early; what is broken is healed by the world."""
        self._stopped.set()
        self.join()

    def _do(self, act: Act) -> None:
        blow = act.blow
        at = time.monotonic()  # before it is done: what it brings about comes after
        if blow.fault in OF_LINKS:
            killed: list[int] | None = self._strike_link(blow, act.begins)
        else:
            site = self._world.site(blow.target)
            if blow.fault is Fault.FILL:
                killed = self._fill(site, act.begins)
            elif blow.fault in OF_AGENTS:
                killed = self._strike_agent(blow, site, act.begins)
            else:
                killed = self._strike_worker(blow, site, act.begins)
        if killed is not None:
            named = blow.target.rpartition(">")[2]
            self._history.note(
                "blow" if act.begins else "healed",
                at=at if act.begins else None,
                fault=str(blow.fault),
                target=blow.target,
                site=[site.name for site in self._world.sites].index(named),
                killed=killed,
                done=round(time.monotonic(), 6),
                for_s=blow.for_s,
                plane=blow.plane,
            )

    def _strike_link(self, blow: Blow, begins: bool) -> list[int]:
        for proxy in self._world.links[blow.target].of(blow.plane):
            match blow.fault:
                case Fault.CUT if begins:
                    proxy.cut()
                case Fault.CUT:
                    proxy.restore()
                case Fault.SNAP:
                    proxy.cut()
                    proxy.restore()
                case Fault.HALF_OPEN if begins:
                    proxy.freeze()
                case Fault.HALF_OPEN:
                    proxy.thaw()
                case Fault.DELAY:
                    proxy.delay_s = blow.delay_s if begins else 0.0
                case _:
                    raise AssertionError(blow)
        return []

    def _strike_worker(self, blow: Blow, site: Site, begins: bool) -> list[int] | None:
        if not begins:
            process = self._frozen.pop(blow, None)
            if process is None:
                return None
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
            return []
        workers = site.workers()
        busy = self._busy()
        chosen = [worker for worker in workers if worker.pid in busy] or workers
        if not chosen:
            return None
        process = chosen[blow.rank % len(chosen)]
        is_kill = blow.fault is Fault.KILL_WORKER
        try:
            process.send_signal(signal.SIGKILL if is_kill else signal.SIGSTOP)
        except psutil.NoSuchProcess:
            return None
        if is_kill:
            return [process.pid]
        self._frozen[blow] = process
        return []

    def _busy(self) -> set[int]:
        """The processes that are running a task, as far as the tasks' effects tell."""
        latest = [effect for rows in tasks.effects(str(self._world.effects)).values() for effect in rows[-1:]]
        return {effect.pid for effect in latest if effect.what == tasks.STARTED}

    def _strike_agent(self, blow: Blow, site: Site, begins: bool) -> list[int] | None:
        if begins:
            if site.is_restarting() or not site.is_alive():
                return None
            self._down.add(blow)
        elif blow not in self._down:
            return None
        match blow.fault:
            case Fault.FREEZE_AGENT:
                site.signal_agent(signal.SIGSTOP if begins else signal.SIGCONT)
                return []
            case Fault.KILL_AGENT if begins:
                site.signal_agent(signal.SIGKILL)
                return []
            case Fault.STOP_AGENT if begins:
                since = round(time.monotonic(), 6)
                site.command("stop")
                self._history.note("stopped", site=self._world.sites.index(site), since=since)
                return []
            case _:
                site.await_death()
                site.restart(lambda: self._world.introduce(site))
        return []

    def _fill(self, site: Site, begins: bool) -> list[int]:
        path = self._world.disk_of(site) / _FILLER
        if not begins:
            path.unlink(missing_ok=True)
            return []
        with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(os.urandom(1 << 20))
        return []
