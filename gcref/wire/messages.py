"""The kinds of messages, their shapes, and the check of a received one.

A message is a list; its first element is the kind. What each element means is said in README.md beside this
file. Sessions check every message they take (`check`), so that the brains behind them may rely on arity, types
and bounds of whatever they are handed; what a message is *allowed* to do is for those brains to judge.

Rules:
    - Unknown trailing fields are ignored, missing ones refused, at the top and inside items.
    - An id is 16 bytes, a reference 48 (id, home, token), several are their concatenation.
    - A check costs a fraction of a microsecond per task: it looks at types, never at the content of payloads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NoReturn

from gcref.errors import RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

# Kinds of messages inside sessions.
SUBMIT: Final = 1
FUNCTION: Final = 2
NEED_FUNCTION: Final = 3
STARTED: Final = 4
OUTCOME: Final = 5
SUBSCRIBE: Final = 6
UNSUBSCRIBE: Final = 7
FORGET: Final = 8
CANCEL: Final = 9
CANCELLED: Final = 10
ATTACH: Final = 11
TASKS: Final = 12
OFFER: Final = 13
EXPLAIN: Final = 14
EXPLAINED: Final = 15
STATUS: Final = 16
STATUS_IS: Final = 17
PINS: Final = 18
TRY: Final = 19
TRIED: Final = 20
# Kinds on the bulk socket, outside the order.
FETCH: Final = 32
CHUNK: Final = 33
BULK_HELLO: Final = 34

NAMES: Final = {
    number: name
    for name, number in (
        ("SUBMIT", SUBMIT), ("FUNCTION", FUNCTION), ("NEED_FUNCTION", NEED_FUNCTION), ("STARTED", STARTED),
        ("OUTCOME", OUTCOME), ("SUBSCRIBE", SUBSCRIBE), ("UNSUBSCRIBE", UNSUBSCRIBE), ("FORGET", FORGET),
        ("CANCEL", CANCEL), ("CANCELLED", CANCELLED), ("ATTACH", ATTACH), ("TASKS", TASKS), ("OFFER", OFFER),
        ("EXPLAIN", EXPLAIN), ("EXPLAINED", EXPLAINED), ("STATUS", STATUS), ("STATUS_IS", STATUS_IS),
        ("PINS", PINS), ("TRY", TRY), ("TRIED", TRIED),
        ("FETCH", FETCH), ("CHUNK", CHUNK), ("BULK_HELLO", BULK_HELLO),
    )
}  # fmt: skip
"""Kind → name, for logs and errors."""

# Statuses in the items of an OUTCOME.
OK: Final = 0
STORED: Final = 1
FAILED: Final = 2
CANCELLED_STATUS: Final = 3
LOST: Final = 4
ALIAS: Final = 5
PENDING: Final = 6

# Modes of a FETCH.
MODE_BYTES: Final = 0
MODE_PATH: Final = 1
MODE_INTO: Final = 2

# Why a FETCH is answered without bytes: the first element of a CHUNK's error, beside a text.
NO_SUCH_OBJECT: Final = 1
MAY_NOT: Final = 2
SOURCE_FAILED: Final = 3
WAY_CLOSED: Final = 4

ECHO_ID: Final = bytes(16)
"""An object that everybody has: zero bytes, as many as are asked for. It measures a link."""

ECHO_MAX_BYTES: Final = 1 << 30
"""Its end."""

ECHO_RANGE_MAX_BYTES: Final = 1 << 20
"""The longest range of it."""

ID_BYTES: Final = 16
DIGEST_BYTES: Final = 16
TOKEN_BYTES: Final = 16
REF_BYTES: Final = 48
SECRET_BYTES: Final = 32
RECORD_FIELDS: Final = 8

MAX_TEXT: Final = 64 * 1024
"""Characters of one text of a failure, a record or a path."""

_SIZE_MAX: Final = 1 << 62


def check(message: Any) -> int:
    """Check the shape of a received message.

    Returns:
        Its kind.

    Raises:
        RemoteProtocolError: it is not a message of this version; the text names kind and field.
    """
    if type(message) is not list or not message:
        raise RemoteProtocolError("a message is an array that begins with its kind")
    kind = message[0]
    checker = _CHECKS.get(kind) if type(kind) is int else None
    if checker is None:
        raise RemoteProtocolError(f"unknown kind of message {kind!r:.40}")
    try:
        checker(message)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RemoteProtocolError(
            f"{NAMES[kind]}: a field is missing or has the wrong type ({error})"
        ) from None
    return int(kind)


def _wrong(message: list[Any], what: str) -> NoReturn:
    raise RemoteProtocolError(f"{NAMES[message[0]]}: {what}")


def _is_id(value: Any) -> bool:
    return type(value) is bytes and len(value) == ID_BYTES


def _is_joined(value: Any, unit: int) -> bool:
    return type(value) is bytes and len(value) % unit == 0


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _SIZE_MAX


def _is_number(value: Any) -> bool:
    return type(value) is float or type(value) is int


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= MAX_TEXT


# ------------------------------------------------------------------------------------------ one function a kind


def _submit(message: list[Any]) -> None:
    home, group, secret, opts, fns, tasks = message[1:7]
    if not (_is_id(home) and _is_id(group) and type(secret) is bytes and len(secret) == SECRET_BYTES):
        _wrong(message, "home, group or secret")
    if type(opts) is not dict or type(fns) is not list or type(tasks) is not list:
        _wrong(message, "opts, fns or tasks")
    _options(message, opts)
    for digest in fns:
        if type(digest) is not bytes or len(digest) != DIGEST_BYTES:
            _wrong(message, "a digest")
    last_fn = len(fns) - 1
    for task in tasks:
        # Tasks are the bulk of what is ever checked, so their commonest form passes with the fewest steps.
        id, fn, payload, deps, passed, args = task if len(task) == 6 else task[:6]
        if not (type(id) is bytes and len(id) == 16 and type(fn) is int and -1 <= fn <= last_fn):
            _wrong(message, "id or function of a task")
        if type(payload) is bytes:
            if args is not None:
                _wrong(message, "a task with both payload and args")
        elif payload is not None or not (type(args) is list and _is_id(args[0]) and _is_count(args[1])):
            _wrong(message, "payload or args of a task")
        if deps is not None and not _is_joined(deps, REF_BYTES):
            _wrong(message, "deps of a task")
        if passed is not None and not _is_joined(passed, REF_BYTES):
            _wrong(message, "passed of a task")


def _options(message: list[Any], opts: dict[Any, Any]) -> None:
    retries, walltime_s, resources = opts.get("retries"), opts.get("walltime_s"), opts.get("resources")
    if retries is not None and not _is_count(retries):
        _wrong(message, "retries")
    if walltime_s is not None and not (_is_number(walltime_s) and walltime_s > 0):
        _wrong(message, "walltime_s")
    if resources is not None and type(resources) is not dict:
        _wrong(message, "resources")


def _function(message: list[Any]) -> None:
    digest, code = message[1:3]
    if type(digest) is not bytes or len(digest) != DIGEST_BYTES or type(code) is not bytes:
        _wrong(message, "digest or bytes")


def _need_function(message: list[Any]) -> None:
    if type(message[1]) is not list:
        _wrong(message, "digests")
    for digest in message[1]:
        if type(digest) is not bytes or len(digest) != DIGEST_BYTES:
            _wrong(message, "a digest")


def _started(message: list[Any]) -> None:
    for item in message[1]:
        if not (_is_id(item[0]) and _is_count(item[1]) and _is_number(item[2])):
            _wrong(message, "an item")


def _outcome(message: list[Any]) -> None:
    if type(message[1]) is not list:
        _wrong(message, "items")
    for item in message[1]:
        id, status, value, attempt, record = item if len(item) == 5 else item[:5]
        if not (type(id) is bytes and len(id) == 16 and type(attempt) is int and 0 <= attempt <= _SIZE_MAX):
            _wrong(message, "id or attempt of an item")
        if status == OK:
            good = type(value) is bytes and type(status) is int
        else:
            good = type(status) is int and status in _VALUE_CHECKS and _VALUE_CHECKS[status](value)
        if not good:
            _wrong(message, "status or value of an item")
        if record is not None:
            _record(message, record)


def _is_failure(value: Any) -> bool:
    """Whether it is `[kind, message, fields, exc, cause]`; without recursion, as a cause may have a cause."""
    depth = 0
    while value is not None:
        depth += 1
        if type(value) is not list or len(value) < 5 or depth > 32:
            return False
        kind, text, fields, exc, value = value[:5]
        if not (_is_text(kind) and _is_text(text) and type(fields) is dict):
            return False
        if exc is not None and type(exc) is not bytes:
            return False
    return depth > 0


def _is_loss(value: Any) -> bool:
    return type(value) is list and _is_text(value[0]) and _is_text(value[1])


_VALUE_CHECKS: Final[dict[int, Callable[[Any], bool]]] = {
    STORED: _is_count,
    FAILED: _is_failure,
    CANCELLED_STATUS: lambda value: True,
    LOST: _is_loss,
    ALIAS: lambda value: type(value) is bytes and len(value) == REF_BYTES,
    PENDING: lambda value: True,
}


def _record(message: list[Any], record: Any) -> None:
    received, started, ended, worker, attempts, pulled, out, err = record[:RECORD_FIELDS]
    if (
        type(received) is float
        and type(started) is float
        and type(ended) is float
        and type(worker) is str
        and len(worker) <= MAX_TEXT
        and type(attempts) is int
        and 0 <= attempts <= _SIZE_MAX
        and pulled is None
        and out is None
        and err is None
    ):
        return  # the record of nearly every task
    for moment in (received, started, ended):
        if moment is not None and type(moment) is not float and type(moment) is not int:
            _wrong(message, "a time of a record")
    if (worker is not None and not _is_text(worker)) or not _is_count(attempts):
        _wrong(message, "worker or attempts of a record")
    if pulled is not None:
        for carrier, size in pulled.items() if type(pulled) is dict else ((None, None),):
            if type(carrier) is not str or not _is_count(size):
                _wrong(message, "bytes pulled of a record")
    if (out is not None and not _is_text(out)) or (err is not None and not _is_text(err)):
        _wrong(message, "stdout or stderr of a record")


def _subscribe(message: list[Any]) -> None:
    home, items = message[1:3]
    if not _is_id(home) or type(items) is not list:
        _wrong(message, "home or items")
    for item in items:
        id, token, attempt, confirm = item if len(item) == 4 else item[:4]
        if not (_is_id(id) and type(confirm) is bool and (attempt is None or _is_count(attempt))):
            _wrong(message, "an item")
        if token is not None and not (type(token) is bytes and len(token) == TOKEN_BYTES):
            _wrong(message, "token of an item")


def _ids(message: list[Any]) -> None:
    if not _is_joined(message[1], ID_BYTES):
        _wrong(message, "ids")


def _cancel(message: list[Any]) -> None:
    _ids(message)
    if type(message[2]) is not bool:
        _wrong(message, "force")


def _cancelled(message: list[Any]) -> None:
    _ids(message)
    answers = message[2]
    if type(answers) is not list or len(answers) * ID_BYTES != len(message[1]):
        _wrong(message, "as many answers as ids")
    for answer in answers:
        if type(answer) is not bool:
            _wrong(message, "an answer")


def _attach(message: list[Any]) -> None:
    if not _is_id(message[1]):
        _wrong(message, "group")


def _tasks(message: list[Any]) -> None:
    group, secret, items = message[1:4]
    if not _is_id(group) or (secret is not None and type(secret) is not bytes) or type(items) is not list:
        _wrong(message, "group, secret or items")
    for item in items:
        if type(item) is not list or not _is_id(item[0]) or not (_is_count(item[1]) or _is_text(item[1])):
            _wrong(message, "an item")


def _offer(message: list[Any]) -> None:
    home, group, secret, items = message[1:5]
    if not (_is_id(home) and _is_id(group) and type(secret) is bytes and len(secret) == SECRET_BYTES):
        _wrong(message, "home, group or secret")
    if type(items) is not list:
        _wrong(message, "items")
    for item in items:
        id, size, blob = item if len(item) == 3 else item[:3]
        if not (_is_id(id) and _is_count(size)):
            _wrong(message, "id or size of an item")
        if blob is not None and not (type(blob) is bytes and len(blob) == size):
            _wrong(message, "blob of an item")


def _explain(message: list[Any]) -> None:
    if not _is_count(message[1]) or not _is_joined(message[2], ID_BYTES):
        _wrong(message, "request or ids")


def _explained(message: list[Any]) -> None:
    if not _is_count(message[1]) or type(message[2]) is not list:
        _wrong(message, "request or answers")
    for answer in message[2]:
        if type(answer) is not dict:
            _wrong(message, "an answer")


def _status(message: list[Any]) -> None:
    if not _is_count(message[1]):
        _wrong(message, "request")


def _status_is(message: list[Any]) -> None:
    if not _is_count(message[1]) or type(message[2]) is not dict:
        _wrong(message, "request or answer")


def _pins(message: list[Any]) -> None:
    _ids(message)
    if type(message[2]) is not bool:
        _wrong(message, "more")


def _try(message: list[Any]) -> None:
    request, target, about = message[1:4]
    if not _is_count(request) or not (target is None or _is_id(target)):
        _wrong(message, "request or target")
    if about is not None and type(about) is not dict:
        _wrong(message, "record of the target")


def _fetch(message: list[Any]) -> None:
    request, id, attempt, offset, length, mode, token = message[1:8]
    if not (_is_count(request) and _is_id(id) and _is_count(attempt)):
        _wrong(message, "request, id or attempt")
    if not (_is_count(offset) and _is_count(length)) or type(mode) is not int or not 0 <= mode <= MODE_INTO:
        _wrong(message, "range or mode")
    if token is not None and type(token) is not bytes:
        _wrong(message, "token")
    if mode == MODE_INTO and not _is_text(message[8]):
        _wrong(message, "path")
    if len(message) > 9 and not _is_text(message[9]):
        _wrong(message, "kind")


def _chunk(message: list[Any]) -> None:
    request, id, attempt, offset, length, checksum, path, error = message[1:9]
    if not (_is_count(request) and _is_id(id) and _is_count(attempt)):
        _wrong(message, "request, id or attempt")
    if not (_is_count(offset) and _is_count(length) and type(checksum) is int):
        _wrong(message, "range or checksum")
    if path is not None and not _is_text(path):
        _wrong(message, "path")
    if error is not None and not (type(error) is list and _is_count(error[0]) and _is_text(error[1])):
        _wrong(message, "error")


def _bulk_hello(message: list[Any]) -> None:
    protocol, party, kind, owner_key = message[1:5]
    if (
        type(protocol) is not int
        or not _is_id(party)
        or type(kind) is not str
        or type(owner_key) is not bytes
    ):
        _wrong(message, "protocol, party, kind or owner key")


_CHECKS: Final[dict[int, Callable[[list[Any]], None]]] = {
    SUBMIT: _submit,
    FUNCTION: _function,
    NEED_FUNCTION: _need_function,
    STARTED: _started,
    OUTCOME: _outcome,
    SUBSCRIBE: _subscribe,
    UNSUBSCRIBE: _ids,
    FORGET: _ids,
    CANCEL: _cancel,
    CANCELLED: _cancelled,
    ATTACH: _attach,
    TASKS: _tasks,
    OFFER: _offer,
    EXPLAIN: _explain,
    EXPLAINED: _explained,
    STATUS: _status,
    STATUS_IS: _status_is,
    PINS: _pins,
    TRY: _try,
    TRIED: _status_is,
    FETCH: _fetch,
    CHUNK: _chunk,
    BULK_HELLO: _bulk_hello,
}
