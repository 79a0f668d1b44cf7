"""What tests of futures share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.sdk.home import Home


@pytest.fixture
def home() -> Iterator[Home]:
    made = Home()
    yield made
    made.close()
