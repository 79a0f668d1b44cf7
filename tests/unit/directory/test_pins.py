"""Pinned keys: the first one counts, a changed one is refused until it is replaced, and the file is read with suspicion."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gcref import ids
from gcref.carriers import keys
from gcref.directory import pins
from gcref.errors import AuthError, ConfigError

OLD, NEW = keys.generate().public, keys.generate().public
ID = ids.new_id()


def test_the_first_key_is_pinned_and_the_same_one_is_fine_ever_after(home: Path) -> None:
    pins.check(ID, OLD, "midway")
    pins.check(ID, OLD, "midway")
    path = home / "known_keys"
    assert path.read_text() == f"{ids.text(ID)} {OLD.decode()} midway\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert pins.read() == {ID: pins.Pin(ID, OLD, "midway")}


def test_a_changed_key_is_refused_until_it_is_trusted(home: Path) -> None:
    other = ids.new_id()
    pins.check(other, NEW, "polaris")
    pins.check(ID, OLD, "ada/midway")
    with pytest.raises(AuthError) as refused:
        pins.check(ID, NEW, "ada/midway")
    for told in (
        ids.text(ID),
        OLD.decode(),
        NEW.decode(),
        "gcref trust ada/midway",
        str(home / "known_keys"),
    ):
        assert told in str(refused.value)
    assert pins.read()[ID].key == OLD
    assert pins.replace(ID, NEW, "ada/midway") == OLD
    pins.check(ID, NEW, "ada/midway")
    with pytest.raises(AuthError):
        pins.check(ID, OLD, "ada/midway")
    pins.check(other, NEW, "polaris")
    assert (home / "known_keys").stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in home.iterdir()] == ["known_keys"]


def test_replacing_what_was_never_pinned_pins_it(home: Path) -> None:
    assert pins.replace(ID, NEW, "midway") is None
    with pytest.raises(AuthError):
        pins.check(ID, OLD, "midway")


def test_a_name_cannot_write_lines_of_its_own(home: Path) -> None:
    other = ids.new_id()
    pins.check(ID, OLD, f"midway\n{ids.text(other)} {NEW.decode()} evil")
    assert list(pins.read()) == [ID]
    pins.check(other, OLD, "polaris")


def test_people_may_edit_it(home: Path) -> None:
    home.mkdir()
    (home / "known_keys").write_text(f"# known\n\n{ids.text(ID)}   {OLD.decode()}")
    (home / "known_keys").chmod(0o600)
    other = ids.new_id()
    pins.check(other, NEW, "polaris")
    assert pins.read() == {ID: pins.Pin(ID, OLD, ""), other: pins.Pin(other, NEW, "polaris")}


@pytest.mark.parametrize(
    "line", ["midway", "not-an-id " + "k" * 40 + " midway", f"{ids.text(ID)} short midway"]
)
def test_a_damaged_line_is_named(home: Path, line: str) -> None:
    pins.check(ID, OLD, "midway")
    with open(home / "known_keys", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match="line 2") as wrong:
        pins.check(ID, OLD, "midway")
    assert wrong.value.file == str(home / "known_keys")


def test_a_file_that_others_may_write_is_not_believed(home: Path) -> None:
    pins.check(ID, OLD, "midway")
    (home / "known_keys").chmod(0o666)
    with pytest.raises(ConfigError, match="written by others"):
        pins.check(ID, OLD, "midway")


def test_what_is_no_key_is_not_pinned(home: Path) -> None:
    with pytest.raises(ConfigError, match="no key"):
        pins.check(ID, b"short", "midway")
    assert pins.read() == {}


def test_those_that_meet_it_at_once_agree_and_lose_no_pin_of_each_other(home: Path) -> None:
    """Nothing is shared but the file, so threads are as good as processes."""
    start = threading.Barrier(4)
    shown = [keys.generate().public for _ in range(4)]
    own = [ids.new_id() for _ in range(40)]

    def first_contacts(number: int) -> bool:
        start.wait()
        for id in own[number::4]:
            pins.check(id, shown[number], "of its own")
        try:
            pins.check(ID, shown[number], "midway")
        except AuthError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        accepted = list(pool.map(first_contacts, range(4)))
    found = pins.read()
    assert [key for key, ok in zip(shown, accepted, strict=True) if ok] == [found[ID].key]
    assert set(found) == {ID, *own}
