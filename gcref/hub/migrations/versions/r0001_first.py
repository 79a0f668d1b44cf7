"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "users",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("name", name="uq_users_name"),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("user_id", sa.Integer, nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("last_used", sa.Double, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_tokens"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_tokens_user_id", ondelete="CASCADE"),
        sa.UniqueConstraint("digest", name="uq_tokens_digest"),
    )
    op.create_index("ix_tokens_user_id", "tokens", ["user_id"])
    op.create_table(
        "parties",
        sa.Column("id", sa.LargeBinary(16), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("user_id", sa.Integer, nullable=False),
        sa.Column("token_id", sa.Integer, nullable=True),
        sa.Column("public_key", sa.String(40), nullable=False),
        sa.Column("record", sa.JSON, nullable=True),
        sa.Column("trust_hub", sa.Boolean, nullable=False),
        sa.Column("wants_mailbox", sa.Boolean, nullable=False),
        sa.Column("mailbox_ready", sa.Boolean, nullable=False),
        sa.Column("mailbox_reason", sa.String(500), nullable=True),
        sa.Column("running", sa.Boolean, nullable=False),
        sa.Column("expired", sa.Boolean, nullable=False),
        sa.Column("registered", sa.Double, nullable=False),
        sa.Column("seen", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_parties"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_parties_user_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"], name="fk_parties_token_id", ondelete="SET NULL"),
    )
    for column in ("user_id", "token_id", "seen"):
        op.create_index(f"ix_parties_{column}", "parties", [column])
    op.create_table(
        "shares",
        sa.Column("party_id", sa.LargeBinary(16), nullable=False),
        sa.Column("user_id", sa.Integer, nullable=False),
        sa.Column("since", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("party_id", "user_id", name="pk_shares"),
        sa.ForeignKeyConstraint(["party_id"], ["parties.id"], name="fk_shares_party_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_shares_user_id", ondelete="CASCADE"),
    )
    op.create_index("ix_shares_user_id", "shares", ["user_id"])
    op.create_table(
        "functions",
        sa.Column("user_id", sa.Integer, nullable=False),
        sa.Column("digest", sa.LargeBinary(16), nullable=False),
        sa.Column("code", sa.LargeBinary, nullable=False),
        sa.Column("size_bytes", sa.Integer, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("user_id", "digest", name="pk_functions"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_functions_user_id", ondelete="CASCADE"),
    )
    op.create_table(
        "task_events",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("task", sa.LargeBinary(16), nullable=False),
        sa.Column("party_id", sa.LargeBinary(16), nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("noted", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_task_events"),
        sa.ForeignKeyConstraint(
            ["party_id"], ["parties.id"], name="fk_task_events_party_id", ondelete="CASCADE"
        ),
    )
    for column in ("task", "party_id", "noted"):
        op.create_index(f"ix_task_events_{column}", "task_events", [column])
    op.create_table(
        "removals",
        sa.Column("party_id", sa.LargeBinary(16), nullable=False),
        sa.Column("since", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("party_id", name="pk_removals"),
    )


def downgrade() -> None:
    """Take them away."""
    for table in ("removals", "task_events", "functions", "shares", "parties", "tokens", "users"):
        op.drop_table(table)
