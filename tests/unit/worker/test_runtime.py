"""What a worker does with entries: real processes, an agent that is only its side of the channel."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from endpoint_worker.worker import channel, zygote_process
from endpoint_worker.worker.channel import KEEP
from endpoint_worker.worker.page import Page
from gcref import ids, task_context
from gcref.errors import DeadlockError, ObjectLostError, SerializationError
from gcref.objects import blob, failure, serialize
from gcref.objects.ref import ObjectRef
from gcref.wire import codec
from gcref.wire.messages import ALIAS, FAILED, OK, STORED
from tests.support.waiting import wait_until
from tests.unit.worker.fake_agent import FakeAgent, Result, exists, failure_of, place, value_of

KEPT: list[Any] = []


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeAgent]:
    """One worker, for tests that leave nothing behind in it."""
    with FakeAgent() as made:
        yield made


@pytest.fixture
def agent(shared: FakeAgent) -> Iterator[FakeAgent]:
    yield shared
    assert not shared.messages, "a message came that nobody expected"
    assert not shared.exits
    shared.unmapped.clear()


@pytest.fixture
def own() -> Iterator[FakeAgent]:
    """A worker that the test may spoil."""
    with FakeAgent() as made:
        yield made


# ---------------------------------------------------------------------------------------------- functions of tasks


def noop() -> None:
    return None


def add(a: int, b: int = 1) -> int:
    return a + b


class Named:
    """A future of ours, as the runtime tells one."""

    def ref(self) -> ObjectRef:
        return ObjectRef(b"i" * 16, b"h" * 16, b"t" * 16)

    def add_done_callback(self, fn: Any) -> None:
        raise AssertionError("nobody waits for it here")


def submit(path: str, kind: str) -> Any:
    """What the SDK does when a task submits: the agent hears of it when there is a file `path`."""
    context = task_context.current
    assert context is not None
    context.submitted = True
    made = Named()

    def hand_over(named: Any) -> None:
        Path(path + "-asked").write_text(" ".join(type(each).__name__ for each in named))
        wait_until(lambda: os.path.exists(path), what="the agent to have it")

    context.hand_over = hand_over
    if kind == "fails":
        raise ValueError("it has submitted something before")
    return {"alias": made, "inside": [made.ref()], "plain": 42}[kind]


def fail(text: str) -> None:
    raise ValueError(text)


def total(array: Any) -> float:
    assert not array.flags.writeable
    return float(array.sum())


def keep(array: Any) -> None:
    KEPT.append(array)


def keep_in_a_cycle(array: Any) -> None:
    knot: list[Any] = [array]
    knot.append(knot)


def drop() -> None:
    KEPT.clear()


def drop_in_a_cycle() -> None:
    knot: list[Any] = [KEPT.copy()]
    knot.append(knot)
    KEPT.clear()


def is_where_the_kept_one_is(array: Any) -> bool:
    return bool(array.ctypes.data == KEPT[0].ctypes.data)


def read_kept() -> list[float]:
    return [float(array.sum()) for array in KEPT]


def wait_for(path: str) -> str:
    """Until somebody writes to the pipe."""
    with open(path) as pipe:
        return pipe.read()


class Rude:
    """Cannot be pickled, and says so in its own way."""

    def __reduce__(self) -> Any:
        raise RuntimeError("never")


class Future:
    """Looks like a future of ours."""

    def __init__(self, ref: ObjectRef) -> None:
        self._ref = ref

    def ref(self) -> ObjectRef:
        return self._ref

    def add_done_callback(self, fn: Any) -> None:
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------- tasks


def test_a_task_runs_and_its_result_says_what_happened(agent: FakeAgent) -> None:
    before = time.time()
    result = agent.run(add, 1, 2)
    assert value_of(result) == 3
    assert result.attempt == 1
    assert before - 1 < result.started < time.time() + 1
    assert 0 < result.duration < 1
    assert (result.refs, result.extra) == (None, None)


@pytest.mark.parametrize(
    "value", [None, 0, False, "", b"", [], float("nan"), ValueError("an instance"), NotImplemented]
)
def test_v1_values_are_exact(agent: FakeAgent, value: object) -> None:
    """V1: nothing is taken for `not ready` or `failed`."""
    assert repr(agent.value(lambda x: x, value)) == repr(value)


def test_a_batch_runs_in_order_and_comes_back_together(agent: FakeAgent) -> None:
    agent.run(add, 0)
    entries = [agent.entry(add, n) for n in range(2000)]
    agent.tasks(entries)
    results = agent.results(2000)
    assert [result.seq for result in results] == [entry[0] for entry in entries]
    assert [value_of(result) for result in results] == list(range(1, 2001))


def test_results_come_in_few_messages(agent: FakeAgent) -> None:
    agent.run(noop)
    agent.tasks([agent.entry(noop) for _ in range(2000)])
    count = messages = 0
    while count < 2000:
        count += len(agent.expect(channel.DONE)[1])
        messages += 1
    assert messages < 200


def test_functions_by_value_lambdas_and_closures(agent: FakeAgent) -> None:
    """V3: what plain pickle cannot do; also inside the arguments."""
    offset = 40

    def local(x: int) -> int:
        return x + offset

    assert agent.value(local, 2) == 42
    assert agent.value(lambda: sorted([1, 2], key=lambda n: -n)) == [2, 1]
    assert agent.value(local, 3, by_value=True) == 43


def test_v8_async_functions_are_awaited(agent: FakeAgent) -> None:
    """V8: also when they raise."""

    async def later(x: int) -> int:
        await asyncio.sleep(0)
        return x + 1

    async def never() -> None:
        raise KeyError("gone")

    assert agent.value(later, 1) == 2
    error = failure.to_exception(failure_of(agent.run(never)))
    assert isinstance(error, KeyError)


def test_e1_an_exception_comes_back_as_itself(agent: FakeAgent) -> None:
    """E1: with the remote traceback as cause, which shows the user's frames and none of ours; and a note."""
    result = agent.run(fail, "no such luck")
    error = failure.to_exception(failure_of(result))
    assert isinstance(error, ValueError)
    assert str(error) == "no such luck"
    shown = str(error.__cause__)
    assert "in fail" in shown
    assert "_execute" not in shown
    (note,) = error.__notes__
    assert ids.text(result.id) in note
    assert "polaris" in note


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, BaseException])
def test_e4_base_exceptions_do_not_kill_the_worker(agent: FakeAgent, kind: type[BaseException]) -> None:
    """E4: the original text, soon; the worker lives."""

    def leave() -> None:
        raise kind("so long")

    assert "so long" in failure_of(agent.run(leave))[1]
    assert agent.value(add, 1) == 2


