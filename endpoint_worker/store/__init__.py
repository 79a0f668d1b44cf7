"""The object store: large blobs in shared memory, and on disk when that is full."""

from endpoint_worker.store.handles import Allocated, Reading, Writable
from endpoint_worker.store.store import Store

__all__ = ["Allocated", "Reading", "Store", "Writable"]
