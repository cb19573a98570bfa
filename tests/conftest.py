"""What every test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

# The same examples on every machine: a green run stays green. To search for new ones,
# run with --hypothesis-profile=search.
settings.register_profile("repeat", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile("repeat")


@pytest.fixture(autouse=True)
def _plain_structlog() -> Iterator[None]:
    """structlog as a fresh process has it: capturing logs leaves it configured."""
    yield
    structlog.reset_defaults()