def test_v6_a_result_that_cannot_be_pickled(agent: FakeAgent) -> None:
    """V6: typed, names the type's module; the worker lives on."""
    for value, module in ((Rude(), __name__), (threading.Lock(), "_thread")):
        told = failure_of(
            agent.run(lambda kind: Rude() if kind == "Rude" else threading.Lock(), type(value).__name__)
        )
        error = failure.to_exception(told)
        assert isinstance(error, SerializationError)
        assert module in f"{error.module} {error}"
    assert agent.value(add, 1) == 2


def test_v6_an_argument_whose_class_is_not_here(agent: FakeAgent) -> None:
    """V6: typed, names the module; also for a function, and for the value of a dependency."""
    missing = b"\x80\x04c" + b"no_such_module\nThing\n" + b")R."
    payload = blob.PLAIN_HEADER + b"\x80\x04(cno_such_module\nThing\n)Rt}\x86."
    told = failure_of(agent.run(noop, payload=payload))
    error = failure.to_exception(told)
    assert isinstance(error, SerializationError)
    assert error.module == "no_such_module"
    dependency = serialize.dumps_call(None, (Dependency(),), {})
    assert list(dependency.deps)
    told = failure_of(
        agent.run(noop, payload=blob.join(dependency.encoded), deps=[blob.PLAIN_HEADER + missing])
    )
    assert told[0] == "SerializationError"
    assert "no_such_module" in told[1]
    agent.send(1, channel.function(b"f" * 16, missing))
    entry = agent.entry(noop)
    entry[3] = b"f" * 16
    agent.tasks([entry])
    assert failure_of(agent.results(1)[0])[0] == "SerializationError"
    assert agent.value(add, 1) == 2


def test_damaged_arguments_and_unknown_functions_fail_their_task_only(agent: FakeAgent) -> None:
    assert "blob" in failure_of(agent.run(noop, payload=b"garbage"))[1]
    entry = agent.entry(noop)
    entry[3] = b"?" * 16
    agent.tasks([entry, agent.entry(add, 1)])
    first, second = agent.results(2)
    assert first.status == FAILED
    assert value_of(second) == 2


def test_output_is_in_the_record_and_in_the_log(agent: FakeAgent) -> None:
    def speak() -> None:
        print("to the record")
        sys.stderr.write("and no newline")
        sys.stdout.buffer.write(b"bytes too\n")
        os.write(1, b"not by way of Python\n")

    result = agent.run(speak)
    assert result.extra == ["to the record\nbytes too\n", "and no newline"]
    assert agent.run(noop).extra is None
    log = (agent.folder / "logs" / "worker-1.out").read_text()
    assert "to the record\nbytes too\nnot by way of Python\n" in log
    assert agent.run(lambda: print("x" * 100_000, file=sys.stderr)).extra == [None, "x" * 8191 + "\n"]


