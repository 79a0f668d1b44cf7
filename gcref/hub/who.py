"""Whom a request is from."""

from __future__ import annotations

from typing import NamedTuple


class Who(NamedTuple):
    """A user, as proven by a token.

    Attributes:
        user_id: the user's row.
        name: the user's name.
        token_id: the token's row.
    """

    user_id: int
    name: str
    token_id: int
