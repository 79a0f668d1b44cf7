"""Values to blobs and back: exact, zero-copy where there are arrays, and a typed error where it cannot be."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import datetime
import decimal
import enum
import functools
import math
import mmap
import operator
import pickle
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcref.errors import GcrefError, ProtocolError, SerializationError
from gcref.objects import blob, pickling, serialize
from gcref.objects.ref import ObjectRef
from tests.unit.objects.holders import Holder, make_ref


def send(value: Any) -> Any:
    """Bring a value to the other side, as a small blob."""
    return serialize.loads(blob.join(serialize.dumps(value)))


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Record:
    name: str
    values: list[Any]


class Colour(enum.Enum):
    RED = 1


class Stateful:
    """Pickles something of its own, as some libraries do, while it is being pickled."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getstate__(self) -> bytes:
        return pickle.dumps(self.inner)

    def __setstate__(self, state: bytes) -> None:
        self.inner = pickle.loads(state)


class Sender:
    """Serializes a value of its own, futures and all, while it is being pickled."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return serialize.loads, (blob.join(serialize.dumps(self.value)),)


class Moody:
    """Raises something while it is unpickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return _raise, (self.error,)


def _raise(error: BaseException) -> None:
    raise error


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=10,
)


@given(plain)
def test_plain_values_come_back_exactly(value: Any) -> None:
    back = send(value)
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("value", [None, 0, False, "", b"", [], (), {}, set(), 0.0, ValueError("no")])
def test_v1_values_that_look_like_nothing_are_exact(value: Any) -> None:
    back = send(value)
    assert type(back) is type(value)
    assert str(back) == str(value)


def test_v1_nan_stays_nan() -> None:
    assert math.isnan(send(math.nan))


