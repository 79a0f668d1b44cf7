"""Owner keys and lists of allowed keys.

An owner key is a Curve25519 key pair, written as Z85 text (40 characters a half). The file of a pair holds the
secret half alone, mode 0600; the public half is computed from it. The list of allowed keys is a text file that
people edit:

    # key                                     role   comment
    W3+Lc1u0!Xc-Rg<9l#?769[0KGbmGldxHcOkrHug  user   ada, laptop
"""

from __future__ import annotations

import os
import secrets
import stat
import struct
from pathlib import Path
from typing import Final, NamedTuple

import zmq
from zmq.utils import z85

from gcref.brains.peers_events import PEER, USER
from gcref.errors import ConfigError

KEY_CHARS: Final = 40
"""Z85 characters of one half of a key pair (32 bytes)."""

_MAX_FILE_BYTES: Final = 1024 * 1024


class KeyPair(NamedTuple):
    """A Curve25519 key pair, both halves as z85 bytes."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        # Representations end up in logs.
        return f"KeyPair(public={self.public!r}, secret=…)"


def generate() -> KeyPair:
    """Make a new key pair."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public, secret)


def load_or_create(path: Path) -> KeyPair:
    """Read a key pair, or make it: the first of several processes that try at once makes it for all.

    Args:
        path: the file; its folder is made, with mode 0700, if it is missing.

    Raises:
        ConfigError: it cannot be read or written, others may read it, or it holds no key.
    """
    pair = load(path)
    if pair is not None:
        return pair
    made = generate()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Written beside and linked: whoever sees the name sees the whole key, also on NFS.
        beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(made.secret + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(beside, path)
        except FileExistsError:
            pass
        finally:
            os.unlink(beside)
    except OSError as error:
        raise _wrong(
            path, f"cannot be written: {error.strerror}", "make its folder writable for you"
        ) from error
    pair = load(path)
    if pair is None:
        raise _wrong(path, "was removed while it was made", "try again")
    return pair


def load(path: Path) -> KeyPair | None:
    """Read a key pair; None: there is no such file.

    Raises:
        ConfigError: it cannot be read, others may read it, or it holds no key.
    """
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(_MAX_FILE_BYTES).strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}", "make it readable for you") from error
    if mode & 0o077:
        raise _wrong(path, f"is open to others (mode {mode:04o})", f"chmod 600 {path}")
    if not is_key(text):
        raise _wrong(path, "holds no key", "restore it, or remove it to get a new key")
    return KeyPair(zmq.curve_public(text), text)


def public_of(path: Path) -> bytes | None:
    """Give the public half of the key pair in a file, z85; None: there is no such file.

    Raises:
        ConfigError: as `load`.
    """
    pair = load(path)
    return None if pair is None else pair.public


def read_authorized(path: Path) -> dict[bytes, str]:
    """Read a list of allowed keys: lines `<z85 key> user|peer [comment]`; a `#` begins a comment line.

    Returns:
        Key → role; empty when there is no such file.

    Raises:
        ConfigError: it cannot be read, or a line is none of these; the text names the line.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}", "make it readable for you") from error
    if len(content) > _MAX_FILE_BYTES:
        raise _wrong(path, f"is larger than {_MAX_FILE_BYTES} bytes", "remove what is no key")
    allowed: dict[bytes, str] = {}
    for number, line in enumerate(content.splitlines(), 1):
        # No key begins with `#`, the last digit of Z85: five digits that do are more than 32 bits.
        words = line.split(None, 2)
        if not words or words[0].startswith(b"#"):
            continue
        role = words[1].decode("utf-8", "replace") if len(words) > 1 else ""
        if not is_key(words[0]) or role not in (USER, PEER):
            raise _wrong(path, f"line {number} is no key with a role", "write: <key> user|peer [comment]")
        allowed[words[0]] = role
    return allowed


def is_key(text: bytes) -> bool:
    """Whether these bytes are one half of a key pair, as Z85 text."""
    if len(text) != KEY_CHARS:
        return False
    try:
        return len(z85.decode(text)) == 32
    except (ValueError, KeyError, struct.error):
        return False


def _wrong(path: Path, problem: str, remedy: str) -> ConfigError:
    return ConfigError(f"{path} {problem}; {remedy}", file=str(path), remedy=remedy)
