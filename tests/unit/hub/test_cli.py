"""The commands of the hub, on its database, in this process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gcref import cli
from gcref.hub import config, users
from gcref.hub.database import Database
from tests.support.programs import ROOT


@pytest.fixture(autouse=True)
def _home(home: Path) -> None:
    """A hub of its own."""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["hub", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_user_and_tokens_from_first_to_last(capsys: pytest.CaptureFixture[str]) -> None:
    code, token, told = run(capsys, "user", "add", "alice")
    assert code == 0
    assert "not shown again" in told
    assert token.strip() not in told
    database = Database(config.load().database)
    who = users.authenticate(database, token.strip())
    assert who is not None
    assert who.name == "alice"
    second = run(capsys, "token", "new", "alice")[1].strip()
    assert second != token.strip()
    shown = run(capsys, "token", "list", "alice")[1]
    assert [line.split()[0] for line in shown.splitlines()] == ["ID", "1", "2"]
    assert "never" in shown
    assert token.strip() not in shown
    assert run(capsys, "token", "revoke", "1") == (0, "", "")
    assert users.authenticate(database, token.strip()) is None
    assert users.authenticate(database, second) is not None
    assert run(capsys, "user", "list")[1].splitlines()[1].split()[0] == "alice"
    assert run(capsys, "user", "remove", "alice")[0] == 0
    assert users.authenticate(database, second) is None
    database.close()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("user", "add", "a/b"), "RejectedError"),
        (("user", "remove", "nobody"), "no user 'nobody'"),
        (("token", "new", "nobody"), "no user 'nobody'"),
        (("token", "list", "nobody"), "no user 'nobody'"),
        (("token", "revoke", "77"), "no token 77"),
        (("start", "--config", "/nowhere/hub.toml"), "ConfigError"),
        (("user", "list", "--config", "/nowhere/hub.toml"), "is not there"),
    ],
)
def test_what_cannot_be_done_says_why(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    code, out, told = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert says in told


def test_sharing_without_a_hub_says_what_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["share", "site", "bob"]) == 1
    assert "GCREF_HUB_URL" in capsys.readouterr().err


def test_without_the_extra_the_rest_works_and_the_hub_says_what_to_install() -> None:
    """Shown with an interpreter that cannot find these libraries."""
    hide = """
import sys
from importlib.machinery import PathFinder
hidden = {"alembic", "fastapi", "sqlalchemy", "uvicorn", "pydantic"}
real = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, *more: None if name.split(".")[0] in hidden else real(name, *more))
from gcref import cli
sys.exit(cli.main(sys.argv[1:]))
"""

    def without(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", hide, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    assert without("version")[0] == 0
    for arguments in (("hub", "start"), ("hub", "user", "list")):
        code, said = without(*arguments)
        assert code == 1
        assert "ConfigError" in said
        assert "pip install 'gcref[hub]'" in said
