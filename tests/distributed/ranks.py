"""What every rank does; ``test_ranks.py`` compares what came out.

Every scenario returns plain values and tensors; one that raises returns its traceback.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.scenarios_ddp import (
    ddp,
    ddp_bucket_views,
    ddp_nan_on_one_rank,
    ddp_natural,
    ddp_unused_parameter,
    ddp_validated,
    group_created_too_late,
    groups_of_one,
    one_process,
    zero,
    zero_the_wrong_way_round,
)
from tests.distributed.scenarios_fsdp import (
    fsdp,
    fsdp_forward_without_backward,
    fsdp_hybrid_sharding,
    fsdp_low_precision_directions,
    fsdp_refused_by_one_rank,
    fsdp_resume,
    fsdp_zero_gradient_shards,
)
from tests.distributed.scenarios_lead import (
    ddp_ahead,
    fsdp_ahead,
    fsdp_ahead_resume,
    one_process_ahead,
)

SCENARIOS: list[Callable[[], dict[str, Any]]] = [
    ddp,
    ddp_natural,
    one_process,
    ddp_validated,
    ddp_nan_on_one_rank,
    ddp_bucket_views,
    ddp_unused_parameter,
    fsdp,
    fsdp_hybrid_sharding,
    fsdp_low_precision_directions,
    fsdp_refused_by_one_rank,
    fsdp_zero_gradient_shards,
    fsdp_resume,
    fsdp_forward_without_backward,
    ddp_ahead,
    fsdp_ahead,
    one_process_ahead,
    fsdp_ahead_resume,
    zero,
    zero_the_wrong_way_round,
    group_created_too_late,
    groups_of_one,
]


def main(rank: int) -> dict[str, Any]:
    """Results by scenario."""
    results: dict[str, Any] = {}
    for scenario in SCENARIOS:
        torch.manual_seed(0)
        try:
            results[scenario.__name__] = scenario()
        except Exception:
            results[scenario.__name__] = {"error": traceback.format_exc()}
        print(rank, scenario.__name__, flush=True)
        dist.barrier()
    return results
