"""Mail: how parties that cannot dial each other are reached, through mailboxes at a broker.

post        the seam: what a mailbox does, and how it is addressed
seal        boxes that only the receiver can open
amqp        the mailbox at RabbitMQ, with its watcher; `connection` and `loop` are its thread
inbox       what has come, by lane, and what of it may be acknowledged
outbox      what waits to leave, within bounds
memory      the fake, with faults on demand; it keeps the same promises (`tests/contract`)
"""
