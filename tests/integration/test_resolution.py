"""Resolution (R1 … R13): futures as arguments, on one site and over two, as a user meets them."""

from __future__ import annotations

import collections
import dataclasses
import functools
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
import pytest

import gcref
from gcref import ComputeFuture, Executor, LocalEndpoint, ObjectRef
from tests.conftest import Sites, Work
from tests.support.tasks import Gate, blob_of, fail, hold, inc
from tests.support.waiting import patience, wait_until

WAIT_S = patience(30)


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Box:
    content: Any


@pytest.fixture
def two_workers() -> Iterator[Executor]:
    with Executor(user_endpoint_config={"workers": 2}) as executor:
        yield executor


def test_r1_a_future_that_is_not_done_is_an_argument(work: Work, gate: Gate, tmp_path: pathlib.Path) -> None:
    started = tmp_path / "started"

    def note(x: int) -> int:
        started.touch()
        return x + 1

    f = work.a.submit(hold, gate, 2)
    g = work.a.submit(note, f)
    wait_until(f.running, what="the first task to run")
    assert not started.exists()
    gate.open()
    assert g.result(WAIT_S) == 3


def test_r2_it_moves_from_site_to_site_once_and_not_through_the_client(work: Work) -> None:
    f = work.a.submit(blob_of, 300_000)
    uses = [work.b.submit(len, f) for _ in range(5)]
    assert [use.result(WAIT_S) for use in uses] == [300_000] * 5
    moved = sum(sum(use.record.pulled_bytes.values()) for use in uses if use.record is not None)
    assert 300_000 <= moved < 310_000, "once"
    assert sum(work.client.payload_bytes().values()) == 0


def large_after(seconds: float, *_before: bytes) -> bytes:
    time.sleep(seconds)
    return bytes(150_000)


def test_r2_links_of_a_chain_move_to_another_worker_when_one_takes_long(two_workers: Executor) -> None:
    """The next link was sent ahead to the same worker, is taken back, and given to the other one when its argument is there."""
    for last in two_workers.map(large_after, [0.0] * 20):  # short, as far as anybody knows
        assert len(last) == 150_000
    chains = []
    for _ in range(12):
        for chain in range(4):
            future = two_workers.submit(large_after, 0.0)
            for link in range(3):
                future = two_workers.submit(large_after, 0.03 if link == chain else 0.0, future)
            chains.append(future)
        assert [len(future.result(WAIT_S)) for future in chains[-4:]] == [150_000] * 4


def hand_on(endpoint: str, size: int, how: str) -> Any:
    """A task that submits another one, at another site, with an argument of its own making."""
    executor = Executor(endpoint)
    data = executor.put(bytes(size)) if how == "put" else bytes(size)
    future = executor.submit(len, data)
    return future.result(30) if how == "waits" else future


@pytest.mark.parametrize("size", [1000, 200_000, 5_000_000])
@pytest.mark.parametrize("how", ["tail call", "waits", "put"])
def test_r2_a_task_hands_its_own_arguments_to_another_site(
    work: Work, two_sites: Sites, how: str, size: int
) -> None:
    assert work.a.submit(hand_on, str(two_sites.midway.endpoint_id), size, how).result(WAIT_S) == size


def test_r3_keyword_star_args_and_three_times_in_one_call(work: Work) -> None:
    def check(a: bytes, *rest: bytes, key: bytes) -> bool:
        return a == rest[0] == key and a is key

    f = work.a.submit(blob_of, 200_000)
    use = work.b.submit(check, f, f, key=f)
    assert use.result(WAIT_S) is True
    assert use.record is not None
    assert sum(use.record.pulled_bytes.values()) < 210_000


def _call(wrapped: Callable[[], Any]) -> Any:
    return wrapped()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: [f],
        lambda f: (f, [f]),
        lambda f: {"k": f},
        lambda f: [{"a": {"b": f}}],
        lambda f: {f},
        lambda f: Point(f, 2),
        lambda f: Box(f),
        lambda f: collections.OrderedDict(k=f),
        lambda f: collections.deque([f, f], maxlen=5),
    ],
    ids=["list", "tuple", "dict", "deep", "set", "namedtuple", "dataclass", "ordered", "deque"],
)
def test_r4_nested_futures_are_resolved_and_types_are_kept(work: Work, wrap: Callable[[Any], Any]) -> None:
    f = work.a.submit(inc, 41)
    assert work.b.submit(lambda x: x, wrap(f)).result(WAIT_S) == wrap(42)
    assert type(work.b.submit(lambda x: x, wrap(f)).result(WAIT_S)) is type(wrap(42))


