"""Distributed futures over HPC sites: a future is an argument, and data goes straight from site to site.

    from gcref import Executor

    with Executor(polaris_id) as polaris, Executor(midway_id) as midway:
        features = [polaris.submit(extract, shard) for shard in shards]   # runs at Polaris
        models = [midway.submit(train, f) for f in features]              # no .result(): Midway pulls from Polaris
        print(midway.submit(pick_best, models).result())

This module only names what users use. Everything is loaded when it is first asked for, so that importing the package costs next
to nothing, and a worker that runs tasks never loads the SDK unless a task uses it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from gcref.objects import ref as _references
from gcref.objects.ref import ObjectRef

if TYPE_CHECKING:
    from gcref import errors
    from gcref.sdk.client import Client
    from gcref.sdk.executor import Executor
    from gcref.sdk.future import ComputeFuture, Record
    from gcref.sdk.local_endpoint import LocalEndpoint

__version__: Final = "0.1.0"

__all__ = ["Client", "ComputeFuture", "Executor", "LocalEndpoint", "ObjectRef", "Record", "errors", "ref"]

_ROOMS: Final = {
    "Client": "gcref.sdk.client",
    "ComputeFuture": "gcref.sdk.future",
    "Executor": "gcref.sdk.executor",
    "LocalEndpoint": "gcref.sdk.local_endpoint",
    "Record": "gcref.sdk.future",
}


def ref(future: ComputeFuture[Any]) -> ObjectRef:
    """A reference to a future's result: as an argument it is handed over as it is, and nothing waits for it.

    Raises:
        TypeError: it is not a future of gcref's.
    """
    make = getattr(future, "ref", None)
    found = make() if make is not None else None
    if not isinstance(found, ObjectRef):
        raise TypeError(
            f"gcref.ref takes a future that gcref's submit or put returned, not a {type(future).__name__}"
        )
    return found


def _open(reference: ObjectRef) -> ComputeFuture[Any]:
    from gcref.sdk.client import open_reference

    return open_reference(reference)


_references.opener = _open


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("gcref.errors")
    room = _ROOMS.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(room), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
