"""Key files: made once, closed to others, never shown; lists of keys that people edit."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import pytest

from gcref.carriers import keys
from gcref.errors import ConfigError


def test_a_key_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "user.key"
    assert keys.public_of(path) is None
    made = keys.load_or_create(path)
    assert keys.load_or_create(path) == made == keys.load(path)
    assert keys.public_of(path) == made.public
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert os.listdir(path.parent) == ["user.key"]
    assert made.public not in path.read_bytes()
    assert keys.is_key(made.public)
    assert keys.is_key(made.secret)


def test_who_comes_at_the_same_time_gets_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    start = threading.Barrier(8)
    found: list[keys.KeyPair] = []

    def load() -> None:
        start.wait()
        found.append(keys.load_or_create(path))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert os.listdir(tmp_path) == ["key"]


def test_secrets_are_not_shown() -> None:
    pair = keys.generate()
    assert pair.secret.decode() not in repr(pair)
    assert pair.public.decode() in repr(pair)
    assert pair.secret.decode() not in f"{pair} {[pair]}"
    assert pickle.loads(pickle.dumps(pair)) == pair


def test_a_key_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "key"
    keys.load_or_create(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600") as caught:
        keys.load_or_create(path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize("content", [b"", b"no key", b"x" * 40 + b"x", b"\xff" * 40, b"%" * 40])
def test_a_file_without_a_key_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="holds no key"):
        keys.load_or_create(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError):
        keys.load_or_create(tmp_path / "file" / "key")
    with pytest.raises(ConfigError, match="cannot be read"):
        keys.load(tmp_path)


def test_a_list_of_keys_is_read_with_roles_and_comments(tmp_path: Path) -> None:
    ada, bob = (keys.generate().public for _ in range(2))
    path = tmp_path / "authorized_keys"
    path.write_bytes(
        b"# who may come in\n\n   # indented\n" + ada + b" user ada, laptop\n" + bob + b"\tpeer\n"
    )
    assert keys.read_authorized(path) == {ada: "user", bob: "peer"}
    assert keys.read_authorized(tmp_path / "none") == {}


@pytest.mark.parametrize("line", [b"short user", b"%s", b"%s admin", b"%s user\n%s", b"user %s"])
def test_a_wrong_line_is_named_by_number(tmp_path: Path, line: bytes) -> None:
    key = keys.generate().public
    path = tmp_path / "authorized_keys"
    path.write_bytes(b"# one\n" + line.replace(b"%s", key) + b"\n")
    with pytest.raises(ConfigError, match=r"line [23]") as caught:
        keys.read_authorized(path)
    assert caught.value.file == str(path)
    assert "user|peer" in str(caught.value)


def test_no_key_begins_with_the_mark_of_comments() -> None:
    assert not keys.is_key(b"#" + b"0" * 39)
    assert keys.is_key(b"0#" + b"0" * 38)
