"""A hub and a RabbitMQ for those workloads that go through the broker, for the time of one run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote


@contextlib.contextmanager
def broker() -> Iterator[dict[str, str]]:
    """Start them; gives the variables with which gcref and `pika` find them."""
    gcref = [sys.executable, "-m", "gcref.cli"]
    with tempfile.TemporaryDirectory(prefix="gcref-bench-") as home:
        settings = Path(home, "hub.toml")
        settings.write_text("port = 0\n[broker]\nstart = true\nport = 0\n")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with open(Path(home, "hub.log"), "w") as log:
            process = subprocess.Popen(
                [*gcref, "hub", "start", "--config", str(settings)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
            try:
                assert process.stdout is not None
                ready = process.stdout.readline()
                if not ready:
                    raise RuntimeError(f"no hub: {Path(home, 'hub.log').read_text()}")
                token = subprocess.run(
                    [*gcref, "hub", "user", "add", "bench", "--config", str(settings)],
                    capture_output=True,
                    text=True,
                    check=True,
                    env=environment,
                ).stdout
                url, _, _, user, password, _ = json.loads(Path(home, "broker", "running.json").read_text())
                scheme, _, place = url.partition("://")
                yield {
                    "GCREF_HUB_URL": ready.split()[-1],
                    "GCREF_TOKEN": token.strip(),
                    "GCREF_CARRIERS": "broker",
                    "GCREF_BENCH_BROKER": f"{scheme}://{user}:{quote(password)}@{place}/%2F",
                }
            finally:
                process.terminate()
                process.communicate()
