"""Failures: how an outcome that is no value crosses the wire, and how it becomes an exception again.

A failure is a plain list, `[kind, message, fields, exc, cause]`:

    kind      "raised": the task's own exception; else the name of a class in gcref.errors, or "CancelledError"
    message   text for people
    fields    map of plain values: the error's fields, or what is known of the exception
    exc       the exception as a blob; None: it cannot be rebuilt, or must not be
    cause     the failure that led to it, or None

    worker: exception ── from_exception ──▶ failure ──▶ agents pass it on ──▶ to_exception ── client: the exception

Agents make, pass on and nest failures, and never look into `exc`. What a worker sends is bounded: text is
cut, and an exception that is too large comes back with its text only. A task's exception comes back as
itself. One that is not an `Exception` (`SystemExit`, `KeyboardInterrupt`) would end the client, so it comes
back as a `TaskError`, and so does one whose class the client does not have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from gcref import errors, ids
from gcref.config import EXCEPTION_MAX_BYTES, EXCEPTION_TEXT_MAX
from gcref.errors import FOREIGN_ERRORS, GcrefError, ProtocolError, TaskError
from gcref.objects import blob, serialize

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

Failure = list[Any]

RAISED: Final = "raised"
CANCELLED: Final = "CancelledError"

# What fits on a few lines of a terminal; the whole text is in the exception.
_MESSAGE_MAX: Final = 1000
# Of a huge exception, what is kept of each of its arguments.
_ARGUMENT_MAX: Final = 4096
# A task may have 10 000 arguments; nobody reads that many ids, and failures ride inside messages.
_TASK_IDS_MAX: Final = 1000
# The innermost frames that are kept for debuggers.
_FRAMES_MAX: Final = 64
# Causes do not nest deeper than this, whoever sends them.
_CAUSES_MAX: Final = 8

_OUR_PACKAGES: Final = ("gcref.", "endpoint_worker.")


class RemoteTraceback(Exception):  # noqa: N818 - it is shown as a cause, and named as the stdlib names its own
    """The traceback of an exception, as text from where it was raised. It is the `__cause__` of that exception here."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""' if self.args else ""


def make(kind: str, message: str, cause: Failure | None = None, **fields: object) -> Failure:
    """Make a failure that is one of gcref's own errors.

    Args:
        kind: name of a class in `gcref.errors`, or `CancelledError`.
        message: what happened, to which id, and what to do next.
        cause: the failure that led to it.
        fields: the error's fields, in plain values; ids as text.
    """
    return [
        kind,
        _clean(message, _MESSAGE_MAX),
        {name: _plain(value) for name, value in fields.items()},
        None,
        cause,
    ]


def from_error(error: GcrefError) -> Failure:
    """Make the failure that says the same as one of gcref's own errors. Its `__cause__` stays behind."""
    kind = next(base.__name__ for base in type(error).__mro__ if getattr(errors, base.__name__, None) is base)
    fields = {name: _plain(value) for name, value in vars(error).items() if not name.startswith("_")}
    return [kind, _clean(str(error), _MESSAGE_MAX), fields, None, None]


def cancelled(message: str = "the task was cancelled") -> Failure:
    """Make the failure of a cancelled task."""
    return make(CANCELLED, message)


def dependency(task_ids: list[bytes], cause: Failure) -> Failure:
    """Make the failure of a task that never ran, because tasks that were to make its arguments failed.

    Args:
        task_ids: the ids of those arguments.
        cause: why one of them failed. What led to that is what is kept: chains of failures do not grow.
    """
    for _ in range(_CAUSES_MAX):
        if cause[0] != "DependencyError" or not cause[4]:
            break
        cause = cause[4]
    texts = [ids.text(id) for id in task_ids[:_TASK_IDS_MAX]]
    if len(task_ids) == 1:
        message = f"the task of an argument failed ({texts[0]}): {cause[1]}"
    else:
        message = f"the tasks of {len(task_ids)} arguments failed ({', '.join(texts[:8])}…): {cause[1]}"
    return make("DependencyError", message, cause, task_ids=texts)


def from_exception(
    exc: BaseException, *, task_id: bytes, endpoint: str | bytes, limit_bytes: int = EXCEPTION_MAX_BYTES
) -> Failure:
    """Make the failure of a task that raised an exception. Never raises, whatever the exception is made of.

    Args:
        exc: the exception.
        task_id: id of the task.
        endpoint: where it ran: a name for people, or an id.
        limit_bytes: a larger exception is cut down, or comes back as its text.
    """
    type_name = _type_name(type(exc))
    data = None
    try:
        text = _text_of(exc)
        tb = _user_part(exc.__traceback__)
        told, frames = _format(exc, tb), _frames(tb)
        data = _encode(exc, text, limit_bytes)
    except BaseException as found:  # noqa: BLE001 - all of it runs foreign code, which may even raise an interrupt
        text = f"<it cannot be looked at: {type(found).__name__}>"
        told, frames = f"{type_name}: {text}\n", []
    fields = {
        "type_name": type_name,
        "text": _clean(text, EXCEPTION_TEXT_MAX),
        "traceback": _clean(told, EXCEPTION_TEXT_MAX),
        "frames": frames,
        "task_id": ids.text(task_id),
        "endpoint": _clean(endpoint, _MESSAGE_MAX) if isinstance(endpoint, str) else ids.text(endpoint),
    }
    return [RAISED, _clean(f"{type_name}: {text}", _MESSAGE_MAX), fields, data, None]


