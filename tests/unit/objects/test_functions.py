"""Functions as bytes: made once, made anew when they mean something else, and not kept when they must not be."""

from __future__ import annotations

import functools
import gc
import json
import math
import os.path
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
import pytest

from gcref.config import INLINE_MAX_BYTES
from gcref.errors import SerializationError
from gcref.objects import pickling
from gcref.objects.serialize import FunctionCache, load_function, ship_modules
from tests.unit.objects.holders import Holder, make_ref

Source = Callable[[str], dict[str, Any]]


@pytest.fixture
def notebook() -> Source:
    """Runs cells in a `__main__` of its own, as a notebook does."""
    names: dict[str, Any] = {"__name__": "__main__"}

    def run(cell: str) -> dict[str, Any]:
        exec(cell, names)
        return names

    return run


@pytest.fixture
def cache() -> FunctionCache:
    return FunctionCache()


def module_level(value: int) -> int:
    return value + 1


class Callable_:  # noqa: N801
    def __call__(self, value: int) -> int:
        return value

    def method(self, value: int) -> int:
        return value


def bytes_of(cache: FunctionCache, fn: Callable[..., Any]) -> bytes:
    found = cache.get(fn)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("fn", [module_level, len, math.sqrt, os.path.join, json.dumps, int, Callable_])
def test_functions_builtins_and_classes_are_kept(cache: FunctionCache, fn: Callable[..., Any]) -> None:
    found = cache.get(fn)
    assert found is not None
    digest, pickled = found
    assert len(digest) == 16
    assert load_function(pickled) is fn
    assert cache.get(fn) is found
    assert FunctionCache().get(fn) == found


def test_a_lambda_is_pickled_once(cache: FunctionCache, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = 3
    fn = lambda value: value + bound  # noqa: E731
    found = cache.get(fn)
    assert found is not None
    assert load_function(found[1])(4) == 7
    monkeypatch.setattr(pickling, "_cloud_pickler", None)
    assert cache.get(fn) is found


@pytest.mark.parametrize(
    "fn",
    [functools.partial(module_level, 1), Callable_(), Callable_().method, [].append, "a".upper, str.upper],
)
def test_other_callables_travel_inside_the_arguments(cache: FunctionCache, fn: Callable[..., Any]) -> None:
    assert cache.get(fn) is None
    assert not cache._known


@pytest.mark.parametrize("make", [Holder, make_ref])
def test_a_function_that_meets_a_future_or_a_reference_is_not_kept(
    cache: FunctionCache, make: Callable[[], Any]
) -> None:
    inside = make()
    for fn in (lambda: inside, lambda a=inside: a):
        assert cache.get(fn) is None
        assert cache.get(fn) is None


def test_a_future_that_somebody_swallows_is_noticed(cache: FunctionCache) -> None:
    class Careless:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __reduce__(self) -> tuple[Any, ...]:
            try:
                cloudpickle.dumps(self.inner)
            except Exception:  # noqa: BLE001 - careless, as it says
                pass
            return str, ()

    inside = Careless(Holder())
    assert cache.get(lambda: inside) is None


def test_a_function_with_an_array_travels_inside_the_arguments(cache: FunctionCache) -> None:
    array = np.arange(3)
    assert cache.get(lambda: array) is None


def test_a_large_function_travels_inside_the_arguments(cache: FunctionCache) -> None:
    small, large = "x" * 1000, "x" * INLINE_MAX_BYTES
    assert cache.get(lambda: small) is not None
    assert cache.get(lambda: large) is None


def test_a_function_that_cannot_be_pickled_says_so(cache: FunctionCache) -> None:
    lock = threading.Lock()
    with pytest.raises(SerializationError, match=r"^the function, a function, cannot be pickled") as caught:
        cache.get(lambda: lock)
    assert caught.value.argument == "the function"


def test_r13_a_redefined_function_has_another_digest(cache: FunctionCache, notebook: Source) -> None:
    first = notebook("def f(): return 1")["f"]
    one = cache.get(first)
    second = notebook("def f(): return 2")["f"]
    two = cache.get(second)
    assert one is not None
    assert two is not None
    assert one[0] != two[0]
    assert (load_function(one[1])(), load_function(two[1])()) == (1, 2)
    assert cache.get(first) == one


def test_r13_two_functions_of_one_name_are_two(cache: FunctionCache) -> None:
    def make(value: int) -> Callable[[], int]:
        def same_name() -> int:
            return value

        return same_name

    functions = [make(n) for n in range(5)]
    assert [load_function(bytes_of(cache, fn))() for fn in functions] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def helper(): return 1", "def helper(): return 2"),
        ("helper = lambda: 1", "helper = lambda: 2"),
        ("def inner(): return 1\ndef helper(): return inner()", "def inner(): return 2"),
        ("N = 1\ndef helper(): return N", "N = 2"),
        ("N = [1]\ndef helper(): return N[0]", "N = [2]"),
        ("class C:\n    n = 1\ndef helper(): return [C.n for _ in '1'][0]", "class C:\n    n = 2"),
        ("def helper(): return later() if 'later' in globals() else 1", "def later(): return 2"),
    ],
)
def test_r13_a_function_is_pickled_anew_when_what_it_uses_is_redefined(
    cache: FunctionCache, notebook: Source, before: str, after: str
) -> None:
    fn = notebook(f"{before}\ndef f(): return helper()")["f"]
    one = cache.get(fn)
    assert one is not None
    assert cache.get(fn) is one
    assert load_function(one[1])() == 1
    notebook(after)
    two = cache.get(fn)
    assert two is not None
    assert load_function(two[1])() == 2
    assert cache.get(fn) is two