def test_r4_in_a_partial_and_in_a_closure(work: Work) -> None:
    f = work.a.submit(inc, 41)
    assert work.b.submit(functools.partial(inc, cast(int, f))).result(WAIT_S) == 43
    assert work.b.submit(_call, functools.partial(inc, cast(int, f))).result(WAIT_S) == 43
    assert work.b.submit(lambda: f + 1).result(WAIT_S) == 43  # type: ignore[operator]


def test_r5_a_reference_is_passed_and_the_task_starts_at_once(work: Work, gate: Gate) -> None:
    def name(ref: ObjectRef) -> str:
        return type(ref).__name__

    def open_it(ref: ObjectRef) -> int:
        return ref.get(timeout=30) + 1  # type: ignore[no-any-return]

    def hand_on(ref: ObjectRef) -> ObjectRef:
        return ref

    f = work.a.submit(hold, gate, 5)
    assert work.b.submit(name, gcref.ref(f)).result(WAIT_S) == "ObjectRef"
    assert not f.done()
    opened = work.b.submit(open_it, f.ref())
    gate.open()
    assert opened.result(WAIT_S) == 6
    again = work.b.submit(hand_on, f.ref()).result(WAIT_S)
    assert again == f.ref()
    assert again.get(WAIT_S) == 5
    assert work.a.submit(open_it, again).result(WAIT_S) == 6
    assert repr(again).find(again._token.hex()) == -1


def test_r6_arguments_that_are_done_failed_cancelled_or_foreign(
    work: Work, two_sites: Sites, gate: Gate
) -> None:
    done = work.a.submit(inc, 1)
    done.result(WAIT_S)
    assert work.b.submit(inc, done).result(WAIT_S) == 3
    failed = work.a.submit(fail, "why")
    failed.exception(WAIT_S)
    with pytest.raises(gcref.errors.DependencyError) as caught:
        work.b.submit(inc, failed).result(WAIT_S)
    assert isinstance(caught.value.__cause__, ValueError)
    blocked = work.a.submit(hold, gate)
    waiting = work.a.submit(inc, blocked)
    assert waiting.cancel()
    with pytest.raises(gcref.errors.DependencyError):
        work.b.submit(inc, waiting).result(WAIT_S)
    gate.open()
    with Executor(two_sites.polaris.endpoint_id) as other:
        assert work.b.submit(inc, other.submit(inc, 1)).result(WAIT_S) == 3
    with ThreadPoolExecutor(1) as pool:
        foreign: Future[int] = pool.submit(inc, 1)
        with pytest.raises(TypeError, match="result"):
            work.a.submit(inc, foreign)
    assert work.a.submit(inc, 1).result(WAIT_S) == 2


def test_r7_a_string_that_equals_a_task_id_stays_a_string(work: Work) -> None:
    f = work.a.submit(inc, 1)
    assert work.a.submit(lambda x: x, f.task_id).result(WAIT_S) == f.task_id


def _sum_list(values: list[int]) -> int:
    return sum(values)


@pytest.mark.parametrize("count", [10_000])
def test_r8_ten_thousand_of_each(work: Work, count: int) -> None:
    futures = [work.a.submit(inc, i) for i in range(count)]
    assert work.a.submit(_sum_list, futures).result(WAIT_S) == sum(range(1, count + 1))
    root = work.a.submit(inc, 0)
    many = [work.a.submit(inc, root) for _ in range(count)]
    assert {f.result(WAIT_S) for f in many} == {2}
    link = root
    for _ in range(count):
        link = work.a.submit(inc, link)
    assert link.result(WAIT_S) == count + 1


def _add(x: int, y: int) -> int:
    return x + y


def test_r9_diamonds_long_chains_and_layers(two_sites: Sites, work: Work) -> None:
    top = work.a.submit(inc, 0)
    left, right = work.a.submit(inc, top), work.b.submit(inc, top)
    assert work.b.submit(_add, left, right).result(WAIT_S) == 4
    with LocalEndpoint("cooley", workers=1) as cooley, Executor(cooley.endpoint_id, work.client) as c:
        link = work.a.submit(inc, 0)
        for i in range(99):
            link = (work.b, c, work.a)[i % 3].submit(inc, link)
        assert link.result(WAIT_S) == 100
    layer: list[ComputeFuture[int]] = [work.a.submit(inc, i) for i in range(50)]
    futures = list(layer)
    for depth in range(1, 20):
        here = (work.a, work.b)[depth % 2]
        layer = [here.submit(_sum_mod, layer) for _ in range(50)]
        futures += layer
    value = sum(range(1, 51)) % 1009
    for _ in range(18):
        value = 50 * value % 1009
    assert {f.result(WAIT_S) for f in layer} == {value}