def to_exception(failure: Any) -> BaseException:
    """Turn a failure into the exception that a future raises. Never raises, whatever was sent.

    A task's own exception has the remote traceback as its `__cause__` (below its own cause, if that could be
    kept) and a note that names task and endpoint.
    """
    return _to_exception(failure, _CAUSES_MAX)


def _to_exception(failure: Any, depth: int) -> BaseException:
    match failure:
        case [str(kind), str(message), dict(fields), bytes() | None as exc, list() | None as cause]:
            pass
        case _:
            return ProtocolError("a failure was reported in a form that nobody can read")
    if kind == RAISED:
        return _raised(message, fields, exc)
    error = _known(kind, message, fields)
    if cause is not None and depth:
        error.__cause__ = _to_exception(cause, depth - 1)
    return error


def _known(kind: str, message: str, fields: dict[Any, Any]) -> BaseException:
    if kind == CANCELLED:
        from concurrent.futures import CancelledError

        return CancelledError(message)
    cls = getattr(errors, kind, None)
    if not (isinstance(cls, type) and issubclass(cls, GcrefError)):
        # A newer gcref may have more kinds.
        return GcrefError(f"{kind}: {message}")
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields.items()
        if isinstance(name, str) and not name.startswith("_") and not hasattr(BaseException, name)
    }
    try:
        return cls(message, **given)
    except (TypeError, ValueError):
        return cls(message)


def _raised(message: str, fields: dict[Any, Any], exc: bytes | None) -> BaseException:
    def field(name: str) -> str:
        value = fields.get(name)
        return value if isinstance(value, str) else ""

    trouble = None
    rebuilt: Any = None
    if exc is not None:
        try:
            rebuilt = serialize.loads(exc)
        except FOREIGN_ERRORS as found:  # foreign code; the text of the exception is there all the same
            trouble = _text_of(found)
    error: BaseException
    if isinstance(rebuilt, Exception):
        error = rebuilt
    else:
        error = TaskError(
            message,
            type_name=field("type_name"),
            text=field("text"),
            traceback=field("traceback"),
            task_id=field("task_id") or None,
        )
    _add_note(error, f"raised by task {field('task_id')} at endpoint {field('endpoint')}")
    if trouble is not None:
        _add_note(error, f"(the exception itself could not be rebuilt here: {trouble})")
    error.__traceback__ = _build_traceback(fields.get("frames"))
    _add_root_cause(error, RemoteTraceback(field("traceback")))
    return error


def _add_root_cause(error: BaseException, cause: BaseException) -> None:
    seen = set()
    while error.__cause__ is not None and id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__
    error.__cause__ = cause


def _add_note(error: BaseException, note: str) -> None:
    try:
        error.add_note(note)
    except FOREIGN_ERRORS:  # `__notes__` may be anything: it came with the exception
        error.__notes__ = [note]


# The exception as bytes


def _encode(exc: BaseException, text: str, limit_bytes: int) -> bytes | None:
    """Turn an exception into a blob from which it can be rebuilt with the same text; None if that is not to be."""
    if not isinstance(exc, Exception):
        return None
    too_large = False
    for form in _forms(exc):
        try:
            encoded = serialize.dumps(form)
            if encoded.size > limit_bytes:
                too_large = True
                break
            data = blob.join(encoded)
            # Rebuilding runs the `__init__` of the user's class, with arguments that it may not want.
            if _is_same(serialize.loads(data), exc, text):
                return data
        except FOREIGN_ERRORS:  # pickling and unpickling run foreign code; another form may do
            continue
    return _encode_shortened(exc, limit_bytes) if too_large else None


def _encode_shortened(exc: Exception, limit_bytes: int) -> bytes | None:
    args = tuple(_clean(arg, _ARGUMENT_MAX) if isinstance(arg, str) else arg for arg in exc.args)
    try:
        encoded = serialize.dumps(_Bare(exc, args, {}))
        if encoded.size > limit_bytes:
            return None
        data = blob.join(encoded)
        return data if _is_same(serialize.loads(data), exc, None) else None
    except FOREIGN_ERRORS:  # as above; its text comes back all the same
        return None


