"""The hub's tables, and how they are read and written.

    users ─┬─ tokens
           ├─ parties ─┬─ shares (with other users)
           │           └─ task_events
           └─ functions                          removals: what is still to be taken away at the broker

Rules:
    - A write is one transaction that takes the write lock first (SQLite: `BEGIN IMMEDIATE`), so it never has to give up
      half-way because somebody else wrote in between. It may be run again, so it does nothing but read and write here.
    - The tables are made and changed by migrations alone (`migrations/`); a test compares them with these classes.
    - Times are Unix seconds. Ids, digests and hashes are bytes.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from gcref.errors import ConfigError, HubUnavailableError

T = TypeVar("T")

# The last of `migrations/versions`.
HEAD: Final = "0001"
# How long a write waits for its turn before the caller is told to come again.
BUSY_MS: Final = 8_000
_WAL_RETRY_S: Final = 0.01
# Any number, as long as all hubs agree on it: who migrates PostgreSQL holds this lock.
_MIGRATION_LOCK: Final = 0x67637265


class Base(DeclarativeBase):
    """All tables."""

    # What `float` means by itself differs between SQLAlchemy 2.0 and 2.1.
    type_annotation_map: ClassVar[dict[Any, Any]] = {float: sa.Double()}
    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def _belongs_to(table: str, **more: Any) -> Any:
    return mapped_column(sa.ForeignKey(f"{table}.id", ondelete="CASCADE"), **more)


class User(Base):
    """Somebody with a name."""

    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(64), unique=True)
    created: Mapped[float]


class Token(Base):
    """What proves who somebody is; only its SHA-256 is here."""

    __tablename__ = "tokens"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = _belongs_to("users", index=True)
    digest: Mapped[bytes] = mapped_column(sa.LargeBinary(32), unique=True)
    created: Mapped[float]
    last_used: Mapped[float | None]


class Party(Base):
    """A client or an endpoint. An endpoint that has been silent for too long is `expired`: its name and shares stay."""

    __tablename__ = "parties"
    id: Mapped[bytes] = mapped_column(sa.LargeBinary(16), primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(16))
    name: Mapped[str] = mapped_column(sa.String(64))
    user_id: Mapped[int] = _belongs_to("users", index=True)
    token_id: Mapped[int | None] = mapped_column(sa.ForeignKey("tokens.id", ondelete="SET NULL"), index=True)
    public_key: Mapped[str] = mapped_column(sa.String(40))
    record: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    trust_hub: Mapped[bool]
    wants_mailbox: Mapped[bool]
    mailbox_ready: Mapped[bool]
    mailbox_reason: Mapped[str | None] = mapped_column(sa.String(500))
    running: Mapped[bool]
    expired: Mapped[bool]
    registered: Mapped[float]
    seen: Mapped[float] = mapped_column(index=True)


class Share(Base):
    """A user, other than its owner, who may use an endpoint."""

    __tablename__ = "shares"
    party_id: Mapped[bytes] = _belongs_to("parties", primary_key=True)
    user_id: Mapped[int] = _belongs_to("users", primary_key=True, index=True)
    since: Mapped[float]


class Function(Base):
    """A function's bytes, as a user has put them here."""

    __tablename__ = "functions"
    user_id: Mapped[int] = _belongs_to("users", primary_key=True)
    digest: Mapped[bytes] = mapped_column(sa.LargeBinary(16), primary_key=True)
    code: Mapped[bytes] = mapped_column(sa.LargeBinary)
    size_bytes: Mapped[int]
    created: Mapped[float]


class TaskEvent(Base):
    """What an endpoint has told of a task."""

    __tablename__ = "task_events"
    id: Mapped[int] = mapped_column(primary_key=True)
    task: Mapped[bytes] = mapped_column(sa.LargeBinary(16), index=True)
    party_id: Mapped[bytes] = _belongs_to("parties", index=True)
    state: Mapped[str] = mapped_column(sa.String(32))
    at: Mapped[float]
    noted: Mapped[float] = mapped_column(index=True)


class Removal(Base):
    """A party whose user and queue are to go from the broker. No foreign key: the party itself has gone."""

    __tablename__ = "removals"
    party_id: Mapped[bytes] = mapped_column(sa.LargeBinary(16), primary_key=True)
    since: Mapped[float]


