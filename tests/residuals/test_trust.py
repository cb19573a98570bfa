from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridopt.residuals import trust
from hybridopt.residuals.trust import TrustWeights


def teach(weights: TrustWeights, gain: float, steps: int) -> None:
    """Residuals that are ``gain`` times the correction."""
    for _ in range(steps):
        weights.update(
            torch.tensor([gain], dtype=torch.float64),
            torch.ones(1, dtype=torch.float64),
            torch.tensor([gain * gain], dtype=torch.float64),
        )


def test_trust_starts_at_zero() -> None:
    assert TrustWeights(3).weights.tolist() == [0.0, 0.0, 0.0]


def test_trust_finds_the_best_weight() -> None:
    for gain in (0.3, 0.7):
        weights = TrustWeights(1)
        teach(weights, gain, 2000)
        assert abs(float(weights.weights) - gain) < 0.02


def test_trust_never_leaves_zero_for_harmful_corrections_nor_exceeds_one() -> None:
    harmful, timid = TrustWeights(1), TrustWeights(1)
    teach(harmful, -1.0, 50)
    teach(timid, 3.0, 50)
    assert float(harmful.weights) == 0.0
    assert float(timid.weights) == 1.0


def test_trust_agrees_with_the_published_update() -> None:
    """Algorithm 1 of McMahan et al. 2013, written out for one coordinate."""
    weights, z, n = TrustWeights(1), 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        product, correction_sq, residual_sq = torch.rand(
            3, 1, generator=generator, dtype=torch.float64
        )
        if abs(z) <= trust.PENALTY:
            w = 0.0
        else:
            sign = 1.0 if z > 0 else -1.0
            w = -(z - sign * trust.PENALTY) / ((trust.SMOOTHING + n**0.5) / trust.RATE)
        w = min(max(w, 0.0), 1.0)
        assert abs(float(weights.weights) - w) < 1e-12
        g = -float(product - w * correction_sq) / float(correction_sq + residual_sq)
        z += g - ((n + g * g) ** 0.5 - n**0.5) / trust.RATE * w
        n += g * g
        weights.update(product, correction_sq, residual_sq)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-12, 1e12), st.floats(-2, 2))
def test_trust_does_not_depend_on_scale(scale: float, gain: float) -> None:
    one, other = TrustWeights(1), TrustWeights(1)
    for _ in range(10):
        parts = torch.tensor([[gain], [1.0], [gain * gain]], dtype=torch.float64)
        one.update(*parts)
        other.update(*(scale * parts))
    torch.testing.assert_close(one.weights, other.weights, rtol=1e-6, atol=1e-9)


def test_trust_learns_nothing_from_nothing() -> None:
    weights = TrustWeights(2)
    weights.update(*torch.zeros(3, 2, dtype=torch.float64))
    weights.update(*torch.full((3, 2), float("nan"), dtype=torch.float64))
    state = weights.state_dict()
    assert not state["z"].any()
    assert not state["n"].any()
