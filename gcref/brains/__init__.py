"""Pure decision code: `handle(event) -> list[Instruction]`.

No socket, thread, clock, random source or file in here: `now` and ids are handed in, and the same events give the
same instructions. The shells around the brains (the client's and the agent's loops) do the I/O.

    session, peers        who can be talked to, and the ordered exchange of messages with each
    tasks, resolver       what is known, what waits for what, what is to be told to whom
    dispatch              which worker gets which task, and when
    transfer              which ranges of which objects are asked for, and where
"""
