"""Whatever the configuration, base, schedule and mishap of one rank: two ranks decide
alike and hold the same weights after every step, replicated or sharded.

``HYBRIDOPT_RANK_SETUPS=100-200`` searches other seeds.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed.any_setup import FIRST, KINDS, LAST
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results():
    return launch("tests.distributed.any_setup")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(FIRST, LAST))
def test_ranks_agree_in_any_setup(results, kind, seed):
    left, right = (r[f"{kind} {seed}"] for r in results)
    assert repr(left["decisions"]) == repr(right["decisions"]), left["setup"]
    assert torch.equal(left["weights"], right["weights"]), left["setup"]
    assert left["weights"].isfinite().all(), left["setup"]
