"""Each example runs as its reader would run it, ends well, and shows what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.programs import ROOT


def run(name: str, *arguments: str, folder: Path) -> str:
    """The standard output of an example; it may leave nothing behind in its folder for temporary files."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    environment.pop("GCREF_HOME", None)
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    assert not list(folder.iterdir())
    return done.stdout


def test_all_examples_are_tested() -> None:
    tested = Path(__file__).read_text()
    for example in (ROOT / "examples").glob("*.py"):
        assert f'run("{example.name}"' in tested


def test_two_sites(tmp_path: Path) -> None:
    shown = run("01_two_sites.py", "--files", "200", folder=tmp_path)
    assert re.search(r"^200 files, \d+ lines, \d+ calls", shown, re.MULTILINE)
    assert re.search(r"^most imported: (?:sys|os) ", shown, re.MULTILINE)
    moved = re.search(r"^moved site to site +([\d.]+) MB (?:ipc|direct)", shown, re.MULTILINE)
    assert moved is not None, shown
    assert float(moved[1]) > 0.2
    carried = re.search(r"^payload through the client +(\d+) bytes +([\d.]+) MB", shown, re.MULTILINE)
    assert carried is not None, shown
    assert int(carried[1]) == 0
    assert float(carried[2]) > 0.4


def test_numpy_by_reference(tmp_path: Path) -> None:
    shown = run("02_numpy_by_reference.py", "--max-mb", "10", folder=tmp_path)
    for way in ("direct", "ipc"):
        for size in (1, 10):
            assert re.search(rf"^ +{size} MB +{way} +{size} MB +[\d.]+ +[\d.]+$", shown, re.MULTILINE), shown


def test_dynamic_graph(tmp_path: Path) -> None:
    package = Path(re.__file__).parents[1] / "concurrent"
    shown = run("03_dynamic_graph.py", str(package), folder=tmp_path)
    intervals = re.search(r"(\d+) intervals in (\d+) tasks on one worker", shown)
    assert intervals is not None, shown
    assert int(intervals[1]) > 20
    assert re.search(rf"^survey of {package}: \d+ directories at two sites", shown, re.MULTILINE)
    assert re.search(r"^  \.py +[\d.]+ MB$", shown, re.MULTILINE)


def test_failures(tmp_path: Path) -> None:
    shown = run("04_failures.py", folder=tmp_path)
    for expected in (
        r"ValueError: could not convert string to float: '21.5 °C'",
        r"in read_temperature",  # the remote traceback
        r"the sound branch ends well: 294.65",
        r"DependencyError < GcrefError.*\n(?:.*\n)*?.*because of ValueError",
        r"with retries=1: worked the second time",
        r"WorkerLostError < LostError < GcrefError",
        r"SerializationError < GcrefError < TypeError.*argument 2",
        r"WalltimeExceededError < GcrefError < TimeoutError",
        r"asked again: 1 s passed",
        r"cancelled: True; the one before it: 0.5 s passed",
        r"because of CancelledError",
        r"NotFoundError.*atlantis",
    ):
        assert re.search(expected, shown), f"{expected}\n{shown}"


def test_asyncio(tmp_path: Path) -> None:
    shown = run("05_asyncio.py", folder=tmp_path)
    assert re.search(r"^gather: \d+ packages; \w+ repeats \d+ of \d+ lines$", shown, re.MULTILINE)
    assert re.search(r"^as_completed: first \w+, last \w+$", shown, re.MULTILINE)
    assert "wait_for: not there after 0.1 s; awaited again: 144; and once more: 144" in shown
    beats = re.search(r"loop: (\d+) beats of 10 ms in ([\d.]+) s", shown)
    assert beats is not None, shown
    assert int(beats[1]) > 20


def test_behind_firewalls(tmp_path: Path) -> None:
    shown = run("06_behind_firewalls.py", "--files", "60", folder=tmp_path)
    assert re.search(r"^60 files, \d+ lines, \d+ calls", shown, re.MULTILINE), shown
    if os.geteuid() == 0:
        assert "each have a network of their own" in shown
    for carrier, least in (("ipc", 0.0), ("direct", 0.0), ("broker", 0.1)):
        moved = re.search(rf"^{carrier} +([\d.]+) MB +([\d.]+) MB$", shown, re.MULTILINE)
        assert moved is not None, shown
        assert float(moved[1]) == 0.0 if least == 0.0 else float(moved[1]) >= least
        assert float(moved[2]) == 0.0, "the client carries no payload"
