"""What a window's steps, one by one, say of its direction."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest
import torch

from hybridopt.dynamics.persistence import Persistence
from hybridopt.types import DRIFT
from tests.dynamics.stream import SIZES, observation

L = len(SIZES)


def measured(step, cosine, **changes):
    """A step whose gradient has this cosine with the drift, all weights together."""
    alignment = torch.zeros(L, 2, dtype=torch.float64)
    one = observation(step, alignment, **changes)
    square = float(one.gradient_sq.sum() * one.basis_sq[:, DRIFT].sum())
    one.dots[step % L, DRIFT] = -cosine * math.sqrt(square)
    return one


def after(*windows, memory=0.0, steps=1.0):
    persistence = Persistence()
    for window in windows:
        persistence.forget()
        for i, cosine in enumerate(window):
            persistence.add(measured(i, cosine, drift_memory=memory), steps)
        persistence.close()
    return persistence


def noise(middle, seed, count=40, spread=0.01):
    source = random.Random(seed)
    return [source.gauss(middle, spread) for _ in range(count)]


@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_significance_follows_its_literal_twin(memory):
    persistence, cosines = Persistence(), noise(0.02, 3, count=9)
    weights = [17.0, *[4.0] * 7, 2.0]
    for i, (cosine, weight) in enumerate(zip(cosines, weights, strict=True)):
        persistence.add(measured(i, cosine, drift_memory=memory), weight)
    total = sum(weights)
    pairs = list(zip(weights, cosines, strict=True))
    mean = sum(w * c for w, c in pairs) / total
    spread = 9 / 8 * sum(w * (c - mean) ** 2 for w, c in pairs) / total
    r = sum(w * memory**w for w in weights) / total
    variance = spread * sum(w * w for w in weights) / total**2 * (1 + r) / (1 - r)
    assert persistence.significance == pytest.approx(mean / math.sqrt(variance))


def test_all_weights_together_are_what_counts():
    """Many small tensors that agree do not outvote the large one that does not."""
    gradient_sq = torch.tensor([1.0, 1.0, 1.0, 1.0, 400.0], dtype=torch.float64)
    persistence, total = Persistence(), 0.0
    for i in range(20):
        alignment = torch.full((L, 2), 0.2, dtype=torch.float64)
        alignment[-1] = -0.2 + 0.05 * math.sin(i)
        one = observation(i, alignment, gradient_sq=gradient_sq)
        norms = (gradient_sq.unsqueeze(1) * one.basis_sq).sqrt()
        one = replace(one, dots=-alignment * norms)
        persistence.add(one, 1.0)
        total += float(one.alignment[:, DRIFT].sum())
    assert total > 0.0
    assert persistence.significance < -3.0


def test_what_is_scaled_says_the_same():
    scaled, plain = Persistence(), Persistence()
    for i, cosine in enumerate(noise(0.005, 4)):
        one = measured(i, cosine)
        plain.add(one, 1.0)
        by_gradient, by_drift = 10.0 ** (i % 3), 1e-6
        many = {
            "gradient_sq": one.gradient_sq * by_gradient**2,
            "basis_sq": one.basis_sq * by_drift**2,
            "dots": one.dots * by_gradient * by_drift,
        }
        scaled.add(replace(one, **many), 1.0)
    assert scaled.significance == pytest.approx(plain.significance)


@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_by_chance_alone_its_spread_is_that_of_a_standard_normal(memory):
    """Of averages of gradients too, though neighbours have much in common."""
    found, source = [], random.Random(0)
    for _ in range(800):
        average, window = 0.0, []
        for step in range(200):
            average = memory * average + (1.0 - memory) * source.gauss(0.0, 0.01)
            if step >= 120 and step % 4 == 0:
                window.append(average)
        persistence = Persistence()
        for i, cosine in enumerate(window):
            persistence.add(measured(i, cosine, drift_memory=memory), 4.0)
        found.append(persistence.significance)
    assert statistics.mean(found) == pytest.approx(0.0, abs=0.15)
    assert statistics.stdev(found) == pytest.approx(1.0, abs=0.2)


def saying(z, count=40):
    """A window of this significance."""
    middle = z * 0.01 / math.sqrt(count - 1)
    return [middle + 0.01 * (-1.0) ** i for i in range(count)]


def test_until_steps_have_spoken_for_it_what_speaks_against_it_stops_it():
    assert after(saying(0.0)).share == 1.0
    against = after(saying(-1.5))
    assert against.evidence == pytest.approx(-0.9)
    assert against.share == 0.0
    assert against.doubted
    slight = after(saying(-0.5))
    assert slight.share == pytest.approx(0.6)
    assert not slight.doubted
    assert after(saying(-99.0)).evidence == pytest.approx(-1.8)


def test_once_proven_it_takes_much_to_disprove_it():
    proven = [saying(1.7)]
    assert after(*proven).proven
    assert not after(saying(1.6)).proven
    spent = after(*proven, *[saying(-1.0)] * 3)
    assert -1.5 < spent.evidence < -0.75
    assert spent.share == 1.0
    assert not spent.doubted
    against = after(*proven, *[saying(-2.0)] * 3)
    assert not against.proven
    assert against.share == 0.0
    assert against.doubted
    again = after(*proven, *[saying(-2.0)] * 3, *[saying(3.0)] * 2)
    assert again.proven


def test_windows_that_measured_next_to_nothing_say_nothing():
    assert after([]).evidence == 0.0
    assert after([0.5, 0.5]).evidence == 0.0
    assert after([0.5, 0.5]).share == 1.0
    for bad in (0.0, math.inf, math.nan):
        persistence = Persistence()
        for i in range(9):
            one = measured(i, 0.3)
            one.gradient_sq[:] = bad
            persistence.add(one, 1.0)
        assert persistence.significance == 0.0


def test_restored_in_mid_window_it_goes_on_alike():
    made, other = Persistence(), Persistence()
    cosines = noise(0.003, 5)
    for i, cosine in enumerate(cosines[:20]):
        made.add(measured(i, cosine, drift_memory=0.9), 4.0)
    made.close()
    for i, cosine in enumerate(cosines[20:30]):
        made.add(measured(i, cosine, drift_memory=0.9), 4.0)
    other.load_state_dict(made.state_dict())
    for persistence in (made, other):
        for i, cosine in enumerate(cosines[30:]):
            persistence.add(measured(i, cosine, drift_memory=0.9), 4.0)
        persistence.close()
    assert other.state_dict() == made.state_dict()
    assert made.evidence != 0.0
