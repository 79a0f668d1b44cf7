"""Programs as a user writes them, each run in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Final

from tests.support.waiting import patience

ROOT: Final = Path(__file__).resolve().parents[2]
"""The folder that holds our packages and these tests."""

_FIRST_LINES: Final = "import gcref\nfrom tests.support.tasks import *\n"


def environment() -> dict[str, str]:
    """Ours, with our packages and these tests on the import path."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def command_of(text: str, folder: Path) -> list[str]:
    """Writes a program, and says how to run it; each warning is an error there.

    Args:
        text: its lines, indented as is handy here; `gcref` and the functions of `tests.support.tasks` are imported.
        folder: where its file goes.
    """
    path = folder / "program.py"
    path.write_text(_FIRST_LINES + textwrap.dedent(text))
    return [sys.executable, "-W", "error", str(path)]


def output_of(text: str, folder: Path, *arguments: str) -> str:
    """What a program prints that ends in order and warns of nothing."""
    done = subprocess.run(
        [*command_of(text, folder), *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=patience(50),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), f"{done.stdout}\n{done.stderr}"
    return done.stdout
