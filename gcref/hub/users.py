"""Users and their tokens.

A token is 256 random bits, so its plain SHA-256 is as good as a slow hash would be: there is nothing to guess. It is shown
once, when it is made.

Taking a token or a user away takes their parties along: keys leave what endpoints may let in, and mailboxes go. What is to
be done at the broker is noted in the same transaction (`parties.dismiss`), and done by `mailboxes`.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from typing import Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session

from gcref.errors import NotFoundError, RejectedError
from gcref.hub import parties
from gcref.hub.database import Database, Party, Token, User
from gcref.hub.who import Who

USER_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
"""What a user may be called: no slash, because `owner/name` names an endpoint."""

PREFIX: Final = "gcref_"
"""How a token begins, so that people and scanners for secrets know one when they see it."""

_BITS: Final = 256
# `last_used` is for people: it need not be written for each request.
_NOTE_USE_S: Final = 60.0


class NewToken(NamedTuple):
    """A token, just made. `secret` is not kept anywhere."""

    id: int
    secret: str

    def __repr__(self) -> str:
        return f"NewToken(id={self.id}, secret=…)"


class UserRow(NamedTuple):
    """A user, for a list."""

    name: str
    created: float
    tokens: int
    endpoints: int


class TokenRow(NamedTuple):
    """A token, for a list."""

    id: int
    created: float
    last_used: float | None


def authenticate(database: Database, secret: str) -> Who | None:
    """Tell whose token it is; None: nobody's. Its use is noted."""
    digest = _digest(secret)
    now = time.time()
    row = database.read(
        lambda session: session.execute(
            sa.select(User.id, User.name, Token.id, Token.last_used).join(Token).where(Token.digest == digest)
        ).first()
    )
    if row is None:
        return None
    user_id, name, token_id, last_used = row
    if last_used is None or not 0 <= now - last_used < _NOTE_USE_S:
        database.write(
            lambda session: session.execute(
                sa.update(Token).where(Token.id == token_id).values(last_used=now)
            )
        )
    return Who(user_id, name, token_id)


def add(database: Database, name: str) -> NewToken:
    """Make a user, with a first token.

    Raises:
        RejectedError: the name is taken, or is none.
    """
    if not USER_PATTERN.fullmatch(name):
        raise RejectedError(
            f"{name!r} cannot name a user: use letters, digits, '.', '_', '@' and '-' (at most 64), a letter or digit first"
        )
    secret = _new_secret()

    def work(session: Session) -> NewToken:
        if session.scalar(sa.select(User.id).where(User.name == name)) is not None:
            raise RejectedError(
                f"there is a user {name!r} already; 'gcref hub token new {name}' makes a token"
            )
        user = User(name=name, created=time.time())
        session.add(user)
        session.flush()
        return _add_token(session, user.id, secret)

    return database.write(work)


def remove(database: Database, name: str) -> list[bytes]:
    """Remove a user with all that is theirs.

    Returns:
        The ids of the parties whose mailboxes are to go now.

    Raises:
        NotFoundError: there is no such user.
    """

    def work(session: Session) -> list[bytes]:
        user = _user(session, name)
        gone = parties.dismiss(session, Party.user_id == user.id, for_good=True)
        session.execute(sa.delete(User).where(User.id == user.id))
        return gone

    return database.write(work)


def listed(database: Database) -> list[UserRow]:
    """All users, by name."""
    tokens = sa.select(sa.func.count()).where(Token.user_id == User.id).scalar_subquery()
    endpoints = (
        sa.select(sa.func.count()).where(Party.user_id == User.id, Party.kind == "endpoint").scalar_subquery()
    )
    query = sa.select(User.name, User.created, tokens, endpoints).order_by(User.name)
    return database.read(lambda session: [UserRow(*row) for row in session.execute(query)])


def new_token(database: Database, name: str) -> NewToken:
    """Make one more token for a user.

    Raises:
        NotFoundError: there is no such user.
    """
    secret = _new_secret()
    return database.write(lambda session: _add_token(session, _user(session, name).id, secret))


def revoke(database: Database, token_id: int) -> list[bytes]:
    """Make a token worthless from now on; the parties that were registered with it go.

    Returns:
        The ids of the parties whose mailboxes are to go now.

    Raises:
        NotFoundError: there is no such token.
    """

    def work(session: Session) -> list[bytes]:
        gone = parties.dismiss(session, Party.token_id == token_id, for_good=False)
        done = session.execute(sa.delete(Token).where(Token.id == token_id).returning(Token.id)).first()
        if done is None:
            raise NotFoundError(f"there is no token {token_id}; 'gcref hub token list NAME' shows a user's")
        return gone

    return database.write(work)


def tokens_of(database: Database, name: str) -> list[TokenRow]:
    """A user's tokens, oldest first.

    Raises:
        NotFoundError: there is no such user.
    """

    def work(session: Session) -> list[TokenRow]:
        query = sa.select(Token.id, Token.created, Token.last_used).where(
            Token.user_id == _user(session, name).id
        )
        return [TokenRow(*row) for row in session.execute(query.order_by(Token.id))]

    return database.read(work)


def _user(session: Session, name: str) -> User:
    user = session.scalar(sa.select(User).where(User.name == name))
    if user is None:
        raise NotFoundError(f"there is no user {name!r}")
    return user


def _add_token(session: Session, user_id: int, secret: str) -> NewToken:
    token = Token(user_id=user_id, digest=_digest(secret), created=time.time(), last_used=None)
    session.add(token)
    session.flush()
    return NewToken(token.id, secret)


def _new_secret() -> str:
    return PREFIX + secrets.token_urlsafe(_BITS // 8)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
