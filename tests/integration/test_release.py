"""Release (L0, L1, L2, L4, L5, L6): what nobody needs any more goes, at once; what somebody holds stays as it is."""

from __future__ import annotations

import gc
import os
import pathlib
import pickle
import subprocess
import sys
import time
from typing import Any, Final

import numpy
import psutil
import pytest
from numpy.typing import NDArray

from gcref import Client, ComputeFuture, Executor, LocalEndpoint, ObjectRef, config, ids, ref
from gcref.directory import records
from gcref.errors import LostReason, ObjectLostError
from tests.conftest import Sites, Work
from tests.support.endpoints import (
    ask,
    host_folder,
    host_root,
    shared_bytes,
    store_of,
    used_bytes,
    worker_pids,
)
from tests.support.proxy import proxied
from tests.support.tasks import Gate, blob_of, fail, hold, inc
from tests.support.waiting import patience, wait_until

WAIT_S = patience(30)

FREED_S: Final = 1.0
"""Bytes that nobody holds are free within this time."""

TRIMMED_S: Final = 11.0
"""Memory that is kept for reuse goes back within 10 s."""

AT_ONCE_S: Final = patience(2)

CARRIERS: Final = ("ipc", "direct")

SIZE: Final = 300_000
"""Bytes of a value that lies in the store."""


