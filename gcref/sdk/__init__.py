"""What users hold in their hands: executors, futures, endpoints of this machine, the client behind them.

executor        submit, map, put: values and functions become messages
future          ComputeFuture, the stdlib's future made light
client          the sessions of this process with endpoints; `loop` is its I/O thread
local_endpoint  an agent on this machine, as a context manager
transfers       large blobs on their way
callbacks, lending, agent_process   the thread for callbacks; slots of waiting tasks; agents as child processes

user's threads ── queue, wake ──► loop ──► brains.submitter, brains.peers ──► carrier
"""
