import pytest
import torch
from torch import Tensor

from hybridopt.config import SecantConfig
from hybridopt.errors import CheckpointError
from hybridopt.weights.noise import NoiseMeter


def quadratic(noise: float, steps: int = 60) -> NoiseMeter:
    """Gradient descent on a quadratic whose loss carries a constant random offset."""
    generator = torch.Generator().manual_seed(0)
    curvature = torch.linspace(0.1, 1.0, 8, dtype=torch.float64)
    x = torch.ones(8, dtype=torch.float64)
    meter = NoiseMeter(SecantConfig())
    previous: tuple[float, Tensor, Tensor] | None = None
    for _ in range(steps):
        offset = noise * float(torch.randn((), generator=generator))
        loss = float(0.5 * (curvature * x * x).sum()) + offset
        gradient = curvature * x
        if previous is not None:
            old_loss, old_x, old_gradient = previous
            move = x - old_x
            slopes = float(old_gradient @ move), float(gradient @ move)
            meter.add(old_loss, loss, *slopes)
        previous = (loss, x.clone(), gradient)
        x = x - 0.1 * gradient
    return meter


def test_meter_is_undecided_until_its_window_is_full() -> None:
    meter = NoiseMeter(SecantConfig(), window=4)
    for _ in range(3):
        meter.add(1.0, 0.5, -0.5, -0.5)
    assert not meter.decided
    assert not meter.is_low
    meter.add(1.0, 0.5, -0.5, -0.5)
    assert meter.decided
    assert meter.is_low


def test_meter_reads_nothing_on_a_quadratic() -> None:
    meter = quadratic(0.0)
    assert meter.misfit < 1e-6
    assert meter.is_low


def test_meter_notices_noise_above_the_step_size() -> None:
    assert not quadratic(0.1).is_low


def test_meter_tells_doubt_from_certain_noise() -> None:
    meter = NoiseMeter(SecantConfig(noise_threshold=0.1), window=1)
    for misfit, low, high in [(0.05, True, False), (0.2, False, False)]:
        meter.add(1.0, 0.5 - 0.5 * misfit, -0.5, -0.5)
        assert (meter.is_low, meter.is_high) == (low, high)
    meter.add(1.0, 0.2, -0.5, -0.5)
    assert meter.is_high


def test_meter_does_not_take_a_crossed_valley_for_noise() -> None:
    meter = NoiseMeter(SecantConfig())
    # f(x) = x^2 + 0.02 x^3 from -1 to 1.05: large slopes of opposite sign.
    x, z = -1.0, 1.05
    loss_x, loss_z = x**2 + 0.02 * x**3, z**2 + 0.02 * z**3
    slope_x = (2 * x + 0.06 * x**2) * (z - x)
    slope_z = (2 * z + 0.06 * z**2) * (z - x)
    assert meter.add(loss_x, loss_z, slope_x, slope_z) < 0.05


def test_meter_does_not_take_rounding_for_noise() -> None:
    meter = NoiseMeter(SecantConfig())
    assert meter.add(1.0, 1.0 + 2.0**-22, -1e-12, -1e-12) < 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_meter_ignores_moves_that_are_not_finite(bad: float) -> None:
    meter = NoiseMeter(SecantConfig(), window=2)
    meter.add(1.0, 0.9, -0.1, -0.1)
    before = meter.misfit
    meter.add(1.0, bad, -0.1, -0.1)
    assert not meter.decided
    assert meter.misfit == before


def test_meter_forgets_on_reset() -> None:
    meter = quadratic(0.0)
    meter.reset()
    assert not meter.decided


def test_meter_continues_exactly_after_a_load() -> None:
    meter = quadratic(0.01)
    other = NoiseMeter(SecantConfig())
    other.load_state_dict(meter.state_dict())
    for m in (meter, other):
        m.add(1.0, 0.7, -0.2, -0.3)
    assert other.misfit == meter.misfit
    assert other.state_dict() == meter.state_dict()


def test_meter_refuses_a_window_that_is_too_long() -> None:
    meter = NoiseMeter(SecantConfig(), window=2)
    with pytest.raises(CheckpointError, match="at most 2"):
        meter.load_state_dict(quadratic(0.0).state_dict())


def test_moves_under_way_end_at_twice_the_threshold():
    for misfit, stays in ((1.5, True), (2.5, False)):
        meter = NoiseMeter(SecantConfig(noise_threshold=0.08))
        for _ in range(20):
            # Both slopes are -1, so the trapezoid rule expects a change of -1.
            meter.add(1.0, misfit * 0.08, -1.0, -1.0)
        assert meter.misfit == pytest.approx(misfit * 0.08, rel=1e-3)
        assert not meter.stays_low(engaged=False)
        assert meter.stays_low(engaged=True) is stays
