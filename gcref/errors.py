"""Every error that gcref raises of its own accord.

    GcrefError
    ├─ TaskError              a task's exception that cannot be rebuilt: type name, text, remote traceback
    ├─ DependencyError        an argument's task failed: .task_ids, __cause__ is the root failure
    ├─ LostError              something of ours went away (retryable)
    │  ├─ WorkerLostError     the process that ran the task died: .exit_code or .signal, .stderr
    │  ├─ EndpointLostError   an endpoint is gone, or came back without what it knew: .endpoint_id
    │  └─ ObjectLostError     a value is gone: .reason (a LostReason), .object_id
    ├─ WalltimeExceededError  also a TimeoutError: .walltime_s
    ├─ DeadlockError          too many tasks are blocked; advises a tail call
    ├─ SerializationError     also a TypeError: .argument or .module
    ├─ ProtocolError
    │  ├─ LocalProtocolError  this side was about to break the protocol
    │  └─ RemoteProtocolError the other side broke it
    │     └─ VersionMismatchError   the other side speaks another version: .local, .remote
    ├─ HubError
    │  ├─ AuthError           a key or token was refused
    │  ├─ NotFoundError       no such thing, or not for you
    │  ├─ RejectedError       the request itself is wrong
    │  └─ HubUnavailableError no answer (retryable)
    ├─ StoreFullError         neither memory nor disk has room: .needed_bytes, .limit_bytes
    └─ ConfigError            a setting is wrong: .file, .key, .remedy

An error is built as `Error(message, **fields)`: the message is for people (what happened, to which id, what
to do next), the fields are for programs. Fields are declared as class attributes with their default. Every
error survives pickling with its fields, its notes and its `__cause__`, because errors travel between
processes like any other value; for the same reason ids in fields are text.
"""

from __future__ import annotations

import enum
from typing import Any, ClassVar, Final

# What foreign code may raise when it runs in passing: as it is pickled, unpickled or asked for its text. That concerns
# the one thing at hand, and ends no process. An interrupt by the user does.
FOREIGN_ERRORS: Final = (Exception, SystemExit, GeneratorExit)


class GcrefError(Exception):
    """Base of gcref's errors.

    Args:
        message: what happened, to which id, and what to do next.
        fields: the facts, each of which becomes an attribute.

    Attributes:
        retryable: doing the same again may succeed.
        task_id: text of the id of the task that it is about, if there is one.
    """

    retryable: ClassVar[bool] = False
    task_id: str | None = None

    def __init__(self, message: str = "", **fields: object) -> None:
        super().__init__(message)
        self.__dict__.update(fields)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__, _pack_cause(self.__cause__))


class TaskError(GcrefError):
    """A task raised an exception that cannot be rebuilt here, or that must not be: it would end this process.

    Attributes:
        type_name: qualified name of the exception's type.
        text: `str` of the exception.
        traceback: the remote traceback, as text.
    """

    type_name: str = ""
    text: str = ""
    traceback: str = ""


class DependencyError(GcrefError):
    """A task did not run, because an argument's task failed. `__cause__` is the root failure.

    Attributes:
        task_ids: text of the ids of the direct arguments that failed.
    """

    task_ids: tuple[str, ...] = ()


class LostError(GcrefError):
    """Something of gcref's went away: a process, a machine, some bytes. The user's code is not to blame."""

    retryable: ClassVar[bool] = True


class WorkerLostError(LostError):
    """The process that ran the task died.

    Attributes:
        exit_code: its exit code, if it exited.
        signal: the number of the signal that killed it, if one did.
        stderr: the last lines that it wrote there.
    """

    exit_code: int | None = None
    signal: int | None = None
    stderr: str = ""


class EndpointLostError(LostError):
    """An endpoint did not answer for too long, or came back without what it knew.

    Attributes:
        endpoint_id: text of the endpoint's id.
    """

    endpoint_id: str | None = None


