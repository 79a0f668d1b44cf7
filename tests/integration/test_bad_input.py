"""Bad input: each mistake is a typed error that names the thing and the remedy, within seconds, and harms nothing else.

Mistakes at the command line are in `test_cli.py`, keys that are not allowed in `test_allowed_keys.py`.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from gcref import Client, Executor, LocalEndpoint, ObjectRef, config
from gcref.carriers import keys
from gcref.directory import records
from gcref.errors import (
    AuthError,
    ConfigError,
    EndpointLostError,
    GcrefError,
    NotFoundError,
    RejectedError,
    SerializationError,
    StoreFullError,
)
from tests.conftest import Sites
from tests.support.leaks import run_processes
from tests.support.programs import environment
from tests.support.tasks import blob_of, inc
from tests.support.waiting import patience, wait_until

SOON_S: Final = patience(10)
"""Within seconds."""

LIMIT_BYTES: Final = 4 * 1024 * 1024


def says(error: BaseException, *words: str) -> None:
    """The text of an error names all of this."""
    for word in words:
        assert word in str(error), f"{type(error).__name__}: {error}"


def serves(executor: Executor) -> None:
    assert executor.submit(inc, 1).result(SOON_S) == 2


# ------------------------------------------------------------------------------------------------- unknown endpoint


def test_an_unknown_endpoint_by_name_and_by_id(two_sites: Sites) -> None:
    for unknown in ("polarsi", str(uuid.uuid4()), uuid.uuid4(), "", "../polaris"):
        with pytest.raises(NotFoundError) as caught:
            Executor(unknown)
        says(caught.value, str(unknown), "known here: midway, polaris", "endpoint-worker start", "GCREF_HOME")


def test_an_unknown_endpoint_inside_a_task(polaris: Executor) -> None:
    def by_name() -> object:
        return Executor("polarsi")

    def by_id(unknown: uuid.UUID) -> object:
        return Executor(unknown).submit(inc, 1).result(30)

    with pytest.raises(NotFoundError) as caught:
        polaris.submit(by_name).result(SOON_S)
    says(caught.value, "polarsi", "known here")
    unknown = uuid.uuid4()
    with pytest.raises(NotFoundError) as caught:
        polaris.submit(by_id, unknown).result(SOON_S)
    says(caught.value, str(unknown), "GCREF_HOME")


def test_a_reference_to_an_endpoint_that_nobody_knows(polaris: Executor) -> None:
    unknown = ObjectRef(os.urandom(16), os.urandom(16), os.urandom(16))
    with pytest.raises(NotFoundError) as caught:
        unknown.get(timeout=SOON_S)
    says(caught.value, str(unknown.home), "known here")
    error = polaris.submit(lambda ref: ref.get(timeout=30), unknown).exception(SOON_S)
    assert isinstance(error, GcrefError)
    says(error, str(unknown.home))
    serves(polaris)


# -------------------------------------------------------------------------------------------- endpoint not running


@pytest.fixture
def never_started(home: Path) -> str:
    """An endpoint that was made, and does not run."""
    made = subprocess.run(
        [sys.executable, "-m", "endpoint_worker", "init", "idle"],
        env=environment(),
        capture_output=True,
        timeout=patience(30),
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return "idle"


def test_an_endpoint_that_is_not_running(never_started: str) -> None:
    with Executor(never_started) as executor:
        first, second = executor.submit(inc, 1), executor.submit(inc, 2)
        for f in (first, second):
            with pytest.raises(EndpointLostError) as caught:
                f.result(SOON_S)
            says(caught.value, repr(never_started), f"endpoint-worker start {never_started}")
            assert caught.value.endpoint_id == str(executor.endpoint_id)
        put = executor.put(b"x" * 1_000_000)
        assert isinstance(put.exception(SOON_S), EndpointLostError)
        with pytest.raises(EndpointLostError, match="endpoint-worker start"):
            executor.reload_tasks()


def test_an_argument_from_an_endpoint_that_is_gone(home: Path) -> None:
    with LocalEndpoint("stays", workers=1) as stays, Client() as client:
        with LocalEndpoint("goes", workers=1) as goes, Executor(goes.endpoint_id, client) as executor:
            f = executor.submit(blob_of, 1_000_000)
            assert f.exception(SOON_S) is None
        with Executor(stays.endpoint_id, client) as here:
            error = here.submit(len, f).exception(SOON_S)
            assert isinstance(error, GcrefError)
            says(error, str(goes.endpoint_id), "GCREF_HOME")
            serves(here)
        with pytest.raises(NotFoundError, match="goes"):
            Executor("goes", client)


# ----------------------------------------------------------------------------------------- wrong key, wrong version


@pytest.fixture
def over_tcp(home: Path) -> Iterator[LocalEndpoint]:
    """An endpoint that is reached over TCP only, as from another machine."""
    with LocalEndpoint("site", workers=1, carriers=("direct",)) as site:
        yield site


def test_an_endpoint_with_another_key_than_expected(over_tcp: LocalEndpoint) -> None:
    record = records.read("site")
    assert record is not None
    records.write(dataclasses.replace(record, public_key=keys.generate().public.decode()))
    with Client() as client, Executor("site", client) as executor:
        with pytest.raises(AuthError) as caught:
            executor.submit(inc, 1).result(SOON_S)
        says(caught.value, "'site'", "another key", "record")
        assert "authorized_keys" not in str(caught.value), "that would not help"
    records.write(record)
    with Client() as client, Executor("site", client) as executor:
        serves(executor)


def test_a_key_that_is_not_allowed_is_told_what_its_owner_has_to_do(
    over_tcp: LocalEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = records.read("site")
    assert record is not None
    monkeypatch.setenv("GCREF_HOME", str(tmp_path / "theirs"))
    records.write(record)
    with Client() as client, Executor("site", client) as executor:
        with pytest.raises(AuthError) as caught:
            executor.submit(inc, 1).result(SOON_S)
        key = keys.public_of(config.home() / "keys" / "user.key")
        assert key is not None
        says(caught.value, "'site'", "authorized_keys", f"{key.decode()} user")


_OTHER_VERSION: Final = """
from gcref import config
config.PROTOCOL_VERSION += 1
import gcref
from tests.support.tasks import inc

