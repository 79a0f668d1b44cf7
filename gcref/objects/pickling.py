"""Pickling by whatever it takes, and telling what went wrong.

    body ── plain pickle ──▶ stream ── names nothing that lives only here ──▶ done
              │ fails           │ does
              └──────── cloudpickle: functions and classes by value ────────▶ done, or an error

What lives only here: `__main__`, and the modules that the user ships. Whatever is pickled by name has the
name of its module in the stream, so looking for these names there is enough; a text that happens to contain
one costs time, nothing else.

The picklers of this module take more care than `pickle.dumps`: large `bytes` are not copied into the stream,
and arrays come back read-only whatever their layout. (Of subclasses of `numpy.ndarray`, numpy makes writable
copies.)
"""

from __future__ import annotations

import copyreg
import importlib
import pickle
import re
import sys
from collections import ChainMap
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from gcref.errors import FOREIGN_ERRORS, SerializationError
from gcref.objects.notes import CLOSED, IN_CALL, here

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

# From this size on, pickle can write a `bytes` by reference.
LARGE_BYTES: Final = 64 * 1024
# pickle names this function for arrays that it copies into the stream.
COPIED_ARRAY: Final = b"_reconstruct"

_MISSING_NAME: Final = re.compile(r"Can't get attribute .* on <module '([^']+)'")

# Names in a stream that mean nothing elsewhere. Replaced as a whole, never changed: another tuple tells that
# there are more.
_only_here: tuple[bytes, ...] = (b"__main__",)


def ship_modules(modules: Iterable[str | ModuleType]) -> None:
    """Send functions and classes of these modules along by value, from now on and in this whole process.

    For modules that the endpoints do not have: the user's own, beside the script. Submodules are included.

    Args:
        modules: modules, or their names.

    Raises:
        SerializationError: there is no such module.
    """
    global _only_here
    for named in modules:
        try:
            module = named if isinstance(named, ModuleType) else importlib.import_module(named)
        except ImportError as error:
            text = f"ship_modules names {named!r}, which cannot be imported: {error}"
            raise SerializationError(text, module=str(named)) from error
        _cloudpickle().register_pickle_by_value(module)
        mark = module.__name__.encode()
        if mark not in _only_here:
            _only_here = (*_only_here, mark)


def only_here() -> tuple[bytes, ...]:
    """Give the names that ask for pickling by value. It is another object as soon as there are more of them."""
    return _only_here


def names_what_lives_only_here(pieces: Sequence[bytes]) -> bool:
    """Tell whether a stream names something that has to be pickled by value."""
    previous = b""
    for piece in pieces:
        size = len(piece).to_bytes(8, "little")
        # What follows its own length is a large value of the user's, not worth the reading.
        if len(piece) < LARGE_BYTES or not previous.endswith((size, size[:4])):
            for name in _only_here:
                if name in piece:
                    return True
        previous = piece
    return False


def pickle_with_care(body: Any, kind: int, plain_first: bool = True) -> Sequence[bytes]:
    """Pickle by whatever it takes, into the notes of this thread, which must be empty.

    Args:
        body: the value.
        kind: what it is, for the notes.
        plain_first: plain pickle may do; else cloudpickle at once.

    Returns:
        The stream, in pieces; large ones may be the user's own bytes.

    Raises:
        BaseException: whatever foreign code raises.
    """
    if plain_first:
        try:
            pieces = _pickle_by(_plain_pickler(), body, kind)
        except FOREIGN_ERRORS:  # cloudpickle runs the same foreign code again, and has the last word
            pieces = None
        if pieces is not None and not names_what_lives_only_here(pieces):
            return pieces
        here.notes.clear()
    return _pickle_by(_cloud_pickler(), body, kind)


class _Pieces(list[bytes]):
    """A stream to be, as the file that a pickler writes to. Large `bytes` are taken as they are."""

    __slots__ = ()
    write = list.append


def _pickle_by(make_pickler: Callable[..., Any], body: Any, kind: int) -> Sequence[bytes]:
    notes = here.notes
    pieces = _Pieces()
    if not _array_reducer and "numpy" in sys.modules:
        array = getattr(sys.modules["numpy"], "ndarray", None)  # None while numpy is still being imported
        if array is not None:
            _array_reducer[array] = _reduce_array
    notes.kind = kind
    try:
        make_pickler(pieces, 5, buffer_callback=notes.keep).dump(body)
    finally:
        notes.kind = CLOSED
    return pieces


