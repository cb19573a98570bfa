"""Every predictor keeps the same promises; new ones are enrolled in ``KINDS``."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from hybridopt.config import MLP, RSSM, HybridConfig
from hybridopt.dynamics import build_predictor
from hybridopt.errors import CheckpointError
from hybridopt.protocols import Predictor
from hybridopt.types import BASIS_SIZE, DRIFT, STEP, Outcome
from tests.dynamics.stream import (
    KINDS,
    NAMES,
    NDIMS,
    SIZES,
    flatten,
    noisy,
    observation,
    predictor,
    slopes,
)

L = len(SIZES)
QUICK = (
    KINDS[0],
    KINDS[1],
    MLP(train_interval_steps=4),
    RSSM(train_interval_steps=6, sequence_steps=3, batch_size=3),
)
every_kind = pytest.mark.parametrize("kind", QUICK, ids=NAMES)
ROLLBACK = Outcome(0, -1.0, 2, 1.0, True)


def run(made, observations, begin=0):
    """Coefficients and numbers of every forecast, as exact values."""
    said = []
    for step, one in enumerate(observations, begin):
        made.observe(one)
        forecast = made.forecast(slopes(L, step))
        said.append(
            (
                forecast.coefficients.tolist(),
                forecast.confidence,
                forecast.progress,
                forecast.progress_lower,
                repr(forecast.loss),
                repr(forecast.loss_sigma),
                None if forecast.latent is None else forecast.latent.tolist(),
            )
        )
        if step % 23 == 22:
            made.feedback(ROLLBACK)
    return said


@every_kind
def test_predictor_is_a_predictor(kind):
    assert isinstance(predictor(kind), Predictor)


@every_kind
def test_forecast_has_the_promised_shapes_and_ranges(kind):
    made = predictor(kind)
    for step, one in enumerate(noisy(40, L)):
        made.observe(one)
        said = made.forecast(slopes(L, step))
        assert said.coefficients.shape == (L, BASIS_SIZE)
        assert said.coefficients.dtype == torch.float64
        assert said.coefficients.device.type == "cpu"
        assert bool((said.coefficients >= 0).all())
        assert 0.0 <= said.confidence <= 1.0
        assert 0.0 <= said.progress_lower <= said.progress < math.inf
        assert step < 3 or (math.isfinite(said.loss) and said.loss_sigma >= 0.0)
        assert said.latent is None or bool(said.latent.isfinite().all())


@every_kind
def test_forecast_before_any_observation_has_no_confidence(kind):
    said = predictor(kind).forecast(slopes(L))
    assert said.confidence == 0.0
    assert bool(said.coefficients.isfinite().all())


@every_kind
def test_forecast_repeats_itself(kind):
    made = predictor(kind)
    for one in noisy(20, L):
        made.observe(one)
    first = made.forecast(slopes(L))
    state = flatten(made.state_dict())
    second = made.forecast(slopes(L))
    assert torch.equal(first.coefficients, second.coefficients)
    assert (first.confidence, first.progress) == (second.confidence, second.progress)
    assert flatten(made.state_dict()) == state


@every_kind
def test_forecast_stays_finite_on_degenerate_observations(kind):
    made = predictor(kind)
    zero = torch.zeros(L, dtype=torch.float64)
    flat = torch.zeros(L, BASIS_SIZE, dtype=torch.float64)
    degenerate = {"gradient_sq": zero, "dots": flat, "basis_sq": flat}
    huge = torch.full((L,), 1e308, dtype=torch.float64)
    for step in range(40):
        changes = [
            degenerate | {"gradient_norm": 0.0},
            {"loss": math.nan},
            {"gradient_sq": huge, "gradient_norm": math.inf},
            {"loss": 1e200, "lr_ratio": math.inf},
            {"lr_ratio": 0.0},
            {"gradient_norm": 1e200},
        ][step % 6]
        made.observe(observation(step, flat + 0.1, **changes))
        said = made.forecast(zero if step % 2 else slopes(L))
        assert bool(said.coefficients.isfinite().all())
        assert math.isfinite(said.confidence)
        assert math.isfinite(said.progress)
        assert math.isfinite(said.progress_lower)


@every_kind
def test_forecast_is_worth_nothing_when_all_slopes_vanish(kind):
    made = predictor(kind)
    for one in noisy(20, L):
        made.observe(one)
    said = made.forecast(torch.zeros(L, dtype=torch.float64))
    assert (said.progress, said.progress_lower) == (0.0, 0.0)


@every_kind
def test_predictor_without_tensors_works(kind):
    made = build_predictor(HybridConfig(predictor=kind), [], [])
    made.observe(noisy(1, 0)[0])
    assert made.forecast(torch.zeros(0, dtype=torch.float64)).coefficients.shape == (
        0,
        BASIS_SIZE,
    )


@every_kind
@pytest.mark.parametrize("cut", [0, 11, 23, 35])
def test_predictor_continues_bit_identically_after_a_load(kind, cut):
    observations = noisy(48, L)
    whole = predictor(kind)
    first = run(whole, observations[:cut])
    saved = copy.deepcopy(whole.state_dict())
    rest = run(whole, observations[cut:], cut)
    resumed = build_predictor(HybridConfig(predictor=kind), SIZES, NDIMS, 999)
    resumed.load_state_dict(saved)
    assert len(first) == cut
    assert run(resumed, observations[cut:], cut) == rest
    assert flatten(resumed.state_dict()) == flatten(whole.state_dict())


@every_kind
def test_predictor_state_is_not_changed_by_going_on(kind):
    made = predictor(kind)
    run(made, noisy(30, L))
    saved = made.state_dict()
    before = flatten(saved)
    run(made, noisy(30, L, seed=1))
    assert flatten(saved) == before


@every_kind
def test_predictor_never_draws_from_the_global_generator(kind):
    before = torch.random.get_rng_state()
    made = predictor(kind)
    run(made, noisy(40, L))
    made.reset()
    assert torch.equal(torch.random.get_rng_state(), before)


@every_kind
def test_predictor_reset_forgets_everything_but_moving(kind):
    made = predictor(kind)
    run(made, noisy(40, L))
    made.reset()
    assert flatten(made.state_dict()) == flatten(predictor(kind).state_dict())


@every_kind
def test_predictor_rollback_quarters_the_gains(kind):
    made = predictor(kind)
    for one in noisy(40, L):
        made.observe(one)
    before = made.forecast(slopes(L)).coefficients
    made.feedback(ROLLBACK)
    after = made.forecast(slopes(L)).coefficients
    expected = (before[:, STEP] / 4).clamp_min(0.02)
    assert bool((before[:, STEP] > 0.1).any())
    assert torch.allclose(after[:, STEP], expected, rtol=1e-12)


@every_kind
def test_predictor_good_outcome_changes_no_gain(kind):
    made = predictor(kind)
    for one in noisy(20, L):
        made.observe(one)
    before = made.forecast(slopes(L)).coefficients
    made.feedback(Outcome(1, 0.7, 1, 1.0, False))
    assert torch.equal(made.forecast(slopes(L)).coefficients, before)


@every_kind
def test_predictor_held_keeps_initial_gains_and_gathers_statistics(kind):
    held = build_predictor(HybridConfig(predictor=kind), SIZES, NDIMS)
    for one in noisy(30, L):
        held.observe(one)
    said = held.forecast(slopes(L))
    assert said.coefficients[:, STEP].tolist() == [0.1] * L
    assert said.coefficients[:, DRIFT].tolist() == [0.0] * L
    assert said.confidence > 0.0
    held.moving = True
    held.observe(observation(30, torch.full((L, 2), 0.2, dtype=torch.float64)))
    assert bool((held.forecast(slopes(L)).coefficients[:, STEP] != 0.1).all())


@every_kind
@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.pop("kind"),
        lambda s: s.update(kind="other"),
        lambda s: _prior_state(s)["gains"].update(gains=torch.zeros(2, 2)),
        lambda s: _prior_state(s)["gains"].update(mean=torch.zeros(L, 2)),
        lambda s: _prior_state(s)["trend"].update(level="high"),
        lambda s: _prior_state(s)["efficiency"].clear(),
        lambda s: s.clear(),
    ],
)
def test_predictor_refuses_a_damaged_state_and_changes_nothing(kind, damage):
    made = predictor(kind)
    run(made, noisy(14, L))
    before = flatten(made.state_dict())
    other = predictor(kind)
    run(other, noisy(15, L, seed=1))
    state = copy.deepcopy(other.state_dict())
    damage(state)
    with pytest.raises(CheckpointError):
        made.load_state_dict(state)
    assert flatten(made.state_dict()) == before


@pytest.mark.parametrize("kind", QUICK[1:], ids=NAMES[1:])
@pytest.mark.parametrize("part", ["model", "features", "calibration", "block", "seen"])
def test_learned_predictor_refuses_damage_in_its_last_parts(kind, part):
    made = predictor(kind)
    run(made, noisy(27, L))
    before = flatten(made.state_dict())
    state = copy.deepcopy(made.state_dict())
    state[part] = [{"features": torch.zeros(1)}] if part == "block" else {"wrong": 1}
    with pytest.raises(CheckpointError):
        made.load_state_dict(state)
    assert flatten(made.state_dict()) == before


def test_predictor_refuses_the_state_of_another_number_of_tensors():
    for kind in QUICK:
        state = predictor(kind).state_dict()
        other = build_predictor(HybridConfig(predictor=kind), SIZES[:-1], NDIMS[:-1])
        with pytest.raises(CheckpointError):
            other.load_state_dict(state)


def test_predictor_refuses_the_state_of_another_kind():
    for kind in QUICK:
        for other in QUICK:
            if type(other) is not type(kind):
                with pytest.raises(CheckpointError):
                    predictor(kind).load_state_dict(predictor(other).state_dict())


def _prior_state(state):
    return state.get("prior", state)
