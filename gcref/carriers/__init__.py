"""How messages are carried. Brains never know which carrier is in use.

    base        the seam: what a carrier of control messages does
    zeromq      ipc and direct (TCP with CURVE); `zap`, `monitor`, `probe` and `listening` look after its sockets
    mail/       mailboxes at a broker, for those whom nobody can dial
    combined    both as one carrier
    memory      the fake, with faults on demand; it keeps the same promises (`tests/contract`)
    bulk/       the thread that moves the bytes of large objects
    keys        owner keys and lists of allowed keys

A library's exceptions never get out of the carrier that uses it.
"""