def test_output_of_a_failed_task_is_kept(agent: FakeAgent) -> None:
    def speak_and_fail() -> None:
        print("last words")
        raise ValueError

    result = agent.run(speak_and_fail)
    assert result.status == FAILED
    assert result.extra == ["last words\n", None]


def test_the_platforms_defaults_are_the_tasks(agent: FakeAgent) -> None:
    def look() -> dict[str, Any]:
        import multiprocessing
        import signal

        handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        return {
            "start method": multiprocessing.get_start_method(),
            "interrupt": handlers.pop(signal.SIGINT) is signal.default_int_handler,
            "handlers": {h for h in handlers.values() if h not in (signal.SIG_DFL, None)},
            "ignored": {n.name for n, h in handlers.items() if h == signal.SIG_IGN},
            "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            "cwd": os.getcwd(),
            "main": vars(sys.modules["__main__"]).keys() - {"__builtins__"},
            "stdin": sys.stdin.read(),
            "asyncio": "asyncio" in sys.modules,
        }

    import multiprocessing

    seen = agent.value(look)
    assert seen["start method"] == multiprocessing.get_start_method()
    assert seen["interrupt"]
    assert seen["handlers"] == {signal.SIG_IGN}
    assert seen["ignored"] == {"SIGPIPE", "SIGXFSZ"}
    assert seen["blocked"] == []
    assert seen["cwd"] == os.getcwd()
    assert seen["main"] == {"__name__", "__doc__", "__package__", "__loader__", "__spec__"}
    assert seen["stdin"] == ""


def test_the_task_knows_its_surroundings(agent: FakeAgent) -> None:
    def look() -> tuple[Any, ...]:
        found = task_context.current
        assert found is not None
        return (
            found.agent_id,
            found.control_address,
            found.bulk_address,
            found.task_id,
            found.group,
            len(found.party),
        )

    result = agent.run(look)
    agent_id, control, bulk, task, group, party = value_of(result)
    assert (control, bulk, task, group, party) == ("ipc:///control", "ipc:///bulk", result.id, b"g" * 16, 16)
    assert len(agent_id) == 16
    assert task_context.current is None


def test_references_in_a_result_are_named(agent: FakeAgent) -> None:
    ref = ObjectRef(b"i" * 16, b"h" * 16, b"t" * 16)
    result = agent.run(lambda: {"ref": ref, "again": [ref]})
    assert result.status == OK
    assert result.refs == ref.pack()


def test_a_returned_future_is_an_alias_and_a_returned_reference_is_not(agent: FakeAgent) -> None:
    """R11: no worker is held, the result is the other task's."""
    ref = ObjectRef(b"i" * 16, b"h" * 16, b"t" * 16)
    result = agent.run(lambda: Future(ref))
    assert (result.status, result.value) == (ALIAS, ref.pack())

    async def later() -> Future:
        return Future(ref)

    assert agent.run(later).status == ALIAS
    assert value_of(agent.run(lambda: ref)) == ref


def test_a_signal_between_tasks_is_survived(own: FakeAgent) -> None:
    """A task's handler that raises after its task has ended harms nobody."""

    def install() -> None:
        def handler(number: int, frame: object) -> None:
            raise RuntimeError("from a handler")

        signal.signal(signal.SIGUSR1, handler)

    def is_idle() -> bool:
        status = Path(f"/proc/{own.pids[1]}/status").read_text()
        return "State:\tS" in status

    own.run(install)
    log = own.folder / "logs" / "worker-1.err"
    for n in range(10):
        wait_until(is_idle, what="the worker to be idle")
        os.kill(own.pids[1], (signal.SIGUSR1, signal.SIGINT)[n % 2])
        wait_until(lambda: log.read_text().count("Traceback") == n + 1, what="the handler to raise")  # noqa: B023
    assert own.value(add, 1) == 2


# --------------------------------------------------------------------------------------------------- look-ahead


class Dependency:
    """Stands for a future in arguments, as `note_dependency` wants it."""

    def __init__(self) -> None:
        self.id = ids.new_id()

    def ref(self) -> ObjectRef:
        return ObjectRef(self.id, b"h" * 16, b"t" * 16)

    def __reduce__(self) -> Any:
        return serialize.note_dependency(self)


def test_a_chain_of_1000_runs_without_the_agent(agent: FakeAgent) -> None:
    """R8: each link finds the result of the one before it in its worker."""
    entries = [agent.entry(add, 0, flags=KEEP)]
    for _ in range(999):
        entries.append(agent.entry(add, Dependency(), deps=[[entries[-1][1]]], flags=KEEP))
    agent.tasks(entries)
    results = agent.results(1000)
    assert [value_of(result) for result in results] == list(range(1, 1001))


