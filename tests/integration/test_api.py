"""The rest of the public API: running, options, registered functions, reload, put, explain, record, shipped modules."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import os
import pickle
import sys
import time
import uuid
import weakref
from pathlib import Path
from typing import Any, Final

import pytest

import gcref
from gcref import Client, ComputeFuture, Executor, LocalEndpoint, ObjectRef
from gcref.errors import ConfigError, NotFoundError, WalltimeExceededError, WorkerLostError
from tests.conftest import Sites
from tests.support.programs import output_of
from tests.support.tasks import Gate, blob_of, die_once, fail, hold, inc, touch
from tests.support.waiting import patience, wait_until

WAIT_S: Final = patience(30)


# ----------------------------------------------------------------------------------------------------- how it stands


def test_running_is_said_of_tasks_that_take_a_while(polaris: Executor, midway: Executor, gate: Gate) -> None:
    held = polaris.submit(hold, gate)
    waiting = midway.submit(inc, held)
    assert not held.done()
    wait_until(held.running, what="the task to run")
    assert not waiting.running()
    assert "running" in repr(held)
    gate.open()
    assert held.result(WAIT_S) == 1
    assert not held.running()
    assert waiting.result(WAIT_S) == 2


def test_a_future_is_the_stdlibs(polaris: Executor) -> None:
    f = polaris.submit(inc, 1)
    assert isinstance(f, concurrent.futures.Future)
    assert isinstance(f, ComputeFuture)
    assert isinstance(polaris, concurrent.futures.Executor)
    assert uuid.UUID(f.task_id).bytes == f._id
    assert f.result(WAIT_S) == 2
    assert "returned int" in repr(f)
    assert "raised ValueError" in repr(_ended(polaris.submit(fail, "why")))
    with pytest.raises(TypeError):
        pickle.dumps(f)
    with pytest.raises(TypeError):
        copy.deepcopy(f)
    with pytest.raises(TypeError):
        pickle.dumps(polaris)
    with pytest.raises(concurrent.futures.InvalidStateError):
        f.set_result(3)
    with pytest.raises(concurrent.futures.InvalidStateError):
        f.set_exception(ValueError())


def _ended(f: ComputeFuture[Any]) -> ComputeFuture[Any]:
    f.exception(WAIT_S)
    return f


def test_an_executor_says_where_it_is(two_sites: Sites) -> None:
    group = uuid.uuid4()
    site = two_sites.polaris
    for name in (site.endpoint_id, str(site.endpoint_id), "polaris"):
        with Executor(name, task_group_id=group, label="mine") as executor:
            assert executor.endpoint_id == site.endpoint_id
            assert executor.task_group_id == group
            assert "polaris" in repr(executor)
            assert "mine" in repr(executor)
    with Executor("polaris") as one, Executor("polaris") as two:
        assert one.task_group_id != two.task_group_id
        assert isinstance(one.task_group_id, uuid.UUID)


def test_loop_run_in_executor(polaris: Executor) -> None:
    async def main() -> int:
        return await asyncio.get_running_loop().run_in_executor(polaris, inc, 1)

    assert asyncio.run(main()) == 2


# ------------------------------------------------------------------------------------------------------------ options


def test_options_are_a_light_view(two_sites: Sites, polaris: Executor, tmp_path: Path) -> None:
    again = polaris.options(retries=1)
    assert isinstance(again, Executor)
    assert (again.endpoint_id, again.task_group_id) == (polaris.endpoint_id, polaris.task_group_id)
    f = again.submit(die_once, str(tmp_path / "a"))
    assert f.result(WAIT_S) == "second"
    assert f.record is not None
    assert f.record.attempts == 2
    with pytest.raises(WorkerLostError):
        polaris.submit(die_once, str(tmp_path / "b")).result(WAIT_S)
    brief = polaris.options(walltime_s=0.2)
    with pytest.raises(WalltimeExceededError) as caught:
        brief.submit(time.sleep, 60).result(WAIT_S)
    assert caught.value.walltime_s == 0.2
    assert isinstance(caught.value, TimeoutError)
    both = again.options(walltime_s=WAIT_S)
    assert both.submit(die_once, str(tmp_path / "c")).result(WAIT_S) == "second", "it kept the retries"
    with pytest.raises(TypeError, match="retrys"):
        polaris.options(retrys=1)
    with pytest.raises(ConfigError, match="retries"):
        polaris.options(retries=-1)


def test_the_end_of_a_view_is_the_end_of_all(two_sites: Sites) -> None:
    executor = Executor("polaris")
    view = executor.options(retries=2)
    assert view.submit(inc, 1).result(WAIT_S) == 2
    view.shutdown()
    with pytest.raises(RuntimeError):
        executor.submit(inc, 1)


# ----------------------------------------------------------------------------------------------- registered functions


def test_registered_functions(polaris: Executor) -> None:
    name = polaris.register_function(inc)
    assert str(uuid.UUID(name)) == name
    assert polaris.register_function(inc) == name
    assert polaris.submit_to_registered_function(name, (1,)).result(WAIT_S) == 2
    assert polaris.submit_to_registered_function(name, kwargs={"x": 2}).result(WAIT_S) == 3
    f = polaris.submit(inc, 1)
    assert polaris.options(retries=1).submit_to_registered_function(name, [f]).result(WAIT_S) == 3
    step = 5
    closure = polaris.register_function(lambda x: x + step)
    assert closure != name
    assert polaris.submit_to_registered_function(closure, (1,)).result(WAIT_S) == 6
    unknown = str(uuid.uuid4())
    with pytest.raises(NotFoundError, match=unknown):
        polaris.submit_to_registered_function(unknown)


# ---------------------------------------------------------------------------------------------------------- reloading


def test_a_second_client_takes_up_a_group(two_sites: Sites, gate: Gate, tmp_path: Path) -> None:
    """The first one ends in the middle; done, failed, large, running, queued and waiting tasks are all there."""
    group = uuid.uuid4()
    said = output_of(
        f"""
        a = gcref.Executor("polaris", task_group_id={str(group)!r})
        gate = Gate({gate.path!r})
        done, failed, large = a.submit(inc, 1), a.submit(fail, "why"), a.submit(blob_of, 2_000_000)
        done.result(30), failed.exception(30), large.exception(30)
        running = [a.submit(hold, gate, n) for n in (10, 11)]
        queued, waiting = a.submit(inc, 20), a.submit(inc, running[0])
        cancelled = a.submit(inc, running[1])
        assert cancelled.cancel()
        futures = done, failed, large, *running, queued, waiting, cancelled
        print(*[f.task_id for f in futures], flush=True)
        import os
        os._exit(0)
        """,
        tmp_path,
    )
    done, failed, large, first, second, queued, waiting, cancelled = said.split()
    with Client() as client, Executor("polaris", client, task_group_id=group) as executor:
        futures = {f.task_id: f for f in executor.reload_tasks()}
        assert futures.keys() == set(said.split())
        assert futures[done].result(WAIT_S) == 2
        with pytest.raises(ValueError, match="why"):
            futures[failed].result(WAIT_S)
        assert len(futures[large].result(WAIT_S)) == 2_000_000
        with pytest.raises(concurrent.futures.CancelledError):
            futures[cancelled].result(WAIT_S)
        assert not futures[first].done()
        # They can be used like any other future, also elsewhere.
        with Executor("midway", client) as elsewhere:
            used = elsewhere.submit(inc, futures[first])
            assert elsewhere.submit(len, futures[large]).result(WAIT_S) == 2_000_000
            gate.open()
            assert used.result(WAIT_S) == 11
        assert [futures[id].result(WAIT_S) for id in (first, second, queued, waiting)] == [10, 11, 21, 11]
        assert {f.task_id for f in executor.reload_tasks()} == set(said.split())
        assert [f.task_id for f in executor.reload_tasks()].count(done) == 1
        more = executor.submit(inc, 30)
        assert more.result(WAIT_S) == 31
        assert more.task_id in {f.task_id for f in executor.reload_tasks()}


def test_another_group_can_be_named_and_what_does_not_exist_is_empty(
    two_sites: Sites, polaris: Executor
) -> None:
    assert polaris.reload_tasks() == []
    assert polaris.reload_tasks(uuid.uuid4()) == []
    with Executor("polaris") as other:
        f = other.submit(inc, 1)
        assert f.result(WAIT_S) == 2
        found = polaris.reload_tasks(str(other.task_group_id))
        assert [g.task_id for g in found] == [f.task_id]
        assert found[0].result(WAIT_S) == 2
        assert polaris.submit(inc, found[0]).result(WAIT_S) == 3


# ----------------------------------------------------------------------------------------------------------------- put


@pytest.mark.parametrize("size", [0, 1, 1000, 99_000, 103_000, 5_000_000])
def test_put(polaris: Executor, midway: Executor, size: int) -> None:
    value = os.urandom(size)
    put = polaris.put(value)
    # What uses it need not wait for it.
    uses = [executor.submit(lambda x: x, put) for executor in (polaris, midway)]
    assert [use.result(WAIT_S) for use in uses] == [value, value]
    assert put.result(WAIT_S) == value
    assert put.done()
    assert not put.cancel()


def test_put_of_a_structure_with_references(polaris: Executor, midway: Executor) -> None:
    f, large = polaris.submit(inc, 1), midway.submit(blob_of, 300_000)
    put = polaris.put({"refs": [f.ref(), large.ref()]})

    def use(x: dict[str, list[ObjectRef]]) -> list[Any]:
        return [x["refs"][0].get(timeout=30), len(x["refs"][1].get(timeout=30))]

    assert midway.submit(use, put).result(WAIT_S) == [2, 300_000]


def test_a_put_that_is_dropped_early_reaches_the_task_all_the_same(polaris: Executor, gate: Gate) -> None:
    put = polaris.put(bytes(2_000_000))
    f = polaris.submit(lambda x, _: len(x), put, polaris.submit(hold, gate))
    dropped = weakref.ref(put)
    del put
    assert dropped() is not None, "the pending task keeps it"
    gate.open()
    assert f.result(WAIT_S) == 2_000_000
    wait_until(lambda: dropped() is None, what="the argument to be let go")


# --------------------------------------------------------------------------------------------------- references


def test_references(polaris: Executor, gate: Gate) -> None:
    f = polaris.submit(hold, gate, "value")
    ref = gcref.ref(f)
    assert ref == f.ref()
    assert hash(ref) == hash(f.ref())
    assert str(ref.id) == f.task_id
    assert str(ref.home) == str(polaris.endpoint_id)
    assert not ref.done()
    with pytest.raises(TimeoutError):
        ref.get(timeout=0.05)
    gate.open()
    assert ref.get(timeout=WAIT_S) == "value"
    assert ref.done()
    assert ref.size_bytes == f.size_bytes
    again = pickle.loads(pickle.dumps(ref))
    assert again == ref
    assert again.get(timeout=WAIT_S) == "value"


# ------------------------------------------------------------------------------------------- explain, record


@pytest.mark.parametrize("carrier", ["ipc", "direct"])
def test_explain_says_which_carrier(two_sites: Sites, gate: Gate, carrier: str) -> None:
    with Client(carriers=(carrier,)) as client, Executor("polaris", client) as executor:
        f = executor.submit(hold, gate)
        wait_until(f.running, what="the task to run")
        assert f"reached by {carrier}" in f.explain()
        gate.open()
        assert f.result(WAIT_S) == 1


def test_explain_of_a_task_at_an_endpoint_that_does_not_answer(home: Path) -> None:
    with LocalEndpoint("quiet", workers=1) as site, Executor("quiet") as executor:
        assert executor.submit(inc, 1).result(WAIT_S) == 2
        site.stop()
        f = executor.submit(inc, 1)
        text = f.explain()
        assert "quiet" in text, text
        assert isinstance(f.exception(WAIT_S), gcref.errors.LostError)


def talk(x: bytes) -> int:
    print("to stdout")
    print("to stderr", file=sys.stderr)
    return len(x)


def test_the_record_of_a_run(polaris: Executor, midway: Executor, gate: Gate) -> None:
    before = time.time()
    large, held = polaris.submit(blob_of, 400_000), polaris.submit(hold, gate)
    f = midway.submit(lambda x, _: talk(x), large, held)
    early = f.record
    assert early is None
    gate.open()
    assert f.result(WAIT_S) == 400_000
    record = f.record
    assert isinstance(record, gcref.Record)
    assert record.received_s is not None
    assert record.started_s is not None
    assert record.ended_s is not None
    assert before - 1 < record.received_s <= record.started_s <= record.ended_s < time.time() + 1
    assert record.attempts == 1
    assert record.worker is not None
    assert record.worker.startswith("midway/")
    assert 400_000 <= sum(record.pulled_bytes.values()) < 410_000
    assert set(record.pulled_bytes) <= {"ipc", "direct"}
    assert record.stdout == "to stdout\n"
    assert record.stderr == "to stderr\n"
    failed = _ended(polaris.submit(fail, "why")).record
    assert failed is not None
    assert failed.attempts == 1


# --------------------------------------------------------------------------------------------------- ship_modules


def test_modules_that_the_endpoint_does_not_have_are_shipped(tmp_path: Path) -> None:
    """A client elsewhere has a module of its own; without shipping it, the error names the module."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "analysis.py").write_text(
        "class Table:\n    def __init__(self, rows):\n        self.rows = rows\n\n"
        "def count(table):\n    return len(table.rows), type(table).__name__\n"
    )
    text = f"""
        import sys
        site = gcref.LocalEndpoint("elsewhere", workers=1)
        sys.path.insert(0, {str(folder)!r})
        import analysis
        with site:
            with gcref.Executor("elsewhere") as plain:
                error = plain.submit(analysis.count, analysis.Table([1, 2])).exception(30)
                print(type(error).__name__, error.module)
            with gcref.Executor("elsewhere", ship_modules={{modules}}) as a, gcref.Executor("elsewhere") as b:
                print(*a.submit(analysis.count, analysis.Table([1, 2])).result(30))
                print(type(a.submit(analysis.Table, [1]).result(30)).__name__)
        """
    for modules in ("[analysis]", '["analysis"]'):
        said = output_of(text.replace("{modules}", modules).replace("{{", "{").replace("}}", "}"), tmp_path)
        assert said.split() == ["SerializationError", "analysis", "2", "Table", "Table"]


