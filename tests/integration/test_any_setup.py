"""Whatever the configuration, base, schedule, loop and mishap: weights stay finite, and
a checkpoint made at any step goes on bit for bit.

Setups are drawn from seeds, so a failure repeats; ``HYBRIDOPT_SETUPS`` gives another
range of them, as in ``HYBRIDOPT_SETUPS=1000-3000``.
"""

import math
import os

import pytest
import torch

from tests.problems import assert_same_bits
from tests.setups import Setup, drawn, take_step

FIRST, LAST = map(int, os.environ.get("HYBRIDOPT_SETUPS", "0-80").split("-"))
RESUMED_STEPS = 60


@pytest.fixture(autouse=True)
def _one_thread():
    """So small are these tensors that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _assert_goes_on_alike(setup: Setup, path) -> None:
    problem = setup.problem()
    opt = setup.build(problem)
    for step in range(setup.saved):
        take_step(setup, problem, opt, step)
        assert all(w.isfinite().all() for w in problem.weights()), step
    torch.save(opt.state_dict(), path)
    twin = problem.twin()
    other = setup.build(twin)
    other.load_state_dict(torch.load(path, weights_only=True))
    last = min(setup.steps, setup.saved + RESUMED_STEPS)
    for step in range(setup.saved, last):
        left = take_step(setup, problem, opt, step)
        right = take_step(setup, twin, other, step)
        assert all(w.isfinite().all() for w in problem.weights()), step
        if setup.base != "adafactor":  # its own resume is not exact
            assert left == right or (math.isnan(left) and math.isnan(right)), step
            assert_same_bits(problem.weights(), twin.weights())
            assert opt.phase is other.phase
    counted = opt.statistics()
    assert counted["steps"] >= counted["predicted_steps"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(FIRST, LAST))
def test_any_setup_stays_finite_and_resumes_bit_for_bit(seed, tmp_path):
    _assert_goes_on_alike(drawn(seed), tmp_path / "opt.pt")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(FIRST, LAST))
def test_any_setup_on_a_gpu_stays_finite_and_resumes_bit_for_bit(seed, tmp_path):
    _assert_goes_on_alike(drawn(seed, "cuda"), tmp_path / "opt.pt")
