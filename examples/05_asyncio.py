"""A `ComputeFuture` can be awaited: `gather`, `as_completed` and `wait_for` work on it, and the event loop stays free.

The work is a real one: which files of the standard library say the same thing twice? Each package is read by one task.

    python3 examples/05_asyncio.py
"""

import asyncio
import hashlib
import os
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from gcref import ComputeFuture, Executor, LocalEndpoint


def hash_lines(package: str) -> tuple[str, int, int]:
    """Name, lines of code, and how many of the longer ones are said twice."""
    lines = [
        line.strip()
        for path in sorted(Path(package).glob("*.py"))
        for line in path.read_text(errors="replace").splitlines()
        if len(line.strip()) > 30
    ]
    distinct = {hashlib.blake2b(line.encode()).digest() for line in lines}
    return Path(package).name, len(lines), len(lines) - len(distinct)


def slow_square(number: int) -> int:
    time.sleep(0.5)
    return number * number


async def all_at_once(site: Executor, packages: list[str]) -> None:
    """`gather` takes the futures as they are."""
    found = await asyncio.gather(*(site.submit(hash_lines, package) for package in packages))
    worst = max(found, key=lambda item: item[2] / max(1, item[1]))
    print(f"gather: {len(found)} packages; {worst[0]} repeats {worst[2]} of {worst[1]} lines")


async def as_they_come(site: Executor, packages: list[str]) -> None:
    """`as_completed` yields each as soon as it is there."""
    order: list[str] = []
    for next_one in asyncio.as_completed(
        [value_of(site.submit(hash_lines, package)) for package in packages]
    ):
        name, _lines, _repeated = await next_one
        order.append(name)
    print(f"as_completed: first {order[0]}, last {order[-1]}")


async def losing_patience(site: Executor) -> None:
    """A `wait_for` that times out gives up waiting, not the task: await it again."""
    future = site.submit(slow_square, 12)
    try:
        await asyncio.wait_for(value_of(future), timeout=0.1)
    except TimeoutError:
        print("wait_for: not there after 0.1 s", end="; ")
    print(f"awaited again: {await future}; and once more: {await future}")


async def staying_responsive(site: Executor) -> None:
    """While tasks run and a large value comes in, the loop goes on ticking."""
    beats = 0

    async def heart() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.01)
            beats += 1

    heartbeat = asyncio.create_task(heart())
    start = time.perf_counter()
    text = await site.submit(bytes, 100_000_000)
    await site.submit(slow_square, 2)
    seconds = time.perf_counter() - start
    heartbeat.cancel()
    print(f"loop: {beats} beats of 10 ms in {seconds:.2f} s, while {len(text) / 1e6:.0f} MB came in")


async def value_of(future: ComputeFuture[Any]) -> Any:
    return await future


async def demonstrate(site: Executor) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    packages = [str(init.parent) for init in sorted(root.glob("*/__init__.py"))][:24]
    await all_at_once(site, packages)
    await as_they_come(site, packages)
    await losing_patience(site)
    await staying_responsive(site)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="gcref-") as home:
        os.environ.setdefault("GCREF_HOME", home)
        with LocalEndpoint("polaris", workers=2), Executor("polaris") as polaris:
            asyncio.run(demonstrate(polaris))


if __name__ == "__main__":
    main()
