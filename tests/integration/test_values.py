"""Values (V1 … V8): what a task gets and gives is exact, of whatever kind and size, and what cannot travel harms nobody."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import math
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy
import pytest
from numpy.typing import NDArray

import gcref
from gcref import Client, ComputeFuture, Executor, LocalEndpoint
from tests.conftest import Sites, Work
from tests.support.endpoints import host_folder, shared_bytes, store_of, worker_pids
from tests.support.programs import output_of
from tests.support.tasks import identity, inc
from tests.support.waiting import patience

WAIT_S = patience(30)

CARRIERS: Final = ("ipc", "direct", "broker")

KB: Final = 1024
MB: Final = 1024 * KB
GB: Final = 1024 * MB


@pytest.fixture(scope="module", params=CARRIERS)
def carrier(request: pytest.FixtureRequest) -> str:
    """The one way that everybody may use."""
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def sites_by(
    carrier: str, request: pytest.FixtureRequest, _nothing_left: None
) -> Iterator[tuple[LocalEndpoint, LocalEndpoint]]:
    """Two endpoints that know one way only, and find no other to each other."""
    ways = (carrier,)
    with contextlib.ExitStack() as stack:
        if carrier == "broker":
            stack.enter_context(request.getfixturevalue("post_office").used_by("gina"))
        here = stack.enter_context(LocalEndpoint(f"here-{carrier}", workers=1, carriers=ways))
        there = stack.enter_context(LocalEndpoint(f"there-{carrier}", workers=1, carriers=ways))
        yield here, there


@pytest.fixture
def work_by(carrier: str, sites_by: tuple[LocalEndpoint, LocalEndpoint]) -> Iterator[Work]:
    here, there = sites_by
    with (
        Client(carriers=(carrier,)) as client,
        Executor(here.endpoint_id, client) as a,
        Executor(there.endpoint_id, client) as b,
    ):
        yield Work(client, a, b)


# ------------------------------------------------------------------------------------------------------------ V1


def is_exact(found: object, wanted: object) -> bool:
    if isinstance(wanted, float) and math.isnan(wanted):
        return isinstance(found, float) and math.isnan(found)
    if isinstance(wanted, BaseException):
        return isinstance(found, type(wanted)) and found.args == wanted.args
    return type(found) is type(wanted) and found == wanted


@pytest.mark.parametrize(
    "value",
    [
        None,
        0,
        False,
        "",
        b"",
        [],
        (),
        {},
        0.0,
        math.nan,
        NotImplemented,
        ...,
        ValueError("no failure"),
        KeyError(),
    ],
    ids=repr,
)
def test_v1_values_that_look_like_nothing_or_like_a_failure(work: Work, value: object) -> None:
    f = work.a.submit(identity, value)
    assert is_exact(f.result(WAIT_S), value)
    assert f.done()
    assert f.exception(WAIT_S) is None
    assert is_exact(f.result(WAIT_S), value), "again, from what was kept"
    assert is_exact(work.b.submit(identity, f).result(WAIT_S), value), "as an argument at another site"
    assert is_exact(work.b.submit(identity, [f]).result(WAIT_S)[0], value)
    assert is_exact(work.a.put(value).result(WAIT_S), value)


# ------------------------------------------------------------------------------------------------------------ V2

RECORD: Final = numpy.dtype([("name", "U8"), ("at", "<f8", (3,)), ("count", "<i4")])

ARRAYS: Final[dict[str, Callable[[int], NDArray[Any]]]] = {
    "0-d": lambda n: numpy.array(1.5),
    "empty": lambda n: numpy.empty((0, n)),
    "plain": lambda n: numpy.arange(n, dtype="<i8"),
    "fortran": lambda n: numpy.asfortranarray(numpy.arange(2 * n, dtype="<f8").reshape(2, n)),
    "strided": lambda n: numpy.arange(6 * n, dtype="<f4").reshape(n, 6)[::-2, 1::2],
    "object": lambda n: numpy.array([{"k": i} for i in range(n)] + [None, "text"], dtype=object),
    "structured": lambda n: numpy.array([(str(i), (i, 1, 2), -i) for i in range(n)], dtype=RECORD),
    "big-endian": lambda n: numpy.arange(n, dtype=">u2"),
    "bool": lambda n: numpy.arange(n) % 3 == 0,
    "dates": lambda n: numpy.arange(n).astype("datetime64[s]"),
}


def make_array(kind: str, n: int) -> NDArray[Any]:
    return ARRAYS[kind](n)


def same(found: NDArray[Any], wanted: NDArray[Any]) -> bool:
    return (
        type(found) is type(wanted)
        and found.dtype == wanted.dtype
        and found.shape == wanted.shape
        and bool(numpy.all(found == wanted))
    )


def check_array(found: NDArray[Any], kind: str, n: int) -> bool:
    return same(found, ARRAYS[kind](n))


def spoil(array: NDArray[Any]) -> None:
    array[...] = array.flat[0] if array.size else 0


@pytest.mark.parametrize("n", [5, 30_000], ids=["inline", "stored"])
@pytest.mark.parametrize("kind", ARRAYS)
def test_v2_arrays_are_exact_and_read_only_and_nobody_spoils_them(work: Work, kind: str, n: int) -> None:
    wanted = ARRAYS[kind](n)
    f = work.a.submit(make_array, kind, n)
    mine = f.result(WAIT_S)
    assert same(mine, wanted)
    assert mine.flags.f_contiguous == wanted.flags.f_contiguous or kind == "strided"
    with pytest.raises(ValueError, match="read-only"):
        spoil(mine)
    for site in (work.a, work.b):
        with pytest.raises(ValueError, match="read-only"):
            site.submit(spoil, f).result(WAIT_S)
        assert site.submit(check_array, f, kind, n).result(WAIT_S) is True
    sent = ARRAYS[kind](n)
    assert work.b.submit(check_array, sent, kind, n).result(WAIT_S) is True, "as an argument from the client"
    assert sent.flags.writeable, "what the client keeps is as it was"
    assert same(mine, wanted)


# ------------------------------------------------------------------------------------------------------------ V3


class Pair(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    y: int = 2


Loose = collections.namedtuple("Loose", "x y")


def test_v3_lambdas_and_local_classes(work: Work) -> None:
    class Local:
        count = 3

        def __init__(self, x: int) -> None:
            self.x = x

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Local) and other.x == self.x

        def twice(self) -> int:
            return 2 * self.x

    @dataclasses.dataclass
    class LocalPoint:
        x: int

    f = work.a.submit(lambda x: Local(x), 21)
    assert f.result(WAIT_S).twice() == 42
    assert work.b.submit(lambda local: local.twice() + local.count, f).result(WAIT_S) == 45
    assert work.b.submit(Local.twice, f).result(WAIT_S) == 42
    assert work.a.submit(LocalPoint, 4).result(WAIT_S).x == 4
    assert work.a.submit(identity, Local(5)).result(WAIT_S) == Local(5)


@pytest.mark.parametrize(
    "value",
    [Pair(1, 2), Loose(1, 2), Point(1), int, Pair, Point, collections.OrderedDict, type(None)],
    ids=repr,
)
def test_v3_named_tuples_dataclasses_and_types(work: Work, value: object) -> None:
    found = work.b.submit(identity, work.a.submit(identity, value)).result(WAIT_S)
    assert type(found) is type(value)
    assert found == value


MAIN_SCRIPT: Final = """
import collections, dataclasses, sys, typing
import gcref