# ------------------------------------------------------------------------------------------------ the embedded default


def test_without_an_endpoint_a_private_one_starts_and_ends_with_the_executor(tmp_path: Path) -> None:
    with Executor(user_endpoint_config={"workers": 1}) as executor:
        f = executor.submit(inc, 1)
        g = executor.submit(touch, str(tmp_path / "ran"), f)
        assert g.result(WAIT_S) == str(tmp_path / "ran")
        assert "private" in repr(executor)
        assert isinstance(executor.endpoint_id, uuid.UUID)


def test_a_setting_for_an_endpoint_that_has_its_own_is_a_warning(two_sites: Sites) -> None:
    with pytest.warns(UserWarning, match="its own configuration"):
        executor = Executor("polaris", user_endpoint_config={"workers": 1})
    executor.shutdown()


def test_a_client_is_shared_and_closed(two_sites: Sites, gate: Gate) -> None:
    with Client() as client:
        a, b = Executor("polaris", client), Executor("midway", client)
        f = b.submit(inc, a.submit(inc, 1))
        assert f.result(WAIT_S) == 3
        held = a.submit(hold, gate)
        assert "ipc" in repr(client)
    for executor in (a, b):
        with pytest.raises(RuntimeError):
            executor.submit(inc, 1)
    assert isinstance(held.exception(WAIT_S), gcref.errors.EndpointLostError)
    assert f.result(0) == 3
    with pytest.raises(RuntimeError, match="closed"):
        Executor("polaris", client)
