"""Two sites, two stages, nothing in between: what does Python's standard library lean on?

Stage 1 runs at "polaris": it parses Python's own source files into tables of what they define, import and call.
Stage 2 runs at "midway": it takes the futures of stage 1 as arguments and follows each call to the function that
it means. A last task, also at midway, picks the answer. Only that comes here: the tables go from site to site.

Then the same again in the usual way, with `.result()` between the stages: every table passes through here.

    python3 examples/01_two_sites.py [--files N]
"""

import argparse
import ast
import collections
import os
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, NamedTuple

from gcref import Client, ComputeFuture, Executor, LocalEndpoint

SHARD_BYTES = 700_000
"""Source code per task of stage 1: what is found in it is worth a way of its own."""

Table = dict[str, Any]
"""What one file says: its module, its lines, and what it defines, imports and calls."""


# ------------------------------------------------------------------------------------ stage 1, at polaris


def parse_files(root: str, paths: list[str]) -> list[Table]:
    """One table per file."""
    tables = []
    for path in paths:
        source = Path(path).read_bytes()
        name = Path(path).relative_to(root).with_suffix("")
        module = name.parent if name.name == "__init__" else name
        reader = Reader()
        reader.visit(ast.parse(source, path))
        tables.append({"module": ".".join(module.parts), "lines": source.count(b"\n"), **vars(reader)})
    return tables


