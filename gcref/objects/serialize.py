"""Values to blobs and back, calls too.

    value ── pickle 5, buffers out of band ──▶ stream + buffers ── blob.encode ──▶ Encoded (nothing copied yet)
    blob ── read-only views ──▶ pickle.loads ──▶ value; its arrays point into the blob

Rules:
- `pickle.dumps` first, which is enough for most values; whether it was, shows in its stream. Else
`gcref.objects.pickling`.
- Containers are never walked: futures and references report themselves (`gcref.objects.notes`).
- Bytes are copied once, into their target. Arrays go out of band, large `bytes` into the stream by reference.
- An array that was received is read-only, also where pickle had to copy it, so that nobody comes to rely on
chance.
- What user code raises while it is pickled or unpickled becomes a `SerializationError` that names the
argument or the module.
- Unpickling is for the worker that runs a task and for the client that reads a value, never for an agent.

This is the front of the room: functions and shipped modules are reached from here too.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gcref.errors import FOREIGN_ERRORS, GcrefError, ProtocolError, SerializationError
from gcref.objects import blob
from gcref.objects.blob import HEADER_BYTES, PLAIN_HEADER, Encoded
from gcref.objects.functions import FunctionCache, load_function
from gcref.objects.notes import CLOSED, IN_CALL, IN_FUNCTION, IN_VALUE, Notes, here
from gcref.objects.pickling import (
    COPIED_ARRAY,
    LARGE_BYTES,
    cannot_pickle,
    cannot_unpickle,
    names_what_lives_only_here,
    pickle_with_care,
    ship_modules,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gcref.objects.ref import ObjectRef

__all__ = [
    "Call",
    "FunctionCache",
    "dumps",
    "dumps_call",
    "load_dependency",
    "load_function",
    "loads",
    "loads_call",
    "note_dependency",
    "ship_modules",
]

# The opcode behind every name in a stream. One byte is looked for much faster than a word.
_STACK_GLOBAL: Final = 0x93
# Small blobs are cheaper to join at once, and to cut than to view.
_CUT_MAX_BYTES: Final = 4096

# Bound once: these stand on the hot path.
_dumps: Final = pickle.dumps
_loads: Final = pickle.loads
_tuple: Final = tuple.__new__


class Call(NamedTuple):
    """The arguments of a call as a blob.

    Attributes:
        encoded: the blob, for `loads_call`.
        deps: the futures in it, each once, in the order of their indices.
        passed: the references in it, each once.
    """

    encoded: Encoded
    deps: Sequence[Any]
    passed: Sequence[Any]


def dumps(value: Any) -> Encoded:
    """Turn a value into a blob. Futures and references inside become references, and are noted in the blob's head.

    Raises:
        SerializationError: the value, or something inside it, cannot be pickled.
    """
    if value is None:
        return _NONE
    notes = here.notes
    if notes.kind or (type(value) is bytes and len(value) >= LARGE_BYTES):
        return _dumps_with_care(value, True)
    notes.kind = IN_VALUE
    try:
        stream = _dumps(value, 5, buffer_callback=notes.keep)
    except BaseException as error:
        notes.kind = CLOSED
        notes.clear()
        if not isinstance(error, FOREIGN_ERRORS):
            raise
        return _dumps_with_care(value, False)
    notes.kind = CLOSED
    if _STACK_GLOBAL not in stream and not notes.met and not notes.buffers:
        parts = (PLAIN_HEADER + stream,) if len(stream) <= _CUT_MAX_BYTES else (PLAIN_HEADER, stream)
        return _tuple(Encoded, (parts, HEADER_BYTES + len(stream), b"", ()))
    by_value = names_what_lives_only_here((stream,))
    if by_value or COPIED_ARRAY in stream:
        notes.clear()
        return _dumps_with_care(value, not by_value)
    return _take_value(notes, (stream,))


def dumps_call(fn: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Turn the arguments of a call into a blob. Futures inside become dependencies, references stay references.

    Args:
        fn: the function, if it travels inside the blob; None: it is known by its digest.
        args: the positional arguments.
        kwargs: the arguments by keyword.

    Raises:
        SerializationError: an argument cannot be pickled. It says which one, counted from 1, or by keyword.
    """
    if fn is None:
        if not args and not kwargs:
            return _NO_ARGUMENTS
        body: tuple[Any, ...] = (args, kwargs)
    else:
        body = (fn, args, kwargs)
    notes = here.notes
    if notes.kind:
        return _dumps_call_with_care(body, True)
    for arg in args:
        if type(arg) is bytes and len(arg) >= LARGE_BYTES:
            return _dumps_call_with_care(body, True)
    notes.kind = IN_CALL
    try:
        stream = _dumps(body, 5, buffer_callback=notes.keep)
    except BaseException as error:
        notes.kind = CLOSED
        notes.clear()
        if not isinstance(error, FOREIGN_ERRORS):
            raise
        return _dumps_call_with_care(body, False)
    notes.kind = CLOSED
    # What has no name in it is all plain data: no future, no reference, nothing that lives only here.
    if _STACK_GLOBAL not in stream and not notes.met and not notes.buffers:
        parts = (PLAIN_HEADER + stream,) if len(stream) <= _CUT_MAX_BYTES else (PLAIN_HEADER, stream)
        encoded = _tuple(Encoded, (parts, HEADER_BYTES + len(stream), b"", ()))
        return _tuple(Call, (encoded, (), ()))
    by_value = names_what_lives_only_here((stream,))
    if by_value or COPIED_ARRAY in stream:
        notes.clear()
        return _dumps_call_with_care(body, not by_value)
    return _take_call(notes, (stream,))