@pytest.mark.parametrize("size", [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 2**20, 5 * 2**20])
@pytest.mark.parametrize("kind", [bytes, bytearray, str])
def test_v4_large_and_small_runs_of_bytes_are_exact(size: int, kind: type) -> None:
    pattern = bytes(range(128)) * (size // 128 + 1)
    value: Any = pattern[:size].decode() if kind is str else kind(pattern[:size])
    for whole in (value, [value, value], {"key": (value, 1)}):
        assert send(whole) == whole


@pytest.mark.parametrize(
    "value",
    [
        Point(1, 2),
        Record("a", [1, 2]),
        Colour.RED,
        int,
        Record,
        type(None),
        types.SimpleNamespace(a=1),
        datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
        decimal.Decimal("1.10"),
        collections.OrderedDict(b=1, a=2),
        collections.deque([1, 2], maxlen=3),
        collections.Counter("aab"),
        frozenset([1, 2]),
        range(3),
        slice(1, 2),
        Path("/a/b"),
        len,
        operator.add,
        math,
    ],
)
def test_v3_all_kinds_of_values_come_back(value: Any) -> None:
    back = send(value)
    assert back == value
    assert type(back) is type(value)


def test_v3_what_only_lives_here_goes_by_value() -> None:
    local_tuple = collections.namedtuple("local_tuple", "a b")

    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

    @dataclasses.dataclass
    class LocalRecord:
        value: int = 7

    bound = 5
    assert send(lambda value: value + bound)(2) == 7
    assert send(functools.partial(lambda a, b: (a, b), b=2))(1) == (1, 2)
    assert send(Local(3)).value == 3
    assert send(Local)(4).value == 4
    assert send(LocalRecord()) == LocalRecord()
    assert send(local_tuple(1, 2)) == (1, 2)


def test_v3_functions_and_classes_of_main_go_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec("class Thing:\n    def f(self): return 7\ndef call(thing): return thing.f()", names)
    with monkeypatch.context() as main:
        for name in ("Thing", "call"):
            main.setattr(sys.modules["__main__"], name, names[name], raising=False)
        # Plain pickle would write a name that means something else in a worker.
        assert b"__main__" in pickle.dumps(names["Thing"]())
        data = blob.join(serialize.dumps([names["call"], names["Thing"]()] * 2))
        large = blob.join(serialize.dumps([["x"] * 2**19, names["Thing"](), bytes(2**18)]))
    call, thing, *_ = serialize.loads(data)
    assert call(thing) == 7
    assert serialize.loads(large)[1].f() == 7


def test_the_text_main_is_only_a_text() -> None:
    assert send(["__main__", b"__main__"]) == ["__main__", b"__main__"]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module that only this side has."""
    (tmp_path / "only_here_module.py").write_text(
        "import dataclasses\n"
        "FACTOR = 3\n"
        "def scale(value): return value * FACTOR\n"
        "@dataclasses.dataclass\nclass Box:\n    value: int\n    def get(self): return self.value\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pickling, "_only_here", pickling.only_here())
    import only_here_module  # type: ignore[import-not-found]

    yield only_here_module
    if "only_here_module" in cloudpickle.list_registry_pickle_by_value():
        cloudpickle.unregister_pickle_by_value(only_here_module)


def leave_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Go to a place where the module is not to be had."""
    monkeypatch.delitem(sys.modules, "only_here_module")
    monkeypatch.setattr(sys, "path", [])


@pytest.mark.parametrize("by_name", [True, False])
def test_shipped_modules_go_by_value(
    shipped: types.ModuleType, monkeypatch: pytest.MonkeyPatch, by_name: bool
) -> None:
    serialize.ship_modules(["only_here_module" if by_name else shipped])
    value = blob.join(serialize.dumps({"box": shipped.Box(2)}))
    call = blob.join(serialize.dumps_call(shipped.scale, (shipped.Box(2),), {}).encoded)
    leave_behind(monkeypatch)
    assert serialize.loads(value)["box"].get() == 2
    fn, (box,), _ = serialize.loads_call(call, _unexpected)
    assert fn is not None
    assert fn(box.get()) == 6


def test_v6_a_module_that_is_missing_is_named_and_ship_modules_advised(
    shipped: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = blob.join(serialize.dumps(shipped.Box(2)))
    leave_behind(monkeypatch)
    with pytest.raises(SerializationError, match=r"ship_modules=\['only_here_module'\]") as caught:
        serialize.loads(data)
    assert caught.value.module == "only_here_module"
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_v6_a_class_that_is_missing_in_its_module_names_the_module(
    shipped: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = blob.join(serialize.dumps(shipped.Box(2)))
    monkeypatch.delattr(shipped, "Box")
    with pytest.raises(SerializationError, match="Box") as caught:
        serialize.loads(data)
    assert caught.value.module == "only_here_module"


def test_a_module_to_ship_must_exist() -> None:
    with pytest.raises(SerializationError, match="no_such_module") as caught:
        serialize.ship_modules(["no_such_module"])
    assert caught.value.module == "no_such_module"


# numpy

STRUCTURED = np.dtype([("a", "<i4"), ("b", "<f8"), ("c", "S3")])
ARRAYS = {
    "0-d": np.array(3.5),
    "empty": np.empty((0, 3)),
    "plain": np.arange(12).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(12).reshape(3, 4)),
    "transposed": np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
    "strided": np.arange(20)[::3],
    "backwards": np.arange(5)[::-1],
    "cut": np.arange(36).reshape(6, 6)[1:5, 2:4],
    "broadcast": np.broadcast_to(np.arange(3), (4, 3)),
    "object": np.array([{"a": 1}, [2], None], dtype=object),
    "object fortran": np.asfortranarray(np.array([[1, "a"], [None, 2.0]], dtype=object)),
    "structured": np.array([(1, 2.5, b"xyz"), (3, 4.5, b"a")], dtype=STRUCTURED),
    "structured strided": np.zeros(6, dtype=STRUCTURED)[::2],
    "with objects inside": np.array([(1, "x")], dtype=[("n", "i4"), ("o", object)]),
    "bool": np.array([True, False]),
    "text": np.array(["abc", "é"]),
    "dates": np.array(["2024-01-01", "NaT"], dtype="datetime64[D]"),
    "dates strided": np.arange("2024-01", "2024-12", dtype="datetime64[M]")[::2],
    "no width": np.array(["", ""], dtype="S0"),
    "complex": np.array([1 + 2j]),
    "other byte order": np.arange(3, dtype=">i4"),
    "nan": np.array([np.nan, -0.0]),
    "read-only": np.frombuffer(b"12345678", dtype="u1"),
}


def assert_same(back: np.ndarray[Any, Any], array: np.ndarray[Any, Any]) -> None:
    assert type(back) is np.ndarray
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    if array.dtype.hasobject:
        assert back.tolist() == array.tolist()
    else:
        assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("where", ["bytes", "bytearray", "mapping", "call"])
@pytest.mark.parametrize("name", ARRAYS)
def test_v2_arrays_are_exact_and_read_only(name: str, where: str) -> None:
    array = ARRAYS[name]
    value = {"array": array, "again": [array]}
    if where == "call":
        call = serialize.dumps_call(None, (), value)
        back = serialize.loads_call(blob.join(call.encoded), _unexpected)[2]
    else:
        encoded = serialize.dumps(value)
        holder: Any = blob.join(encoded)
        if where == "bytearray":
            holder = bytearray(holder)
        elif where == "mapping":
            holder = mmap.mmap(-1, encoded.size)
            blob.write_into(encoded, memoryview(holder))
        back = serialize.loads(holder)
    received = back["array"]
    assert_same(received, array)
    assert back["again"][0] is received
    with pytest.raises(ValueError, match="read-only"):
        received[...] = received
    if not received.flags.owndata:
        with pytest.raises(ValueError, match="WRITEABLE"):
            received.flags.writeable = True
    if array.flags.f_contiguous and not array.dtype.hasobject and array.ndim == 2:
        assert received.flags.f_contiguous


@pytest.mark.parametrize("name", ["plain", "fortran", "structured", "strided", "cut"])
def test_v2_arrays_of_a_mapped_blob_are_views_of_it(name: str) -> None:
    encoded = serialize.dumps(ARRAYS[name])
    mapping = mmap.mmap(-1, encoded.size)
    blob.write_into(encoded, memoryview(mapping))
    received = serialize.loads(memoryview(mapping))
    base = np.frombuffer(mapping, dtype="u1").ctypes.data
    assert base < received.ctypes.data < base + encoded.size
    assert (received.ctypes.data - base) % 64 == 0
    with pytest.raises(BufferError):
        mapping.close()
    del received
    mapping.close()


def test_v2_an_array_that_contains_itself_comes_back() -> None:
    array = np.empty(1, dtype=object)
    array[0] = array
    back = send(array)
    assert back[0] is back


def test_v2_arrays_in_containers_and_closures_come_back() -> None:
    array = np.arange(10)[::2]
    (first, nested), record = send(((array, {"x": [array]}), Record("a", [array])))
    assert_same(first, array)
    assert nested["x"][0] is first
    assert record.values[0] is first
    closed_over = send(lambda: array)()
    assert_same(closed_over, array)
    assert not closed_over.flags.writeable


def test_v2_subclasses_of_arrays_come_back_as_themselves() -> None:
    masked = np.ma.masked_array([1, 2, 3], mask=[False, True, False])
    back = send(masked)
    assert type(back) is type(masked)
    assert back.tolist() == [1, None, 3]


def test_many_small_arrays_come_back() -> None:
    arrays = [np.full(n % 7, n) for n in range(2000)]
    for back, array in zip(send(arrays), arrays, strict=True):
        assert_same(back, array)


# Futures and references in a value


def test_futures_and_references_in_a_value_become_references_and_are_noted() -> None:
    future, ref = Holder(), make_ref()
    encoded = serialize.dumps({"f": [future, future, Holder(future.id)], "r": (ref, ref)})
    assert encoded.refs == future.ref().pack() + ref.pack()
    data = blob.join(encoded)
    assert blob.refs_of(data) == encoded.refs
    back = serialize.loads(data)
    assert back == {"f": [future.ref()] * 3, "r": (ref, ref)}
    assert all(type(found) is ObjectRef for found in back["f"])
    assert back["f"][0].pack() == future.ref().pack()


def test_futures_deep_inside_are_found_without_looking_for_them() -> None:
    future = Holder()
    for value in (
        lambda: future,
        functools.partial(print, future),
        Record("a", [future]),
        Stateful([future]),
    ):
        assert serialize.dumps(value).refs == future.ref().pack()


def test_a_value_that_serializes_another_one_keeps_to_its_own_references() -> None:
    inner, outer = make_ref(), make_ref()
    encoded = serialize.dumps([outer, Sender([inner, np.arange(3)]), np.arange(4), outer])
    assert encoded.refs == outer.pack()
    back = serialize.loads(blob.join(encoded))
    assert back[0] == outer
    assert back[1][0] == inner
    assert back[1][1].tolist() == [0, 1, 2]
    assert back[2].tolist() == [0, 1, 2, 3]


def test_what_a_failed_pickling_noted_is_forgotten() -> None:
    for _ in range(2):
        with pytest.raises(SerializationError):
            serialize.dumps([make_ref(), Holder(), np.arange(3), threading.Lock()])
        assert serialize.dumps([1]).refs == b""
        assert serialize.dumps_call(None, (1,), {}).deps == ()


def test_an_interrupted_pickling_leaves_nothing_behind() -> None:
    class Interrupted:
        def __reduce__(self) -> tuple[Any, ...]:
            raise KeyboardInterrupt

    for attempt in (serialize.dumps, lambda value: serialize.dumps_call(None, tuple(value), {})):
        with pytest.raises(KeyboardInterrupt):
            attempt([make_ref(), np.arange(3), Interrupted()])
        assert serialize.dumps(["a"]).refs == b""
        with pytest.raises(TypeError, match=r"gcref\.ref"):
            pickle.dumps(Holder())


def test_a_future_pickled_by_anybody_else_says_what_to_do() -> None:
    for attempt in (pickle.dumps, cloudpickle.dumps):
        with pytest.raises(TypeError, match=r"submit\(\).*gcref\.ref\(future\)"):
            attempt([Holder()])


def test_pickling_in_one_thread_does_not_concern_another() -> None:
    class Waiting:
        def __reduce__(self) -> tuple[Any, ...]:
            with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(TypeError):
                pool.submit(pickle.dumps, Holder()).result()
            return str, ()

    assert send([Waiting()]) == [""]


# What cannot be


def test_v6_a_result_that_cannot_be_pickled_is_a_typed_error_with_its_module() -> None:
    with pytest.raises(SerializationError, match=r"_thread\.lock.*cannot be pickled") as caught:
        serialize.dumps(threading.Lock())
    assert isinstance(caught.value, TypeError)
    assert caught.value.module == "_thread"
    assert caught.value.__cause__ is not None
    with pytest.raises(SerializationError, match="the value"):
        serialize.dumps({"a": [threading.Lock()]})


def test_a_result_with_a_foreign_future_says_what_to_do() -> None:
    with pytest.raises(SerializationError, match=r"concurrent\.futures.*result\(\)"):
        serialize.dumps([concurrent.futures.Future()])
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(SerializationError, match=r"asyncio.*result\(\)"):
            serialize.dumps({"a": loop.create_future()})
    finally:
        loop.close()


def test_what_is_raised_while_pickling_is_a_typed_error() -> None:
    class Odd:
        def __reduce__(self) -> tuple[Any, ...]:
            raise SystemExit("not like this")

    with pytest.raises(SerializationError, match="SystemExit: not like this"):
        serialize.dumps([Odd()])
    with pytest.raises(SerializationError, match=r"^argument 1, .*SystemExit: not like this"):
        serialize.dumps_call(None, (Odd(),), {})


def test_a_value_that_is_too_deep_is_a_typed_error() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(SerializationError):
        serialize.dumps(deep)
    while deep:  # taken apart by hand: destructors recurse, too
        deep = deep.pop()


@pytest.mark.parametrize("error", [ValueError("odd"), SystemExit(3), GeneratorExit(), RecursionError()])
def test_what_is_raised_while_unpickling_is_a_typed_error(error: BaseException) -> None:
    with pytest.raises(SerializationError, match=type(error).__name__) as caught:
        send(Moody(error))
    assert type(caught.value.__cause__) is type(error)


def test_errors_of_gcref_and_interrupts_pass_through_unpickling() -> None:
    with pytest.raises(ProtocolError):
        send(Moody(ProtocolError("as it is")))
    with pytest.raises(KeyboardInterrupt):
        send(Moody(KeyboardInterrupt()))


@given(plain, st.data())
def test_a_truncated_blob_is_a_typed_error(value: Any, draw: st.DataObject) -> None:
    data = blob.join(serialize.dumps([value, np.arange(5), b"x" * 10]))
    with pytest.raises(GcrefError):
        serialize.loads(data[: draw.draw(st.integers(0, len(data) - 1))])


def test_a_stream_that_asks_for_more_buffers_than_there_are_is_a_typed_error() -> None:
    wanting: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(np.arange(3), 5, buffer_callback=wanting.append)
    with pytest.raises(SerializationError):
        serialize.loads(blob.join(blob.encode([stream])))


def _unexpected(index: int) -> Any:
    raise AssertionError(f"there is no dependency {index}")
