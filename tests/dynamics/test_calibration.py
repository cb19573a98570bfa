"""Trust is earned, and confidence falls with errors."""

from __future__ import annotations

import math

import pytest
import torch

from hybridopt.dynamics.calibration import Calibration
from hybridopt.dynamics.correction import CHANNELS, Correction
from hybridopt.types import STEP

L = 6


def scored(shift, noise, steps=200, log_scale=0.0, seed=0):
    """A calibration of a model that foresees ``shift`` up to errors of size noise."""
    calibration = Calibration()
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn((8, L, CHANNELS), generator=generator, dtype=torch.float64)

    for _ in range(steps // 8):
        targets = shift * draw()
        mean = targets + noise * draw()
        scale = torch.full_like(mean, log_scale)
        calibration.add(targets, Correction(mean, scale, torch.zeros_like(mean)))
    return calibration


def test_calibration_trusts_a_model_that_beats_the_prior():
    calibration = scored(1.0, 0.3)
    assert calibration.trust.tolist() == [1.0] * CHANNELS
    assert calibration.trusted


def test_calibration_does_not_trust_a_model_that_is_worse():
    calibration = scored(1.0, 1.5)
    assert calibration.trust.tolist() == [0.0] * CHANNELS
    assert not calibration.trusted


def test_calibration_does_not_trust_too_few_scores():
    assert not scored(1.0, 0.1, steps=8).trusted
    assert scored(1.0, 0.1, steps=16).trusted


def test_calibration_does_not_trust_a_model_that_says_zero():
    calibration = Calibration()
    zero = torch.zeros(8, L, CHANNELS, dtype=torch.float64)
    for _ in range(10):
        calibration.add(zero + 0.7, Correction(zero, zero, zero))
    assert calibration.trust.tolist() == [0.0] * CHANNELS


def test_calibration_takes_trust_back():
    calibration = scored(1.0, 0.3)
    mean = torch.full((8, L, CHANNELS), 2.0, dtype=torch.float64)
    zero = torch.zeros_like(mean)
    for _ in range(10):
        calibration.add(-mean, Correction(mean, zero, zero))
    assert not calibration.trusted


def test_calibration_ignores_channels_that_were_not_observed():
    calibration = Calibration()
    targets = torch.ones(8, L, CHANNELS, dtype=torch.float64)
    targets[..., 3] = math.nan
    said = Correction(targets.nan_to_num(1.0), 0 * targets.nan_to_num(), targets * 0)
    for _ in range(4):
        calibration.add(targets, said)
    assert calibration.trust.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert calibration._count.tolist() == [32, 32, 32, 0]


def test_confidence_falls_with_past_errors_and_with_spread():
    noises = (0.5, 0.8, 1.2, 2.0)
    by_error = []
    for noise in noises:
        calibration = scored(4.0, noise, log_scale=math.log(0.4))
        assert calibration.trust[STEP] == 1.0
        by_error.append(calibration.confidence(0.2))
    assert by_error == sorted(by_error, reverse=True)
    assert by_error[0] > 2 * by_error[-1]
    by_spread = [calibration.confidence(s) for s in (0.0, 0.1, 0.5, 2.0)]
    assert by_spread == sorted(by_spread, reverse=True)
    assert all(0.0 <= c <= 1.0 for c in by_error + by_spread)


def test_confidence_is_one_while_nothing_is_trusted():
    assert scored(1.0, 1.5).confidence(3.0) == 1.0


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_overconfidence_is_the_error_in_stated_sigmas(noise):
    calibration = scored(4.0, noise, steps=2000)
    assert calibration.overconfidence == pytest.approx(max(1.0, noise), rel=0.1)


def test_applied_correction_is_what_was_said_times_trust():
    calibration = scored(1.0, 1.5)
    calibration.trust = torch.tensor([1.0, 0.5, 0.0, 0.25]).double()
    one = torch.ones(L, CHANNELS, dtype=torch.float64)
    applied = calibration.applied(Correction(one, 2 * one, 3 * one))
    assert applied.mean[0].tolist() == [1.0, 0.5, 0.0, 0.25]
    assert applied.log_scale[0].tolist() == [2.0, 1.0, 0.0, 0.5]
    assert applied.spread[0].tolist() == [3.0, 1.5, 0.0, 0.75]
