"""Where Alembic begins: it changes the tables over the connection that `Database` hands it, inside its transaction."""

from __future__ import annotations

from alembic import context

from gcref.hub.database import Base

# Not `begin_transaction` of a connection of Alembic's own: the caller's transaction holds the lock.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transactional_ddl=False,
)
context.run_migrations()
