"""Which tests run side by side in `tests/run`: each module is in one of two lanes, which take about as long as each other."""

from __future__ import annotations

from pathlib import Path
from typing import Final

LANES: Final = (1, 2)

_SECOND: Final = frozenset(
    ("test_journal_size", "test_prompt_endings", "test_lost_peers", "test_agent_dies", "test_coming_back")
)
"""Modules of `integration` in the second lane, beside everything outside that folder."""


def lane_of(path: Path) -> int:
    """The lane of a test module."""
    return 2 if "integration" not in path.parts or path.stem in _SECOND else 1