# Filled once numpy is there; the picklers look into it through their tables.
_array_reducer: dict[type, Callable[[Any], Any]] = {}


@cache
def _plain_pickler() -> Callable[..., Any]:
    table = ChainMap(_array_reducer, copyreg.dispatch_table)
    return type("_PlainPickler", (pickle.Pickler,), {"dispatch_table": table})


@cache
def _cloud_pickler() -> Any:
    base = _cloudpickle().Pickler
    return type("_CloudPickler", (base,), {"dispatch_table": ChainMap(_array_reducer, base.dispatch_table)})


@cache
def _cloudpickle() -> Any:
    # Imported when it is needed: that takes longer than all of this room.
    import cloudpickle

    return cloudpickle


def _reduce_array(array: Any) -> Any:
    flags = array.flags
    if not (flags.c_contiguous or flags.f_contiguous or array.dtype.hasobject):
        # A slice is packed, and then goes out of band like any other array.
        array = array.copy(order="C")
    reduced = array.__reduce_ex__(5)
    if len(reduced) == 3:
        # numpy has no buffer to give (objects, dates): what sets up the copy closes it as well.
        return (*reduced, None, None, restore_read_only)
    return reduced


def restore_read_only(array: Any, state: Any) -> None:
    """Set up an array that was copied into a stream. Streams name this function; nobody else calls it."""
    array.__setstate__(state)
    array.flags.writeable = False


def cannot_pickle(what: str, argument: str | None, value: Any, error: BaseException) -> SerializationError:
    """Make the error for a value that cannot be pickled.

    Args:
        what: the value's part in it, for the message.
        argument: the same, for programs; None: it is no argument.
        value: the value.
        error: what pickling it raised.
    """
    kind = type(value)
    foreign = _foreign_future(value)
    if foreign is None:
        text = f"{what}, a {_name_of(kind)}, cannot be pickled: {type(error).__name__}: {error}"
    else:
        text = (
            f"{what} is or contains a {foreign}, which is no future of gcref and means nothing at an endpoint: "
            "wait for it and pass its result(), or make it with submit() of a gcref.Executor"
        )
    return SerializationError(text, argument=argument, module=kind.__module__)


def cannot_unpickle(what: str, error: BaseException) -> SerializationError:
    """Make the error for something that cannot be unpickled.

    Args:
        what: its part in it, for the message.
        error: what unpickling it raised.
    """
    module = None
    if isinstance(error, ImportError):
        module = error.name
    elif isinstance(error, AttributeError):
        found = _MISSING_NAME.search(str(error))
        module = found and found.group(1)
    if module is None:
        return SerializationError(f"{what} cannot be unpickled: {type(error).__name__}: {error}")
    top = module.partition(".")[0]
    return SerializationError(
        f"{what} cannot be unpickled, because it needs the module {module!r}, which is missing here or is not "
        f"the same: {error}. Install it here, or send it along with Executor(..., ship_modules=[{top!r}])",
        module=module,
    )


_PLAIN_REDUCE: Final[Any] = object.__reduce_ex__


class _ForeignFutureError(Exception):
    pass


def _foreign_future(value: Any) -> str | None:
    """Give the name of the type of the first future in a value that is not ours, or None."""
    known = (("concurrent.futures", "Future"), ("asyncio", "Future"))
    futures = tuple(getattr(sys.modules[module], name) for module, name in known if module in sys.modules)
    base = _cloud_pickler()

    def look(pickler: Any, found: Any) -> Any:
        # Ours say themselves how they are pickled.
        if isinstance(found, futures) and type(found).__reduce_ex__ is _PLAIN_REDUCE:
            raise _ForeignFutureError(_name_of(type(found)))
        return base.reducer_override(pickler, found)

    here.notes.clear()
    try:
        _pickle_by(type("_Detective", (base,), {"reducer_override": look}), value, IN_CALL)
    except _ForeignFutureError as found:
        return str(found)
    except FOREIGN_ERRORS:  # that it fails is known; the question was only why
        return None
    return None


def _name_of(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