class Reader(ast.NodeVisitor):
    """Walks a syntax tree and notes what it finds."""

    def __init__(self) -> None:
        self.defines: list[tuple[str, int, int, str]] = []  # name, line, length in lines, what it is for
        self.imports: dict[str, str] = {}  # local name: what it stands for
        self.calls: list[tuple[str, int, int, int]] = []  # name, line, column, number of arguments

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            local = alias.asname or alias.name.partition(".")[0]
            self.imports[local] = alias.name if alias.asname else local

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0:
            for alias in node.names:
                self.imports[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        purpose = (ast.get_docstring(node) or "").partition("\n")[0]
        self.defines.append((node.name, node.lineno, length, purpose))
        self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Call(self, node: ast.Call) -> None:
        arguments = len(node.args) + len(node.keywords)
        self.calls.append((ast.unparse(node.func)[:80], node.lineno, node.col_offset, arguments))
        self.generic_visit(node)


# ------------------------------------------------------------------------------------ stage 2, at midway


class Summary(NamedTuple):
    files: int
    lines: int
    calls: int
    imported: collections.Counter[str]
    called: collections.Counter[str]
    functions: int
    documented: int
    longest: tuple[int, str]


def follow_calls(tables: list[Table]) -> Summary:
    """Look each call's name up in its file's imports, and sum up what the files lean on."""
    imported: collections.Counter[str] = collections.Counter()
    called: collections.Counter[str] = collections.Counter()
    longest = (0, "")
    functions = documented = 0
    for table in tables:
        imports = table["imports"]
        imported.update({name.partition(".")[0] for name in imports.values()})
        for name, _line, _column, _arguments in table["calls"]:
            local, dot, rest = name.partition(".")
            if local in imports:
                called[imports[local] + dot + rest] += 1
        for name, line, length, purpose in table["defines"]:
            functions += 1
            documented += bool(purpose)
            longest = max(longest, (length, f"{name} in {table['module']}, line {line}"))
    lines, calls = sum(table["lines"] for table in tables), sum(len(table["calls"]) for table in tables)
    return Summary(len(tables), lines, calls, imported, called, functions, documented, longest)


def pick_answer(summaries: list[Summary]) -> list[str]:
    """The few lines that we wanted to know."""
    files = sum(summary.files for summary in summaries)
    lines = sum(summary.lines for summary in summaries)
    calls = sum(summary.calls for summary in summaries)
    functions = sum(summary.functions for summary in summaries)
    documented = sum(summary.documented for summary in summaries)
    imported = sum((summary.imported for summary in summaries), collections.Counter[str]())
    called = sum((summary.called for summary in summaries), collections.Counter[str]())
    length, where = max(summary.longest for summary in summaries)
    return [
        f"{files} files, {lines} lines, {calls} calls, {called.total()} of them into other modules",
        "most imported: "
        + ", ".join(f"{name} (by {count} files)" for name, count in imported.most_common(3)),
        "most called: " + ", ".join(f"{name} ({count} times)" for name, count in called.most_common(3)),
        f"{functions} functions, {documented / functions:.0%} of them documented; longest: {where}, {length} lines",
    ]


# ------------------------------------------------------------------------------------ here


class Run(NamedTuple):
    answer: list[str]
    seconds: float
    tables: list[ComputeFuture[Any]]
    summaries: list[ComputeFuture[Any]]


def by_reference(polaris: Executor, midway: Executor, root: str, shards: list[list[str]]) -> Run:
    """The whole graph goes out at once. This process only waits for the end of it."""
    start = time.perf_counter()
    tables = [polaris.submit(parse_files, root, shard) for shard in shards]
    summaries = [midway.submit(follow_calls, table) for table in tables]  # no .result(): midway pulls it
    answer = midway.submit(pick_answer, summaries)  # futures in a list work too
    for count, _ in enumerate(as_completed(summaries), 1):
        parsed = sum(table.done() for table in tables)
        tell(f"parsed at polaris: {parsed} of {len(tables)}, followed at midway: {count} of {len(tables)}")
    return Run(answer.result(), time.perf_counter() - start, tables, [*summaries, answer])


def by_hand(polaris: Executor, midway: Executor, root: str, shards: list[list[str]]) -> Run:
    """The same with `.result()` in between: this process carries what it does not want."""
    start = time.perf_counter()
    tables = [polaris.submit(parse_files, root, shard) for shard in shards]
    values = [table.result() for table in tables]
    summaries = [midway.submit(follow_calls, value) for value in values]
    answer = midway.submit(pick_answer, [summary.result() for summary in summaries])
    return Run(answer.result(), time.perf_counter() - start, tables, [*summaries, answer])


def find_files(root: str, limit: int | None) -> list[Path]:
    """The standard library's source, without tests; with a limit, files from all over it."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = sorted(
        path
        for path in Path(root).rglob("*.py")
        if path.is_file() and not skipped.intersection(path.relative_to(root).parts)
    )
    return files if limit is None else files[:: max(1, len(files) // limit)][:limit]


def deal(files: list[Path]) -> list[list[str]]:
    """Shards of much the same size: the files are dealt out like cards, the largest first."""
    files = sorted(files, key=lambda path: path.stat().st_size, reverse=True)
    count = max(2, sum(path.stat().st_size for path in files) // SHARD_BYTES)
    return [[str(path) for path in files[start::count]] for start in range(count)]


def tell(progress: str) -> None:
    print(f"\r{progress}", end="", file=sys.stderr, flush=True)


def show(run: Run, again: Run, carried: list[int]) -> None:
    pulled: collections.Counter[str] = collections.Counter()
    for future in run.summaries:
        if future.record is not None:
            pulled.update(future.record.pulled_bytes)
    ways = ", ".join(f"{bytes_ / 1e6:.1f} MB {carrier}" for carrier, bytes_ in pulled.items())
    print("\n".join(["", *run.answer, ""]))
    rows = [
        ("", "by reference", "with .result() in between"),
        ("tasks at polaris", f"{len(run.tables)}", f"{len(again.tables)}"),
        ("tasks at midway", f"{len(run.summaries)}", f"{len(again.summaries)}"),
        ("moved site to site", ways or "0 bytes", "0 bytes"),
        ("payload through the client", f"{carried[0]} bytes", f"{carried[1] / 1e6:.1f} MB"),
        ("time", f"{run.seconds:.2f} s", f"{again.seconds:.2f} s"),
    ]
    for row in rows:
        print("{:28}{:22}{}".format(*row).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, metavar="N", help="read only so many files")
    root = sysconfig.get_path("stdlib")
    shards = deal(find_files(root, parser.parse_args().files))
    with tempfile.TemporaryDirectory(prefix="gcref-") as home:
        os.environ.setdefault("GCREF_HOME", home)  # where endpoints find each other; yours, if you have one
        with (
            LocalEndpoint("polaris", workers=1),
            LocalEndpoint("midway", workers=1),
            Client() as client,
            Executor("polaris", client) as polaris,
            Executor("midway", client) as midway,
        ):
            midway.submit(follow_calls, polaris.submit(parse_files, root, [])).result()  # nobody starts cold
            run = by_reference(polaris, midway, root, shards)
            tell("\n")
            carried = [sum(client.payload_bytes().values())]
            again = by_hand(polaris, midway, root, shards)
            carried.append(sum(client.payload_bytes().values()) - carried[0])
            assert run.answer == again.answer
            show(run, again, carried)


if __name__ == "__main__":
    main()
