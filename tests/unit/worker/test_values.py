"""Mappings and kept results of a worker, without a worker: every grant comes back once, and no bytes too early."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from endpoint_worker.worker.values import RECENT_MAX, SMALL_BYTES, Kept, Mappings

paths = st.sampled_from(("a", "b", "c"))


class MappingsMachine(RuleBasedStateMachine):
    """Entries come, start, end, are taken away; their values live as long as they like."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="gcref-test-", dir="/dev/shm"))
        self.mappings = Mappings()
        self.granted: dict[str, int] = {}
        self.queued: list[str] = []
        self.views: list[tuple[str, memoryview]] = []
        self.tainted: set[str] = set()
        for name in "abc":
            (self.folder / name).write_bytes(name.encode() * 100)

    def place(self, name: str) -> list[object]:
        return [str(self.folder / name), 100]

    @rule(name=paths)
    def comes(self, name: str) -> None:
        self.mappings.granted(str(self.folder / name))
        self.granted[name] = self.granted.get(name, 0) + 1
        self.queued.append(name)

    @rule()
    def is_taken_away(self) -> None:
        if self.queued:
            self.mappings.passed_over(str(self.folder / self.queued.pop()))

    @rule(maps=st.booleans(), keeps=st.booleans(), forks=st.booleans())
    def runs(self, maps: bool, keeps: bool, forks: bool) -> None:
        if not self.queued:
            return
        name = self.queued.pop(0)
        self.mappings.started(str(self.folder / name))
        if maps:
            view = self.mappings.map(self.place(name))
            assert view == name.encode() * 100
            assert view.readonly
            assert self.mappings.map(self.place(name)).obj is view.obj, "mapped once"
            if keeps:
                self.views.append((name, view))
            if forks:
                self.mappings.taint()
                self.tainted |= {name for name in "abc" if self.is_mapped(name)}
            del view
        self.mappings.let_go()

    @rule()
    def a_value_goes(self) -> None:
        if self.views:
            self.views.pop(0)

    @rule(everything=st.booleans())
    def tries_again(self, everything: bool) -> None:
        self.mappings.retry(everything=everything)

    def is_mapped(self, name: str) -> bool:
        found = self.mappings._paths.get(str(self.folder / name))
        return found is not None and found.mapping is not None

    @invariant()
    def what_comes_back_is_what_nobody_sees(self) -> None:
        for path, grants, reusable in self.mappings.take_returned():
            name = Path(path).name
            assert grants == self.granted.pop(name)
            assert name not in self.queued
            assert name not in {seen for seen, _ in self.views}
            assert reusable == (name not in self.tainted)
            self.tainted.discard(name)

    @invariant()
    def kept_views_are_what_they_were(self) -> None:
        for name, view in self.views:
            assert view == name.encode() * 100

    def teardown(self) -> None:
        self.views.clear()
        while self.queued:
            self.is_taken_away()
        self.mappings.retry(everything=True)
        self.what_comes_back_is_what_nobody_sees()
        assert not self.granted, "every grant comes back"
        assert not self.mappings.held
        shutil.rmtree(self.folder)


TestMappings = MappingsMachine.TestCase
TestMappings.settings = settings(max_examples=60, stateful_step_count=40)


@pytest.fixture
def kept() -> Kept:
    return Kept()


def test_small_results_are_kept_for_a_while(kept: Kept) -> None:
    recent = kept.recent
    for n in range(3 * RECENT_MAX):
        recent[b"%d" % n] = b"x"
        if len(recent) > RECENT_MAX:
            recent = kept.turn()
    assert kept.get(b"%d" % (3 * RECENT_MAX - 1)) == b"x"
    assert kept.get(b"%d" % (2 * RECENT_MAX)) == b"x"
    assert kept.get(b"0") is None


def test_large_results_are_kept_up_to_a_sum(kept: Kept) -> None:
    blob = bytes(100 * SMALL_BYTES)
    for n in range(100):
        kept.add_large(b"%d" % n, blob)
    assert kept.get(b"99") is blob
    assert kept.get(b"0") is None
    assert sum(kept.get(b"%d" % n) is not None for n in range(100)) == 81
