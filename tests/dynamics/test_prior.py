"""The analytic predictor against a literal twin and against its own definitions."""

from __future__ import annotations

import math

import pytest
import torch

from hybridopt.config import DriftConfig, GainConfig, HybridConfig, Prior
from hybridopt.dynamics import build_predictor
from hybridopt.types import STEP, Outcome
from tests.dynamics.stream import SIZES, noisy, observation, predictor, slopes
from tests.parts import move_of

L = len(SIZES)


class Twin:
    """The rule as it is written down, one tensor and one direction at a time."""

    def __init__(self, gain: GainConfig):
        self.rule, self.gain = gain, gain.initial
        self.restart()

    def restart(self):
        self.count, self.m, self.q = 0, 0.0, 0.0

    def absorb(self, c):
        rho = self.rule.memory
        self.count += 1
        self.m = rho * self.m + (1 - rho) * c
        self.q = rho * self.q + (1 - rho) * c * c

    def grow(self, headroom):
        if self.count < 2:
            return
        rule = self.rule
        rho = rule.memory
        correction = 1 - rho**self.count
        m, q = self.m / correction, self.q / correction
        sd = math.sqrt(max(q - m * m, 0.0))
        t = m / (sd * math.sqrt((1 - rho) / (1 + rho)) + 0.01)
        step = min(max((abs(t) - rule.significance) / 2, 0.0), 1.0)
        if step == 0.0:
            self.gain *= (rule.minimum / self.gain) ** rule.relaxation
        speed = 1 + rule.boost * headroom if t > 0 else 1.0
        self.gain *= math.exp(rule.rate * speed * math.copysign(step, t))
        self.gain = min(max(self.gain, rule.minimum), rule.maximum)


@pytest.mark.parametrize("lift", [0.0, 0.45])
@pytest.mark.parametrize(
    "gain",
    [
        GainConfig(),
        GainConfig(rate=0.7, significance=0.3, memory=0.5, maximum=4.0),
        GainConfig(relaxation=0.0, boost=3.0, eager=0.5),
    ],
)
def test_prior_follows_its_literal_twin(gain, lift):
    made = build_predictor(HybridConfig(predictor=Prior(), gain=gain), SIZES, [1] * L)
    rule = [Twin(gain) for _ in range(L)]
    pooled, credit = Pooled(), 0.0
    ratios = {40: 1.5, 41: 1.2, 55: 0.5, 70: 3.0}
    seen = set()
    for i, one in enumerate(noisy(120, L, seed=3)):
        ratio = ratios.get(i, 1.0)
        made.moving = i >= 10
        # Alignments that begin high show headroom, and lose it half-way.
        alignment = (one.alignment + (lift if i < 60 else 0.0)).clamp(-1, 1)
        made.observe(observation(i, alignment, lr_ratio=ratio))
        headroom = pooled.absorb(float(alignment[:, STEP].mean()))
        seen.add(0.0 if headroom == 0 else 1.0 if headroom == 1 else 0.5)
        for index, twin in enumerate(rule):
            if made.moving and ratio > 1:
                twin.gain = max((1 + twin.gain) / ratio - 1, gain.minimum)
            twin.absorb(float(alignment[index, STEP]))
            if i == 10:
                twin.gain *= max(gain.eager / gain.initial, 1.0) ** headroom
            if made.moving:
                twin.grow(headroom)
        if made.moving and rule[0].count > 1:
            credit = max(headroom, 0.99 * credit)
            hold_together(rule, gain, credit)
        if i == 90:
            made.feedback(Outcome(0, 0.0, 1, 1.0, True))
            pooled, credit = Pooled(), 0.0
            for twin in rule:
                twin.gain = max(twin.gain / 4, gain.minimum)
                twin.restart()
        said = made.forecast(slopes(L)).coefficients[:, STEP]
        exact = torch.tensor([twin.gain for twin in rule], dtype=torch.float64)
        assert torch.allclose(said, exact, rtol=1e-9, atol=0.0), i
    assert said.std() > 0.01 or lift
    assert (1.0 in seen) == (lift > 0)