def test_results_are_kept_for_entries_that_were_already_here(agent: FakeAgent) -> None:
    """Without KEEP: an entry that waits in the queue names it, or it is small and recent."""
    big = agent.entry(bytes, 50_000)
    small = agent.entry(add, 1)
    user = agent.entry(
        lambda *values: [len(values), *map(type, values)],
        Dependency(),
        Dependency(),
        deps=[[big[1]], [small[1]]],
    )
    agent.tasks([big, small])
    agent.tasks([user])
    results = agent.results(2)
    more = agent.wait(lambda: agent.take(channel.DONE) or agent.take(channel.GIVE_BACK), "an answer")
    if more[0] == channel.GIVE_BACK:  # the producer had ended before its consumer came
        assert more[1] == [user[0]]
    else:
        assert value_of(Result(*more[1][0])) == [2, bytes, int]
    agent.tasks([agent.entry(add, Dependency(), deps=[[small[1]]])])
    assert value_of(agent.results(1)[0]) == 3
    assert len(results) == 2


def test_each_user_of_a_value_has_its_own_copy(agent: FakeAgent) -> None:
    first = agent.entry(lambda: [1], flags=KEEP)

    def spoil(values: list[int]) -> int:
        values.append(2)
        return len(values)

    users = [agent.entry(spoil, Dependency(), deps=[[first[1]]]) for _ in range(3)]
    agent.tasks([first, *users])
    assert [value_of(result) for result in agent.results(4)[1:]] == [2, 2, 2]


def test_one_dependency_named_twice_is_loaded_once(agent: FakeAgent) -> None:
    dependency = Dependency()
    data = blob.join(serialize.dumps([1]))
    assert agent.value(lambda a, b: a is b, dependency, [dependency][0], deps=[data])


def test_entries_whose_argument_failed_are_given_back(agent: FakeAgent) -> None:
    """Also those behind them; others are not touched."""
    bad = agent.entry(fail, "first", flags=KEEP)
    second = agent.entry(add, Dependency(), deps=[[bad[1]]], flags=KEEP)
    third = agent.entry(add, Dependency(), deps=[[second[1]]])
    other = agent.entry(add, 5)
    agent.tasks([bad, second, third, other])
    assert [result.status for result in agent.results(2)] == [FAILED, OK]
    assert agent.expect(channel.GIVE_BACK)[1] == [second[0], third[0]]


# ------------------------------------------------------------------------------------------------------- leases


def test_within_the_lease_it_starts_after_it_it_asks(agent: FakeAgent) -> None:
    entries = [agent.entry(add, n) for n in range(4)]
    agent.tasks(entries, lease_s=-1)
    assert agent.expect(channel.ASK)[1] == entries[0][0]
    assert agent.zygote.progress(1) == entries[0][0]
    revoked = [entries[1][0], entries[3][0], 999_999_999]
    agent.send(1, channel.grant(time.monotonic() + 60, revoked))
    assert [result.seq for result in agent.results(2)] == [entries[0][0], entries[2][0]]
    assert agent.zygote.progress(1) == entries[2][0]


def test_the_entry_that_it_asks_for_may_be_taken_away(agent: FakeAgent) -> None:
    entries = [agent.entry(add, n) for n in range(2)]
    agent.tasks(entries, lease_s=-1)
    agent.expect(channel.ASK)
    agent.send(1, channel.grant(0.0, [entries[0][0]]))
    assert agent.expect(channel.ASK)[1] == entries[1][0]
    agent.send(1, channel.grant(0.0, [entries[1][0]]))
    assert agent.value(add, 1) == 2


def test_a_grant_that_comes_unasked_counts(agent: FakeAgent) -> None:
    agent.send(1, channel.grant(time.monotonic() + 60, []))
    entries = [agent.entry(add, n) for n in range(2)]
    agent.tasks(entries, lease_s=-1)
    agent.expect(channel.ASK)
    agent.send(1, channel.grant(time.monotonic() - 60, [entries[1][0]]))
    assert agent.expect(channel.ASK)[1] == entries[0][0]
    agent.send(1, channel.grant(time.monotonic() + 60, []))
    assert [result.seq for result in agent.results(1)] == [entries[0][0]]


