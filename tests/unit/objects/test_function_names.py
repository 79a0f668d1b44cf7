"""The names of functions, read from bytes that are never unpickled."""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcref.objects.function_names import name_of
from gcref.objects.functions import FunctionCache


def _made_here() -> Callable[[int], int]:
    step = 3

    def inner(x: int) -> int:
        return x + step

    return inner


def _by_value(source: str, name: str) -> Callable[..., Any]:
    """A function as of a user's script: its module is `__main__`, so it is pickled by value."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(source, scope)
    found: Callable[..., Any] = scope[name]
    return found


HELPER = "def helper(x):\n    return x\n\ndef simulate(x):\n    return helper(x)\n"
METHOD = "class Mesh:\n    def refine(self):\n        pass\nrefine = Mesh.refine\n"


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (json.dumps, "dumps"),
        (pow, "pow"),
        (functools.reduce, "reduce"),
        (_by_value(HELPER, "simulate"), "simulate"),
        (_by_value(METHOD, "refine"), "Mesh.refine"),
        (_by_value("f = lambda x: x", "f"), "<lambda>"),
        (_made_here(), "_made_here.inner"),
    ],
)
def test_names(fn: Callable[..., Any], name: str) -> None:
    made = FunctionCache().get(fn)
    assert made is not None
    assert name_of(made[1]) == name


def test_what_is_no_function_has_no_name() -> None:
    for pickled in (b"", b"nonsense", pickle.dumps(["a", "b", "c"]), pickle.dumps({"__qualname__": "x"})):
        assert name_of(pickled) is None


@given(st.binary(max_size=200))
def test_bytes_of_strangers_do_no_harm(pickled: bytes) -> None:
    name = name_of(pickled)
    assert name is None or len(name) <= 80
