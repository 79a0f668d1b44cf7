"""Random graphs under random faults, with seeds that are the same each time; `python -m tests.chaos` tries others.

What a run must keep is said by the laws in `checker`. When one fails, its report names the seed, the law, and the story of
the task; its folder, with the history and the agents' logs, is below pytest's own temporary folder.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.run import Settings, run

SEEDS = (
    Settings(1, tasks=30, duration_s=2.0),
    Settings(2, tasks=60, duration_s=4.0),
    Settings(3, tasks=60, duration_s=4.0, endpoints=3),
    Settings(202, tasks=60, duration_s=4.0, agents_die=True),
    Settings(210, tasks=60, duration_s=4.0, agents_die=True, endpoints=3),
    Settings(215, tasks=60, duration_s=4.0, agents_die=True),
)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("settings", SEEDS, ids=lambda settings: str(settings.seed))
def test_laws_hold_whatever_breaks(settings: Settings, tmp_path: Path) -> None:
    verdict = run(settings, tmp_path)
    assert not verdict.violations, verdict.report
