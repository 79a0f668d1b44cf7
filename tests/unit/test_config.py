"""Settings and folders: which source wins, and what a wrong setting's error says."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gcref import config, ids
from gcref.errors import ConfigError


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of one's own: its shared memory and its disk are folders of this test."""
    for attribute, name in (("_SHARED_MEMORY", "shm"), ("_HOST_DISK", "disk")):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(config, attribute, str(tmp_path / name))
    return tmp_path


def write(home: Path, text: str) -> None:
    (config.home() / "config.toml").write_text(text)
    assert config.home() == home


def test_home_is_made_and_closed_to_others(home: Path) -> None:
    assert config.home() == home
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert config.home() == home


def test_home_is_below_the_users_folder_unless_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GCREF_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.home() == tmp_path / ".gcref"
    monkeypatch.setenv("GCREF_HOME", "~/elsewhere")
    assert config.home() == tmp_path / "elsewhere"


def test_a_home_that_cannot_be_made_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GCREF_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ConfigError) as caught:
        config.home()
    assert caught.value.key == "GCREF_HOME"
    assert caught.value.remedy
    assert caught.value.remedy in str(caught.value)


def test_without_any_setting_there_are_defaults(home: Path) -> None:
    assert config.client_config() == (None, None, frozenset(("ipc", "direct", "broker")), 600.0, 5.0)


def test_the_file_is_read(home: Path) -> None:
    write(
        home,
        'hub_url = "https://hub.example.org"\ntoken = "secret"\ncarriers = ["direct"]\n'
        "endpoint_lost_s = 30\nheartbeat_s = 0.5\n",
    )
    assert config.client_config() == (
        "https://hub.example.org", "secret", frozenset(("direct",)), 30.0, 0.5,
    )  # fmt: skip


def test_the_environment_wins_over_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(home, 'hub_url = "https://hub.example.org"\ntoken = "secret"\ncarriers = ["direct"]\n')
    monkeypatch.setenv("GCREF_HUB_URL", "http://other.example.org")
    monkeypatch.setenv("GCREF_TOKEN", "other")
    monkeypatch.setenv("GCREF_CARRIERS", "ipc, broker")
    found = config.client_config()
    assert found[:3] == ("http://other.example.org", "other", frozenset(("ipc", "broker")))


def test_the_token_is_not_in_the_representation(home: Path) -> None:
    write(home, 'token = "secret"')
    assert "secret" not in f"{config.client_config()} {config.client_config()!r}"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("hub_ulr = 'https://hub.example.org'", "hub_ulr"),
        ("hub_url = 7", "hub_url"),
        ("hub_url = ''", "hub_url"),
        ("hub_url = 'hub.example.org'", "hub_url"),
        ("token = ['a']", "token"),
        ("carriers = 'direct'", "carriers"),
        ("carriers = []", "carriers"),
        ("carriers = ['pigeon']", "carriers"),
        ("carriers = [7]", "carriers"),
        ("endpoint_lost_s = 'soon'", "endpoint_lost_s"),
        ("endpoint_lost_s = -1", "endpoint_lost_s"),
        ("heartbeat_s = 0", "heartbeat_s"),
        ("heartbeat_s = inf", "heartbeat_s"),
        ("heartbeat_s = true", "heartbeat_s"),
        ("this is no TOML", None),
        ("[client]\ntoken = 'a'", "client"),
    ],
)
def test_a_wrong_setting_is_an_error_with_file_key_and_remedy(home: Path, text: str, key: str | None) -> None:
    write(home, text)
    with pytest.raises(ConfigError) as caught:
        config.client_config()
    error = caught.value
    assert (error.file, error.key) == (str(home / "config.toml"), key)
    assert error.remedy
    assert error.remedy in str(error)
    assert str(home / "config.toml") in str(error)


def test_a_file_that_is_no_text_is_a_config_error(home: Path) -> None:
    (config.home() / "config.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is no TOML"):
        config.client_config()


def test_carriers_come_from_argument_then_environment_then_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.carriers_allowed() == frozenset(("ipc", "direct", "broker"))
    write(home, 'carriers = ["broker"]')
    assert config.carriers_allowed() == frozenset(("broker",))
    monkeypatch.setenv("GCREF_CARRIERS", "direct")
    assert config.carriers_allowed() == frozenset(("direct",))
    assert config.carriers_allowed(("ipc", "direct")) == frozenset(("ipc", "direct"))
    assert config.carriers_allowed("ipc") == frozenset(("ipc",))


@pytest.mark.parametrize("explicit", [(), ("pigeon",), "ipc,direct"])
def test_unknown_or_no_carriers_are_refused(home: Path, explicit: tuple[str, ...] | str) -> None:
    with pytest.raises(ConfigError, match="broker, direct, ipc"):
        config.carriers_allowed(explicit)


def test_an_unknown_carrier_in_the_environment_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GCREF_CARRIERS", "direct,pigeon")
    with pytest.raises(ConfigError) as caught:
        config.carriers_allowed()
    assert (caught.value.file, caught.value.key) == ("environment", "GCREF_CARRIERS")


def test_the_folders_of_a_party_are_made_and_closed_to_others(machine: Path) -> None:
    party = ids.new_id()
    for make, root in ((config.host_dir, "shm"), (config.disk_dir, "disk")):
        folder = make(party)
        assert folder == machine / root / f"gcref-{os.geteuid()}" / party.hex()
        assert make(party) == folder
        assert make(None) == folder.parent
        for made in (folder, folder.parent):
            assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_a_folder_that_others_could_enter_is_closed(machine: Path) -> None:
    folder = config.host_dir(ids.new_id())
    folder.parent.chmod(0o777)
    assert config.host_dir(None) == folder.parent
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


def test_a_folder_of_somebody_else_is_refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    (machine / "shm" / f"gcref-{mine + 1}").mkdir()
    with pytest.raises(ConfigError, match="somebody else"):
        config.host_dir(None)


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_link_or_a_file_in_place_of_a_folder_is_refused(machine: Path, kind: str) -> None:
    place = machine / "shm" / f"gcref-{os.geteuid()}"
    if kind == "link":
        (machine / "target").mkdir()
        place.symlink_to(machine / "target")
    else:
        place.touch()
    with pytest.raises(ConfigError):
        config.host_dir(ids.new_id())


def test_without_shared_memory_there_is_a_temporary_folder(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine / "tmp").mkdir()
    monkeypatch.setattr(config, "_temporary_root", lambda: str(machine / "tmp"))
    (machine / "shm").rmdir()
    (machine / "disk").rmdir()
    assert config.host_dir(None).parent == machine / "tmp"
    assert config.disk_dir(None).parent == machine / "tmp"


def test_a_socket_in_a_partys_folder_has_a_path_that_the_kernel_takes() -> None:
    path = f"{config._SHARED_MEMORY}/gcref-{2**32 - 2}/{'f' * 32}/control-4294967295.sock"
    assert len(path) <= config.SOCKET_PATH_MAX_BYTES
