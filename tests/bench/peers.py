"""Virtual environments for the systems that are not ours, made on first use, outside the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PACKAGES: dict[str, tuple[str, ...]] = {
    "ray": ("ray>=2.40", "numpy"),
    "dask": ("distributed>=2024.8", "numpy"),
    "parsl": ("parsl>=2024.3", "numpy"),
}


class PeerError(Exception):
    """A peer cannot be installed."""


def python_of(peer: str, tell: Callable[[str], None]) -> str:
    """The interpreter of an environment that has the peer.

    Raises:
        PeerError: pip could not install it.
    """
    folder = cache_dir() / f"{peer}-py{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    complete = folder / "complete"
    if complete.exists() and complete.read_text() == " ".join(PACKAGES[peer]):
        return str(python)
    tell(f"installing {peer} into {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    for step in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES[peer]],
    ):
        done = subprocess.run(step, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise PeerError(
                f"{peer} cannot be installed: {' '.join(step)} ended with {done.returncode}:\n"
                f"{done.stderr[-2000:]}\n"
                f"Leave it out of --against, or install {' '.join(PACKAGES[peer])} into {folder} by hand "
                f"and write {' '.join(PACKAGES[peer])!r} into {complete}."
            )
    complete.write_text(" ".join(PACKAGES[peer]))
    return str(python)


def cache_dir() -> Path:
    """Where the environments are: `$XDG_CACHE_HOME/gcref-bench`, else `~/.cache/gcref-bench`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gcref-bench")
