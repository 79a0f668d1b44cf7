"""Who is let in: another person asks to use an endpoint, is let in by a line in a file, and is put out again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from endpoint_worker import status
from gcref import Client, Executor, LocalEndpoint, config
from gcref.carriers import keys
from gcref.directory import records
from gcref.errors import AuthError
from tests.support.waiting import patience, wait_until

SOON_S = 20.0


@pytest.fixture
def site() -> Iterator[records.EndpointRecord]:
    """An endpoint of ours, reachable over TCP only, as others reach it."""
    with LocalEndpoint("site", workers=1, carriers=("direct",)):
        record = records.read("site")
        assert record is not None
        yield record


@pytest.fixture
def theirs(site: records.EndpointRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """The other person: from now on this process is theirs. Our list of allowed keys, and the line that lets them in.

    A client keeps the key that it started with, so each test makes one of its own.
    """
    listed = records.endpoint_dir("site") / "authorized_keys"
    monkeypatch.setenv("GCREF_HOME", str(tmp_path / "theirs"))
    records.write(dataclasses.replace(site, host_nonce="", control=site.control, bulk=site.bulk))
    pair = keys.load_or_create(config.home() / "keys" / "user.key")
    return listed, f"{pair.public.decode()} user ada\n"


def test_a_key_that_is_not_listed_is_refused_with_an_auth_error(
    site: records.EndpointRecord, theirs: tuple[Path, str]
) -> None:
    with pytest.raises(AuthError, match="site"):
        status.ask(site)
    with Client() as client, Executor("site", client) as executor, pytest.raises(AuthError):
        executor.submit(pow, 2, 2).result(timeout=patience(SOON_S))


def test_a_listed_key_is_let_in_at_once_and_put_out_again_when_it_is_taken_out(
    site: records.EndpointRecord, theirs: tuple[Path, str]
) -> None:
    listed, line = theirs
    listed.write_text(f"# friends\n{line}")

    def is_in() -> bool:
        try:
            return bool(status.ask(site)["name"] == "site")
        except AuthError:
            return False

    wait_until(is_in, timeout_s=SOON_S, what="the new key to be let in")
    with Client() as client, Executor("site", client) as executor:
        assert executor.submit(pow, 2, 3).result(timeout=patience(SOON_S)) == 8
        listed.write_text("# nobody\n")
        wait_until(lambda: not is_in(), timeout_s=SOON_S, what="the key to be refused")
        # The connection of this executor is open: it ends too.
        with pytest.raises(AuthError):
            executor.submit(pow, 2, 4).result(timeout=patience(SOON_S))


def test_a_peer_may_not_submit(site: records.EndpointRecord, theirs: tuple[Path, str]) -> None:
    listed, line = theirs
    listed.write_text(line.replace(" user ", " peer "))
    with Client() as client, Executor("site", client) as executor, pytest.raises(AuthError):
        executor.submit(pow, 2, 5).result(timeout=patience(SOON_S))
