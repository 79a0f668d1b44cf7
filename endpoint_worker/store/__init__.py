"""The object store: large blobs in shared memory, and on disk when that is full."""

from endpoint_worker.store.store import Allocated, Reading, Store, Writable

__all__ = ["Allocated", "Reading", "Store", "Writable"]