def array_of(start: int, size: int = SIZE) -> NDArray[Any]:
    return numpy.arange(start, start + size // 8)


def size_of(*blobs: bytes) -> int:
    return sum(map(len, blobs))


def is_freed(*names: str) -> None:
    wait_until(
        lambda: not used_bytes(*names),
        timeout_s=FREED_S,
        what=lambda: f"{', '.join(names)} to free {used_bytes(*names)} bytes",
    )


# ------------------------------------------------------------------------------------------------------------ L0

_kept: list[NDArray[Any]] = []


def keep(array: NDArray[Any]) -> int:
    """Keeps an argument beyond the task."""
    _kept.append(array)
    return os.getpid()


def kept_is(*starts: int) -> bool:
    """Whether what was kept is what it was."""
    found = all(numpy.array_equal(array, array_of(start)) for array, start in zip(_kept, starts, strict=True))
    _kept.clear()
    return found


def make_others(a: Executor, b: Executor, starts: range) -> None:
    """Makes values at one site, moves them to the other, and drops them."""
    made = [a.submit(array_of, start) for start in starts]
    moved = [b.submit(numpy.sum, f) for f in made]
    assert [f.result(WAIT_S) for f in moved] == [array_of(start).sum() for start in starts]


@pytest.mark.parametrize("way", CARRIERS)
def test_l0_an_array_that_is_kept_never_changes(home: pathlib.Path, way: str) -> None:
    """In the client, in a worker at the value's home, and in a worker at another site."""
    with (
        LocalEndpoint("here", workers=1, carriers=[way]) as here,
        LocalEndpoint("there", workers=1, carriers=[way]) as there,
    ):
        with (
            Client(carriers=[way]) as client,
            Executor(here.endpoint_id, client) as a,
            Executor(there.endpoint_id, client) as b,
        ):
            f = a.submit(array_of, 1)
            mine = f.result(WAIT_S)
            pids = {a.submit(keep, f).result(WAIT_S), b.submit(keep, f).result(WAIT_S)}
            g = a.put(array_of(2))
            assert a.submit(keep, g).result(WAIT_S) in pids
            del f, g
        with (
            Client(carriers=[way]) as client,
            Executor(here.endpoint_id, client) as a,
            Executor(there.endpoint_id, client) as b,
        ):
            for start in range(1000, 2000, 20):
                make_others(a, b, range(start, start + 20))
            assert numpy.array_equal(mine, array_of(1))
            assert a.submit(kept_is, 1, 2).result(WAIT_S) is True
            assert b.submit(kept_is, 1).result(WAIT_S) is True
            assert worker_pids("here") | worker_pids("there") == pids, "they are the workers that kept it"
        assert numpy.array_equal(mine, array_of(1))
    assert numpy.array_equal(mine, array_of(1)), "also after the endpoint is gone"
    del mine
    gc.collect()


# ------------------------------------------------------------------------------------------------------------ L1


@pytest.mark.parametrize("moved", [False, True], ids=["at-home", "in-a-cache"])
@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
def test_l1_the_last_future_dropped_frees_the_bytes(work: Work, moved: bool, read: bool) -> None:
    f = work.a.submit(blob_of, 5_000_000)
    if moved:
        assert work.b.submit(size_of, f).result(WAIT_S) == 5_000_000
        assert used_bytes("midway") >= 5_000_000, "a copy stays for whoever needs it next"
    value = f.result(WAIT_S) if read else None
    again = f
    del f
    assert again.done() or again.result(WAIT_S)
    assert used_bytes("polaris") >= 5_000_000
    del again
    is_freed("polaris", "midway")
    assert value is None or len(value) == 5_000_000


@pytest.mark.parametrize("size", [10, SIZE], ids=["inline", "stored"])
def test_l1_an_agent_forgets_what_was_dropped(work: Work, size: int) -> None:
    before = ask("polaris")["objects"], ask("midway")["objects"]
    futures = [work.a.submit(blob_of, size) for _ in range(50)]
    put = work.a.put(blob_of(size))
    uses = [work.b.submit(size_of, put, f) for f in futures]
    assert {use.result(WAIT_S) for use in uses} == {2 * size}
    del futures, put, uses
    wait_until(
        lambda: (ask("polaris")["objects"], ask("midway")["objects"]) <= before, what="the graph to go"
    )
    is_freed("polaris", "midway")


def test_l1_pooled_memory_is_given_back(work: Work) -> None:
    names = ("polaris", "midway")
    f = work.a.submit(blob_of, 20_000_000)
    assert work.b.submit(size_of, f).result(WAIT_S) == 20_000_000
    del f
    is_freed(*names)
    wait_until(
        lambda: not any(store_of(name)["pooled_bytes"] for name in names),
        timeout_s=TRIMMED_S,
        what="the pool to be trimmed",
    )
    segments = [host_folder(name) / "segments" for name in names]
    assert shared_bytes(*segments) == 0
    assert work.a.submit(inc, 1).result(WAIT_S) == 2


def test_l1_failures_cancelled_tasks_and_their_arguments_go_too(work: Work, gate: Gate) -> None:
    large = work.a.put(blob_of(SIZE))
    running = [work.a.submit(hold, gate, 1, large) for _ in range(2)]
    queued = work.a.submit(size_of, blob_of(SIZE), large)
    waiting = work.b.submit(size_of, blob_of(SIZE), running[0], large)
    failing = work.b.submit(inc, large)
    assert isinstance(failing.exception(WAIT_S), TypeError)
    assert waiting.cancel()
    assert queued.cancel()
    gate.open()
    assert [f.result(WAIT_S) for f in running] == [1, 1]
    del large, running, queued, waiting, failing
    is_freed("polaris", "midway")


# ------------------------------------------------------------------------------------------------------------ L2


@pytest.mark.parametrize("site", ["a", "b"])
def test_l2_an_argument_is_pinned_until_its_task_ends(work: Work, gate: Gate, site: str) -> None:
    executor: Executor = getattr(work, site)
    argument = work.a.submit(blob_of, 5_000_000)
    argument.exception(WAIT_S)
    blocker = executor.submit(hold, gate)
    use = executor.submit(_size_after, blocker, argument)
    put = executor.submit(_size_after, blocker, work.a.put(bytes(4_000_000)))
    del argument, blocker
    gc.collect()
    others = [work.a.submit(blob_of, SIZE) for _ in range(20)]
    assert all(f.exception(WAIT_S) is None for f in others)
    del others
    assert not use.done()
    assert used_bytes("polaris") >= 9_000_000
    gate.open()
    assert use.result(WAIT_S) == 5_000_000
    assert put.result(WAIT_S) == 4_000_000
    is_freed("polaris", "midway")
    del use, put


def _size_after(_blocker: object, blob: bytes) -> int:
    return len(blob)


def test_l2_a_task_whose_future_is_dropped_runs_all_the_same(work: Work, tmp_path: pathlib.Path) -> None:
    mark = tmp_path / "mark"
    work.b.submit(_touch_of, str(mark), work.a.submit(blob_of, SIZE))
    wait_until(mark.exists, what="the task to run")
    assert mark.read_text() == str(SIZE)
    is_freed("polaris", "midway")


def _touch_of(path: str, blob: bytes) -> bytes:
    part = pathlib.Path(f"{path}.part")
    part.write_text(str(len(blob)))
    part.rename(path)
    return blob


# ------------------------------------------------------------------------------------------------------------ L4

CLIENT_SCRIPT: Final = """
import sys
from gcref import Executor
from tests.support.tasks import blob_of
executor = Executor(sys.argv[1])
futures = [executor.submit(blob_of, 5_000_000) for _ in range(3)]
values = [future.result() for future in futures]
print("ready", flush=True)
sys.stdin.read()
"""


def test_l4_the_bytes_of_a_killed_client_go_with_its_lease(home: pathlib.Path) -> None:
    with LocalEndpoint("short", workers=1, config={"lease_s": 1.0, "heartbeat_s": 0.2}):
        with subprocess.Popen(
            [sys.executable, "-c", CLIENT_SCRIPT, "short"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            assert used_bytes("short") >= 15_000_000
            process.kill()
        wait_until(lambda: not used_bytes("short"), timeout_s=10, what="the lease to end")


def test_l4_spilled_objects_of_a_killed_agent_are_swept(home: pathlib.Path) -> None:
    """Also those on disk go at the next start of any endpoint."""
    with LocalEndpoint("small", workers=1, config={"store_limit_bytes": "20 MiB"}) as small:
        id = records.resolve("small").id
        disk, host = config.disk_dir(id), host_root() / id.hex()
        with Client() as client:
            executor = Executor("small", client)
            futures = [executor.submit(blob_of, 5_000_000) for _ in range(8)]
            assert [f.exception(WAIT_S) for f in futures] == [None] * 8
            wait_until(lambda: store_of("small")["disk_bytes"] > 0, what="objects to be spilled")
            agent = psutil.Process(small.pid)
            workers = agent.children(recursive=True)
            agent.kill()
            psutil.wait_procs(workers, timeout=patience(10))
            assert not any(worker.is_running() for worker in workers)
            with LocalEndpoint("next", workers=1):
                assert not host.exists()
                assert not list(disk.rglob("spill/*"))
            del futures


# ------------------------------------------------------------------------------------------------------------ L5


def refer_to(ref: ObjectRef) -> dict[str, Any]:
    """A value that refers to another object, of another site."""
    return {"ref": ref, "note": [ref]}


def open_held(held: dict[str, Any]) -> int:
    return len(held["ref"].get(30))


def keeps_what_it_refers_to(work: Work, outer: ComputeFuture[Any]) -> None:
    """The object inside, of 5 MB at midway, is there for every site though nobody else holds it."""
    gc.collect()
    # Whatever was let go is gone before these have come back.
    assert [site.submit(inc, 1).result(WAIT_S) for site in (work.a, work.b) for _ in range(5)] == [2] * 10
    # Its task may run still. What comes now and is let go at once, the sites would not find.
    wait_until(lambda: used_bytes("midway") >= 5_000_000, what="the object")
    assert work.a.submit(open_held, outer).result(WAIT_S) == 5_000_000
    assert work.b.submit(open_held, outer).result(WAIT_S) == 5_000_000


@pytest.mark.parametrize("by", ["put", "submit"])
def test_l5_a_reference_inside_a_result_keeps_its_object(work: Work, by: str) -> None:
    inner = work.b.submit(blob_of, 5_000_000) if by == "submit" else work.b.put(blob_of(5_000_000))
    outer = work.a.submit(refer_to, inner.ref())
    outer.exception(WAIT_S)
    del inner
    keeps_what_it_refers_to(work, outer)
    held = outer.result(WAIT_S)
    assert len(held["ref"].get(WAIT_S)) == 5_000_000
    assert used_bytes("midway") >= 5_000_000
    del held, outer
    is_freed("polaris", "midway")


@pytest.mark.parametrize("ballast", [0, 1_000_000], ids=["small", "large"])
def test_l5_a_reference_inside_a_put_value_keeps_its_object(work: Work, ballast: int) -> None:
    inner = work.b.submit(blob_of, 5_000_000)
    outer = work.a.put({"ref": inner.ref(), "ballast": bytes(ballast)})
    outer.exception(WAIT_S)
    del inner
    keeps_what_it_refers_to(work, outer)
    del outer
    is_freed("polaris", "midway")


def test_l5_a_nested_future_in_a_result_is_a_reference_that_holds(work: Work, two_sites: Sites) -> None:
    outer = work.a.submit(_submit_inside, str(two_sites.midway.endpoint_id))
    found = outer.result(WAIT_S)
    assert isinstance(found["inner"], ObjectRef)
    assert len(found["inner"].get(WAIT_S)) == SIZE
    assert work.b.submit(lambda value: len(value["inner"].get(30)), outer).result(WAIT_S) == SIZE
    del found, outer
    is_freed("polaris", "midway")


@pytest.mark.parametrize("site", ["polaris", "midway"])
def test_l5_a_reference_in_a_result_works_when_the_future_of_the_result_is_gone(
    work: Work, two_sites: Sites, site: str
) -> None:
    endpoint = str(getattr(two_sites, site).endpoint_id)
    references = []
    for _ in range(30):
        references.append(work.a.submit(_submit_inside, endpoint).result(WAIT_S)["inner"])
        # Whatever was let go is gone before these have come back.
        assert [executor.submit(inc, 1).result(WAIT_S) for executor in (work.a, work.b)] == [2] * 2
    assert [len(reference.get(WAIT_S)) for reference in references] == [SIZE] * 30
    del references
    is_freed("polaris", "midway")


def _submit_inside(endpoint: str) -> dict[str, Any]:
    return {"inner": Executor(endpoint).submit(blob_of, SIZE)}


# ------------------------------------------------------------------------------------------------------------ L6


def get_of(it: Any) -> Any:
    """The value of a reference, or the value itself."""
    return it.get(30) if isinstance(it, ObjectRef) else it


def copy_of(ref: ObjectRef) -> ObjectRef:
    """The reference as somebody else gets it: it keeps nothing."""
    copied: ObjectRef = pickle.loads(pickle.dumps(ref))
    return copied


@pytest.mark.parametrize("use", ["argument", "reference"])
def test_l6_a_subscription_that_comes_before_the_submit(work: Work, two_sites: Sites, use: str) -> None:
    """The submit is held back on its way; the other site asks for the object meanwhile."""
    record = records.resolve("polaris")
    first = work.a.submit(inc, 1)
    assert work.b.submit(inc, first).result(WAIT_S) == 3, "the sites know each other"
    with proxied("polaris") as (control, _bulk), Client(carriers=["direct"]) as slow_client:
        late = Executor(two_sites.polaris.endpoint_id, slow_client)
        assert late.submit(inc, 1).result(WAIT_S) == 2
        objects = ask(record)["objects"]
        control.freeze()
        f = late.submit(blob_of, SIZE)
        asking = work.b.submit(get_of, f.ref() if use == "reference" else f)
        wait_until(lambda: ask(record)["objects"] > objects, what="the subscription to arrive")
        assert not asking.done()
        control.thaw()
        found = asking.result(WAIT_S)
        assert found == f.result(WAIT_S)
        late.shutdown()


def released(work: Work) -> ObjectRef:
    """A reference to what was there, and is not any more."""
    f = work.a.submit(blob_of, SIZE)
    ref = copy_of(f.ref())
    assert len(f.result(WAIT_S)) == SIZE
    del f
    is_freed("polaris")
    return ref


@pytest.mark.parametrize("site", ["client", "a", "b"])
def test_l6_a_subscription_that_comes_after_the_release(work: Work, site: str) -> None:
    ref = released(work)
    began = time.monotonic()
    ask_for = ref.get if site == "client" else getattr(work, site).submit(get_of, ref).result
    with pytest.raises(ObjectLostError) as caught:
        ask_for(WAIT_S)
    assert time.monotonic() - began < AT_ONCE_S
    assert caught.value.reason is LostReason.RELEASED


@pytest.mark.parametrize("site", ["client", "here", "there"])
def test_l6_a_subscription_for_an_id_that_never_comes(home: pathlib.Path, site: str) -> None:
    with (
        LocalEndpoint("here", workers=1, config={"unknown_object_s": 0.5}) as here,
        LocalEndpoint("there", workers=1) as there,
        Client() as client,
        Executor(here.endpoint_id, client) as a,
        Executor(there.endpoint_id, client) as b,
    ):
        known = a.submit(inc, 1)
        assert b.submit(inc, known).result(WAIT_S) == 3
        ref = ObjectRef(ids.new_id(), here.endpoint_id.bytes, known.ref().pack()[32:])
        began = time.monotonic()
        ask_for = ref.get if site == "client" else {"here": a, "there": b}[site].submit(get_of, ref).result
        with pytest.raises(ObjectLostError) as caught:
            ask_for(WAIT_S)
        assert caught.value.reason is LostReason.NEVER_SUBMITTED
        assert 0.4 < time.monotonic() - began < 0.5 + AT_ONCE_S
        assert known.result(WAIT_S) == 2
        del ref, known


def get_both(large: ObjectRef, failing: ObjectRef) -> tuple[int, Any]:
    return len(large.get(30)), failing.get(30)


def test_l1_a_failed_task_keeps_nothing_in_its_idle_worker(work: Work) -> None:
    """Its exception knows its frames, and they know what it had; only a collection would find that."""
    large, failing = work.a.submit(blob_of, 5_000_000), work.a.submit(fail, "on purpose")
    failed = work.a.submit(get_both, ref(large), ref(failing))
    assert isinstance(failed.exception(WAIT_S), ValueError)
    del large, failing, failed
    gc.collect()
    wait_until(lambda: used_bytes("polaris", "midway") == 0, what="all bytes to go")