class Plain:
    def __init__(self, x):
        self.x = x

class Child(Plain):
    def twice(self):
        return 2 * self.x

@dataclasses.dataclass
class Data:
    x: int
    more: list = dataclasses.field(default_factory=list)

class Named(typing.NamedTuple):
    x: int

OldNamed = collections.namedtuple("OldNamed", "x")

def make(cls, x):
    return cls(x)

def read(value):
    return type(value).__name__, value.x

def helper(x):
    return x + CONSTANT

CONSTANT = 10

def uses_global(x):
    return helper(x)

if __name__ == "__main__":
    with gcref.Executor(sys.argv[1]) as a, gcref.Executor(sys.argv[2]) as b:
        for cls in (Plain, Child, Data, Named, OldNamed):
            made = a.submit(make, cls, 7)
            assert type(made.result(30)) is cls, (cls, made.result())
            assert b.submit(read, made).result(30) == (cls.__name__, 7), cls
            assert b.submit(read, cls(8)).result(30) == (cls.__name__, 8), cls
        assert a.submit(make, Child, 7).result(30).twice() == 14
        assert a.submit(lambda: Data(1)).result(30) == Data(1)
        assert a.submit(uses_global, 1).result(30) == 11
    print("fine")
"""


def test_v3_classes_of_main(two_sites: Sites, tmp_path: pathlib.Path) -> None:
    names = (two_sites.polaris.name, two_sites.midway.name)
    assert output_of(MAIN_SCRIPT, tmp_path, *names) == "fine\n"


# ------------------------------------------------------------------------------------------------------------ V4


def pattern(size: int, salt: int) -> NDArray[numpy.uint8]:
    """Bytes that tell their own place: a piece that is missing, stale or elsewhere shows."""
    return numpy.arange(salt, salt + size // 8 + 1, dtype="<u8").view(numpy.uint8)[:size]


def make_bytes(size: int, salt: int) -> bytes:
    return pattern(size, salt).tobytes()


def check_bytes(data: Any, size: int, salt: int) -> bool:
    """Whether these are the bytes of `pattern`; looks at a piece at a time."""
    found = numpy.frombuffer(data, numpy.uint8)
    step = 32 * 1024 * 1024
    return found.size == size and all(
        numpy.array_equal(found[at : at + step], pattern(min(step, size - at), salt + at // 8))
        for at in range(0, size, step)
    )


SIZES: Final = {
    "1 B": 1,
    "99 KB": 99 * KB,  # rides in a message
    "101 KB": 101 * KB,  # lies in the store
    "9.9 MB": 9_900_000,
    "10.1 MB": 10_100_000,
    "100 MB": 100 * MB,
    "1 GB": GB,
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_v4_every_size_from_site_to_site_and_to_the_client(work_by: Work, carrier: str, size: int) -> None:
    salt = size + 1
    f: ComputeFuture[Any] = work_by.a.submit(pattern if size >= 100 * MB else make_bytes, size, salt)
    use = work_by.b.submit(check_bytes, f, size, salt)
    assert use.result(WAIT_S) is True
    assert use.record is not None
    moved = use.record.pulled_bytes
    if size > 100 * KB:
        assert set(moved) == {carrier}
        assert size <= moved[carrier] < size + 10 * KB, "once"
    assert sum(work_by.client.payload_bytes().values()) == 0, "no client bytes"
    if (carrier, size) == ("broker", GB):
        return  # once is enough
    assert check_bytes(f.result(WAIT_S), size, salt)
    counted = work_by.client.payload_bytes()
    if size > 100 * KB:
        assert size <= counted["mapped" if carrier == "ipc" else "in"] < size + 10 * KB


@pytest.mark.parametrize("size", list(SIZES.values())[:-1], ids=list(SIZES)[:-1])
def test_v4_every_size_as_an_argument_from_the_client(work_by: Work, size: int) -> None:
    assert work_by.a.submit(check_bytes, make_bytes(size, 7), size, 7).result(WAIT_S) is True
    assert work_by.b.submit(check_bytes, pattern(size, 8), size, 8).result(WAIT_S) is True


# ------------------------------------------------------------------------------------------------------------ V5


class Deep:
    def __init__(self) -> None:
        self.inner = [{"lock": threading.Lock()}]


def two(*args: object, **kwargs: object) -> int:
    return len(args) + len(kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "name"),
    [
        ((threading.Lock(),), {}, "argument 1"),
        ((1, Deep()), {}, "argument 2"),
        ((1,), {"key": [threading.Lock()]}, "keyword 'key'"),
        ((b"x" * 200_000, (i for i in range(3))), {}, "argument 2"),
    ],
    ids=["plain", "deep", "keyword", "beside-a-large-one"],
)
def test_v5_an_argument_that_cannot_be_pickled(
    work: Work, args: tuple[object, ...], kwargs: dict[str, object], name: str
) -> None:
    before = work.a.submit(inc, 1)
    with pytest.raises(gcref.errors.SerializationError) as caught:
        work.a.submit(two, before, *args, **kwargs)
    shifted = name.replace("2", "3").replace("1", "2")
    assert caught.value.argument == shifted
    assert shifted in str(caught.value)
    assert isinstance(caught.value, TypeError)
    assert (before.result(WAIT_S), work.a.submit(inc, before).result(WAIT_S)) == (2, 3)


def test_v5_a_function_that_cannot_be_pickled_and_a_value_to_put(work: Work) -> None:
    lock = threading.Lock()
    with pytest.raises(gcref.errors.SerializationError, match="function"):
        work.a.submit(lambda: lock.locked())
    with pytest.raises(gcref.errors.SerializationError):
        work.a.put([lock])
    assert work.a.submit(inc, 1).result(WAIT_S) == 2


# ------------------------------------------------------------------------------------------------------------ V6


@pytest.mark.parametrize(
    "wrap", [lambda lock: lock, lambda lock: {"k": [lock]}, lambda lock: (lock, b"x" * 200_000)]
)
def test_v6_a_result_that_cannot_be_pickled(work: Work, wrap: Callable[[Any], Any]) -> None:
    pids = worker_pids("polaris")

    def make() -> Any:
        return wrap(threading.Lock())

    f = work.a.submit(make)
    error = f.exception(WAIT_S)
    assert isinstance(error, gcref.errors.SerializationError)
    assert "lock" in str(error)
    assert error.module
    assert work.a.submit(inc, 1).result(WAIT_S) == 2
    assert worker_pids("polaris") == pids


UNKNOWN_MODULE: Final = """
class Thing:
    x = 5

    def __eq__(self, other):
        return type(other) is Thing