def _forms(exc: Exception) -> Iterator[object]:
    """Give the exception in forms that lose more and more."""
    yield exc
    if isinstance(exc, ExceptionGroup):
        yield _without_unpicklable(exc)
    else:
        yield _Bare(exc, exc.args, {k: v for k, v in vars(exc).items() if _can_be_sent(v)})


class _Bare:
    """Stands for an exception in a pickle, and comes back as that exception, without a call of its `__init__`."""

    def __init__(self, exc: Exception, args: tuple[Any, ...], state: dict[str, Any]) -> None:
        self._parts = (type(exc), args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild_bare, self._parts


def rebuild_bare(cls: type[Exception], args: tuple[Any, ...], state: dict[str, Any]) -> Exception:
    """Make an exception without its `__init__`. Pickles name this function; nobody else calls it."""
    exc = cls.__new__(cls, *args)
    exc.args = args
    exc.__dict__.update(state)
    return exc


def _without_unpicklable(group: ExceptionGroup[Exception]) -> ExceptionGroup[Exception]:
    members: list[Exception] = []
    for member in group.exceptions:
        if _can_be_sent(member):
            members.append(member)
        elif isinstance(member, ExceptionGroup):
            members.append(_without_unpicklable(member))
        else:
            text = _text_of(member)
            name = _type_name(type(member))
            members.append(TaskError(f"{name}: {text}", type_name=name, text=text))
    return group.derive(members)


def _can_be_sent(value: object) -> bool:
    try:
        serialize.loads(blob.join(serialize.dumps(value)))
    except FOREIGN_ERRORS:  # foreign code; that it raises is the answer
        return False
    return True


def _is_same(found: object, exc: Exception, text: str | None) -> bool:
    return _type_name(type(found)) == _type_name(type(exc)) and (text is None or _text_of(found) == text)


# Texts and tracebacks


def _type_name(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _text_of(exc: object) -> str:
    try:
        return str(exc)
    except FOREIGN_ERRORS as error:  # `__str__` is foreign code
        return f"<its text cannot be had: {type(error).__name__}>"


def _clean(text: str, limit: int) -> str:
    """Cut a text in its middle, and make it fit for the wire, which takes no lone surrogates."""
    if len(text) > limit:
        head, tail = limit // 3, limit - limit // 3
        text = f"{text[:head]}… [{len(text) - limit} characters left out] …{text[-tail:]}"
    return text.encode("utf-8", "backslashreplace").decode()


def _plain(value: object) -> Any:
    if isinstance(value, str):
        # Also what is a `str` by inheritance only, such as a LostReason.
        return _clean(value[:], EXCEPTION_TEXT_MAX)
    if value is None or isinstance(value, (bool, int, float, bytes)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return _clean(str(value), EXCEPTION_TEXT_MAX)


def _user_part(tb: TracebackType | None) -> TracebackType | None:
    """Leave out the outer frames that are gcref's own, if others follow."""
    inner = tb
    while inner is not None and str(inner.tb_frame.f_globals.get("__name__")).startswith(_OUR_PACKAGES):
        inner = inner.tb_next
    return inner or tb


def _format(exc: BaseException, tb: TracebackType | None) -> str:
    import traceback

    try:
        return "".join(traceback.format_exception(type(exc), exc, tb))
    except FOREIGN_ERRORS as error:  # formatting runs foreign code
        return f"{_type_name(type(exc))}: <its traceback cannot be formatted: {type(error).__name__}>\n"


def _frames(tb: TracebackType | None) -> list[list[Any]]:
    """Give file, function and line of the innermost frames."""
    frames: list[list[Any]] = []
    while tb is not None:
        code = tb.tb_frame.f_code
        frames.append(
            [_clean(code.co_filename, _MESSAGE_MAX), _clean(code.co_name, _MESSAGE_MAX), tb.tb_lineno]
        )
        tb = tb.tb_next
    return frames[-_FRAMES_MAX:]


def _build_traceback(frames: Any) -> TracebackType | None:
    """Build a traceback that a debugger can walk, where tblib is installed."""
    if not isinstance(frames, list) or not frames or len(frames) > _FRAMES_MAX:
        return None
    try:
        from tblib import Traceback
    except ImportError:
        return None
    chain: dict[str, Any] | None = None
    try:
        for file, name, line in reversed(frames):
            frame = {
                "f_globals": {"__file__": file, "__name__": "?"},
                "f_locals": {},
                "f_code": {"co_filename": file, "co_name": name},
                "f_lineno": line,
            }
            chain = {"tb_frame": frame, "tb_lineno": line, "tb_next": chain}
        # Its frames are real ones, and keep all frames that they were made under, with everything in them: in a generator
        # these end with the generator's own.
        apart = (Traceback.from_dict(one).as_traceback() for one in (chain,))
        built: TracebackType | None = next(apart)
        apart.close()
    except FOREIGN_ERRORS:  # frames come from outside, and are only a help
        return None
    return built
