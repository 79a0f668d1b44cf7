"""Arguments of calls: futures are found wherever they are, each once, and a bad argument is named."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcref import ids
from gcref.errors import DependencyError, ProtocolError, SerializationError
from gcref.objects import blob, serialize
from gcref.objects.ref import ObjectRef
from tests.unit.objects.holders import Holder, make_ref


def send(call: serialize.Call, values: dict[bytes, Any] | None = None) -> tuple[Any, Any, Any]:
    """Bring a call to the other side, where the dependencies have these values."""
    found = values or {}
    data = blob.join(call.encoded)
    assert blob.refs_of(data) == b""
    return serialize.loads_call(data, lambda index: found[call.deps[index].id])


class Pair(NamedTuple):
    a: Any
    b: Any


@dataclasses.dataclass
class Record:
    value: Any


class Submits:
    """Submits a task of its own while it is being pickled."""

    def __init__(self, made: list[serialize.Call], argument: Any) -> None:
        self.made = made
        self.argument = argument

    def __reduce__(self) -> tuple[Any, ...]:
        self.made.append(serialize.dumps_call(None, (self.argument,), {}))
        return str, ("submitted",)


class SwallowsError:
    """Tries to pickle something, and does not mind if that fails."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getstate__(self) -> Any:
        try:
            return pickle.dumps([self.inner, threading.Lock()])
        except TypeError:
            return "nothing"

    def __setstate__(self, state: Any) -> None:
        self.inner = state


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((1,), {}), ((), {"a": 1}), ((1, "b", None), {"c": [2], "fn": 3, "args": 4})],
)
def test_arguments_come_back(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = serialize.dumps_call(None, args, kwargs)
    assert (list(call.deps), list(call.passed)) == ([], [])
    assert send(call) == (None, args, kwargs)


def test_calls_without_arguments_share_one_blob() -> None:
    call = serialize.dumps_call(None, (), {})
    assert call is serialize.dumps_call(None, (), {})
    assert blob.join(call.encoded) == blob.PLAIN_HEADER + pickle.dumps(((), {}), 5)
    _, _, kwargs = send(call)
    kwargs["mine"] = 1
    assert send(call) == (None, (), {})


def test_a_function_may_travel_inside() -> None:
    for fn in (len, lambda text: len(text), functools.partial(max, 2)):
        back, args, kwargs = send(serialize.dumps_call(fn, ("ab",), {}))
        assert (args, kwargs) == (("ab",), {})
        if not isinstance(fn, functools.partial):
            assert back(*args) == 2


def test_r3_the_same_future_three_times_is_one_dependency() -> None:
    future = Holder()
    call = serialize.dumps_call(None, (future, [future]), {"key": Holder(future.id)})
    assert [dep.id for dep in call.deps] == [future.id]
    assert send(call, {future.id: 5}) == (None, (5, [5]), {"key": 5})


def wrap_in_closure(future: Any) -> Callable[[], Any]:
    return lambda: future


WRAPPERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "itself": (lambda f: f, lambda v: v),
    "list": (lambda f: [1, f], lambda v: v[1]),
    "tuple": (lambda f: (1, f), lambda v: v[1]),
    "dict value": (lambda f: {"a": f}, lambda v: v["a"]),
    "dict in dict in list": (lambda f: [{"a": {"b": f}}], lambda v: v[0]["a"]["b"]),
    "set": (lambda f: {f}, lambda v: next(iter(v))),
    "frozenset": (lambda f: frozenset([f]), lambda v: next(iter(v))),
    "namedtuple": (lambda f: Pair(1, f), lambda v: v.b),
    "dataclass": (Record, lambda v: v.value),
    "OrderedDict": (lambda f: collections.OrderedDict(a=f), lambda v: v["a"]),
    "deque": (lambda f: collections.deque([f]), lambda v: v[0]),
    "defaultdict": (lambda f: collections.defaultdict(list, a=f), lambda v: v["a"]),
    "partial": (lambda f: functools.partial(Record, f), lambda v: v().value),
    "closure": (wrap_in_closure, lambda v: v()),
    "default of a lambda": (lambda f: lambda a=f: a, lambda v: v()),
    "object array": (lambda f: np.array([f, 1], dtype=object), lambda v: v[0]),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_r4_a_future_is_resolved_wherever_it_is_and_types_are_kept(name: str) -> None:
    wrap, unwrap = WRAPPERS[name]
    future = Holder()
    call = serialize.dumps_call(None, (wrap(future),), {"key": wrap(future)})
    assert [dep.id for dep in call.deps] == [future.id]
    _, (arg,), kwargs = send(call, {future.id: "value"})
    for received in (arg, kwargs["key"]):
        assert type(received) is (str if name == "itself" else type(wrap(future)))
        assert unwrap(received) == "value"


def test_r4_a_future_in_the_function_itself_is_resolved() -> None:
    future = Holder()
    call = serialize.dumps_call(wrap_in_closure(future), (), {})
    fn, _, _ = send(call, {future.id: 7})
    assert fn() == 7


def test_r5_a_reference_is_passed_and_noted_once() -> None:
    ref, future = make_ref(), Holder()
    call = serialize.dumps_call(None, (ref, {"r": [ref]}), {"f": future, "same": future.ref()})
    assert [passed._id for passed in call.passed] == [ref._id, future.id]
    assert [dep.id for dep in call.deps] == [future.id]
    _, args, kwargs = send(call, {future.id: 1})
    assert args == (ref, {"r": [ref]})
    assert type(args[0]) is ObjectRef
    assert kwargs == {"f": 1, "same": future.ref()}


def test_r7_a_text_that_is_an_id_stays_a_text() -> None:
    future = Holder()
    text = ids.text(future.id)
    call = serialize.dumps_call(None, (text, future.id, future), {text: text})
    assert len(call.deps) == 1
    assert send(call, {future.id: 1}) == (None, (text, future.id, 1), {text: text})


@given(st.lists(st.integers(0, 5), max_size=20))
def test_every_future_gets_the_value_of_its_index(which: list[int]) -> None:
    futures = [Holder() for _ in range(6)]
    call = serialize.dumps_call(None, tuple(futures[n] for n in which), {})
    assert [dep.id for dep in call.deps] == [futures[n].id for n in dict.fromkeys(which)]
    assert send(call, {future.id: n for n, future in enumerate(futures)})[1] == tuple(which)


def test_r8_ten_thousand_futures_are_ten_thousand_dependencies() -> None:
    futures = [Holder() for _ in range(10_000)]
    call = serialize.dumps_call(None, (futures,), {})
    assert list(call.deps) == futures
    assert send(call, {future.id: n for n, future in enumerate(futures)})[1] == (list(range(10_000)),)


def test_arrays_travel_out_of_band_and_are_read_only() -> None:
    array = np.arange(1000)
    call = serialize.dumps_call(None, (array, array[::2]), {})
    assert any(isinstance(part, memoryview) and part.nbytes == array.nbytes for part in call.encoded.parts)
    _, (whole, half), _ = send(call)
    assert (whole.tolist(), half.tolist()) == (array.tolist(), array[::2].tolist())
    assert not whole.flags.writeable
    assert not half.flags.writeable


def test_a_task_submitted_while_an_argument_is_pickled_keeps_to_its_own() -> None:
    made: list[serialize.Call] = []
    outer, inner = Holder(), Holder()
    call = serialize.dumps_call(
        None, (outer, Submits(made, [inner, outer]), outer), {"last": Holder(inner.id)}
    )
    assert [dep.id for dep in call.deps] == [outer.id, inner.id]
    assert [dep.id for dep in made[-1].deps] == [inner.id, outer.id]
    values = {outer.id: "o", inner.id: "i"}
    assert send(call, values) == (None, ("o", "submitted", "o"), {"last": "i"})
    assert send(made[-1], values) == (None, (["i", "o"],), {})


def test_a_future_that_was_met_but_not_written_is_waited_for_all_the_same() -> None:
    future = Holder()
    call = serialize.dumps_call(None, (SwallowsError(future),), {})
    assert [dep.id for dep in call.deps] == [future.id]
    assert send(call, {future.id: 1})[1][0].inner == "nothing"
    assert serialize.dumps_call(None, (1,), {}).deps == ()


def test_arguments_may_be_read_while_others_are_being_read() -> None:
    first, second = Holder(), Holder()
    one = serialize.dumps_call(None, (first, first), {})
    two = serialize.dumps_call(None, ([second], Holder(second.id)), {})

    def resolve(index: int) -> Any:
        return send(one, {first.id: "inner"})[1]

    assert serialize.loads_call(blob.join(two.encoded), resolve)[1] == (
        [("inner", "inner")],
        ("inner", "inner"),
    )


# What cannot be


@pytest.mark.parametrize(
    ("args", "kwargs", "name"),
    [
        ((threading.Lock(),), {}, "argument 1"),
        ((1, [threading.Lock()]), {}, "argument 2"),
        ((1,), {"a": 2, "x": {"y": threading.Lock()}}, "keyword 'x'"),
        ((bytes(2**17), threading.Lock()), {}, "argument 2"),
        ((Holder(), make_ref(), threading.Lock()), {}, "argument 3"),
    ],
)
def test_v5_an_argument_that_cannot_be_pickled_is_named(
    args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> None:
    with pytest.raises(SerializationError, match=f"^{name}, a .* cannot be pickled") as caught:
        serialize.dumps_call(None, args, kwargs)
    assert caught.value.argument == name
    assert isinstance(caught.value, TypeError)
    assert send(serialize.dumps_call(None, (1,), {})) == (None, (1,), {})


def test_v5_a_function_that_cannot_be_pickled_is_named() -> None:
    lock = threading.Lock()
    with pytest.raises(SerializationError) as caught:
        serialize.dumps_call(lambda: lock, (1,), {})
    assert caught.value.argument == "the function"


def test_r6_a_foreign_future_is_a_type_error_that_says_what_to_do() -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        foreign = pool.submit(int)
        for args, kwargs, name in (
            ((1, foreign), {}, "argument 2"),
            ((), {"x": [{"y": foreign}]}, "keyword 'x'"),
        ):
            with pytest.raises(TypeError, match=r"no future of gcref.*result\(\)") as caught:
                serialize.dumps_call(None, args, kwargs)
            assert isinstance(caught.value, SerializationError)
            assert caught.value.argument == name


def test_r6_futures_of_asyncio_are_foreign_too() -> None:
    async def attempt() -> None:
        loop = asyncio.get_running_loop()
        task = loop.create_task(asyncio.sleep(0))
        for foreign in (loop.create_future(), task):
            with pytest.raises(TypeError, match=r"no future of gcref.*result\(\)"):
                serialize.dumps_call(None, (foreign,), {})
        await task

    asyncio.run(attempt())


def test_what_a_dependency_raises_passes_through() -> None:
    call = serialize.dumps_call(None, (Holder(),), {})

    for trouble in (DependencyError("failed before"), OSError("no such mapping"), SystemExit(3)):

        def fail(index: int, trouble: BaseException = trouble) -> Any:
            raise trouble

        with pytest.raises(type(trouble)) as caught:
            serialize.loads_call(blob.join(call.encoded), fail)
        assert caught.value is trouble


def test_a_value_is_no_call_and_a_call_is_no_value() -> None:
    for value in (1, (1,), (1, 2, 3, 4), [1, 2]):
        with pytest.raises(ProtocolError, match="something else"):
            serialize.loads_call(blob.join(serialize.dumps(value)), lambda index: None)
    with pytest.raises(ProtocolError, match="read as a value"):
        serialize.loads(blob.join(serialize.dumps_call(None, (Holder(),), {}).encoded))
