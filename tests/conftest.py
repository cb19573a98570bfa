"""What every test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def _plain_structlog() -> Iterator[None]:
    """structlog as a fresh process has it: capturing logs leaves it configured."""
    yield
    structlog.reset_defaults()