def test_a_lease_that_ends_behind_a_long_task_stops_the_rest(agent: FakeAgent, tmp_path: Path) -> None:
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    long = agent.entry(wait_for, pipe)
    rest = [agent.entry(add, n) for n in range(3)]
    agent.run(noop)
    agent.tasks([long, *rest], lease_s=0.2)
    wait_until(lambda: agent.zygote.progress(1) == long[0], what="the long task to start")
    lease_over = time.monotonic() + 0.2
    wait_until(lambda: time.monotonic() > lease_over, what="the lease to end")
    Path(pipe).write_text("go")
    assert agent.expect(channel.ASK)[1] == rest[0][0]
    agent.send(1, channel.grant(time.monotonic() + 60, [entry[0] for entry in rest]))
    assert value_of(agent.results(1)[0]) == "go"


# ------------------------------------------------------------------------------------------------ when it sends


def test_results_are_sent_before_a_function_that_is_not_known(agent: FakeAgent, tmp_path: Path) -> None:
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    agent.run(noop)
    agent.tasks([agent.entry(noop), agent.entry(noop), agent.entry(wait_for, pipe, by_value=True)])
    assert len(agent.results(2)) == 2
    Path(pipe).write_text("")
    agent.results(1)


def test_results_do_not_wait_behind_a_task_that_takes_longer_than_ever(
    agent: FakeAgent, tmp_path: Path
) -> None:
    pipe, empty = str(tmp_path / "pipe"), str(tmp_path / "empty")
    os.mkfifo(pipe)
    Path(empty).write_text("")

    def read(path: str) -> str:
        return wait_for(path)

    for _ in range(20):  # it is known to be short
        agent.run(read, empty)
    agent.tasks([agent.entry(read, empty), agent.entry(read, empty), agent.entry(read, pipe)])
    assert len(agent.results(2)) == 2
    Path(pipe).write_text("at last")
    assert value_of(agent.results(1)[0]) == "at last"


# ------------------------------------------------------------------------------------------------ large results


def test_large_results_are_written_where_the_agent_says(agent: FakeAgent, tmp_path: Path) -> None:
    array = np.arange(100_000, dtype=np.float64)
    entries = [agent.entry(lambda: np.arange(100_000, dtype=np.float64)), agent.entry(add, 1)]
    agent.tasks(entries)
    _, size, failed = agent.expect(channel.ALLOC)
    assert failed is None
    path = tmp_path / "segment"
    agent.send(1, channel.segment(str(path), size, False))
    stored, small = agent.results(2)
    assert (stored.status, stored.value) == (STORED, [str(path), size])
    assert value_of(small) == 2
    data = path.read_bytes()
    assert len(data) == size
    assert np.array_equal(serialize.loads(data), array)


def test_a_segment_without_room_is_reported_and_another_one_asked_for(
    agent: FakeAgent, tmp_path: Path
) -> None:
    agent.tasks([agent.entry(bytes, 200_000), agent.entry(bytes, 300_000)])
    size = agent.expect(channel.ALLOC)[1]
    bad = str(tmp_path / "no folder" / "segment")
    agent.send(1, channel.segment(bad, size, False))
    assert agent.expect(channel.ALLOC)[1:] == [size, bad]
    agent.send(1, channel.segment(str(tmp_path / "good"), size, False))
    assert agent.results(1)[0].value == [str(tmp_path / "good"), size]
    agent.expect(channel.ALLOC)
    agent.send(1, channel.no_segment(failure.make("StoreFullError", "no room", needed_bytes=1)))
    assert failure_of(agent.results(1)[0])[:2] == ["StoreFullError", "no room"]
    assert agent.value(add, 1) == 2


def test_a_dependent_of_a_stored_result_is_given_back(agent: FakeAgent, tmp_path: Path) -> None:
    first = agent.entry(bytes, 200_000, flags=KEEP)
    second = agent.entry(len, Dependency(), deps=[[first[1]]])
    agent.tasks([first, second])
    size = agent.expect(channel.ALLOC)[1]
    agent.send(1, channel.segment(str(tmp_path / "segment"), size, False))
    assert agent.results(1)[0].status == STORED
    assert agent.expect(channel.GIVE_BACK)[1] == [second[0]]


# ------------------------------------------------------------------------------------------------ mapped values


def test_mapped_values_are_read_only_and_returned(agent: FakeAgent, tmp_path: Path) -> None:
    """V2: an array of a mapped blob is a view, and cannot be written to."""
    where, _ = place(tmp_path / "blob", np.ones(100_000))

    def spoil(array: Any) -> None:
        array[0] = 2

    assert agent.value(total, Dependency(), deps=[where]) == 100_000
    assert agent.returned(where[0]) == [where[0], 1, True]
    agent.unmapped.clear()
    assert "read-only" in failure_of(agent.run(spoil, Dependency(), deps=[where]))[1]
    assert agent.returned(where[0]) == [where[0], 1, True]


