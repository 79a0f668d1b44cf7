"""The plan of the house, held by tests: who may import whom, pure brains, public names, what an import costs."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import pytest

import gcref

ROOT: Final = Path(__file__).resolve().parent.parent
PACKAGES: Final = ("gcref", "endpoint_worker")

# The ladder. A room imports from its own room and from rooms on lower steps, never from a neighbour on its own step.
STEPS: Final = {
    "gcref.errors": 0,
    "gcref.ids": 0,
    "gcref.config": 0,
    "gcref.task_context": 0,
    "gcref.words": 0,
    "gcref.wire": 1,
    "gcref.objects": 1,
    "gcref.brains": 2,
    "gcref.carriers": 3,
    "gcref.directory": 4,
    "gcref.sdk": 5,
    "gcref.hub": 5,
    "gcref.cli": 6,
    # The root hands out the public names, lazily.
    "gcref": 6,
}
VOCABULARY: Final = frozenset(room for room, step in STEPS.items() if step == 0)

# The endpoint's own ladder, and the highest step of gcref that it may use.
ENDPOINT_STEPS: Final = {
    "endpoint_worker": 0,
    "endpoint_worker.config_keys": 0,
    "endpoint_worker.config": 1,
    "endpoint_worker.journal": 1,
    "endpoint_worker.store": 2,
    "endpoint_worker.worker": 3,
    "endpoint_worker.engines": 4,
    "endpoint_worker.agent": 5,
    # These know an agent only from outside, as a process and as a party.
    "endpoint_worker.daemon": 5,
    "endpoint_worker.status": 5,
    "endpoint_worker.cli": 6,
    "endpoint_worker.__main__": 7,
}
ENDPOINT_USES: Final = STEPS["gcref.directory"]

# The door of each outside library: the modules, or rooms, that import it. One that is not listed is not ours to use.
DOORS: Final = {
    "msgpack": ("gcref.wire.codec",),
    "zmq": ("gcref.carriers", "endpoint_worker.worker.channel", "endpoint_worker.agent"),
    "cloudpickle": ("gcref.objects",),
    "tblib": ("gcref.objects",),
    "xxhash": ("gcref.brains.transfer_answers",),
    "requests": ("gcref.directory",),
    "pika": ("gcref.carriers",),
    "nacl": ("gcref.carriers",),
    "fastapi": ("gcref.hub",),
    "pydantic": ("gcref.hub",),
    "uvicorn": ("gcref.hub",),
    "sqlalchemy": ("gcref.hub",),
    "alembic": ("gcref.hub",),
    "parsl": ("endpoint_worker.engines",),
}

# What a brain must not even import: clocks, chance, threads, and whatever reaches outside the process.
IMPURE: Final = frozenset(
    (
        *("time", "datetime", "random", "secrets", "uuid"),
        *("os", "io", "pathlib", "shutil", "tempfile", "mmap", "subprocess", "signal", "logging"),
        *("socket", "select", "selectors", "ssl", "zmq"),
        *("asyncio", "threading", "multiprocessing", "concurrent", "queue", "contextvars"),
    )
)
# Imports of these that bring in nothing but constants, with what they are.
CONSTANTS: Final = {
    ("gcref.brains.submitter", "concurrent.futures._base"): "the names of a standard future's states"
}
# Of our own vocabulary, what is impure: ids are handed in.
IMPURE_NAMES: Final = frozenset(
    {"new_id", "home", "host_dir", "disk_dir", "client_config", "carriers_allowed", "open", "print"}
)

MAX_LINES: Final = 600
# Longer modules, each with the reason why it is one idea.
LONG_MODULES: Final = {
    "gcref/brains/dispatch.py": "one brain: queue, look-ahead, leases, stealing and lent slots share every invariant",
    "gcref/brains/graph.py": "one table, and the verbs that keep its rules: ends, aliases, releases",
    "gcref/brains/peers.py": "one brain: handshakes, choice of link and sessions share every invariant",
    "gcref/brains/submitter.py": "one brain: the client's tasks from submit to end, in one table of transitions",
    "endpoint_worker/agent/control.py": "one loop: the table that obeys all brains of the agent",
}

PUBLIC_NAMES: Final = {
    *("Client", "ComputeFuture", "Executor", "LocalEndpoint", "ObjectRef", "Record", "errors", "ref"),
}

# Behaviours that users expect; each has a test that carries its id in its name or its docstring.
BEHAVIOURS: Final = (
    *(f"R{number}" for number in range(1, 14)),
    *(f"V{number}" for number in range(1, 9)),
    *(f"E{number}" for number in range(1, 6)),
    *(f"W{number}" for number in range(1, 7)),
    *(f"C{number}" for number in range(1, 5)),
    *(f"L{n}" for n in range(7)),
    *(f"F{number}" for number in range(1, 12)),
)


class Import(NamedTuple):
    """One import statement's target, as the module that it loads."""

    importer: str
    line: int
    target: str
    at_load: bool
    """It runs when the importer is loaded: not inside a function, and not for types only."""

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