class Database:
    """The hub's memory. Any thread may use it.

    Args:
        url: SQLAlchemy's, `sqlite:///…` or `postgresql+psycopg://…`.

    Raises:
        ConfigError: it cannot be opened, or a later version has changed it.
    """

    def __init__(self, url: str) -> None:
        self.shown = sa.make_url(url).render_as_string(hide_password=True)
        self._is_sqlite = url.startswith("sqlite")
        if self._is_sqlite:
            _make_private(Path(url.removeprefix("sqlite:///")))
        try:
            self._engine = self._made(url)
        except ImportError as error:
            raise ConfigError(
                f"the database {self.shown} needs a library that is not installed: {error}",
                key="database",
                remedy="pip install 'gcref[hub,postgresql]'",
            ) from error
        self._writer = self._engine.execution_options(gcref_writes=True)
        try:
            self._migrate()
        except ConfigError:
            self.close()
            raise
        except sa.exc.SQLAlchemyError as error:
            self.close()
            raise ConfigError(
                f"the database {self.shown} cannot be opened: {_brief(error)}",
                key="database",
                remedy="see that it is there and that you may write to it",
            ) from error

    def read(self, work: Callable[[Session], T]) -> T:
        """Run `work` with a view of the database.

        Raises:
            HubUnavailableError: the database does not answer.
        """
        try:
            with Session(self._engine) as session:
                return work(session)
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
            raise self._down(error) from error

    def write(self, work: Callable[[Session], T]) -> T:
        """Run `work` as one transaction: all of it happens, and is on disk, or nothing of it does.

        Args:
            work: may run twice, so it touches nothing but the session.

        Raises:
            HubUnavailableError: the database does not answer, or is busy for too long.
        """
        for last in (False, True):
            try:
                with Session(self._writer, expire_on_commit=False) as session, session.begin():
                    return work(session)
            except sa.exc.IntegrityError as error:
                # On PostgreSQL somebody may have made the same row at the same time: look again.
                if last:
                    raise HubUnavailableError("two requests were in each other's way: try again") from error
            except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
                raise self._down(error) from error
        raise AssertionError("unreachable")

    def check(self) -> None:
        """See whether the database answers. Raises as `read` does."""
        self.read(lambda session: session.execute(sa.text("SELECT 1")))

    def connect(self) -> sa.Connection:
        """A connection, for whoever wants to look at the tables themselves."""
        return self._engine.connect()

    def close(self) -> None:
        """Let go of the connections."""
        self._engine.dispose()

    def _made(self, url: str) -> sa.Engine:
        if not self._is_sqlite:
            return sa.create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=30, pool_timeout=5)
        # As many connections as the web server has threads.
        engine = sa.create_engine(url, pool_size=10, max_overflow=40, pool_timeout=5)
        sa.event.listen(engine, "connect", _on_connect)
        sa.event.listen(engine, "begin", _on_begin)
        return engine

    def _migrate(self) -> None:
        with self._engine.connect() as connection:
            if sa.inspect(connection).has_table("alembic_version"):
                found = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
                if found == HEAD:
                    return
        # Alembic is loaded only where there is something to change.
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option(
            "script_location", str(Path(__file__).parent / "migrations").replace("%", "%%")
        )
        with self._writer.begin() as connection:
            if not self._is_sqlite:
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(:id)"), {"id": _MIGRATION_LOCK})
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise ConfigError(
                    f"the database {self.shown} was made by another version of gcref: {error}",
                    key="database",
                    remedy="use that version, or another database",
                ) from error

    def _down(self, error: Exception) -> HubUnavailableError:
        return HubUnavailableError(f"the hub's database does not answer: {_brief(error)}")


def _on_connect(connection: Any, _record: Any) -> None:
    # The driver would begin transactions of its own, and too late; `_on_begin` does it.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
    _use_wal(cursor)
    # What has been acknowledged survives a loss of power too: nobody here counts microseconds.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _use_wal(cursor: sqlite3.Cursor) -> None:
    """Only the first connection ever changes the file. Of several at once SQLite refuses all but one, without waiting."""
    until = time.monotonic() + BUSY_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(_WAL_RETRY_S)


def _on_begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("gcref_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _make_private(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Never opened when it is there: closing it would take SQLite's locks in this process away.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise ConfigError(
            f"the database {path} cannot be made: {error.strerror}",
            file=str(path),
            key="database",
            remedy="name a file that you can write to",
        ) from error


def _brief(error: Exception) -> str:
    # SQLAlchemy adds the statement and its parameters, which may be secrets.
    return str(getattr(error, "orig", None) or type(error).__name__).strip().splitlines()[0][:300]