def test_arguments_may_lie_in_the_store_too(agent: FakeAgent, tmp_path: Path) -> None:
    call = serialize.dumps_call(None, (np.ones(50_000), 2), {})
    data = blob.join(call.encoded)
    (tmp_path / "args").write_bytes(data)
    where: list[Any] = [str(tmp_path / "args"), len(data)]
    assert agent.value(lambda a, b: float(a.sum()) * b, args_path=where) == 100_000
    assert agent.returned(where[0]) == [where[0], 1, True]


def test_one_object_for_many_tasks_is_mapped_once_and_its_grants_counted(
    agent: FakeAgent, tmp_path: Path
) -> None:
    """V7: one copy in memory."""
    where, _ = place(tmp_path / "blob", np.ones(100_000))

    def address(array: Any, other: Any) -> int:
        assert array.ctypes.data == other.ctypes.data
        return int(array.ctypes.data)

    entries = [agent.entry(address, Dependency(), Dependency(), deps=[where, where]) for _ in range(20)]
    agent.tasks(entries)
    assert len({value_of(result) for result in agent.results(20)}) == 1
    assert agent.returned(where[0]) == [where[0], 40, True]


def test_grants_of_entries_that_do_not_start_are_returned(agent: FakeAgent, tmp_path: Path) -> None:
    where, _ = place(tmp_path / "blob", np.ones(1000))
    bad = agent.entry(fail, "x", flags=KEEP)
    given_back = agent.entry(add, Dependency(), Dependency(), deps=[[bad[1]], where])
    agent.tasks([bad, given_back])
    agent.results(1)
    agent.expect(channel.GIVE_BACK)
    agent.wait(lambda: agent.returned(where[0]), "the grant")
    agent.unmapped.clear()
    revoked = [agent.entry(total, Dependency(), deps=[where], args_path=None) for _ in range(3)]
    agent.tasks(revoked, lease_s=-1)
    agent.expect(channel.ASK)
    agent.send(1, channel.grant(0.0, [entry[0] for entry in revoked]))
    assert agent.wait(lambda: agent.returned(where[0]), "the grants") == [where[0], 3, True]
    agent.expect(channel.DONE)


def test_l0_an_array_kept_in_a_global_never_changes(own: FakeAgent, tmp_path: Path) -> None:
    """L0: its mapping is held, and returned only when it is gone; 1000 more objects make no difference."""
    where, _ = place(tmp_path / "blob", np.full(20_000, 7.0))
    own.run(keep, Dependency(), deps=[where])
    others = [place(tmp_path / f"blob-{n}", np.full(20_000, float(n)))[0] for n in range(50)]
    for _ in range(20):
        own.tasks([own.entry(total, Dependency(), deps=[other]) for other in others])
        own.results(50)
    assert own.returned(where[0]) is None
    assert {item[0] for _, item in own.unmapped} == {other[0] for other in others}
    assert own.value(read_kept) == [140_000.0]
    # The same object again shares the mapping that there is.
    assert own.value(is_where_the_kept_one_is, Dependency(), deps=[where])
    own.run(drop)
    assert own.wait(lambda: own.returned(where[0]), "the mapping to be returned") == [where[0], 2, True]


def test_garbage_does_not_keep_a_mapping_for_long(own: FakeAgent, tmp_path: Path) -> None:
    """L1: an idle worker collects it, without being told; and when it is told."""
    where, _ = place(tmp_path / "blob", np.ones(20_000))
    own.run(gc.disable)
    own.run(keep_in_a_cycle, Dependency(), deps=[where])
    own.wait(lambda: own.returned(where[0]), "the mapping to be returned")
    own.unmapped.clear()
    own.run(keep, Dependency(), deps=[where])
    own.run(drop_in_a_cycle)
    own.send(1, channel.unmap())
    own.wait(lambda: own.returned(where[0]), "the mapping to be returned")


def test_what_a_forked_child_may_see_is_not_reusable(own: FakeAgent, tmp_path: Path) -> None:
    """L0: the child of a task sees the bytes after the worker has let go of them."""
    where, _ = place(tmp_path / "blob", np.ones(20_000))
    release = str(tmp_path / "pipe")
    os.mkfifo(release)

    def fork(array: Any) -> int:
        child = os.fork()
        if child == 0:
            wait_for(release)
            os._exit(0 if float(array.sum()) == 20_000 else 1)
        return child

    child = own.value(fork, Dependency(), deps=[where])
    assert own.returned(where[0]) == [where[0], 1, False]
    Path(release).write_text("")
    assert own.value(lambda pid: os.waitpid(pid, 0)[1], child) == 0
    own.unmapped.clear()
    own.run(total, Dependency(), deps=[where])
    assert own.returned(where[0]) == [where[0], 1, True]


