"""Functions as bytes: made once for each function, named by their digest, sent once to each endpoint.

    get(fn) ─▶ known, and what it uses is what it was ─▶ (digest, bytes)
             ─▶ new ─▶ pickled by itself ─▶ (digest, bytes), kept as long as the function lives
                         └─▶ meets a future or an array, or is large ─▶ None: it travels inside the arguments

A function that is pickled by name can be kept as it is. One that is pickled by value takes along what it
uses: globals, the contents of its closure, and the same of the functions among these. Its bytes are right
only as long as those names mean the same, so the cache writes down what they meant, and looks again each
time. It compares identities: a list that was changed inside is not noticed. Like the default of an argument,
it was taken when the function was first submitted.

Arrays send a function into the arguments, because there each call gets its own, read-only; a function is
unpickled once in a worker, and its array would be shared by all calls.
"""

from __future__ import annotations

import builtins
import pickle
import weakref
from hashlib import blake2b
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gcref.config import INLINE_MAX_BYTES
from gcref.errors import FOREIGN_ERRORS, GcrefError, SerializationError
from gcref.objects.notes import IN_FUNCTION, here
from gcref.objects.pickling import (
    cannot_pickle,
    cannot_unpickle,
    names_what_lives_only_here,
    only_here,
    pickle_with_care,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DIGEST_BYTES: Final = 16

_ABSENT: Final = object()


class FunctionCache:
    """Functions as bytes. Any thread may use it; two that ask for a new function at once both do the work."""

    def __init__(self) -> None:
        # By identity: a class may have a metaclass that compares as it likes.
        self._known: dict[int, _Known] = {}

    def get(self, fn: Callable[..., Any]) -> tuple[bytes, bytes] | None:
        """Give a function's digest (16 bytes) and its bytes, for `load_function`.

        Returns:
            None if it is to travel inside the arguments: it contains a future, a reference or an array, or is
            larger than `INLINE_MAX_BYTES`, or is some other callable, whose state may change from call to
            call.

        Raises:
            SerializationError: it cannot be pickled.
        """
        known = self._known.get(id(fn))
        if known is not None and known.fn() is fn and known.only_here is only_here():
            for uses in known.uses:
                if not uses.are_unchanged():
                    break
            else:
                return known.result
        if not _is_constant(fn):
            return None
        return self._make(fn)

    def _make(self, fn: Callable[..., Any]) -> tuple[bytes, bytes] | None:
        shipped = only_here()
        pickled, by_value = _pickle_function(fn)
        result = None if pickled is None else (blake2b(pickled, digest_size=DIGEST_BYTES).digest(), pickled)
        # What travels inside the arguments is right whatever becomes of its names.
        uses = list(_uses(fn)) if by_value and result is not None and isinstance(fn, FunctionType) else []
        key = id(fn)
        self._known[key] = _Known(weakref.ref(fn, lambda ref: self._forget(key, ref)), result, uses, shipped)
        return result

    def _forget(self, key: int, ref: weakref.ref[Any]) -> None:
        known = self._known.get(key)
        # Another function may have the same identity by now.
        if known is not None and known.fn is ref:
            del self._known[key]


def load_function(pickled: bytes | bytearray | memoryview) -> Callable[..., Any]:
    """Turn a function's bytes into the function.

    Raises:
        SerializationError: it cannot be rebuilt here; `.module` says what is missing, if something is.
    """
    try:
        fn = pickle.loads(pickled)
    except GcrefError:
        raise
    except FOREIGN_ERRORS as error:
        raise cannot_unpickle("the function", error) from error
    if not callable(fn):
        raise SerializationError(f"the function is no function, but a {type(fn).__qualname__}")
    found: Callable[..., Any] = fn
    return found


class _Known(NamedTuple):
    fn: weakref.ref[Any]
    result: tuple[bytes, bytes] | None
    uses: list[_Uses]
    only_here: tuple[bytes, ...]


class _Uses:
    """What one function uses, and what that meant.

    Held weakly where that is possible, the function too: its own name, in its globals or its closure, leads
    back to it.
    """

    __slots__ = ("_cells", "_fn", "_globals")

    def __init__(self, fn: FunctionType) -> None:
        self._fn = weakref.ref(fn)
        # Names of attributes are among these. They cost a look each time, and do no harm.
        names = [name for name in _names(fn.__code__) if not hasattr(builtins, name)]
        self._globals = [(name, _hold(fn.__globals__.get(name, _ABSENT))) for name in names]
        self._cells = [_hold(_contents(cell)) for cell in fn.__closure__ or ()]

    def are_unchanged(self) -> bool:
        fn = self._fn()
        if fn is None:
            return False
        look = fn.__globals__.get
        for name, held in self._globals:
            if look(name, _ABSENT) is not held():
                return False
        if self._cells:
            for cell, held in zip(fn.__closure__ or (), self._cells, strict=True):
                if _contents(cell) is not held():
                    return False
        return True

    def functions(self) -> Iterator[FunctionType]:
        """Give the functions among what is used."""
        for held in [*(held for _, held in self._globals), *self._cells]:
            value = held()
            if isinstance(value, FunctionType):
                yield value


def _is_constant(fn: Callable[..., Any]) -> bool:
    """Tell whether the bytes of a callable can stand for all calls of it."""
    if isinstance(fn, BuiltinFunctionType):
        # Methods of built-in types look the same, and carry the object that they belong to.
        return fn.__self__ is None or isinstance(fn.__self__, (ModuleType, type))
    return isinstance(fn, (FunctionType, type))


def _pickle_function(fn: Callable[..., Any]) -> tuple[bytes | None, bool]:
    """Pickle a function by itself.

    Returns:
        Its bytes, or None if it is to travel inside the arguments; whether it was pickled by value.
    """
    notes = here.notes
    held = notes.put_aside()
    try:
        by_value = False
        try:
            pickled = pickle.dumps(fn, 5)
        except FOREIGN_ERRORS:  # cloudpickle has the last word
            pickled = b""
        if not pickled or names_what_lives_only_here((pickled,)):
            by_value = True
            pickled = b"".join(pickle_with_care(fn, IN_FUNCTION, plain_first=False))
        if notes.met or notes.buffers or len(pickled) > INLINE_MAX_BYTES:
            return None, by_value
        return pickled, by_value
    except FOREIGN_ERRORS as error:
        # Whoever meets a future raises, and may be asked in vain to let that through.
        if notes.met:
            return None, True
        raise cannot_pickle("the function", "the function", fn, error) from error
    finally:
        notes.bring_back(held)


def _uses(fn: FunctionType) -> Iterator[_Uses]:
    """Give what a function uses, and what those functions of its own module use that it uses."""
    seen = {fn}
    todo = [fn]
    while todo:
        uses = _Uses(todo.pop())
        yield uses
        for found in uses.functions():
            if found.__globals__ is fn.__globals__ and found not in seen:
                seen.add(found)
                todo.append(found)


def _hold(value: object) -> Callable[[], object]:
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _contents(cell: Any) -> object:
    try:
        found: object = cell.cell_contents
    except ValueError:  # a cell that is still empty
        found = _ABSENT
    return found
