"""Fixtures for all tests: a home of one's own, two sites, a gate, and a look for what a module left behind."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import hypothesis
import pytest

from tests.support import by_mail, lanes
from tests.support.leaks import Traces, assert_nothing_left, mark_run, start_library_threads
from tests.support.tasks import Gate

if TYPE_CHECKING:
    from gcref import Client, Executor, LocalEndpoint
    from tests.support.hub import Hub
    from tests.support.rabbit import Rabbit

# The machine may be busy: how long an example takes says nothing. Examples that failed are kept by no one else.
hypothesis.settings.register_profile(
    "gcref",
    deadline=None,
    max_examples=int(os.environ.get("GCREF_TEST_EXAMPLES", "60")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
    database=None,
    print_blob=True,
)
hypothesis.settings.load_profile("gcref")

_OURS = ("GCREF_HOME", "GCREF_HUB_URL", "GCREF_TOKEN", "GCREF_CARRIERS")


class Sites(NamedTuple):
    """Two endpoints on this machine: `A, B = two_sites`."""

    polaris: LocalEndpoint
    midway: LocalEndpoint


class Work(NamedTuple):
    """A client of its own, with an executor at each of two sites."""

    client: Client
    a: Executor
    b: Executor


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--lane", type=int, choices=lanes.LANES, help="only the tests of this lane; together they are all"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of other lanes, for `tests/run`."""
    lane = config.getoption("--lane")
    if lane is not None:
        others = [item for item in items if lanes.lane_of(item.path) != lane]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if lanes.lane_of(item.path) == lane]


def pytest_collection_finish() -> None:
    """What is imported and collected stays until the end: collections, of which there are two for each module, skip it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _marked_run() -> None:
    mark_run()
    start_library_threads()


@pytest.fixture(scope="module", autouse=True)
def _module_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every module has its own `GCREF_HOME`, and no settings of the person who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _OURS:
            patch.delenv(name, raising=False)
        home = tmp_path_factory.mktemp("home") / "gcref"
        patch.setenv("GCREF_HOME", str(home))
        yield home


@pytest.fixture(scope="module", autouse=True)
def _nothing_left(_module_home: Path) -> Iterator[None]:
    """After each module nothing is left: no process, thread, open file, mapped segment or file in shared memory."""
    before = Traces.take(collect=False)  # the end of the module before this one has just done that
    yield
    assert_nothing_left(before)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `GCREF_HOME` for this test alone."""
    path = tmp_path / "gcref"
    monkeypatch.setenv("GCREF_HOME", str(path))
    return path


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of what users rely on run by mail too; see `tests.support.by_mail`."""
    names = metafunc.fixturenames
    if metafunc.module.__name__.rpartition(".")[2] not in by_mail.MODULES or not {"ways", "home"} & {*names}:
        return
    if "ways" not in names:
        names.insert(0, "ways")
    alone = metafunc.function.__name__ in by_mail.NOT_BY_MAIL
    metafunc.parametrize("ways", ["any"] if alone else ["any", "broker"], indirect=True, scope="module")


@pytest.fixture(scope="session")
def post_office(rabbit: Rabbit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a broker for the whole run, started when a test first needs it. No test stops it."""
    from tests.support.hub import Hub
    from tests.support.leaks import lasts

    with Hub(tmp_path_factory.mktemp("hub"), rabbit) as hub:
        lasts(hub.pid)
        hub.add_user("gina")
        yield hub


@pytest.fixture(scope="module")
def ways(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, _nothing_left: None
) -> Iterator[str]:
    """The ways that everybody may use who does not say otherwise: `any`, or `broker`."""
    found: str = getattr(request, "param", "any")
    if found == "any":
        yield found
        return
    hub: Hub = request.getfixturevalue("post_office")
    with hub.used_by("gina"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCREF_CARRIERS", found)
        patch.setenv("GCREF_HOME", str(tmp_path_factory.mktemp("home") / "gcref"))
        yield found


@pytest.fixture
def far(ways: str) -> tuple[str, ...]:
    """The ways by which large values have to travel, also on one machine."""
    return ("broker",) if ways == "broker" else ("direct",)


@pytest.fixture(scope="module")
def two_sites(ways: str) -> Iterator[Sites]:
    """The endpoints "polaris" and "midway", two workers each, for all tests of a module."""
    from gcref import LocalEndpoint

    with LocalEndpoint("polaris", workers=2) as polaris, LocalEndpoint("midway", workers=2) as midway:
        yield Sites(polaris, midway)


@pytest.fixture
def polaris(two_sites: Sites) -> Iterator[Executor]:
    """An executor at polaris, for one test."""
    from gcref import Executor

    with Executor(two_sites.polaris.endpoint_id) as executor:
        yield executor


@pytest.fixture
def midway(two_sites: Sites) -> Iterator[Executor]:
    """An executor at midway, for one test."""
    from gcref import Executor

    with Executor(two_sites.midway.endpoint_id) as executor:
        yield executor


@pytest.fixture
def work(two_sites: Sites) -> Iterator[Work]:
    """A client and its executors at polaris and midway, for one test."""
    from gcref import Client, Executor

    with (
        Client() as client,
        Executor(two_sites.polaris.endpoint_id, client) as a,
        Executor(two_sites.midway.endpoint_id, client) as b,
    ):
        yield Work(client, a, b)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A closed gate; opened at the end, so that no task is left waiting."""
    found = Gate.at(tmp_path)
    yield found
    found.open()


@pytest.fixture(scope="session")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rabbit]:
    """A real RabbitMQ for the whole run. Tests that kill or pause it leave it running."""
    from tests.support.rabbit import Rabbit

    with Rabbit(tmp_path_factory.mktemp("rabbit")) as rabbit:
        yield rabbit
