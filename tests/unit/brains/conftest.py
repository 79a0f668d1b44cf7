"""What tests of sessions share."""

from __future__ import annotations

import pytest

from tests.unit.brains.pair import Pair


@pytest.fixture
def pair() -> Pair:
    """Two parties that have not met."""
    return Pair()
