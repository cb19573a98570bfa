"""Two gloo processes: every rank takes the same decisions and ends at the same weights.

One launch runs every scenario of ``ranks.py``; the tests here look at what came back.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed import ranks
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results():
    return launch("tests.distributed.ranks")


@pytest.fixture
def both(results):
    """The two ranks' results of one scenario."""

    def pick(scenario):
        found = [r[scenario.__name__] for r in results]
        for rank, result in enumerate(found):
            assert "error" not in result, f"rank {rank}: {result.get('error')}"
        return found

    return pick


def assert_ranks_agree(left, right):
    assert repr(left["decisions"]) == repr(right["decisions"])
    assert torch.equal(left["weights"], right["weights"])


def phases(result):
    return {step[0] for step in result["decisions"]}


@pytest.mark.parametrize(
    "scenario",
    [
        ranks.ddp,
        ranks.ddp_natural,
        ranks.ddp_validated,
        ranks.ddp_nan_on_one_rank,
        ranks.ddp_unused_parameter,
        ranks.fsdp,
        ranks.fsdp_hybrid_sharding,
        ranks.fsdp_low_precision_directions,
        ranks.fsdp_refused_by_one_rank,
        ranks.ddp_ahead,
        ranks.fsdp_ahead,
        ranks.zero,
    ],
    ids=lambda s: s.__name__,
)
def test_ranks_take_the_same_decisions_and_hold_the_same_weights_after_every_step(
    both, scenario
):
    left, right = both(scenario)
    assert_ranks_agree(left, right)


def test_predicted_steps_communicate_nothing_and_real_ones_one_sum(both):
    for result in both(ranks.ddp):
        assert result["predicted"] > 10
        # One more compares the ranks' parameter lists at the first real step.
        assert result["sums"] == result["real"] + 1
        assert result["gradient_reductions"] == result["real"]


@pytest.mark.parametrize(
    "scenario",
    [ranks.ddp_natural, ranks.fsdp, ranks.fsdp_hybrid_sharding],
    ids=lambda s: s.__name__,
)
def test_ranks_train_as_one_process_on_the_mean_loss(both, scenario):
    """So the loss is averaged, and shards and copies weigh what they should."""
    reference, result = both(ranks.one_process)[0], both(scenario)[0]
    torch.testing.assert_close(
        result["weights"], reference["weights"], rtol=1e-3, atol=1e-4
    )
    assert phases(result) >= {"warmup", "full"}
    for ours, theirs in zip(result["decisions"], reference["decisions"], strict=True):
        assert ours[:5] == theirs[:5]
        assert ours[5] == pytest.approx(theirs[5], rel=1e-3)
        assert ours[6] == pytest.approx(theirs[6], rel=1e-2, nan_ok=True)


@pytest.mark.parametrize(
    "scenario", [ranks.ddp_ahead, ranks.fsdp_ahead], ids=lambda s: s.__name__
)
def test_ranks_are_as_far_ahead_as_one_process(both, scenario):
    reference = both(ranks.one_process_ahead)[0]
    for result in both(scenario):
        assert max(made for _, made in result["leads"]) > 0.4
        # What is measured counts one real step later.
        assert [length for length, _ in result["leads"][1:]] == pytest.approx(
            [length for length, _ in reference["leads"][:-1]], rel=0.05, abs=0.02
        )
        torch.testing.assert_close(
            result["weights"], reference["weights"], rtol=0.05, atol=0.02
        )
    left, right = both(scenario)
    assert left["leads"] == right["leads"]


@pytest.mark.parametrize(
    "scenario", [ranks.ddp_ahead, ranks.fsdp_ahead], ids=lambda s: s.__name__
)
def test_leads_need_no_sum_of_their_own(both, scenario):
    for result in both(scenario):
        # One more compares the ranks' parameter lists at the first real step.
        assert result["sums"] == result["real"] + 1


