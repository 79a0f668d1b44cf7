"""A hub as its administrators run it: on PostgreSQL, and behind TLS."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from gcref import ids
from gcref.directory.hub import HubClient, Registration
from gcref.errors import AuthError, HubUnavailableError, NotFoundError
from gcref.hub.database import Base, Database
from tests.support.hub import Hub
from tests.support.ports import free_ports
from tests.support.waiting import patience, wait_until

PROGRAMS = Path("/usr/lib/postgresql")


class PostgreSQL:
    """A database server of one's own, on a port of this machine."""

    def __init__(self, folder: Path) -> None:
        found = sorted(PROGRAMS.glob("*/bin/initdb"))
        assert found, "PostgreSQL is not installed: bash tests/run does it"
        self._programs = found[-1].parent
        self._folder = folder
        self._log = folder / "log"
        # It refuses to run as root.
        self._user = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
        folder.mkdir(mode=0o755)
        if self._user is not None:
            os.chown(folder, self._user.pw_uid, self._user.pw_gid)
        (self.port,) = free_ports(1)
        self.url = f"postgresql://hub@127.0.0.1:{self.port}/postgres"
        data = str(folder / "data")
        subprocess.run(
            [
                self._programs / "initdb",
                "-D",
                data,
                "-A",
                "trust",
                "-U",
                "hub",
                "-N",
                "--no-locale",
                "-E",
                "UTF8",
            ],
            check=True,
            capture_output=True,
            timeout=patience(60),
            **self._as_user(),
        )
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [
                    str(self._programs / "postgres"),
                    *("-D", data, "-h", "127.0.0.1", "-p", str(self.port), "-k", str(folder)),
                    *("-c", "fsync=off", "-c", "shared_buffers=16MB"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **self._as_user(),
            )
        wait_until(self._is_ready, timeout_s=30, what=lambda: f"PostgreSQL:\n{self._log.read_text()[-2000:]}")

    def stop(self) -> None:
        """End it; connections are closed."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(patience(20))

    def _as_user(self) -> dict[str, Any]:
        if self._user is None:
            return {}
        # Its own folder: it may not be able to enter ours.
        return {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": [], "cwd": "/"}

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()[-2000:]
        return "ready to accept connections" in self._log.read_text()


@pytest.fixture(scope="module")
def postgresql(_nothing_left: None) -> Iterator[PostgreSQL]:
    # Not below pytest's own folder, which is closed to the server's user.
    folder = Path("/tmp") / f"gcref-test-{os.urandom(6).hex()}"
    found = PostgreSQL(folder)
    yield found
    found.stop()
    shutil.rmtree(folder)


def site(number: int) -> Registration:
    id = ids.new_id()
    key = f"{id.hex()}********"
    record = {"id": ids.text(id), "name": f"site-{number}", "public_key": key, "running": True}
    return Registration(id, "endpoint", f"site-{number}", key, record, trust_hub=True)


def test_a_hub_on_postgresql(postgresql: PostgreSQL, tmp_path: Path) -> None:
    """The tables, requests at the same time, and what goes with a user."""
    with Hub(tmp_path, database=postgresql.url) as hub:
        database = Database(hub.database_url)
        with database.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        database.close()
        alice, bob, sites = hub.client("alice"), hub.client("bob"), [site(number) for number in range(8)]

        def live(one: Registration) -> None:
            assert alice.register(one).owner == "alice"
            alice.heartbeat(one.id)
            alice.report(one.id, [(one.id, "done", 1.5)])
            alice.share(one.name, "bob")
            assert bob.find(f"alice/{one.name}").id == one.id

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(live, sites))
            list(pool.map(alice.register, [sites[0]] * 16))
            list(pool.map(lambda _: alice.put_function(*FUNCTION), range(8)))
        assert alice.get_function(FUNCTION[0]) == FUNCTION[1]
        assert {record.id for record in bob.endpoints()} == {one.id for one in sites}
        assert [event.at for event in bob.where_is(sites[3].id)] == [1.5]
        alice.withdraw(sites[3].id)
        assert bob.where_is(sites[3].id) == []
        hub.command("hub", "user", "remove", "alice")
        assert bob.endpoints() == []
        with pytest.raises(AuthError):
            alice.heartbeat(sites[0].id)


FUNCTION = (blake2b(b"code", digest_size=16).digest(), b"code")


def test_a_hub_behind_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = tmp_path / "hub.crt", tmp_path / "hub.key"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
            ),
            *(
                "-keyout",
                key,
                "-out",
                certificate,
                "-subj",
                "/CN=hub",
                "-addext",
                "subjectAltName=IP:127.0.0.1",
            ),
        ],
        check=True,
        capture_output=True,
        timeout=patience(30),
    )
    with Hub(tmp_path / "hub", cert=str(certificate), key=str(key)) as hub:
        with pytest.raises(AuthError, match=r"certificate .* is not trusted.*REQUESTS_CA_BUNDLE"):
            hub.client("alice").whoami()
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert hub.client("alice").whoami() == "alice"
        with pytest.raises(NotFoundError):
            hub.client("alice").find("site")
        plain = HubClient(hub.url.replace("https", "http"), hub.token("alice"))
        with pytest.raises(HubUnavailableError):
            plain.whoami()
        plain.close()
