"""The keys of parties as they were at first contact: `$GCREF_HOME/known_keys`.

The hub is trusted to name a party's key once. What it names later is compared with that:

    hub ── record ──► check ── first contact: written down ──► dial
                        └───── another key than then ────────► AuthError, until `gcref trust NAME`

    # id                                   key                                       name
    6f1c2e5a-70f5-4b7e-9a53-8d5a5f1f6c11   W3+Lc1u0!Xc-Rg<9l#?769[0KGbmGldxHcOkrHug  midway

Rules:
    - The file may lie on a network file system and be shared by many processes, so nothing here locks. A pin is one
      line, appended by one write; of two lines about one party the *first* counts, so two processes that meet it at
      once agree. `replace` writes the file anew beside and renames.
    - Keys in local records are not pinned: who may write those may write this file too.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final, NamedTuple

from gcref import config, ids
from gcref.carriers.keys import is_key
from gcref.errors import AuthError, ConfigError

MAX_FILE_BYTES: Final = 4 * 1024 * 1024
"""Some forty thousand parties; a larger file is damaged."""

MAX_NAME_CHARS: Final = 200


class Pin(NamedTuple):
    """What was written down of a party.

    Attributes:
        id: the party, 16 bytes.
        key: its owner key, z85.
        name: what it was called then; for people.
    """

    id: bytes
    key: bytes
    name: str


def path_of(home: Path | None = None) -> Path:
    """The file with the pinned keys; it need not exist.

    Args:
        home: a `GCREF_HOME`; `None` is the one of this process.
    """
    return (config.home() if home is None else home) / "known_keys"


def check(id: bytes, key: bytes, name: str, home: Path | None = None) -> None:
    """Compare a party's key with the one of the first contact; pin it if this is the first contact.

    Args:
        id: the party, 16 bytes.
        key: the owner key that the hub names, z85.
        name: what the party is called, for people.
        home: a `GCREF_HOME`; `None` is the one of this process.

    Raises:
        AuthError: another key is pinned; the text says what changed, and what to do.
        ConfigError: the file cannot be read or written, others may write it, or it is damaged; or `key` is none.
    """
    pins = read(home)
    if id not in pins:
        _append(Pin(id, key, name), home)
        pins = read(home)  # somebody else may have been first
    pinned = pins[id].key if id in pins else key
    if pinned != key:
        raise AuthError(
            f"the key of {name!r} ({ids.text(id)}) is not the one of the first contact: {pinned.decode()} was "
            f"pinned in {path_of(home)}, the hub now names {key.decode()}. Ask its owner whether the key was changed; "
            f"if so, say 'gcref trust {name}'. If not, somebody wants to be taken for it."
        )


def replace(id: bytes, key: bytes, name: str, home: Path | None = None) -> bytes | None:
    """Pin this key from now on, whatever was pinned.

    Returns:
        The key that was pinned before; None: there was none.

    Raises:
        ConfigError: as `check`.
    """
    pins = read(home)
    old = pins.get(id)
    pins[id] = Pin(id, key, name)
    _write(list(pins.values()), home)
    return None if old is None else old.key


def read(home: Path | None = None) -> dict[bytes, Pin]:
    """All that is pinned, by id; empty when there is no such file.

    Raises:
        ConfigError: it cannot be read, others may write it, or a line is none; the text names the line.
    """
    path = path_of(home)
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}", "make it readable for you") from error
    if mode & 0o022:
        raise _wrong(
            path, f"may be written by others (mode {mode:04o})", f"look through it, then chmod 600 {path}"
        )
    if len(content) > MAX_FILE_BYTES:
        raise _wrong(path, f"is larger than {MAX_FILE_BYTES} bytes", "remove what is no key")
    pins: dict[bytes, Pin] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip() or line.startswith(b"#"):
            continue
        pin = _parse(line)
        if pin is None:
            raise _wrong(
                path, f"line {number} is no pinned key", "write: <id> <key> <name>, or remove the line"
            )
        pins.setdefault(pin.id, pin)
    return pins


def _parse(line: bytes) -> Pin | None:
    words = line.split(None, 2)
    if len(words) < 2 or not is_key(words[1]):
        return None
    try:
        id = ids.parse(words[0].decode("ascii"))
    except ValueError:
        return None
    return Pin(id, words[1], words[2].decode("utf-8", "replace").strip() if len(words) > 2 else "")


def _line(pin: Pin, path: Path) -> bytes:
    if not is_key(pin.key):
        raise _wrong(path, f"cannot take {pin.key!r}, which is no key", "ask the hub's administrator")
    name = " ".join("".join(c if c.isprintable() else " " for c in pin.name).split())[:MAX_NAME_CHARS]
    return f"{ids.text(pin.id)} {pin.key.decode('ascii')} {name}\n".encode()


def _append(pin: Pin, home: Path | None) -> None:
    path = path_of(home)
    line = _line(pin, path)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line  # somebody edited it
            os.write(fd, line)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise _wrong(
            path, f"cannot be written: {error.strerror}", "make its folder writable for you"
        ) from error


def _write(pins: list[Pin], home: Path | None) -> None:
    path = path_of(home)
    content = b"".join(_line(pin, path) for pin in pins)
    beside = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _wrong(
            path, f"cannot be written: {error.strerror}", "make its folder writable for you"
        ) from error


def _wrong(path: Path, problem: str, remedy: str) -> ConfigError:
    return ConfigError(f"{path} {problem}; {remedy}", file=str(path), remedy=remedy)
