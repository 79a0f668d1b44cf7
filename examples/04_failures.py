"""What goes wrong, and what it looks like: every wait ends in a value or in an error that names its reason.

python3 examples/04_failures.py
"""

import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gcref import Executor, LocalEndpoint, errors

# ------------------------------------------------------------------------------------ tasks


def read_temperature(text: str) -> float:
    return float(text)


def to_kelvin(celsius: float) -> float:
    return celsius + 273.15


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def crash_once(marker: str) -> str:
    """Kills its own process as a memory limit would; the next time it works."""
    if not os.path.exists(marker):
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "worked the second time"


def wait(seconds: float) -> str:
    time.sleep(seconds)
    return f"{seconds} s passed"


# ------------------------------------------------------------------------------------ cases


def a_task_raises(polaris: Executor) -> None:
    """The exception itself comes back, with the traceback of the place where it was raised."""
    polaris.submit(read_temperature, "21.5 °C").result()


def a_chain_over_three_sites(polaris: Executor, midway: Executor, theta: Executor) -> None:
    """What depends on a failed task never runs; the error names the task, its cause is the first failure."""
    bad = polaris.submit(read_temperature, "n/a")
    good = polaris.submit(read_temperature, "21.5")
    kelvin = [midway.submit(to_kelvin, celsius) for celsius in (good, bad)]
    print(f"  the sound branch ends well: {kelvin[0].result()}")
    theta.submit(mean, kelvin).result()


def a_worker_dies(polaris: Executor, folder: str) -> None:
    """Without retries that is an error; with them, the task runs again in a new worker."""
    retried = polaris.options(retries=1).submit(crash_once, f"{folder}/first")
    print(f"  with retries=1: {retried.result()}")
    polaris.submit(crash_once, f"{folder}/second").result()


def an_argument_cannot_travel(polaris: Executor) -> None:
    """`submit` says so at once, and names it. Nothing else is harmed."""
    try:
        polaris.submit(print, "fine", [threading.Lock()])
    finally:
        print(f"  the executor goes on: {polaris.submit(to_kelvin, 0.0).result()}")


def a_task_takes_too_long(polaris: Executor) -> None:
    """A walltime ends the task, where it runs."""
    polaris.options(walltime_s=0.5).submit(wait, 30).result()


def we_are_impatient(polaris: Executor) -> None:
    """A timeout ends only our waiting; ask again later."""
    future = polaris.submit(wait, 1)
    try:
        future.result(timeout=0.1)
    finally:
        print(f"  asked again: {future.result()}")


def we_change_our_mind(polaris: Executor) -> None:
    """What has not started is cancelled, and so is what depends on it."""
    first = polaris.submit(wait, 0.5)
    second = polaris.submit(wait, 30)  # there is one worker: this one waits its turn
    third = polaris.submit(str.upper, second)
    print(f"  cancelled: {second.cancel()}; the one before it: {first.result()}")
    third.result()


def there_is_no_such_place() -> None:
    """Names and addresses are checked when the executor is made."""
    Executor("atlantis").submit(wait, 0).result(timeout=10)


# ------------------------------------------------------------------------------------ here


def show(case: Callable[..., None], *args: Any) -> None:
    """Runs a case, and prints the error that it ends in."""
    print(f"\n{case.__name__.replace('_', ' ')}\n  ({case.__doc__})")
    try:
        case(*args)
    except Exception as error:  # noqa: BLE001 - the point is to see them all
        for line in describe(error):
            print(f"  {line}")
    else:
        raise SystemExit(f"{case.__name__}: no error came")


def describe(error: BaseException) -> list[str]:
    kinds = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, Exception)][:-1]
    lines = [f"{' < '.join(kinds)}: {str(error).splitlines()[0] if str(error) else '(no text)'}"]
    lines += [f"  note: {note}" for note in getattr(error, "__notes__", [])]
    if isinstance(error, errors.DependencyError):
        lines.append(f"  tasks: {', '.join(error.task_ids)}")
    cause = error.__cause__
    if cause is not None and not isinstance(error, errors.GcrefError):
        remote = "".join(traceback.format_exception(cause)).strip().splitlines()
        lines += ["  where it was raised:", *(f"    {line}" for line in remote if line.strip())]
    elif cause is not None:
        lines += [f"  because of {line}" for line in describe(cause)[:1]]
    return lines


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="gcref-") as home:
        os.environ.setdefault("GCREF_HOME", home)
        with (
            LocalEndpoint("polaris", workers=1),
            LocalEndpoint("midway", workers=1),
            LocalEndpoint("theta", workers=1),
            Executor("polaris") as polaris,
            Executor("midway") as midway,
            Executor("theta") as theta,
        ):
            show(a_task_raises, polaris)
            show(a_chain_over_three_sites, polaris, midway, theta)
            show(a_worker_dies, polaris, home)
            show(an_argument_cannot_travel, polaris)
            show(a_task_takes_too_long, polaris)
            show(we_are_impatient, polaris)
            show(we_change_our_mind, polaris)
            show(there_is_no_such_place)


if __name__ == "__main__":
    main()
