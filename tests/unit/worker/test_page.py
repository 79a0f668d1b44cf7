"""The page of a worker: what is noted is found again, whatever happened to the one who noted it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint_worker.worker import page as pages
from endpoint_worker.worker.page import Page

AREA = 512 * 1024


@pytest.fixture
def path(tmp_path: Path) -> str:
    made = str(tmp_path / "page")
    pages.create(made)
    return made


@pytest.fixture
def page(path: str) -> Iterator[Page]:
    made = Page(path)
    yield made
    made.close()


def test_progress_is_seen_by_another_mapping(path: str, page: Page) -> None:
    other = Page(path)
    assert other.progress == 0
    page.words[0] = 2**63 + 5
    assert other.progress == 2**63 + 5
    other.close()


def test_a_start_is_told_whole_or_not_at_all(path: str, page: Page) -> None:
    other = Page(path)
    assert other.started() is None
    page.start(7, 2, b"i" * 16)
    assert other.started() == (7, 2, b"i" * 16)
    # The next one is noted, and has not begun: the one before has ended.
    pages.START.pack_into(page.mapping, pages.START_AT, 9, 1, b"j" * 16)
    assert other.started() is None
    assert other.progress == 7
    page.words[0] = 9
    assert other.started() == (9, 1, b"j" * 16)
    assert other.begun() == 9
    page.unstart()
    assert (other.started(), other.progress, other.begun()) == (None, 9, 8)
    other.close()


def test_what_others_write_is_found(path: str, page: Page) -> None:
    assert (page.end(), page.pid, page.blocked, page.note()) == (None, 0, False, b"")
    page.sign()
    page.words[pages.BLOCKED] = 1
    pages.note_end(path, 0, None)
    other = Page(path)
    assert (other.end(), other.pid, other.blocked) == ((0, None), os.getpid(), True)
    pages.note_end(path, None, 9)
    assert other.end() == (None, 9)
    other.close()
    pages.create(path, b"note")
    pages.note_end(path + "?", 0, None)
    other = Page(path)
    assert (other.note(), other.end()) == (b"note", None)
    other.close()


def test_what_is_no_page_is_not_mapped(tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(b"short")
    with pytest.raises(OSError, match="no page"):
        Page(str(tmp_path / "page"))


def test_results_are_found_in_order(path: str, page: Page) -> None:
    results = [b"%d" % n * (n % 50) for n in range(1000)]
    for result in results:
        page.add(result)
    other = Page(path)
    assert other.results() == results
    other.close()


@given(st.lists(st.integers(0, 100_000), max_size=40))
def test_the_last_results_are_there_when_it_has_turned(sizes: list[int]) -> None:
    """At least as much as one area holds is found again, and in order."""
    import tempfile

    descriptor, path = tempfile.mkstemp(dir="/dev/shm")
    os.close(descriptor)
    pages.create(path)
    page = Page(path)
    added = [bytes([n]) * size for n, size in enumerate(sizes)]
    for result in added:
        page.add(result)
    found = page.results()
    page.close()
    os.unlink(path)
    assert found == added[len(added) - len(found) :]
    missing = added[: len(added) - len(found)]
    assert not missing or sum(map(len, found)) + len(missing[-1]) + 4 * (len(found) + 1) > AREA


def test_a_result_larger_than_an_area_is_passed_over(page: Page) -> None:
    page.add(b"a")
    page.add(bytes(AREA))
    page.add(b"b")
    page.add(bytes(AREA - 4))
    assert page.results() == [b"a", b"b", bytes(AREA - 4)]


def test_a_spoiled_page_is_read_without_harm(path: str, page: Page) -> None:
    for n in range(10):
        page.add(b"%d" % n)
    page.words[1] = 2**63
    page.words[3] = 77
    assert page.results()[:10] == [b"%d" % n for n in range(10)]
    page.mapping[4096:4100] = b"\xff" * 4
    assert page.results() == []
    with pytest.raises(FileNotFoundError):
        Page(path + "?")
