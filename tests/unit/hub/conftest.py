from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcref.hub.database import Database
from gcref.hub.who import Who
from tests.unit.hub.people import user


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with all tables and nothing in them."""
    path = tmp_path_factory.mktemp("fresh") / "hub.db"
    Database(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def database(fresh: Path, tmp_path: Path) -> Iterator[Database]:
    shutil.copy(fresh, tmp_path / "hub.db")
    found = Database(f"sqlite:///{tmp_path / 'hub.db'}")
    yield found
    found.close()


@pytest.fixture
def alice(database: Database) -> Who:
    return user(database, "alice")


@pytest.fixture
def bob(database: Database) -> Who:
    return user(database, "bob")