def loads(buffer: bytes | bytearray | memoryview, keeper: object = None) -> Any:
    """Turn a blob into its value. Arrays in it are read-only views of the buffer, and keep it alive.

    Args:
        buffer: the blob.
        keeper: what the references in the value are to keep alive.

    Raises:
        SerializationError: the value cannot be rebuilt here; `.module` says what is missing, if something is.
        ProtocolError: this is no blob, or a damaged one.
    """
    notes = here.notes
    outer, notes.keeper = notes.keeper, keeper
    try:
        return _unpickle(buffer)
    except GcrefError:
        raise
    except FOREIGN_ERRORS as error:
        raise cannot_unpickle("the value", error) from error
    finally:
        notes.keeper = outer


def loads_call(
    buffer: bytes | bytearray | memoryview, resolve: Callable[[int], Any]
) -> tuple[Callable[..., Any] | None, tuple[Any, ...], dict[str, Any]]:
    """Turn a blob of `dumps_call` into function, arguments and keywords.

    Args:
        buffer: the blob.
        resolve: gives the value of the dependency with an index. What it raises goes through as it is.

    Raises:
        SerializationError: an argument cannot be rebuilt here; `.module` says what is missing, if any is.
        ProtocolError: this is no blob of a call, or a damaged one.
    """
    notes = here.notes
    outer = notes.resolve
    notes.resolve = resolve
    try:
        body = _unpickle(buffer)
    except GcrefError:
        raise
    except FOREIGN_ERRORS as error:
        if error is notes.trouble:
            raise
        raise cannot_unpickle("an argument", error) from error
    finally:
        notes.resolve = outer
        notes.trouble = None
    if type(body) is tuple:
        if len(body) == 2:
            return None, body[0], body[1]
        if len(body) == 3:
            return body
    raise ProtocolError("a blob that was to hold the arguments of a call holds something else")


