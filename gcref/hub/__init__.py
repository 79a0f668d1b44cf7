"""The hub: the service that knows users, parties, keys and addresses, and hands out mailboxes at the broker.

    gcref hub start ─► app (uvicorn) ─► api ─► users, parties, sharing, shelf ─► database (SQLAlchemy)
                                         └──► mailboxes ─► broker (management API of RabbitMQ)
    gcref hub user|token … ─────────────────► users ─► database, mailboxes

It is out of every hot path: with it down, connected parties go on. It trusts nobody without a token, and the broker with
nothing but sealed mail.
"""
