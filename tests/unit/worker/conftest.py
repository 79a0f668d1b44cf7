"""What tests of adopted workers share: an agent whose workers outlive it, and a task that waits for somebody else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.worker.fake_agent import ADOPT_S, FakeAgent


@pytest.fixture
def agent() -> Iterator[FakeAgent]:
    with FakeAgent(adopt_s=ADOPT_S) as made:
        yield made


@pytest.fixture
def pipe(tmp_path: Path) -> str:
    """A named pipe: who reads it waits until somebody writes."""
    made = str(tmp_path / "pipe")
    os.mkfifo(made)
    return made