def note_dependency(holder: Any, id: bytes | None = None) -> tuple[Any, ...]:
    """Give what a future's `__reduce_ex__` is to return: for whoever pickles in this thread, or nobody.

    Args:
        holder: the future. Its `ref()` gives its `ObjectRef`.
        id: its id, 16 bytes; None: ask `holder.ref()`, which costs a token.

    Raises:
        TypeError: nobody who knows about futures is pickling.
    """
    notes = here.notes
    if notes.kind == IN_CALL:
        return load_dependency, (notes.add_dependency(id or holder.ref()._id, holder),)
    if notes.kind == IN_VALUE:
        ref: ObjectRef = holder.ref()
        return ref.__reduce__()
    if notes.kind == IN_FUNCTION:
        notes.stop()
    raise TypeError(
        f"a {type(holder).__name__} cannot be pickled by itself. Pass it to submit() as an argument, or inside one: the "
        "function then gets its value. To store it or send it elsewhere, take its reference: gcref.ref(future)"
    )


def load_dependency(index: int) -> Any:
    """Give the value of a dependency. Streams of `dumps_call` name this function; nobody else calls it."""
    notes = here.notes
    if notes.resolve is None:
        raise ProtocolError("the arguments of a call were read as a value")
    try:
        return notes.resolve(index)
    except BaseException as error:
        notes.trouble = error
        raise


def _dumps_with_care(value: Any, plain_first: bool) -> Encoded:
    notes = here.notes
    held = notes.put_aside()
    try:
        return _take_value(notes, pickle_with_care(value, IN_VALUE, plain_first))
    except FOREIGN_ERRORS as error:
        raise cannot_pickle("the value", None, value, error) from error
    finally:
        notes.bring_back(held)


def _dumps_call_with_care(body: tuple[Any, ...], plain_first: bool) -> Call:
    notes = here.notes
    held = notes.put_aside()
    try:
        return _take_call(notes, pickle_with_care(body, IN_CALL, plain_first))
    except FOREIGN_ERRORS as error:
        raise _name_argument(body, error) from error
    finally:
        notes.bring_back(held)


def _take_value(notes: Notes, stream: Sequence[bytes]) -> Encoded:
    named = list(notes.refs.values())
    buffers = [buffer.raw() for buffer in notes.buffers]
    notes.clear()
    return blob.encode(stream, buffers, named)


def _take_call(notes: Notes, stream: Sequence[bytes]) -> Call:
    deps = [holder for _, holder in notes.deps.values()]
    passed = list(notes.refs.values())
    buffers = [buffer.raw() for buffer in notes.buffers]
    notes.clear()
    return Call(blob.encode(stream, buffers), deps, passed)


def _unpickle(buffer: bytes | bytearray | memoryview) -> Any:
    if type(buffer) is bytes and len(buffer) <= _CUT_MAX_BYTES and buffer[:HEADER_BYTES] == PLAIN_HEADER:
        return _loads(buffer[HEADER_BYTES:])
    view = memoryview(buffer).toreadonly()
    _, (start, end), spans = blob.layout(view)
    return _loads(view[start:end], buffers=[view[start:end] for start, end in spans])


def _name_argument(body: tuple[Any, ...], error: BaseException) -> SerializationError:
    """Find out which argument of a call cannot be pickled, by pickling each one alone."""
    *fn, args, kwargs = body
    candidates = [("the function", item) for item in fn]
    candidates += [(f"argument {number}", item) for number, item in enumerate(args, 1)]
    candidates += [(f"keyword {name!r}", item) for name, item in kwargs.items()]
    for name, item in candidates:
        here.notes.clear()
        try:
            pickle_with_care(item, IN_CALL)
        except FOREIGN_ERRORS as found:
            return cannot_pickle(name, name, item, found)
    return SerializationError(f"the arguments cannot be pickled: {type(error).__name__}: {error}")


def _constant(value: object) -> Encoded:
    data = PLAIN_HEADER + _dumps(value, 5)
    return Encoded((data,), len(data), b"")


_NONE: Final = _constant(None)
_NO_ARGUMENTS: Final = Call(_constant(((), {})), (), ())