executor = gcref.Executor("polaris")
error = executor.submit(inc, 1).exception(20)
print(type(error).__name__, error)
"""


def test_a_client_of_another_protocol_version(two_sites: Sites, polaris: Executor) -> None:
    """A process in which gcref has another version number, as after an upgrade on one side."""
    done = subprocess.run(
        [sys.executable, "-c", _OTHER_VERSION],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=patience(30),
        check=False,
    )
    here = config.PROTOCOL_VERSION
    for word in ("VersionMismatchError", "'polaris'", f"version {here + 1}", f"{here};", "install the same"):
        assert word in done.stdout, f"{done.stdout}\n{done.stderr}"
    serves(polaris)


# ------------------------------------------------------------------------------------------ values that have no bytes


def test_an_argument_that_cannot_be_pickled(polaris: Executor) -> None:
    """V5 as well: it raises at `submit`, and the executor is unharmed."""
    lock, items = threading.Lock(), (n for n in range(3))
    tries: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((lock,), {}, "argument 1"),
        ((1, {"deep": [lock]}), {}, "argument 2"),
        ((), {"x": items}, "keyword 'x'"),
    ]
    for args, kwargs, named in tries:
        with pytest.raises(SerializationError) as caught:
            polaris.submit(inc, *args, **kwargs)
        says(caught.value, named, "cannot be pickled")
        assert caught.value.argument == named
        assert isinstance(caught.value, TypeError)
        with pytest.raises(SerializationError):
            list(polaris.map(inc, [1, *args, *kwargs.values()]))
    with pytest.raises(SerializationError):
        polaris.submit(lambda: lock)
    with pytest.raises(SerializationError):
        polaris.put(items)
    with pytest.raises(TypeError, match=r"Executor\(\)"):
        polaris.submit(inc, polaris)
    serves(polaris)


def test_a_result_that_cannot_be_pickled(polaris: Executor, midway: Executor) -> None:
    """V6 as well: that future fails, and the worker lives on."""

    def generator() -> object:
        return (n for n in range(3))

    def nested() -> object:
        return {"locks": [threading.Lock()]}

    def pid() -> int:
        return os.getpid()

    workers = {polaris.submit(pid).result(SOON_S) for _ in range(20)}
    for fn, named in ((generator, "generator"), (nested, "lock")):
        f = polaris.submit(fn)
        with pytest.raises(SerializationError) as caught:
            f.result(SOON_S)
        says(caught.value, named)
        dependent = midway.submit(inc, f)
        error = dependent.exception(SOON_S)
        assert error is not None
        assert isinstance(error.__cause__, SerializationError)
    assert {polaris.submit(pid).result(SOON_S) for _ in range(20)} <= workers


def test_something_that_is_no_function(polaris: Executor) -> None:
    with pytest.raises(TypeError):
        polaris.submit(7).result(SOON_S)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inc"):
        polaris.submit(inc, 1, 2).result(SOON_S)
    serves(polaris)


# ------------------------------------------------------------------------------------------- over the store's limit


@pytest.fixture
def small(home: Path) -> Iterator[Executor]:
    """An endpoint with a store of 4 MiB."""
    with (
        LocalEndpoint("small", workers=1, config={"store_limit_bytes": LIMIT_BYTES}) as site,
        Executor(site.endpoint_id) as executor,
    ):
        yield executor


def is_too_large(error: BaseException | None) -> None:
    assert isinstance(error, StoreFullError)
    says(error, "object of 60000", str(LIMIT_BYTES), "store_limit_bytes")
    assert error.needed_bytes is not None
    assert error.needed_bytes >= 6_000_000
    assert error.limit_bytes == LIMIT_BYTES


def test_a_result_an_argument_and_a_put_over_the_limit(small: Executor) -> None:
    is_too_large(small.submit(blob_of, 6_000_000).exception(SOON_S))
    is_too_large(small.put(bytes(6_000_000)).exception(SOON_S))
    is_too_large(small.submit(len, bytes(6_000_000)).exception(SOON_S))
    assert len(small.submit(blob_of, 3_000_000).result(SOON_S)) == 3_000_000
    serves(small)


def test_an_argument_from_another_site_over_the_limit(small: Executor) -> None:
    with LocalEndpoint("large", workers=1) as site, Executor(site.endpoint_id) as executor:
        f = executor.submit(blob_of, 6_000_000)
        error = small.submit(len, f).exception(SOON_S)
        assert error is not None
        is_too_large(error if isinstance(error, StoreFullError) else error.__cause__)
        assert len(f.result(SOON_S)) == 6_000_000, "it is well at its home"
        assert executor.submit(len, f).result(SOON_S) == 6_000_000
    serves(small)


# ----------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("table", "key", "words"),
    [
        ({"workrs": 1}, "workrs", ("workrs", "workers")),
        ({"store_limit_bytes": -1}, "store_limit_bytes", ("store_limit_bytes", "-1", "8 GiB")),
        ({"carriers": ["pigeon"]}, "carriers", ("carriers", "pigeon", "direct")),
        ({"heartbeat_s": "soon"}, "heartbeat_s", ("heartbeat_s", "seconds")),
    ],
)
def test_a_setting_that_cannot_be(
    home: Path, table: dict[str, Any], key: str, words: tuple[str, ...]
) -> None:
    before = run_processes().keys()
    with pytest.raises(ConfigError) as caught:
        LocalEndpoint("x", config=table)
    says(caught.value, *words)
    assert caught.value.key == key
    assert caught.value.remedy
    assert records.read("x") is None
    with Executor(user_endpoint_config=table) as executor, pytest.raises(ConfigError) as caught:
        executor.submit(inc, 1).result(SOON_S)
    says(caught.value, *words)
    wait_until(lambda: run_processes().keys() <= before, what=lambda: f"the end of {run_processes()}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('carrriers = ["ipc"]\n', ("carrriers", "known are")),
        ('carriers = ["pigeon"]\n', ("carriers", "pigeon", "choose from")),
        ("carriers = 5\n", ("carriers", "list")),
        ('hub_url = "example.org"\n', ("hub_url", "https://")),
        ("= 5\n", ("TOML", "line 1")),
    ],
)
def test_the_clients_configuration(two_sites: Sites, text: str, words: tuple[str, ...]) -> None:
    path = config.home() / "config.toml"
    path.write_text(text)
    try:
        with pytest.raises(ConfigError) as caught:
            Executor("polaris", Client())
    finally:
        path.unlink()
    says(caught.value, str(path), *words)
    assert caught.value.file == str(path)
    with Client() as client, Executor("polaris", client) as executor:
        serves(executor)


def test_carriers_that_do_not_exist_or_do_not_lead_there(
    two_sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="pigeon"):
        Client(carriers=("pigeon",))
    with pytest.raises(ConfigError, match="no carrier"):
        LocalEndpoint("x", carriers=())
    monkeypatch.setenv("GCREF_CARRIERS", "pigeon")
    with pytest.raises(ConfigError, match="GCREF_CARRIERS"):
        Client()
    monkeypatch.delenv("GCREF_CARRIERS")
    with (
        LocalEndpoint("tcp", workers=1, carriers=("direct",)),
        Client(carriers=("ipc",)) as client,
        Executor("tcp", client) as executor,
        pytest.raises(ConfigError) as caught,
    ):
        executor.submit(inc, 1).result(SOON_S)
    says(caught.value, "'tcp'", "tcp://", "Allow another carrier")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"retries": -1}, "retries"),
        ({"retries": True}, "retries"),
        ({"walltime_s": 0}, "walltime_s"),
        ({"walltime_s": "1 min"}, "walltime_s"),
        ({"resource_specification": {"cores": [1]}}, "resource_specification"),
        ({"batch_size": 0}, "batch_size"),
        ({"task_group_id": "no id"}, "no id"),
        ({"ship_modules": ["no_such_module"]}, "no_such_module"),
    ],
)
def test_options_that_cannot_be(two_sites: Sites, options: dict[str, Any], word: str) -> None:
    with pytest.raises((ConfigError, ValueError, SerializationError)) as caught:
        Executor("polaris", **options)
    says(caught.value, word)


def test_resources_that_the_endpoint_s_engine_does_not_understand(polaris: Executor) -> None:
    with pytest.raises(RejectedError) as caught:
        polaris.options(resource_specification={"cores": 1}).submit(inc, 1).result(SOON_S)
    says(caught.value, "resource_specification", "cores", "remove it")
    serves(polaris)


# --------------------------------------------------------------------------------------------- the same name, a port


def test_a_second_endpoint_of_the_same_name(two_sites: Sites, polaris: Executor) -> None:
    with pytest.raises(ConfigError) as caught:
        LocalEndpoint("polaris", workers=1)
    says(
        caught.value, "'polaris'", str(two_sites.polaris.pid), "endpoint-worker stop polaris", "another name"
    )
    serves(polaris)


@pytest.mark.parametrize("name", ["", "../x", "a b", "x" * 65, str(uuid.uuid4())])
def test_names_that_cannot_be(home: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LocalEndpoint(name)
    says(caught.value, repr(name), "cannot name an endpoint")


@pytest.mark.parametrize("key", ["port", "bulk_port"])
def test_a_taken_port(home: Path, key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            LocalEndpoint("x", workers=1, config={key: port})
        says(caught.value, f"127.0.0.1:{port}", f"{key} = 0")
        assert caught.value.key == key
        assert caught.value.remedy
    assert records.read("x") is None
    with LocalEndpoint("x", workers=1, config={key: port}), Executor("x") as executor:
        serves(executor)