def test_sharded_run_resumes_exactly_while_it_is_ahead(both):
    for result in both(ranks.fsdp_ahead_resume):
        assert result["lead"] > 0.0
        assert result["unshared"] > 0
        assert result["same"] == [True] * 5


def test_natural_decisions_include_predicted_steps(both):
    assert both(ranks.ddp_natural)[0]["predicted"] > 3
    assert "predict" in phases(both(ranks.fsdp)[0])


def test_empty_shards_take_part(both):
    left, right = both(ranks.fsdp)
    assert left["empty"] == 0
    assert right["empty"] == 2
    assert left["kinds"] == right["kinds"] == ["DTensor", "Tensor"]


def test_nan_on_one_rank_is_everyones(both):
    for result in both(ranks.ddp_nan_on_one_rank):
        assert result["bad"] == 3
        assert bool(result["weights"].isfinite().all())


def test_validation_is_a_mean_over_ranks(both):
    left, right = both(ranks.ddp_validated)
    assert left["validated"] == right["validated"] > 3


def test_gradients_in_reused_buckets_still_count_as_the_users(both):
    left, right = both(ranks.ddp_bucket_views)
    assert left["real"] == left["stepped"] > 20
    assert left["predicted"] > 5
    assert torch.equal(left["weights"], right["weights"])


def test_parameter_without_gradient_on_any_rank_is_left_alone(both):
    for result in both(ranks.ddp_unused_parameter):
        assert torch.equal(result["spare"], torch.ones(3))
        assert not result["tracked"]
        assert result["predicted"] > 10


def test_directions_have_the_same_precision_on_unevenly_filled_ranks(both):
    left, right = both(ranks.fsdp_low_precision_directions)
    assert left["sizes"][0] > left["sizes"][1]
    assert left["dtypes"] == right["dtypes"] == ["torch.bfloat16"] * 4


def test_move_that_one_rank_refuses_is_taken_back_by_all(both):
    left, right = both(ranks.fsdp_refused_by_one_rank)
    assert left["rolled_back"] == right["rolled_back"] > 0
    assert bool(left["weights"].isfinite().all())


def test_gradient_that_is_zero_in_one_ranks_shards_only_is_a_gradient(both):
    left, right = both(ranks.fsdp_zero_gradient_shards)
    assert left["real"] == right["real"] == 1


@pytest.mark.parametrize("way", ["plain", "flat", "full", "disk"])
def test_sharded_run_resumes_exactly_in_mid_predict(both, way):
    for result in both(ranks.fsdp_resume):
        assert result[way] == {"decisions": True, "weights": True}


def test_forward_without_backward_does_not_hide_a_predicted_move(both):
    for result in both(ranks.fsdp_forward_without_backward):
        # The first line is torch's own trap; should it close, the cure can go.
        assert result["nothing"] is False
        assert result["released"] is True
        assert result["optimizer"] is True


def test_zero_redundancy_base_trains_saves_and_resumes_exactly(both):
    left, right = both(ranks.zero)
    assert left["resumes"]
    assert right["resumes"]
    assert left["predicted"] > 5
    assert "consolidate_state_dict" in left["unconsolidated"]
    assert left["unmodified"]


def test_scheduler_reaches_inside_a_zero_redundancy_base(both):
    for result in both(ranks.zero):
        assert result["inner_rate"] < 3e-3


def test_zero_redundancy_around_the_wrapper_is_refused_on_every_rank(both):
    for result in both(ranks.zero_the_wrong_way_round):
        assert "HybridPredictOptimizer(ZeroRedundancyOptimizer" in result["refused"]


def test_process_group_created_after_the_optimizer_is_refused(both):
    for result in both(ranks.group_created_too_late):
        assert "init_process_group" in result["refused"]


def test_ranks_of_different_groups_need_not_agree(both):
    left, right = both(ranks.groups_of_one)
    assert left["predicted"] > 0
    assert right["predicted"] > 0
