"""`ComputeFuture` keeps the contract of `concurrent.futures.Future` to the letter, and costs less."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import random
import sys
import threading
import time
import tracemalloc
from concurrent import futures as stdlib
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from typing import Any

import pytest

import gcref
from gcref.brains.submitter_table import Stored
from gcref.errors import LostError, ObjectLostError
from gcref.objects import serialize
from gcref.sdk.future import ComputeFuture, Record, settle
from tests.support.waiting import wait_until
from tests.unit.sdk.home import HOME, Home, bytes_of

SOON = 10.0


def in_thread(fn: Any, *args: Any) -> threading.Thread:
    thread = threading.Thread(target=fn, args=args, daemon=True)
    thread.start()
    return thread


def finish_each(home: Home, futures: list[ComputeFuture[Any]]) -> None:
    for future in futures:
        home.finish(future)


# --------------------------------------------------------------------------------------------------------- states


def test_a_new_future_is_pending(home: Home) -> None:
    future = home.future()
    assert isinstance(future, Future)
    assert (future.done(), future.running(), future.cancelled()) == (False, False, False)
    assert "pending" in repr(future)
    assert future.task_id in repr(future)
    assert future.record is None
    assert future.size_bytes is None


def test_running_then_done(home: Home) -> None:
    future = home.future()
    home.run(future)
    assert future.running()
    home.finish(future, value=[1, 2])
    assert (future.done(), future.running()) == (True, False)
    assert future.result() == [1, 2]
    assert future.exception() is None
    home.run(future)
    assert not future.running()


@pytest.mark.parametrize("value", [None, 0, False, "", b"", [], ValueError("returned, not raised")])
def test_values_that_look_like_nothing(home: Home, value: Any) -> None:
    """V1."""
    future = home.future()
    home.finish(future, value=value)
    assert repr(future.result()) == repr(value)
    assert future.exception() is None
    assert future.result() is future.result()


def test_a_failure_is_raised_each_time(home: Home) -> None:
    """E1."""
    future = home.future()
    home.fail(future)
    for _ in range(2):
        with pytest.raises(ValueError, match="no luck"):
            future.result()
    assert isinstance(future.exception(), ValueError)
    assert any("polaris" in note for note in future.exception().__notes__)  # type: ignore[union-attr]
    assert "raised ValueError" in repr(future)


def test_cancelled(home: Home) -> None:
    future = home.future()
    home.cancel_now(future)
    assert (future.done(), future.cancelled(), future.running()) == (True, True, False)
    with pytest.raises(CancelledError):
        future.result()
    with pytest.raises(CancelledError):
        future.exception()
    assert future.cancel()
    assert "cancelled" in repr(future)


def test_cancel_asks_the_client(home: Home) -> None:
    future = home.future()
    assert future.cancel()
    home.cancel_answer = False
    assert not future.cancel()
    assert future.cancel(force=True)
    home.finish(future)
    home.cancel_answer = True
    assert not future.cancel()


def test_it_ends_once(home: Home) -> None:
    watched, bare = home.future(), home.future()
    watched.add_done_callback(lambda _: None)
    for future in (watched, bare):
        home.finish(future, value=1)
        home.finish(future, value=2)
        home.fail(future)
        home.cancel_now(future)
        assert future.result() == 1


def test_nobody_else_may_end_it(home: Home) -> None:
    future = home.future()
    with pytest.raises(InvalidStateError):
        future.set_result(1)
    with pytest.raises(InvalidStateError):
        future.set_exception(ValueError())
    with pytest.raises(RuntimeError):
        future.set_running_or_notify_cancel()
    home.finish(future)
    assert future.result() == 42


def test_record(home: Home) -> None:
    future = home.future()
    settle([(future, "FINISHED", False, bytes(bytes_of(1)), [1.0, 2.0, 3.0, "midway-1", 2])])
    assert future.record == Record(1.0, 2.0, 3.0, "midway-1", 2, {}, "", "")


# -------------------------------------------------------------------------------------------------------- waiting


def test_result_times_out_and_later_has_the_value(home: Home) -> None:
    """W1."""
    future = home.future()
    with pytest.raises(TimeoutError):
        future.result(0)
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)
    with pytest.raises(TimeoutError):
        future.exception(timeout=0.01)
    home.finish(future)
    assert future.result(0) == 42


@pytest.mark.parametrize("call", ["result", "exception"])
def test_a_waiting_thread_wakes(home: Home, call: str) -> None:
    future = home.future()
    got: list[Any] = []
    thread = in_thread(lambda: got.append(getattr(future, call)()))
    wait_until(lambda: future._guard is not None, what="the thread to wait")
    home.finish(future)
    thread.join(SOON)
    assert got == [42 if call == "result" else None]


def test_a_waiting_thread_hears_of_cancellation(home: Home) -> None:
    future = home.future()
    got: list[BaseException] = []

    def wait() -> None:
        try:
            future.result(SOON)
        except CancelledError as error:
            got.append(error)

    thread = in_thread(wait)
    wait_until(lambda: future._guard is not None, what="the thread to wait")
    home.cancel_now(future)
    thread.join(SOON)
    assert len(got) == 1


@pytest.mark.parametrize("repeat", range(50))
def test_race_of_many_readers_with_the_end(home: Home, repeat: int) -> None:
    futures = [home.future() for _ in range(20)]
    got: list[Any] = []

    def read() -> None:
        got.extend([future.result(SOON) for future in random.Random(repeat).sample(futures, len(futures))])

    threads = [in_thread(read) for _ in range(3)]
    for future in futures:
        home.finish(future, value=7)
    for thread in threads:
        thread.join(SOON)
    assert got == [7] * 60


# ------------------------------------------------------------------------------------------------- wait, as_completed


def test_wait_on_a_mixture(home: Home) -> None:
    """W2."""
    with ThreadPoolExecutor(1) as pool:
        ours, theirs = home.future(), pool.submit(pow, 2, 3)
        done, not_done = stdlib.wait([ours, theirs], timeout=SOON, return_when=stdlib.FIRST_COMPLETED)
        assert (done, not_done) == ({theirs}, {ours})
        thread = in_thread(home.finish, ours)
        done, not_done = stdlib.wait([ours, theirs], timeout=SOON)
        thread.join(SOON)
        assert (done, not_done) == ({ours, theirs}, set())


def test_wait_for_the_first_exception(home: Home) -> None:
    good, bad, slow = home.future(), home.future(), home.future()
    home.finish(good)
    timer = threading.Timer(0.02, home.fail, [bad])
    timer.start()
    done, not_done = stdlib.wait([good, bad, slow], timeout=SOON, return_when=stdlib.FIRST_EXCEPTION)
    assert (done, not_done) == ({good, bad}, {slow})
    done, not_done = stdlib.wait([good, bad, slow], timeout=SOON, return_when=stdlib.FIRST_EXCEPTION)
    assert (done, not_done) == ({good, bad}, {slow})
    timer.join()


def test_wait_sees_what_was_cancelled(home: Home) -> None:
    future = home.future()
    timer = threading.Timer(0.02, home.cancel_now, [future])
    timer.start()
    assert stdlib.wait([future], timeout=SOON).done == {future}
    assert list(stdlib.as_completed([future], timeout=SOON)) == [future]
    timer.join()


def test_as_completed_keeps_the_order_of_ending(home: Home) -> None:
    futures = [home.future() for _ in range(5)]
    order = [futures[index] for index in (3, 1, 4, 0, 2)]
    home.finish(order[0])
    found = stdlib.as_completed(futures, timeout=SOON)
    got = [next(found)]
    for future in order[1:]:
        home.finish(future)
    got.extend(found)
    assert got == order


def test_as_completed_times_out(home: Home) -> None:
    future = home.future()
    with pytest.raises(TimeoutError):
        list(stdlib.as_completed([future], timeout=0.01))
    assert future._waiters == []


@pytest.mark.parametrize("repeat", range(50))
def test_race_of_as_completed_with_the_ends(home: Home, repeat: int) -> None:
    chance = random.Random(repeat)
    futures = [home.future() for _ in range(30)]
    for future in chance.sample(futures, 10):
        future.add_done_callback(lambda _: None)
    rest = chance.sample(futures, len(futures))

    def end() -> None:
        while rest:
            batch = [rest.pop() for _ in range(min(len(rest), chance.randint(1, 5)))]
            chance.choice([home.finish, home.fail, home.cancel_now])(*batch)

    thread = in_thread(end)
    found = list(stdlib.as_completed(futures, timeout=SOON))
    thread.join(SOON)
    assert sorted(map(id, found)) == sorted(map(id, futures))
    assert all(future._waiters == [] for future in futures)


@pytest.mark.parametrize("repeat", range(50))
def test_race_of_wait_with_the_ends(home: Home, repeat: int) -> None:
    futures = [home.future() for _ in range(30)]
    thread = in_thread(finish_each, home, futures)
    done, not_done = stdlib.wait(futures, timeout=SOON)
    assert (len(done), len(not_done)) == (30, 0)
    assert all(future.done() for future in futures)
    thread.join(SOON)


# ------------------------------------------------------------------------------------------------------- callbacks


def test_callbacks_run_in_order_on_their_own_thread(home: Home) -> None:
    """W4."""
    future = home.future()
    seen: list[tuple[int, str]] = []
    for number in range(3):
        future.add_done_callback(lambda f, n=number: seen.append((n, threading.current_thread().name)))  # type: ignore[misc]
    assert home.held == {future._id: future}
    home.finish(future)
    wait_until(lambda: len(seen) == 3, what="the callbacks")
    assert seen == [(number, "gcref-callbacks") for number in range(3)]
    assert home.held == {}


def test_a_raising_callback_is_logged_and_harms_no_other(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    """W4."""
    future = home.future()
    seen: list[Any] = []

    def bad(_: Any) -> None:
        raise SystemExit("from a callback")

    future.add_done_callback(lambda f: 1 / 0)
    future.add_done_callback(bad)
    future.add_done_callback(seen.append)
    with caplog.at_level(logging.ERROR, "concurrent.futures"):
        home.finish(future)
        wait_until(lambda: bool(seen), what="the last callback")
    assert [record.message.startswith("exception calling callback") for record in caplog.records] == [
        True,
        True,
    ]


def test_a_callback_after_the_end_runs_at_once(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    """W4."""
    future = home.future()
    home.fail(future)
    seen: list[Any] = []
    future.add_done_callback(seen.append)
    assert seen == [future]
    with caplog.at_level(logging.ERROR, "concurrent.futures"):
        future.add_done_callback(lambda f: 1 / 0)
    assert len(caplog.records) == 1


def test_callbacks_of_a_cancelled_future(home: Home) -> None:
    future = home.future()
    seen: list[bool] = []
    future.add_done_callback(lambda f: seen.append(f.cancelled()))
    home.cancel_now(future)
    wait_until(lambda: seen == [True], what="the callback")


def test_a_callback_may_wait_for_a_large_value(home: Home) -> None:
    """W4."""
    future = home.future()
    seen: list[Any] = []
    future.add_done_callback(lambda f: seen.append(f.result(SOON)))
    home.store(future)
    wait_until(lambda: len(home.pulls) == 1, what="the fetch")
    home.pulls[0].finish(bytes_of("large"))
    wait_until(lambda: seen == ["large"], what="the callback")


@pytest.mark.parametrize("repeat", range(50))
def test_race_of_adding_callbacks_with_the_end(home: Home, repeat: int) -> None:
    futures = [home.future() for _ in range(20)]
    seen: list[Any] = []
    thread = in_thread(finish_each, home, futures)
    for future in futures:
        future.add_done_callback(seen.append)
    thread.join(SOON)
    wait_until(lambda: len(seen) == 20, what="every callback, once")
    assert set(map(id, seen)) == set(map(id, futures))
    assert home.held == {}


# ---------------------------------------------------------------------------------------------------- large values


def test_a_large_value_is_fetched_by_the_first_result(home: Home) -> None:
    future = home.future()
    home.store(future, 123_456_789)
    assert future.done()
    assert future.exception() is None
    assert future.size_bytes == 123_456_789
    assert home.pulls == []
    with pytest.raises(TimeoutError):
        future.result(0.01)
    assert len(home.pulls) == 1
    home.pulls[0].finish(bytes_of("value"))
    assert future.result(0) == "value"
    assert future.result() is future.result()
    assert len(home.pulls) == 1
    assert future.size_bytes == 123_456_789


def test_a_failed_fetch_may_be_tried_again(home: Home) -> None:
    future = home.future()
    home.store(future)

    def refuse() -> None:
        wait_until(lambda: len(home.pulls) == 1, what="the fetch")
        home.pulls[0].finish(None, lambda: ObjectLostError("gone", reason="timeout"))

    thread = in_thread(refuse)
    with pytest.raises(LostError, match="gone"):
        future.result(SOON)
    thread.join(SOON)
    assert future.exception() is None
    with pytest.raises(TimeoutError):
        future.result(0.01)
    home.pulls[1].finish(bytes_of(5))
    assert future.result(0) == 5


def test_many_readers_share_one_fetch_and_one_value(home: Home) -> None:
    future = home.future()
    home.store(future)
    got: list[Any] = []
    threads = [in_thread(lambda: got.append(future.result(SOON))) for _ in range(5)]
    wait_until(lambda: len(home.pulls) == 1, what="the fetch")
    home.pulls[0].finish(bytes_of([1, 2, 3]))
    for thread in threads:
        thread.join(SOON)
    assert len(home.pulls) == 1
    assert len({id(value) for value in got}) == 1


# ------------------------------------------------------------------------------------------------ references, pickling


def test_reference(home: Home) -> None:
    future = home.future()
    reference = gcref.ref(future)
    assert (reference._id, reference._home) == (future._id, HOME)
    assert reference == future.ref()
    assert reference._pin is future
    with pytest.raises(TypeError, match="future"):
        gcref.ref(Future())  # type: ignore[arg-type]


def test_pickled_by_anybody_else_it_says_what_to_do(home: Home) -> None:
    future = home.future()
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"submit\(\).*gcref\.ref"):
            attempt(future)


def test_as_an_argument_it_is_a_dependency(home: Home) -> None:
    future = home.future()
    call = serialize.dumps_call(None, (future, [future]), {"x": {"y": future}})
    assert list(call.deps) == [future]


# ------------------------------------------------------------------------------------------------ dropping, forking


def test_references_in_a_value_keep_its_object_and_not_its_future(home: Home) -> None:
    inner, outer, plain = home.future(), home.future(), home.future()
    home.finish(plain, value=[1])
    home.finish(outer, value=[inner.ref(), {"deep": inner.ref()}])
    found, id = outer.result(), outer._id
    assert plain.result() == [1]
    assert home.kept == [id]
    del outer
    assert home.dropped == [id], "nothing in the value holds the future"
    found.pop()
    assert home.dropped == [id]
    found.pop()
    assert home.dropped == [id, id]


def test_dropping_one_notes_its_id(home: Home) -> None:
    future = home.future()
    id = future._id
    del future
    assert home.dropped == [id]


def test_held_while_it_has_callbacks(home: Home) -> None:
    future = home.future()
    seen: list[Any] = []
    future.add_done_callback(lambda f: seen.append(f.result()))
    del future
    assert home.dropped == []
    home.finish(*home.held.values())
    wait_until(lambda: seen == [42], what="the callback")
    gc.collect()
    wait_until(lambda: len(home.dropped) == 1, what="the drop")


def test_half_made_ones_are_harmless() -> None:
    future: ComputeFuture[Any] = ComputeFuture.__new__(ComputeFuture)
    del future


def test_nothing_waits_after_a_fork(home: Home) -> None:
    """C4."""
    done, pending = home.future(), home.future()
    home.finish(done)
    home.problem = "this executor belongs to the parent process"
    assert done.result() == 42
    for use in (pending.result, pending.exception, lambda: pending.add_done_callback(print)):
        with pytest.raises(RuntimeError, match="parent"):
            use()


# --------------------------------------------------------------------------------------------------------- its cost


def test_a_bare_future_makes_no_lock_and_costs_little(home: Home) -> None:
    count = 10_000
    ids_made = [bytes([0] * 8) + number.to_bytes(8, "big") for number in range(count)]
    kept: list[ComputeFuture[Any]] = [ComputeFuture(home, id) for id in ids_made[:100]]
    tracemalloc.start()
    try:
        kept = [ComputeFuture(home, id) for id in ids_made]
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size / count < 300, f"{size / count:.0f} bytes each"
    assert all(future._guard is None for future in kept)
    home.finish(*kept)
    assert all(future._guard is None for future in kept)


def test_it_is_made_and_ended_quickly(home: Home) -> None:
    """Compared with the stdlib's in the same run, so that a busy machine does not matter."""
    count = 5_000
    id = bytes(16)

    def best(work: Any) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    ours = best(lambda: [ComputeFuture(home, id) for _ in range(count)])
    theirs = best(lambda: [Future() for _ in range(count)])
    assert ours < theirs


def test_no_attribute_is_invented(home: Home) -> None:
    future = home.future()
    assert not hasattr(future, "_no_such_thing")
    assert future._guard is None
    assert isinstance(future._condition, threading.Condition)
    assert future._guard is future._condition


def test_stored_is_small() -> None:
    assert sys.getsizeof(Stored(b"", b"", 0, 0, None)) < 100
