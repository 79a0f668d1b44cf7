"""What an endpoint's configuration file may say, and what happens when it says something else."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint_worker import config as endpoint_config
from endpoint_worker.config import EndpointConfig
from endpoint_worker.config_keys import KEYS, size_bytes, template
from gcref import config
from gcref.errors import ConfigError


def test_every_key_is_an_attribute_and_every_attribute_a_key() -> None:
    assert [key.name for key in KEYS] == [field.name for field in dataclasses.fields(EndpointConfig)]


def test_an_empty_table_gives_the_defaults() -> None:
    settings = EndpointConfig.from_table({})
    assert settings == EndpointConfig()
    assert settings.workers == endpoint_config.cpu_count()
    assert settings.store_limit_bytes > 0
    assert (settings.heartbeat_s, settings.lease_s) == (config.HEARTBEAT_S, config.LEASE_S)


def test_the_fresh_file_is_toml_and_says_the_defaults() -> None:
    table = tomllib.loads(template("polaris"))
    assert table == {}
    said = tomllib.loads(template("polaris", workers=3, bind="0.0.0.0", advertise=["a", "b"]))
    assert said == {"workers": 3, "bind": "0.0.0.0", "advertise": ["a", "b"]}
    assert EndpointConfig.from_table(said).workers == 3


def test_each_line_of_the_fresh_file_works_when_its_mark_is_taken_away() -> None:
    text = re.sub(r"(?m)^#(\w+ = )", r"\1", template("polaris"))
    table = tomllib.loads(text)
    assert list(table) == [key.name for key in KEYS]
    settings = EndpointConfig.from_table(table)
    # What the file shows is the default, except where the machine decides or an example is shown.
    varying = {
        "workers",
        "store_limit_bytes",
        "omp_threads",
        "worker_memory_bytes",
        "advertise",
        "spill_dir",
        "worker_env",
        "carriers",
    }
    default = EndpointConfig()
    for key in KEYS:
        if key.name not in varying:
            assert getattr(settings, key.name) == getattr(default, key.name), key.name


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("workers", 12, 12),
        ("carriers", ["direct"], frozenset(("direct",))),
        ("bind", "hsn0", "hsn0"),
        ("bind", "::", "::"),
        ("advertise", ["login1.example.org"], ("login1.example.org",)),
        ("store_limit_bytes", "1.5 GiB", 3 * 1024**3 // 2),
        ("store_limit_bytes", 4096, 4096),
        ("spill_dir", "/scratch/me", Path("/scratch/me")),
        ("heartbeat_s", 1, 1.0),
        ("adopt_s", 0, 0.0),
        ("store_wait_s", 0.5, 0.5),
        ("worker_env", {"A_1": "x y"}, {"A_1": "x y"}),
        ("gpus", 2, ("0", "1")),
        ("gpus", [3, "GPU-8f6d"], ("3", "GPU-8f6d")),
        ("log_level", "debug", "debug"),
        ("journal", False, False),
    ],
)
def test_a_good_value_is_taken(key: str, value: Any, expected: Any) -> None:
    assert getattr(EndpointConfig.from_table({key: value}), key) == expected


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("workers", 0, "whole number from 1"),
        ("workers", True, "whole number"),
        ("workers", "4", "whole number"),
        ("workers", 2.0, "whole number"),
        ("carriers", [], "at least one of broker, direct, ipc"),
        ("carriers", "direct", "a list"),
        ("carriers", ["direct", "pigeon"], "broker, direct, ipc"),
        ("carriers", [["direct"]], "broker, direct, ipc"),
        ("bind", "tcp://0.0.0.0", "without a port"),
        ("bind", "", "host name"),
        ("bind", 0, "host name"),
        ("port", 65536, "65535"),
        ("port", -1, "65535"),
        ("advertise", "login1", "a list"),
        ("advertise", ["a b"], "host name"),
        ("store_limit_bytes", 0, "above 0"),
        ("store_limit_bytes", -5, "above 0"),
        ("store_limit_bytes", "8 gigs", '"8 GiB"'),
        ("store_limit_bytes", True, "above 0"),
        ("spill_dir", "spill", "absolute"),
        ("spill_dir", "$GCREF_TEST_NOT_SET/x", "absolute"),
        ("spill_dir", 5, "path of a folder"),
        ("heartbeat_s", "5", "number of seconds"),
        ("heartbeat_s", 0, "at least"),
        ("heartbeat_s", float("nan"), "number of seconds"),
        ("lease_s", float("inf"), "number of seconds"),
        ("adopt_s", -1, "at least 0"),
        ("worker_env", {"A-B": "x"}, "variable names"),
        ("worker_env", {"A": 1}, "variable names"),
        ("worker_env", ["A=1"], "variable names"),
        ("omp_threads", 0, "whole number from 1"),
        ("gpus", -1, "number of devices"),
        ("gpus", [0.5], "number of devices"),
        ("gpus", "all", "number of devices"),
        ("trust_hub", "yes", "true or false"),
        ("journal", 1, "true or false"),
        ("log_level", "loud", "debug, info, warning, error"),
    ],
)
def test_a_bad_value_names_file_key_and_remedy(key: str, value: Any, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EndpointConfig.from_table({key: value}, "/somewhere/config.toml")
    error = caught.value
    assert (error.file, error.key) == ("/somewhere/config.toml", key)
    assert error.remedy is not None
    assert hint in error.remedy
    assert str(error).startswith(f"/somewhere/config.toml: {key} ")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("worker", "workers"),
        ("hearbeat_s", "heartbeat_s"),
        ("store_limit", "store_limit_bytes"),
        ("fsync", "journal_fsync"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(meant))) as caught:
        EndpointConfig.from_table({key: 1}, "config.toml")
    assert caught.value.key == key


def test_an_unknown_key_that_resembles_nothing_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        EndpointConfig.from_table({"qqq": 1})
    assert all(key.name in str(caught.value) for key in KEYS)


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"port": 4000, "bulk_port": 4000}, "bulk_port"),
        ({"heartbeat_s": 30, "endpoint_lost_s": 30}, "endpoint_lost_s"),
    ],
)
def test_values_that_contradict_each_other_are_refused(table: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EndpointConfig.from_table(table)
    assert caught.value.key == key


def test_a_file_that_is_missing_or_no_toml_or_not_text(tmp_path: Path) -> None:
    path = tmp_path / "polaris" / "config.toml"
    path.parent.mkdir()
    with pytest.raises(ConfigError, match="endpoint-worker init polaris"):
        EndpointConfig.load(path)
    path.write_text("workers = = 4\n")
    with pytest.raises(ConfigError, match="line 1"):
        EndpointConfig.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="no TOML"):
        EndpointConfig.load(path)
    path.write_text("workers = 4\n")
    assert EndpointConfig.load(path).workers == 4


def test_addresses_to_listen_on() -> None:
    assert EndpointConfig().listen_address() == "tcp://127.0.0.1:*"
    fixed = EndpointConfig.from_table({"bind": "::1", "port": 4001, "bulk_port": 4002})
    assert (fixed.listen_address(), fixed.bulk_listen_address()) == ("tcp://[::1]:4001", "tcp://[::1]:4002")


def test_addresses_that_others_are_told() -> None:
    assert EndpointConfig().advertised("tcp://127.0.0.1:4001") == ("tcp://127.0.0.1:4001",)
    named = EndpointConfig.from_table({"bind": "0.0.0.0", "advertise": ["login1.example.org", "::1"]})
    assert named.advertised("tcp://0.0.0.0:4001") == ("tcp://login1.example.org:4001", "tcp://[::1]:4001")
    everywhere = EndpointConfig.from_table({"bind": "0.0.0.0"}).advertised("tcp://0.0.0.0:4001")
    assert everywhere
    assert all(re.fullmatch(r"tcp://[0-9.]+:4001", address) for address in everywhere)
    assert "tcp://0.0.0.0:4001" not in everywhere


def test_the_environment_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = endpoint_config.cpu_count()
    assert EndpointConfig(workers=1).environment(1) == {"OMP_NUM_THREADS": str(cores)}
    assert EndpointConfig(workers=2 * cores).environment(1)["OMP_NUM_THREADS"] == "1"
    assert EndpointConfig(omp_threads=3).environment(1)["OMP_NUM_THREADS"] == "3"
    said = {"OMP_NUM_THREADS": "5", "MPLBACKEND": "Agg"}
    assert EndpointConfig(worker_env=said).environment(1) == said
    # The key is about nothing else, so it is meant.
    assert EndpointConfig(worker_env=said, omp_threads=3).environment(1) == said | {"OMP_NUM_THREADS": "3"}
    for inherited in ("7", "4,2"):
        monkeypatch.setenv("OMP_NUM_THREADS", inherited)
        assert EndpointConfig(workers=1).environment(1) == {}, "it has the agent's"
        assert EndpointConfig(omp_threads=3).environment(1) == {"OMP_NUM_THREADS": "3"}


def test_devices_are_dealt_out_to_the_workers_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = EndpointConfig(gpus=("a", "b"), worker_env={"CUDA_VISIBLE_DEVICES": "all"})
    for worker, device in enumerate("abab", start=1):
        assert settings.environment(worker) == dict.fromkeys(
            ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"), device
        )


def test_secrets_of_the_environment_are_not_shown() -> None:
    assert "hunter2" not in repr(EndpointConfig(worker_env={"DB_PASSWORD": "hunter2"}))


_PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text("ab/$0. ", max_size=8)
    | st.lists(st.integers(), max_size=3)
)


@given(st.dictionaries(st.sampled_from([*(key.name for key in KEYS), "stranger"]), _PLAIN))
def test_any_table_gives_settings_or_a_config_error(table: dict[str, Any]) -> None:
    wrong: str | None = "stranger" if "stranger" in table else None
    try:
        EndpointConfig.from_table(table)
    except ConfigError as error:
        wrong = error.key
        assert wrong in table, error  # noqa: PT017 - either way is right; only the key must be one that was given
    else:
        assert wrong is None


@given(st.integers(min_value=1, max_value=2**62))
def test_a_size_in_bytes_is_itself_however_it_is_written(size: int) -> None:
    assert size_bytes(size) == size
    assert size_bytes(json.loads(json.dumps(size))) == size


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("1 kB", 0), ("2 KB", 2000), ("2KiB", 2048), ("0.5 MB", 500_000)]
)
def test_sizes_as_text(text: str, size: int) -> None:
    if size:
        assert size_bytes(text) == size
    else:
        with pytest.raises(ValueError, match="GiB"):
            size_bytes(text)