def hold_together(rule, gain, credit):
    """The bound on gains that grow alone, as it is written down."""
    product = math.prod(twin.gain for twin in rule)
    bound = max(gain.lone_maximum, 4 * product ** (1 / len(rule)))
    bound *= max(gain.maximum / bound, 1.0) ** credit
    for twin in rule:
        twin.gain = min(twin.gain, bound)


class Pooled:
    """Headroom as it is written down."""

    def __init__(self):
        self.values = []

    def absorb(self, c):
        self.values.insert(0, c)
        if len(self.values) < 2:
            return 0.0
        weights = [0.8**k for k in range(len(self.values))]
        m = sum(w * v for w, v in zip(weights, self.values, strict=True)) / sum(weights)
        q = sum(w * v * v for w, v in zip(weights, self.values, strict=True))
        sd = math.sqrt(max(q / sum(weights) - m * m, 0.0))
        t = m / (sd * math.sqrt(0.2 / 1.8) + 0.005)
        return min(max((t - 6) / 6, 0), 1) * min(max((m - 0.2) / 0.2, 0), 1)


def test_prior_gains_without_evidence_come_to_rest():
    """White alignments carry gains anywhere; relaxation brings them to the floor."""
    drawn = torch.Generator().manual_seed(1)
    rows = torch.randn(600, L, 2, generator=drawn, dtype=torch.float64) * 0.1
    resting, wandering = (
        predictor(Prior(), gain=GainConfig(relaxation=r)) for r in (0.03, 0.0)
    )
    levels = {id(resting): [], id(wandering): []}
    for i, row in enumerate(rows):
        for made in (resting, wandering):
            made.observe(observation(i, row))
            levels[id(made)].append(made.gains.gains[:, STEP].log().mean().exp())
    assert torch.stack(levels[id(resting)][100:]).mean() < 0.03
    assert torch.stack(levels[id(wandering)][100:]).mean() > 0.08


def test_alignment_is_the_cosine_of_the_descent_direction_and_zero_without_one():
    one = noisy(1, L)[0]
    norms = (one.gradient_sq.unsqueeze(1) * one.basis_sq).sqrt()
    torch.testing.assert_close(one.alignment, -one.dots / norms)
    zero = torch.zeros_like(one.dots)
    flat = observation(0, zero, dots=zero, basis_sq=zero)
    assert flat.alignment.tolist() == zero.tolist()
    lost = observation(0, zero, dots=zero + torch.nan)
    assert lost.alignment.tolist() == zero.tolist()


def test_prior_gain_grows_on_steady_alignment_and_falls_on_opposed():
    gain = GainConfig(minimum=0.03, maximum=40.0)
    steady, opposed = (predictor(Prior(), gain=gain) for _ in range(2))
    for i in range(40):
        one = torch.full((L, 2), 0.3, dtype=torch.float64)
        steady.observe(observation(i, one))
        opposed.observe(observation(i, -one))
    assert bool((steady.gains.gains[:, STEP] == 40.0).all())
    assert bool((opposed.gains.gains[:, STEP] == 0.03).all())


def test_prior_one_observation_is_no_evidence():
    made = predictor(Prior())
    made.observe(observation(0, torch.full((L, 2), 0.9, dtype=torch.float64)))
    assert made.gains.gains[:, STEP].tolist() == [0.1] * L


def test_prior_progress_is_first_order_worth_times_efficiency():
    made = predictor(Prior(), drift=DriftConfig(enabled=False))
    made.observe(noisy(1, L)[0])
    made.gains.gains = torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0], [5, 0]]).double()
    said = made.forecast(torch.tensor([1.0, -9.0, 2.0, 0.0, 1.0]).double())
    assert said.progress == pytest.approx((1 + 6 + 5) / 4 * 0.5)
    assert said.progress_lower == 0.0  # no move was seen to end downhill yet
    for _ in range(2):
        made.gate.add(1.0, 1.0, 1.0)
    said = made.forecast(torch.tensor([1.0, -9.0, 2.0, 0.0, 1.0]).double())
    assert said.progress_lower == pytest.approx(3.0 * 0.25)
    assert said.confidence == pytest.approx(0.5)


