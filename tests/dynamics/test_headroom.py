"""Headroom tells a rate that is far too low from every other regime."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hybridopt.config import GainConfig, HybridConfig
from hybridopt.dynamics.gains import AlignmentGains
from hybridopt.dynamics.headroom import Headroom, Room
from tests.dynamics.stream import noisy, observation


def _after(values: list[float], size: int = 20, noise: float = 0.05) -> Headroom:
    drawn = torch.Generator().manual_seed(0)
    headroom = Headroom()
    for value in values:
        row = torch.randn(size, generator=drawn, dtype=torch.float64) * noise
        headroom.add(value + row)
    return headroom


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.55] * 10, 1.0),
        ([0.1] * 10, 0.0),
        ([-0.5] * 10, 0.0),
        # Falling from a warm-up's rate: high on the average, but not steady.
        ([0.7] * 10 + [0.7 * 0.6**k for k in range(1, 6)], 0.0),
        ([0.55], 0.0),
        ([], 0.0),
    ],
)
def test_headroom_needs_high_and_steady_alignment(values, expected):
    assert _after(values).value == pytest.approx(expected, abs=0.05)


def test_headroom_rises_gradually_between_its_bounds():
    levels = [_after([m] * 12, noise=0.0).value for m in (0.2, 0.25, 0.3, 0.35, 0.4)]
    assert levels == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])


def test_headroom_of_no_tensors_is_zero_and_nan_is_no_evidence():
    headroom = _after([0.5] * 10)
    before = headroom.value
    headroom.add(torch.zeros(0, dtype=torch.float64))
    headroom.add(torch.full((3,), math.nan, dtype=torch.float64))
    assert headroom.value == before == 1.0


def test_credit_is_the_largest_headroom_less_one_per_cent_per_step():
    headroom = _after([0.55] * 10)
    assert headroom.credit == 0.0  # nothing has grown yet
    headroom.remember()
    assert headroom.credit == headroom.value == pytest.approx(1.0, abs=0.05)
    before, steps = headroom.credit, 30
    for _ in range(steps):
        headroom.add(torch.zeros(3, dtype=torch.float64))
        headroom.remember()
    assert headroom.value == 0.0
    assert before * 0.99**steps <= headroom.credit < 1.0


@pytest.mark.parametrize("headroom", [False, True])
def test_a_gain_grows_beyond_its_bound_with_the_others_or_with_headroom(headroom):
    def grown(lonely: bool) -> Tensor:
        gains = AlignmentGains(HybridConfig(), 8)
        for _ in range(80):
            gains.headroom.credit = float(headroom)
            evidence = torch.zeros(8, 2, dtype=torch.float64)
            evidence[: 1 if lonely else 8, 0] = 5.0
            gains.grow(evidence)
        return gains.gains[:, 0]

    assert float(grown(lonely=False).min()) == 128.0
    assert float(grown(lonely=True)[0]) == pytest.approx(
        125.0 if headroom else 16.0, rel=0.03
    )
    assert float(grown(lonely=True)[1:].max()) < 0.1


def test_bounds_hold_without_tensors_and_with_gains_of_zero():
    AlignmentGains(HybridConfig(), 0).grow(torch.zeros(0, 2, dtype=torch.float64))
    config = HybridConfig(gain=GainConfig(minimum=0.0))
    gains = AlignmentGains(config, 2)
    gains.gains[:, 0] = torch.tensor([100.0, 0.0])
    gains.grow(torch.zeros(2, 2, dtype=torch.float64))
    assert gains.gains[:, 0].tolist() == [16.0, 0.0]


def test_headroom_state_continues_bit_for_bit():
    one, other = _after([0.3] * 5), Headroom()
    other.load_state_dict(one.state_dict())
    for value in (0.31, 0.28, 0.4):
        row = torch.full((4,), value, dtype=torch.float64)
        for headroom in (one, other):
            headroom.add(row)
            headroom.remember()
        assert one.value == other.value
        assert one.credit == other.credit


@pytest.mark.parametrize(("mean", "expected"), [(0.05, 1.0), (0.0, 1.0), (-0.05, 0.0)])
def test_room_is_taken_by_reliable_overshoot_only(mean, expected):
    room = Room()
    assert room.value == 0.0
    for i in range(60):
        sign = 1.0 if i % 2 else -1.0
        alignment = torch.full((4, 2), mean + 0.02 * sign, dtype=torch.float64)
        room.add(observation(i, alignment))
        if i == 0:
            assert room.value == 0.0  # one has no error to be judged by
    assert room.value == pytest.approx(expected, abs=0.25)


def test_room_takes_no_notice_of_what_has_no_length_or_is_no_number():
    room = Room()
    steps = noisy(6, 4, seed=5)
    for one in steps:
        room.add(one)
    before = room.value
    still = torch.zeros(4, 2, dtype=torch.float64)
    room.add(observation(7, still, basis_sq=still))
    room.add(observation(8, torch.full((4, 2), math.nan, dtype=torch.float64)))
    assert room.value == before > 0.0
