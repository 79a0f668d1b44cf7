"""What users hold in their hands: executors, futures, endpoints of this machine, the client behind them.

    user's threads ── queue, wake ──► loop ──► brains.submitter, brains.peers ──► carrier
                  ◄── future, callbacks ──┘

The modules, from what users see to what serves it:

    executor          submit, put, map: values and functions become messages (mapping, options)
    future            ComputeFuture, the stdlib's future made light; lending: what a waiting task does with its slot
    client            who this process is; the executors that share its sessions
    loop              the client's I/O thread: it owns the sockets and drives the brains
    reaching          how it finds endpoints and gives them up (whereabouts: where they are)
    handover          inside a task: what it leaves behind is its agent's before it ends
    large_values      fetches and uploads, by the bulk thread (transfers: what that thread finds here)
    callbacks         the thread that runs the callbacks of futures
    local_endpoint    a named agent on this machine; private_endpoint: one for a single executor (agent_process)
    explain, story    what `explain` says; what endpoints say of a task, in words
    inquiry           `gcref explain TASK`: finds a task from outside
    questions         what user's threads ask the I/O thread (request: one of these, and its answer)
"""