@cache
def modules() -> dict[str, Path]:
    """Every module of the two packages, by its dotted name."""
    found: dict[str, Path] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for name, path in modules().items() for found in _imports_of(name, tree(path)))


def _imports_of(importer: str, module: ast.Module) -> Iterator[Import]:
    later = {id(node) for part in ast.walk(module) if _runs_later(part) for node in ast.walk(part)}
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, node.lineno, alias.name, id(node) not in later)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}:{node.lineno} has a relative import"
            source = node.module or ""
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield Import(
                    importer, node.lineno, inner if inner in modules() else source, id(node) not in later
                )


def _runs_later(node: ast.AST) -> bool:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        return True
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def room(module: str, steps: dict[str, int]) -> str:
    """The room that a module lies in: the longest name in `steps` that it begins with."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in steps), module)


def lies_in(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in rooms)


def test_every_module_has_its_room() -> None:
    lost = [name for name in modules() if name != "gcref" and room(name, STEPS | ENDPOINT_STEPS) == "gcref"]
    lost += [name for name in modules() if "." in name and room(name, ENDPOINT_STEPS) == "endpoint_worker"]
    assert not lost, f"give each of these a step on the ladder: {lost}"


def test_imports_of_gcref_point_down_the_ladder() -> None:
    wrong: list[str] = []
    for found in imports():
        if not found.importer.startswith("gcref"):
            continue
        if found.target.split(".")[0] == "endpoint_worker":
            wrong.append(f"{found}: gcref never imports endpoint_worker")
        if found.target.split(".")[0] != "gcref":
            continue
        here, there = room(found.importer, STEPS), room(found.target, STEPS)
        same = here == there or {here, there} <= VOCABULARY
        if not same and STEPS[there] >= STEPS[here]:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_the_endpoint_uses_gcref_below_the_sdk_and_its_own_rooms_downwards() -> None:
    wrong: list[str] = []
    for found in imports():
        if not found.importer.startswith("endpoint_worker"):
            continue
        top = found.target.split(".")[0]
        if top == "gcref" and STEPS[room(found.target, STEPS)] > ENDPOINT_USES:
            wrong.append(str(found))
        if top == "endpoint_worker":
            here, there = room(found.importer, ENDPOINT_STEPS), room(found.target, ENDPOINT_STEPS)
            if here != there and ENDPOINT_STEPS[there] >= ENDPOINT_STEPS[here]:
                wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_need_each_other_to_load() -> None:
    needs: dict[str, set[str]] = {name: set() for name in modules()}
    for found in imports():
        if found.at_load and found.target in needs and found.target != found.importer:
            needs[found.importer].add(found.target)
    while free := [name for name, targets in needs.items() if not targets & needs.keys()]:
        for name in free:
            del needs[name]
    assert not needs, f"these import each other in a circle: {sorted(needs)}"


def test_each_outside_library_has_one_door() -> None:
    ours = {*PACKAGES, *sys.stdlib_module_names, "__future__"}
    wrong = [
        f"{found}, whose door is {DOORS.get(top) or 'nowhere'}"
        for found in imports()
        if (top := found.target.split(".")[0]) not in ours and not lies_in(found.importer, DOORS.get(top, ()))
    ]
    assert not wrong, "\n".join(wrong)


def test_brains_are_pure() -> None:
    wrong = [
        str(found)
        for found in imports()
        if lies_in(found.importer, ("gcref.brains",))
        and found.target.split(".")[0] in IMPURE
        and (found.importer, found.target) not in CONSTANTS
    ]
    for name, path in modules().items():
        if lies_in(name, ("gcref.brains",)):
            for node in ast.walk(tree(path)):
                called = node.func if isinstance(node, ast.Call) else None
                word = (
                    called.id
                    if isinstance(called, ast.Name)
                    else called.attr
                    if isinstance(called, ast.Attribute)
                    else ""
                )
                if word in IMPURE_NAMES:
                    wrong.append(f"{name}:{called.lineno if called else 0} calls {word}")
    assert not wrong, "\n".join(wrong)


def test_modules_are_small_or_say_why_not() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules().values()}
    long = {path: count for path, count in lines.items() if count > MAX_LINES and path not in LONG_MODULES}
    assert not long, f"longer than {MAX_LINES} lines: {long}; a long file is usually two ideas"
    assert all(lines.get(path, 0) > MAX_LINES for path in LONG_MODULES), (
        "an excuse that is not needed any more"
    )


def test_the_public_names_are_the_documented_ones() -> None:
    assert set(gcref.__all__) - {"__version__"} == PUBLIC_NAMES
    assert set(dir(gcref)) >= PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(gcref, name).__doc__, f"gcref.{name} has no documentation"
    with pytest.raises(AttributeError):
        _ = gcref.no_such_name


def test_the_top_of_the_house_holds_nothing_else() -> None:
    made_by_tools = {"build", "dist"}
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - made_by_tools
    assert top <= {"pyproject.toml", "README.md", "LICENSE", "gcref", "endpoint_worker", "tests", "examples"}


def test_the_papers_point_to_what_is_there() -> None:
    papers = [path for top in ("README.md", *PACKAGES, "tests") for path in _papers(ROOT / top)]
    assert ROOT / "gcref" / "ARCHITECTURE.md" in papers
    broken = [
        f"{paper.relative_to(ROOT)} -> {target}"
        for paper in papers
        for target in re.findall(r"\]\(([^)#:\s]+)[^):]*\)", paper.read_text())
        if not (paper.parent / target).exists()
    ]
    assert not broken, "\n".join(broken)


def _papers(top: Path) -> list[Path]:
    return [top] if top.is_file() else sorted(top.rglob("*.md"))


@pytest.mark.parametrize(
    ("statement", "limit"),
    [
        ("import gcref", 2.0),
        # Not promised, but felt by everybody: what a first script waits for.
        ("from gcref import Executor", 4.0),
    ],
)
def test_importing_gcref_is_cheap(statement: str, limit: float) -> None:
    ratios: list[float] = []
    # A busy machine may spoil one comparison; it does not spoil three.
    while not ratios or (ratios[-1] > limit and len(ratios) < 3):
        stick, ours = _import_times("import zmq, msgpack, cloudpickle", statement)
        ratios.append(ours / stick)
    assert ratios[-1] <= limit, f"{statement!r} takes {ratios} times as long as importing its libraries"


def test_importing_gcref_loads_neither_the_sdk_nor_a_library() -> None:
    loaded = _python("import sys, gcref; print(' '.join(sys.modules))").split()
    assert not [
        name for name in loaded if name.startswith(("gcref.sdk", "gcref.carriers", "endpoint_worker"))
    ]
    assert not DOORS.keys() & set(loaded)


def _import_times(*statements: str, rounds: int = 9) -> list[float]:
    """How long each statement takes in a fresh interpreter, in seconds: medians of rounds in which they take turns."""
    script = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
    rows = [[float(_python(script.format(statement))) for statement in statements] for _ in range(rounds)]
    # The first round may have to read and compile files.
    return [statistics.median(column) for column in zip(*rows[1:], strict=True)]


def _python(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout


def test_every_behaviour_has_its_test() -> None:
    words: set[str] = set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
                words.update(part.upper() for part in node.name.split("_"))
                words.update(re.findall(r"\b[A-Z][0-9]+\b", ast.get_docstring(node) or ""))
    missing = [behaviour for behaviour in BEHAVIOURS if behaviour not in words]
    assert not missing, f"no test carries {', '.join(missing)} in its name or docstring"
