from __future__ import annotations

import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from gcref.errors import ConfigError, HubUnavailableError
from gcref.hub import database as rooms
from gcref.hub.database import HEAD, Base, Database, User
from tests.support.waiting import patience


def test_the_migrations_make_what_the_classes_say(database: Database) -> None:
    with database.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_the_last_migration_is_the_one_that_is_looked_for() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(rooms.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_current_head() == HEAD


def test_the_file_is_private_and_in_wal_with_foreign_keys(database: Database, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "hub.db").stat().st_mode) == 0o600
    with database.connect() as connection:
        found = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "foreign_keys")
        ]
    assert found == ["wal", 1]


def test_what_was_written_is_there_after_opening_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new' / 'hub.db'}"
    first = Database(url)
    first.write(lambda session: session.add(User(name="alice", created=1.0)))
    # Not closed: a process that was killed closes nothing.
    again = Database(url)
    assert again.read(lambda session: session.scalar(sa.select(User.name))) == "alice"
    again.close()
    first.close()


def test_a_write_that_fails_leaves_nothing(database: Database) -> None:
    def work(session: sa.orm.Session) -> None:
        session.add(User(name="alice", created=1.0))
        session.flush()
        raise KeyError

    with pytest.raises(KeyError):
        database.write(work)
    assert database.read(lambda session: session.scalar(sa.select(User.name))) is None


def test_writes_that_look_before_they_write_do_not_overtake_each_other(database: Database) -> None:
    """Each adds one to what it has read; with a lock taken too late, SQLite would refuse some, or lose them."""
    database.write(lambda session: session.add(User(name="counter", created=0.0)))
    both = threading.Barrier(8)

    def count(_number: int) -> None:
        both.wait()
        for _ in range(5):
            database.write(step)

    def step(session: sa.orm.Session) -> None:
        user = session.scalars(sa.select(User)).one()
        user.created += 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(8)))
    assert database.read(lambda session: session.scalar(sa.select(User.created))) == 40.0


def test_two_processes_that_make_the_tables_at_once_make_them_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'hub.db'}"
    at_once = threading.Barrier(6)

    def make(_: int) -> Database:
        at_once.wait(patience(10))
        return Database(url)

    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(make, range(6)))
    for one in made:
        one.close()


def test_a_database_that_is_busy_for_too_long_is_unavailable(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "BUSY_MS", 20)
    path = tmp_path / "hub.db"
    path.write_bytes(fresh.read_bytes())
    database, other = Database(f"sqlite:///{path}"), Database(f"sqlite:///{path}")

    def work(session: sa.orm.Session) -> None:
        session.add(User(name="alice", created=1.0))
        session.flush()
        with pytest.raises(HubUnavailableError, match="does not answer: database is locked"):
            other.write(lambda session: session.add(User(name="bob", created=1.0)))

    database.write(work)
    other.close()
    database.close()


def test_a_database_of_a_later_version_is_refused(database: Database, tmp_path: Path) -> None:
    database.write(
        lambda session: session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    )
    with pytest.raises(ConfigError, match="another version"):
        Database(f"sqlite:///{tmp_path / 'hub.db'}")


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hub.db").write_text("no database" * 1000)
    with pytest.raises(ConfigError, match="cannot be opened"):
        Database(f"sqlite:///{tmp_path / 'hub.db'}")
    with pytest.raises(ConfigError, match="cannot be opened"):
        Database(f"sqlite:///{tmp_path}")
    with pytest.raises(ConfigError, match="cannot be made"):
        Database(f"sqlite:///{tmp_path / 'hub.db' / 'hub.db'}")
    with pytest.raises(ConfigError, match="cannot be opened") as caught:
        Database("postgresql+psycopg://me:geheim@127.0.0.1:1/hub")
    assert "geheim" not in str(caught.value)
