"""Random graphs with nothing broken: whatever is not right then, nothing explains.

Sizes lie on both sides of what travels inline, tasks take longer than their function used to, and every way of naming a value
is used: as an argument, inside one, by reference, in a value, by a task that submits another one at either site.
"""

from __future__ import annotations

import random
import time
from typing import Any, NamedTuple

import numpy as np
import pytest

import gcref
from gcref import Executor, ObjectRef
from tests.conftest import Sites, Work
from tests.support.waiting import patience

WAIT_S = patience(60)
PRIME = 1_000_003
SIZES = (0, 0, 0, 1000, 120_000, 150_000, 1_500_000)
SECONDS = (0.0, 0.0, 0.0, 0.0, 0.002, 0.03)


class Shape(NamedTuple):
    """What a task makes, and how long it takes for it."""

    number: int
    size: int
    seconds: float


def make(key: int, size: int) -> Any:
    """A value that `read` knows again: a number, or an array full of it."""
    return np.full(size // 8 + 1, key, np.int64) if size else key


def read(value: Any) -> int:
    """The number in a value, or in all the values that it holds or refers to."""
    if isinstance(value, ObjectRef):
        value = value.get(WAIT_S)
    if isinstance(value, dict):
        return read(value["inside"])
    if isinstance(value, list):
        return sum(map(read, value)) % PRIME
    if isinstance(value, np.ndarray):
        assert (value == value[0]).all()
        return int(value[0])
    return int(value)


def mix(number: int, keys: list[int]) -> int:
    for key in keys:
        number = (number * 31 + key) % PRIME
    return number


def compute(shape: Shape, *values: Any) -> Any:
    time.sleep(shape.seconds)
    return make(mix(shape.number, [read(value) for value in values]), shape.size)


def box(shape: Shape, *values: Any) -> Any:
    return {"inside": compute(shape, *values)}


def tail(shape: Shape, endpoint: str, *values: Any) -> Any:
    """Its arguments travel on by value."""
    return Executor(endpoint).submit(compute, shape, *values)


def tail_in_a_box(shape: Shape, endpoint: str, *values: Any) -> Any:
    return {"inside": Executor(endpoint).submit(compute, shape, *values)}


def nest(shape: Shape, endpoint: str, *values: Any) -> Any:
    return Executor(endpoint).submit(compute, shape, *values).result()


@pytest.mark.parametrize("seed", range(6))
def test_a_graph_gives_what_it_says(work: Work, two_sites: Sites, seed: int) -> None:
    dice = random.Random(seed)
    sites = [str(two_sites.polaris.endpoint_id), str(two_sites.midway.endpoint_id)]
    nodes: list[tuple[Any, int]] = []  # futures, and the numbers that their values are to have
    for number in range(80):
        at = dice.randrange(2)
        executor = (work.a, work.b)[at]
        shape = Shape(number, dice.choice(SIZES), dice.choice(SECONDS))
        chosen = [dice.choice(nodes) for _ in range(dice.choice((0, 1, 1, 2, 3)))] if nodes else []
        keys = [key for _, key in chosen]
        given = [dice.choice(WAYS)(future) for future, _ in chosen]
        fn = dice.choices((compute, box, tail, tail_in_a_box, nest, None), (60, 8, 8, 4, 4, 8))[0]
        if fn is None:
            nodes.append((executor.put(make(number, shape.size)), number))
        else:
            elsewhere = () if fn in (compute, box) else (sites[1 - at] if fn is nest else dice.choice(sites),)
            nodes.append((executor.submit(fn, shape, *elsewhere, *given), mix(number, keys)))
        if dice.random() < 0.1:
            del nodes[dice.randrange(len(nodes))]  # nobody needs it any more, but perhaps a task
    while nodes:
        future, key = nodes.pop()
        assert read(future.result(WAIT_S)) == key


# Not too often a reference, for which a task waits with its slot lent: too many of those are a DeadlockError.
WAYS = (
    *[lambda future: future] * 14,
    *[lambda future: [future]] * 2,
    *[lambda future: {"inside": future}] * 2,
    gcref.ref,
)