def test_prior_measures_efficiency_by_the_trapezoid_rule():
    made = predictor(Prior(), drift=DriftConfig(enabled=False))
    made.observe(noisy(1, L)[0])
    slope = slopes(L).abs()
    samples = []
    for i, ratio in enumerate((0.4, -0.2, -7.0, 5.0), 1):
        said = made.forecast(slope)
        coefficients = said.coefficients
        begin = float((coefficients[:, STEP] * slope).sum())
        dots = torch.zeros(L, 2, dtype=torch.float64)
        dots[0, STEP] = -ratio * begin / float(coefficients[0, STEP])
        flat = torch.zeros(L, 2, dtype=torch.float64)
        made.observe(observation(i, flat, dots=dots, move=move_of(said, slope)))
        samples.append((1 + min(max(ratio, -1), 1)) / 2)
    weights = [0.9 ** (3 - i) for i in range(4)]
    mean = sum(w * s for w, s in zip(weights, samples, strict=True)) / sum(weights)
    assert made.efficiency.mean == pytest.approx(mean)
    assert 0.0 < made.efficiency.error < 0.25


def test_prior_efficiency_is_that_of_the_step_direction_alone():
    made = predictor(Prior(), drift=DriftConfig(initial=4.0, window_steps=2))
    flat = torch.zeros(L, 2, dtype=torch.float64)
    slope = slopes(L).abs()
    for i in range(3):
        made.observe(observation(i, flat))
        said = made.forecast(slope)
    begin = float((said.coefficients[:, STEP] * slope).sum())
    dots = torch.full((L, 2), 100.0, dtype=torch.float64)
    dots[:, STEP] = 0.0
    dots[0, STEP] = -0.5 * begin / float(said.coefficients[0, STEP])
    made.observe(observation(3, flat, dots=dots, move=move_of(said, slope)))
    assert made.efficiency.surprise == pytest.approx((0.75 - 0.5) / 0.3)


def test_prior_consumes_no_steps_once_moves_end_uphill():
    made = predictor(Prior(), drift=DriftConfig(enabled=False))
    flat = torch.zeros(L, 2, dtype=torch.float64)
    lower = []
    slope = slopes(L).abs()
    said = made.forecast(slope)
    for ends in (-1.0, 1.0):
        for i in range(20):
            one = observation(i, flat + 0.3)
            dots = ends * one.dots.abs()
            move = move_of(said, slope, progress=0.1)
            made.observe(observation(i, flat, dots=dots, move=move))
            said = made.forecast(slope)
        lower.append(said.progress_lower)
    assert lower[0] > 0.0
    assert lower[1] == 0.0


def test_prior_judges_no_move_that_was_not_made():
    made = predictor(Prior())
    for i, one in enumerate(noisy(10, L)):
        made.observe(observation(i, one.alignment, move=None))
        made.forecast(slopes(L))
    assert made.efficiency.mean == 0.5
    assert made.efficiency.error == 0.25


def test_prior_rolled_back_move_counts_as_worth_nothing():
    made = predictor(Prior())
    made.feedback(Outcome(0, -1.0, 1, 1.0, True))
    assert made.efficiency.mean == 0.0
    assert made.forecast(slopes(L)).progress == 0.0


def test_prior_expects_a_straight_loss_line_to_go_on():
    made = predictor(Prior())
    flat = torch.zeros(L, 2, dtype=torch.float64)
    for i in range(300):
        made.observe(observation(i, flat, loss=3.0 - 0.01 * i))
    said = made.forecast(slopes(L))
    assert said.loss == pytest.approx(0.0, abs=1e-3)
    assert said.loss_sigma < 1e-3
    means, sigmas = made.loss_path(5)
    assert means == pytest.approx([-0.01 * k for k in range(5)], abs=1e-3)
    assert sigmas == sorted(sigmas)


def test_prior_loss_sigma_covers_noise():
    made = predictor(Prior())
    generator = torch.Generator().manual_seed(0)
    flat = torch.zeros(L, 2, dtype=torch.float64)
    inside = 0
    for i in range(400):
        loss = 2.0 + 0.1 * float(torch.randn((), generator=generator))
        said = made.forecast(slopes(L))
        inside += abs(loss - said.loss) < 2 * said.loss_sigma
        made.observe(observation(i, flat, loss=loss))
    assert 0.88 < inside / 400 < 0.99