def test_a_forked_child_that_returns_is_no_second_worker(own: FakeAgent) -> None:
    def split(how: str) -> int:
        child = os.fork()
        if child == 0 and how == "raise":
            raise ValueError("in the child")
        return child

    for how in ("return", "raise"):
        child = own.value(split, how)
        assert child > 0
        code = own.value(lambda pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), child)
        assert code == (1 if how == "raise" else 0)
    assert own.value(add, 1) == 2


def test_multiprocessing_works_in_a_task(own: FakeAgent) -> None:
    def use() -> list[int]:
        import multiprocessing

        with multiprocessing.Pool(2) as pool:
            return pool.map(abs, [-1, -2, -3])

    assert own.value(use) == [1, 2, 3]


def test_bytes_that_went_bad_are_not_handed_to_a_task(agent: FakeAgent, tmp_path: Path) -> None:
    where, data = place(tmp_path / "blob", np.ones(20_000))
    import zlib

    assert agent.value(total, Dependency(), deps=[[*where, zlib.crc32(data)]]) == 20_000
    for bad in ([*where, 1], [str(tmp_path / "none"), 100], [where[0], where[1] + 1]):
        for _ in range(2):
            error = failure.to_exception(failure_of(agent.run(total, Dependency(), deps=[bad])))
            assert isinstance(error, ObjectLostError)


def test_more_arguments_than_file_descriptors(own: FakeAgent, tmp_path: Path) -> None:
    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    def total_of(*arrays: Any) -> float:
        return sum(float(array.sum()) for array in arrays)

    own.run(limit)
    places = [place(tmp_path / f"{n}", np.full(1000, float(n)))[0] for n in range(200)]
    dependencies = [Dependency() for _ in places]
    assert own.value(total_of, *dependencies, deps=places) == 1000 * sum(range(200))
    assert len(own.unmapped) == 200


# ------------------------------------------------------------------------------------------------- lent slots


def wait_lending(pipe: str) -> str:
    context = task_context.current
    assert context is not None
    with context.blocking(), context.blocking():
        return wait_for(pipe)


def test_r12_a_task_that_waits_lends_its_slot(agent: FakeAgent, tmp_path: Path) -> None:
    """R12: what it holds goes back, its slot is lent, and it asks for one before it goes on."""
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    where, _ = place(tmp_path / "blob", np.ones(1000))
    waiting = agent.entry(wait_lending, pipe)
    held = [agent.entry(total, Dependency(), deps=[where]), agent.entry(add, 1)]
    agent.tasks([waiting, *held])
    assert agent.expect(channel.GIVE_BACK)[1] == [entry[0] for entry in held]
    assert agent.expect(channel.BLOCKED)[1] == waiting[1]
    agent.tasks([late := agent.entry(add, 7)])  # it crosses
    agent.send(1, channel.slot(True))
    assert agent.expect(channel.GIVE_BACK)[1] == [late[0]]
    assert agent.returned(where[0]) == [where[0], 1, True]
    agent.expect(channel.DONE)
    Path(pipe).write_text("here")
    assert agent.expect(channel.RESUME)[1] == waiting[1]
    agent.tasks([after := agent.entry(add, 8)])
    agent.send(1, channel.slot(True))
    first, second = agent.results(2)
    assert (first.id, value_of(first)) == (waiting[1], "here")
    assert (second.id, value_of(second)) == (after[1], 9)


def test_r12_too_many_that_wait_is_an_error_in_the_task(agent: FakeAgent) -> None:
    """R12: never a silent deadlock."""

    def try_to_wait() -> str:
        context = task_context.current
        assert context is not None
        try:
            with context.blocking():
                return "waited"
        except DeadlockError as error:
            return str(error)

    agent.tasks([agent.entry(try_to_wait)])
    agent.expect(channel.BLOCKED)
    agent.send(1, channel.slot(False, failure.make("DeadlockError", "return the future instead")))
    assert value_of(agent.results(1)[0]) == "return the future instead"


def test_only_the_tasks_main_thread_lends(agent: FakeAgent) -> None:
    def elsewhere() -> str:
        found = []

        def work() -> None:
            context = task_context.current
            assert context is not None
            with context.blocking():
                found.append("done")

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found[0]

    assert agent.value(elsewhere) == "done"


# ------------------------------------------------------------------------------------------------------ the end