"""


def x_of(value: Any) -> int:
    return int(value.x)


@pytest.fixture
def unknown(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, two_sites: Sites) -> Iterator[Any]:
    """A module that the client can import, and endpoints that run already cannot."""
    import importlib

    name = f"beside_the_script_{os.urandom(4).hex()}"
    (tmp_path / f"{name}.py").write_text(UNKNOWN_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module(name)
    del sys.modules[name]


def test_v6_an_argument_whose_class_the_worker_cannot_import(work: Work, unknown: Any) -> None:
    pids = worker_pids("polaris")
    error = work.a.submit(x_of, unknown.Thing()).exception(WAIT_S)
    assert isinstance(error, gcref.errors.SerializationError)
    assert error.module == unknown.__name__
    assert "ship_modules" in str(error)
    put = work.a.put(unknown.Thing())
    for site in (work.a, work.b):
        later = site.submit(x_of, put).exception(WAIT_S)
        assert isinstance(later, gcref.errors.SerializationError)
        assert later.module == unknown.__name__
    assert work.a.submit(inc, 1).result(WAIT_S) == 2
    assert worker_pids("polaris") == pids


def test_v6_a_module_that_is_shipped_is_known_everywhere(two_sites: Sites, unknown: Any) -> None:
    with Executor(two_sites.polaris.endpoint_id, ship_modules=[unknown]) as executor:
        assert executor.submit(x_of, unknown.Thing()).result(WAIT_S) == 5
        assert executor.submit(unknown.Thing).result(WAIT_S).x == 5


# ------------------------------------------------------------------------------------------------------------ V7


def check_put(data: NDArray[Any], index: int) -> int:
    assert data.size == 100 * MB // 8
    return int(data[index])


@pytest.mark.parametrize(("way", "copies"), [("ipc", 1), ("direct", 2), ("broker", 2)])
def test_v7_one_upload_and_one_copy_in_memory(
    home: pathlib.Path, request: pytest.FixtureRequest, way: str, copies: int
) -> None:
    """By TCP or by mail nobody knows that both endpoints are on one machine."""
    size = 100 * MB
    with contextlib.ExitStack() as stack:
        if way == "broker":
            stack.enter_context(request.getfixturevalue("post_office").used_by("gina"))
        here = stack.enter_context(LocalEndpoint("here", workers=2, carriers=[way]))
        there = stack.enter_context(LocalEndpoint("there", workers=2, carriers=[way]))
        client = stack.enter_context(Client(carriers=[way]))
        a = stack.enter_context(Executor(here.endpoint_id, client))
        b = stack.enter_context(Executor(there.endpoint_id, client))
        folders = [host_folder(site.name) for site in (here, there)]
        before = shared_bytes(*folders)
        data = a.put(numpy.arange(size // 8))
        uses = [site.submit(check_put, data, i) for site in (a, b) for i in range(100)]
        assert [use.result(WAIT_S) for use in uses] == [*range(100), *range(100)]
        assert size <= client.payload_bytes()["out"] < size + 10 * KB, "one upload"
        assert size <= store_of("here")["used_bytes"] < 1.2 * size
        assert copies * size <= shared_bytes(*folders) - before < (copies + 0.2) * size


# ------------------------------------------------------------------------------------------------------------ V8


async def _one(x: int) -> int:
    return x


async def gathered(*values: int) -> int:
    return sum(await asyncio.gather(*map(_one, values)))


async def raising() -> None:
    await asyncio.sleep(0)
    raise LookupError("from a coroutine")


def test_v8_async_functions_are_awaited_in_the_worker(work: Work) -> None:
    f: ComputeFuture[Any] = work.a.submit(gathered, 1, 2, 3)
    assert f.result(WAIT_S) == 6
    later: ComputeFuture[Any] = work.b.submit(gathered, f, 4)
    assert later.result(WAIT_S) == 10
    assert work.a.submit(inc, f).result(WAIT_S) == 7
    assert isinstance(work.a.submit(raising).exception(WAIT_S), LookupError)
