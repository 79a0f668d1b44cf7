"""A system's own process, from inside: `python -m tests.bench.child NAME` obeys a JSON line at a time.

    {"start": {"sites": 1, "workers": 2, "carriers": null}}    → {"version": "…"} (null: do not start the system)
    {"measure": "chain", "params": {…}}                        → {"figures": {…}}
    {"stop": true}                                             → {} and the process ends

What fails is answered by {"error": "…", "wrong": bool}, and the next order is awaited.

Answers go to what was standard output at the start; whatever else is printed, by peers for example, joins
standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any

from tests.bench.system import Setting, System, WrongAnswerError
from tests.bench.workloads import WORKLOADS


def main(name: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.set_inheritable(answers.fileno(), False)
    os.dup2(2, 1)
    adapter: System = importlib.import_module(f"tests.bench.systems.{name}").Adapter()
    measures = {workload.name: workload.measure for workload in WORKLOADS}
    started = False
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if "start" in order:
                started = order["start"] is not None
                if started:
                    adapter.start(Setting(**order["start"]))
                answer["version"] = adapter.version()
            elif "measure" in order:
                answer["figures"] = measures[order["measure"]](adapter, order["params"])
            elif started:
                adapter.stop()
        except Exception as error:  # noqa: BLE001 - the parent reports it, and goes on with the next system
            answer = {"error": traceback.format_exc(), "wrong": isinstance(error, WrongAnswerError)}
        print(json.dumps(answer), file=answers)
        if "stop" in order:
            return


if __name__ == "__main__":
    main(sys.argv[1])