def _sum_mod(values: list[int]) -> int:
    return sum(values) % 1009


def test_r9_each_value_travels_to_a_site_at_most_once(work: Work) -> None:
    layer = [work.a.submit(blob_of, 150_000) for _ in range(10)]
    uses = [work.b.submit(_lengths, layer) for _ in range(10)]
    assert {use.result(WAIT_S) for use in uses} == {1_500_000}
    moved = sum(sum(use.record.pulled_bytes.values()) for use in uses if use.record is not None)
    assert 1_500_000 <= moved < 1_550_000


def _lengths(blobs: list[bytes]) -> int:
    return sum(map(len, blobs))


def _array_of(size: int) -> Any:
    return np.arange(size // 8)


def test_r10_one_large_value_for_500_tasks_is_one_transfer(work: Work) -> None:
    f = work.a.submit(_array_of, 50_000_000)
    uses = [work.b.submit(len, f) for _ in range(500)]
    assert {use.result(WAIT_S) for use in uses} == {50_000_000 // 8}
    moved = sum(sum(use.record.pulled_bytes.values()) for use in uses if use.record is not None)
    assert 50_000_000 <= moved < 50_100_000
    assert sum(work.client.payload_bytes().values()) == 0


def _countdown(endpoint: str, n: int) -> Any:
    if n == 0:
        return "done"
    return Executor(endpoint).submit(_countdown, endpoint, n - 1)


def _blocking(endpoint: str, n: int) -> int:
    if n == 0:
        return 0
    return 1 + int(Executor(endpoint).submit(_blocking, endpoint, n - 1).result(30))


def test_r11_tail_calls_with_one_worker(home: pathlib.Path) -> None:
    with LocalEndpoint("lone", workers=1) as lone, Executor(lone.endpoint_id) as executor:
        assert executor.submit(_countdown, str(lone.endpoint_id), 20).result(WAIT_S) == "done"


def test_r12_a_task_that_blocks_lends_its_slot(home: pathlib.Path) -> None:
    with LocalEndpoint("lone", workers=1) as lone, Executor(lone.endpoint_id) as executor:
        assert executor.submit(_blocking, str(lone.endpoint_id), 3).result(WAIT_S) == 3


def test_r12_too_many_blocked_tasks_are_a_deadlock_error_with_advice(home: pathlib.Path) -> None:
    with LocalEndpoint("lone", workers=1) as lone, Executor(lone.endpoint_id) as executor:
        error = executor.submit(_blocking, str(lone.endpoint_id), 12).exception(WAIT_S)
        assert isinstance(error, gcref.errors.DeadlockError)
        assert "tail call" in str(error)
        assert executor.submit(inc, 1).result(WAIT_S) == 2


def _inner_at(endpoint: str, x: int) -> Any:
    return Executor(endpoint).submit(inc, x)


def test_a_task_submits_to_another_site_and_returns_the_future(work: Work, two_sites: Sites) -> None:
    f = work.a.submit(_inner_at, str(two_sites.midway.endpoint_id), 5)
    assert f.result(WAIT_S) == 6
    assert work.b.submit(inc, f).result(WAIT_S) == 7


def test_r13_each_call_uses_the_definition_of_its_moment(work: Work) -> None:
    def make(version: int) -> Callable[[], int]:
        def f() -> int:
            return version

        return f

    assert [work.a.submit(make(v)).result(WAIT_S) for v in range(3)] == [0, 1, 2]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("def g(): return 'first'", namespace)
    first = work.a.submit(namespace["g"])
    exec("def g(): return 'second'", namespace)
    second = work.a.submit(namespace["g"])
    assert (first.result(WAIT_S), second.result(WAIT_S)) == ("first", "second")


def test_ten_threads_build_one_graph(work: Work) -> None:
    roots = [work.a.submit(inc, i) for i in range(10)]
    found: list[list[int]] = [[] for _ in range(10)]

    def build(k: int) -> None:
        links = [work.b.submit(inc, root) for root in roots]
        found[k] = [link.result(WAIT_S) for link in links]

    threads = [threading.Thread(target=build, args=(k,)) for k in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[i + 2 for i in range(10)]] * 10