def test_exit_comes_after_what_is_held_and_ends_like_an_interpreter(own: FakeAgent, tmp_path: Path) -> None:
    def prepare() -> None:
        import atexit

        atexit.register((tmp_path / "handler").write_text, "called")
        threading.Thread(target=(tmp_path / "thread").write_text, args=("ran",)).start()

    own.tasks([own.entry(prepare), own.entry(add, 1)])
    own.send(1, channel.exit())
    assert [result.status for result in own.results(2)] == [OK, OK]
    exited = own.exited()
    assert (exited.exit_code, exited.signal, exited.stderr) == (0, None, "")
    assert (tmp_path / "handler").read_text() == "called"
    assert (tmp_path / "thread").read_text() == "ran"
    assert not exists(exited.pid)
    assert not list((own.folder / "logs").glob("worker-*"))


def test_who_does_not_end_after_exit_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that a task left behind waits for ever; nothing that a task made is lost by that."""
    monkeypatch.setattr(zygote_process, "EXIT_GRACE_S", 0.2)

    def leave_a_thread() -> int:
        threading.Thread(target=threading.Event().wait).start()
        return 7

    with FakeAgent() as agent:
        assert agent.value(leave_a_thread) == 7
        agent.send(1, channel.exit())
        assert agent.exited().signal == signal.SIGALRM


# ------------------------------------------------------------------------------------------------------- limits


def test_a_limit_of_memory_is_an_error_in_the_task(tmp_path: Path) -> None:
    """What is mapped of the store does not count, and the worker lives on."""
    with FakeAgent(0) as agent:
        agent.spawn(1, memory_bytes=128 << 20)
        agent.expect(channel.READY)
        error = failure.to_exception(failure_of(agent.run(bytearray, 192 << 20)))
        assert isinstance(error, MemoryError)
        assert agent.value(lambda: len(bytearray(32 << 20))) == 32 << 20
        where, _ = place(tmp_path / "blob", np.ones(20 << 20))
        assert agent.value(total, Dependency(), deps=[where]) == 20 << 20
        assert not agent.exits


def test_a_result_is_sent_before_large_arguments_are_unmapped(own: FakeAgent, tmp_path: Path) -> None:
    """To unmap a gigabyte takes a tenth of a second."""
    where, _ = place(tmp_path / "blob", np.ones(2 << 20))
    own.tasks([own.entry(total, Dependency(), deps=[where])])
    first, second = own.expect(channel.DONE), own.expect(channel.DONE)
    assert (len(first[1]), first[2]) == (1, [])
    assert (second[1], second[2]) == ([], [[where[0], 1, True]])


def test_done_is_what_the_codec_would_write() -> None:
    results = [[n, b"i" * 16, 1, OK, b"blob", 1.5, 0.1, None, None] for n in range(70_000)]
    frame = channel.done([codec.pack(result) for result in results], [["/path", 1, True]])
    assert codec.unpack(frame) == [channel.DONE, results, [["/path", 1, True]]]
    assert codec.unpack(channel.done([], [])) == [channel.DONE, [], []]


# ----------------------------------------------------------------------------------------- what tasks leave behind


@pytest.mark.parametrize(
    ("kind", "named"), [("alias", "Named"), ("inside", "ObjectRef"), ("plain", ""), ("fails", "")]
)
def test_a_task_that_has_submitted_something_ends_when_its_agent_has_it(
    own: FakeAgent, tmp_path: Path, kind: str, named: str
) -> None:
    """Before that nothing is said of it, nor written into the page; and no other task begins, which could be killed."""
    path = str(tmp_path / "taken")
    first, second = own.entry(submit, path, kind), own.entry(add, 1)
    own.tasks([first, second])
    wait_until(lambda: os.path.exists(path + "-asked"), what="the function to return")
    wait_until(lambda: Path(path + "-asked").read_text() == named, what="it to say what its result names")
    page = Page(str(next(own.folders[0].glob("*.page"))))
    assert page.started() == (first[0], 1, first[1])
    assert page.results() == []
    page.close()
    assert own.zygote.has_ended(1, first[0]), "nobody kills the worker for its walltime any more"
    assert not own.zygote.has_ended(1, second[0])
    Path(path).touch()
    told = own.results(2)
    assert [result.seq for result in told] == [first[0], second[0]]
    assert told[0].status == {"alias": ALIAS, "fails": FAILED}.get(kind, OK)


def test_a_worker_that_dies_before_takes_that_task_along_and_no_other(own: FakeAgent, tmp_path: Path) -> None:
    path = str(tmp_path / "taken")
    before, first, second = own.entry(add, 1), own.entry(submit, path, "plain"), own.entry(add, 1)
    own.tasks([before, first, second])
    wait_until(lambda: os.path.exists(path + "-asked"), what="the function to return")
    os.kill(own.pids[1], signal.SIGKILL)
    gone = own.exited()
    assert gone.progress == first[0]
    assert [row[0] for row in gone.results] == [before[0]]