class LostReason(enum.StrEnum):
    """Why an object is lost."""

    RELEASED = "released"
    NEVER_SUBMITTED = "never_submitted"
    HOME_LOST = "home_lost"
    BYTES_LOST = "bytes_lost"
    CORRUPT = "corrupt"
    TIMEOUT = "timeout"


class ObjectLostError(LostError):
    """The bytes of an object are not to be had (any more).

    Attributes:
        reason: why.
        object_id: text of the object's id.
    """

    reason: LostReason = LostReason.BYTES_LOST
    object_id: str | None = None

    def __init__(self, message: str = "", **fields: object) -> None:
        super().__init__(message, **fields)
        # Reasons cross the wire as text.
        self.reason = LostReason(self.reason)


class WalltimeExceededError(GcrefError, TimeoutError):
    """A task ran for longer than its `walltime_s` and was killed.

    Attributes:
        walltime_s: the limit, in seconds.
    """

    walltime_s: float | None = None


class DeadlockError(GcrefError):
    """A task would have to wait for others, but too many wait already: return the future instead."""


class SerializationError(GcrefError, TypeError):
    """A value cannot be turned into bytes, or bytes cannot be turned into a value.

    Attributes:
        argument: which argument of a submit is to blame, such as `argument 2` or `keyword 'x'`.
        module: the module that the value needs and that cannot be imported here.
    """

    argument: str | None = None
    module: str | None = None


class ProtocolError(GcrefError):
    """Messages or bytes are not what the protocol says."""


class LocalProtocolError(ProtocolError):
    """This side was about to break the protocol: a defect in gcref, or a misuse of its inner parts."""


class RemoteProtocolError(ProtocolError):
    """The other side broke the protocol."""


class VersionMismatchError(RemoteProtocolError):
    """The other side speaks another version.

    Attributes:
        local: the version here.
        remote: the version there.
    """

    local: int | str | None = None
    remote: int | str | None = None


class HubError(GcrefError):
    """The directory, or a party, refused or could not serve a request."""


class AuthError(HubError):
    """A key or a token was refused."""


class NotFoundError(HubError):
    """There is no such thing, or it is not yours to see."""


class RejectedError(HubError):
    """The request itself is wrong; repeating it does not help."""


class HubUnavailableError(HubError):
    """The hub does not answer."""

    retryable: ClassVar[bool] = True


class StoreFullError(GcrefError):
    """An object store has no room left in memory or on disk.

    Attributes:
        needed_bytes: what was asked for.
        limit_bytes: what the store may hold.
    """

    needed_bytes: int | None = None
    limit_bytes: int | None = None


class ConfigError(GcrefError):
    """A setting is missing or wrong.

    Attributes:
        file: the file, environment variable or folder that holds the setting.
        key: the setting.
        remedy: what to do about it.
    """

    file: str | None = None
    key: str | None = None
    remedy: str | None = None


def _rebuild(
    cls: type[GcrefError], args: tuple[Any, ...], fields: dict[str, Any], cause: bytes | None
) -> GcrefError:
    error = cls(*args)
    error.__dict__.update(fields)
    if cause is not None:
        error.__cause__ = _unpack_cause(cause)
    return error


def _pack_cause(cause: BaseException | None) -> bytes | None:
    # Bytes inside the bytes: a cause that cannot be rebuilt must not take the error itself with it.
    if cause is None:
        return None
    import pickle

    try:
        return pickle.dumps(cause, protocol=5)
    except FOREIGN_ERRORS:
        return pickle.dumps(_stand_in(type(cause).__qualname__, cause), protocol=5)


def _unpack_cause(cause: bytes) -> BaseException:
    import pickle

    try:
        found = pickle.loads(cause)
    except FOREIGN_ERRORS as error:
        return _stand_in("an exception that cannot be rebuilt here", error)
    return found if isinstance(found, BaseException) else _stand_in(type(found).__qualname__, found)


def _stand_in(type_name: str, value: object) -> TaskError:
    try:
        text = str(value)
    except FOREIGN_ERRORS:
        text = "<no text>"
    return TaskError(f"{type_name}: {text}", type_name=type_name, text=text)
