"""The page of a worker: what is noted is found again, whatever happened to the one who noted it."""

from __future__ import annotations

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
    import os
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
    page._mapping[4096:4100] = b"\xff" * 4
    assert page.results() == []
    with pytest.raises(FileNotFoundError):
        Page(path + "?")
