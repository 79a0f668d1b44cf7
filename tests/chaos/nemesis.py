"""What is broken, and when: a plan that is a pure function of the seed. `strike` carries it out.

Faults of one target never overlap, so that the end of one is never the end of another. Each ends by itself, long before
anybody gives anything up: what a fault may do to a task's outcome is the affair of `checker`, and for most it is nothing.
"""

from __future__ import annotations

import enum
import random
from typing import Final, NamedTuple


class Fault(enum.StrEnum):
    """A way to break something."""

    KILL_WORKER = "kill worker"
    FREEZE_WORKER = "freeze worker"
    FREEZE_AGENT = "freeze agent"
    KILL_AGENT = "kill agent"  # SIGKILL, and started again
    STOP_AGENT = "stop agent"  # in order, and started again
    CUT = "cut"  # connections break, and new ones are refused
    SNAP = "snap"  # connections break, and new ones are taken at once
    HALF_OPEN = "half open"  # nothing passes, and nobody is told
    DELAY = "delay"
    FILL = "fill"  # no room on the disk of a store


AGENTS_DIE: Final = frozenset((Fault.KILL_AGENT, Fault.STOP_AGENT))
OF_WORKERS: Final = frozenset((Fault.KILL_WORKER, Fault.FREEZE_WORKER))
OF_AGENTS: Final = frozenset((Fault.FREEZE_AGENT, Fault.KILL_AGENT, Fault.STOP_AGENT))
OF_LINKS: Final = frozenset((Fault.CUT, Fault.SNAP, Fault.HALF_OPEN, Fault.DELAY))

PLANES: Final = ("control", "bulk", "both")


class Blow(NamedTuple):
    """One fault at one time.

    Attributes:
        at_s: when, seconds from the start.
        fault: what is done.
        target: a site's name, or a link's: `client>a`.
        for_s: how long it lasts; an agent that dies is started again after it.
        plane: of a link: which of its two connections.
        delay_s: by how much everything on a link is held back.
        rank: decides which worker; one that runs a task is taken first.
    """

    at_s: float
    fault: Fault
    target: str
    for_s: float = 0.0
    plane: str = "both"
    delay_s: float = 0.0
    rank: int = 0


class Act(NamedTuple):
    """One thing to do: to begin a blow, or to end it."""

    at_s: float
    begins: bool
    blow: Blow


_WEIGHTS: Final = {
    Fault.KILL_WORKER: 6.0,
    Fault.FREEZE_WORKER: 3.0,
    Fault.FREEZE_AGENT: 2.0,
    Fault.KILL_AGENT: 3.0,
    Fault.STOP_AGENT: 1.0,
    Fault.CUT: 3.0,
    Fault.SNAP: 3.0,
    Fault.HALF_OPEN: 2.0,
    Fault.DELAY: 2.0,
    Fault.FILL: 1.0,
}
_LONGEST_S: Final = {
    Fault.FREEZE_WORKER: 1.5,
    Fault.FREEZE_AGENT: 2.5,
    Fault.KILL_AGENT: 1.5,
    Fault.STOP_AGENT: 1.0,
    Fault.CUT: 2.0,
    Fault.HALF_OPEN: 3.0,
    Fault.DELAY: 3.0,
    Fault.FILL: 2.0,
}
_DELAYS_S: Final = (0.005, 0.05, 0.3)
_APART_S: Final = 0.3  # between two faults of one target


def plan(
    seed: int,
    *,
    sites: tuple[str, ...],
    links: tuple[str, ...],
    duration_s: float,
    agents_die: bool = False,
    disks_fill: bool = False,
    per_s: float = 1.5,
) -> tuple[Blow, ...]:
    """The blows, in the order of their time.

    Args:
        seed: the same one gives the same plan.
        sites: their names.
        links: those that can be broken.
        duration_s: all is over by then.
        agents_die: agents may be killed, or stopped, and are started again.
        disks_fill: the disk of a store may be filled.
        per_s: how many blows a second, about.
    """
    dice = random.Random(f"nemesis {seed}")
    missing = (frozenset() if agents_die else AGENTS_DIE) | (frozenset() if disks_fill else {Fault.FILL})
    faults = [fault for fault in Fault if fault not in missing and (links or fault not in OF_LINKS)]
    # Some runs see a little of everything, others much of little.
    favoured = set(dice.sample(faults, k=dice.randint(1, len(faults))))
    weights = [_WEIGHTS[fault] if fault in favoured else 0.0 for fault in faults]
    free_at: dict[str, float] = {}
    found: list[Blow] = []
    at_s = 0.0
    while (at_s := at_s + dice.expovariate(per_s)) < duration_s:
        blow = _blow(dice, round(at_s, 3), dice.choices(faults, weights)[0], sites, links)
        kept = struck(blow)
        if free_at.get(kept, 0.0) <= at_s and at_s + blow.for_s <= duration_s:
            free_at[kept] = at_s + blow.for_s + _APART_S
            found.append(blow)
    return tuple(found)


def timeline(blows: tuple[Blow, ...]) -> list[Act]:
    """What to do in which order; a blow that lasts has an end."""
    acts = [Act(blow.at_s, True, blow) for blow in blows]
    acts += [Act(blow.at_s + blow.for_s, False, blow) for blow in blows if blow.for_s]
    return sorted(acts, key=lambda act: act.at_s)


def _blow(
    dice: random.Random, at_s: float, fault: Fault, sites: tuple[str, ...], links: tuple[str, ...]
) -> Blow:
    longest_s = _LONGEST_S.get(fault, 0.0)
    # Many are over before a heartbeat is missed, some last longer.
    for_s = round(longest_s * dice.random() ** 2 + 0.01, 3) if longest_s else 0.0
    if fault in OF_LINKS:
        delay_s = dice.choice(_DELAYS_S) if fault is Fault.DELAY else 0.0
        return Blow(at_s, fault, dice.choice(links), for_s, dice.choice(PLANES), delay_s)
    rank = dice.randrange(1000) if fault in OF_WORKERS else 0
    return Blow(at_s, fault, dice.choice(sites), for_s, rank=rank)


def struck(blow: Blow) -> str:
    """What must be whole for the blow to be possible: a link, an agent, the workers or the disk of a site."""
    if blow.fault in OF_AGENTS:
        return f"agent {blow.target}"
    if blow.fault in OF_WORKERS:
        return f"workers {blow.target}"
    if blow.fault is Fault.FILL:
        return f"disk {blow.target}"
    return blow.target
