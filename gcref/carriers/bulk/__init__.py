"""Bulk: how the bytes of large objects move, in a thread beside control.

ports       what its users give it (provider, sink) and hear of it (completions)
thread      the pulling half, and the thread itself; `gcref.brains.transfer` decides
serving     the answering half
links       who is connected, by ipc or TCP; `link` is one of them
mail        links through mailboxes
outbox      buffers that ZeroMQ has not sent yet
"""