def test_r13_a_closure_is_pickled_anew_when_its_variable_changes(cache: FunctionCache) -> None:
    value = 1
    fn = lambda: value  # noqa: E731
    one = bytes_of(cache, fn)
    value = 2
    assert (load_function(one)(), load_function(bytes_of(cache, fn))()) == (1, 2)


def test_functions_that_call_each_other_are_kept(cache: FunctionCache, notebook: Source) -> None:
    fn = notebook("def f(n): return g(n - 1) if n else 'end'\ndef g(n): return f(n)")["f"]
    found = cache.get(fn)
    assert cache.get(fn) is found
    assert load_function(bytes_of(cache, fn))(5) == "end"


def test_a_function_with_an_empty_cell_is_kept(cache: FunctionCache) -> None:
    later: int
    fn = lambda: later  # noqa: E731
    one = cache.get(fn)
    assert one is not None
    assert cache.get(fn) is one
    later = 3
    assert later == load_function(bytes_of(cache, fn))()


def test_a_function_that_is_gone_is_forgotten(cache: FunctionCache) -> None:
    def make() -> tuple[Callable[[], Any], weakref.ref[Any]]:
        captured = Callable_()

        def recursive() -> Any:
            return recursive, captured

        return recursive, weakref.ref(captured)

    fn, watched = make()
    cache.get(fn)
    assert len(cache._known) == 1
    del fn
    gc.collect()
    assert not cache._known
    assert watched() is None


def test_a_function_whose_whole_module_is_gone_is_forgotten(cache: FunctionCache) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("def f(): return f, g\ndef g(): return f", namespace)
    cache.get(namespace["f"])
    namespace.clear()
    gc.collect()
    assert not cache._known


def test_a_new_function_in_the_place_of_an_old_one_is_not_taken_for_it(cache: FunctionCache) -> None:
    for n in range(200):
        namespace: dict[str, Any] = {"__name__": "__main__"}
        exec(f"def f(): return {n}", namespace)
        assert load_function(bytes_of(cache, namespace["f"]))() == n


def test_shipping_a_module_makes_its_functions_anew(
    cache: FunctionCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("made_for_this_test")
    exec("def f(): return 5", module.__dict__)
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    monkeypatch.setattr(pickling, "_only_here", pickling.only_here())
    by_name = bytes_of(cache, module.f)
    ship_modules([module])
    try:
        by_value = bytes_of(cache, module.f)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    monkeypatch.delitem(__import__("sys").modules, module.__name__)
    assert load_function(by_value)() == 5
    with pytest.raises(SerializationError, match="made_for_this_test") as caught:
        load_function(by_name)
    assert caught.value.module == "made_for_this_test"


def test_bytes_that_are_no_function_are_a_typed_error() -> None:
    for pickled in (b"", b"garbage", cloudpickle.dumps(7)):
        with pytest.raises(SerializationError, match="the function"):
            load_function(pickled)


def test_many_threads_may_ask_at_once(cache: FunctionCache) -> None:
    functions = [eval(f"lambda: {n}") for n in range(50)]
    wrong: list[int] = []

    def ask() -> None:
        for n, fn in enumerate(functions):
            if load_function(bytes_of(cache, fn))() != n:
                wrong.append(n)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(cache._known) == 50
