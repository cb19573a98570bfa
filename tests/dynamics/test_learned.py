"""Learned predictors: the prior until proven better, and better where it can be."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from hybridopt.config import MLP, RSSM, HybridConfig, Linear, Prior
from hybridopt.dynamics import (
    LearnedPredictor,
    LinearModel,
    MLPModel,
    PriorPredictor,
    RSSMModel,
    build_predictor,
)
from hybridopt.dynamics.features import FEATURES
from hybridopt.types import STEP, Outcome
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
    waves,
)

L = len(SIZES)
QUICK_RSSM = RSSM(
    train_interval_steps=2, learning_rate=5e-3, sequence_steps=8, batch_size=16
)
LEARNERS = (Linear(), MLP(train_interval_steps=2, learning_rate=1e-2))


@pytest.mark.parametrize(
    ("kind", "model"), [(Linear(), LinearModel), (MLP(), MLPModel), (RSSM(), RSSMModel)]
)
def test_build_predictor_gives_each_config_its_model(kind, model):
    made = build_predictor(HybridConfig(predictor=kind), SIZES, NDIMS)
    assert isinstance(made, LearnedPredictor)
    assert type(made.model) is model


def test_build_predictor_gives_prior_for_prior():
    made = build_predictor(HybridConfig(predictor=Prior()), SIZES, NDIMS)
    assert type(made) is PriorPredictor


def test_build_predictor_takes_the_seed_of_the_configuration():
    config = HybridConfig(seed=3, predictor=RSSM())
    plain = HybridConfig(predictor=RSSM())
    own = build_predictor(config, SIZES, NDIMS).state_dict()["model"]["network"]
    given = build_predictor(plain, SIZES, NDIMS, 3).state_dict()
    other = build_predictor(plain, SIZES, NDIMS).state_dict()
    assert torch.equal(own["adam"], given["model"]["network"]["adam"])
    assert not torch.equal(own["adam"], other["model"]["network"]["adam"])


@pytest.mark.parametrize(
    "kind",
    [
        MLP(train_interval_steps=10**6),
        RSSM(train_interval_steps=10**6),
        Linear(ridge=1e300),
    ],
    ids=["mlp", "rssm", "linear"],
)
def test_untrained_model_is_the_prior_bit_for_bit(kind):
    prior, learned = predictor(Prior()), predictor(kind)
    for step, one in enumerate(noisy(80, L)):
        prior.observe(one)
        learned.observe(one)
        a, b = prior.forecast(slopes(L, step)), learned.forecast(slopes(L, step))
        assert a.coefficients.tolist() == b.coefficients.tolist()
        assert repr((a.progress, a.progress_lower, a.loss, a.loss_sigma)) == repr(
            (b.progress, b.progress_lower, b.loss, b.loss_sigma)
        )
        assert a.confidence == b.confidence
    assert prior.loss_path(3) == learned.loss_path(3)


@pytest.mark.parametrize("kind", [MLP(), RSSM()], ids=["mlp", "rssm"])
def test_untrained_model_says_zero_whatever_it_sees(kind):
    made = predictor(kind)
    codes = torch.randn(
        L, made.model.code_size, generator=torch.Generator().manual_seed(0)
    )
    said = made.model.decode(codes)
    assert not said.mean.any()
    assert not said.log_scale.any()
    assert not said.spread.any()


@dataclass
class Trained:
    made: LearnedPredictor
    losses: list[float]
    model_error: float
    prior_error: float


def train_on_waves(kind):
    """Run over 320 steps; errors of one-step forecasts over the last 80."""
    made = predictor(kind)
    trained = Trained(made, [], 0.0, 0.0)
    if not isinstance(kind, Linear):
        train = made.model.train
        made.model.train = lambda: trained.losses.append(train())
    for i, one in enumerate(waves(320, L)):
        if i >= 240:
            said, unit = made._applied, made.prior.gains.deviation + 0.01
            assert said is not None
            error = one.alignment - made.prior.gains.mean
            left = error - said.mean[:, :2] * unit
            trained.model_error += float(left[:, STEP].square().sum())
            trained.prior_error += float(error[:, STEP].square().sum())
        made.observe(one)
    return trained


@pytest.fixture(scope="module")
def trained_rssm():
    return train_on_waves(QUICK_RSSM)


@pytest.mark.parametrize("kind", LEARNERS, ids=["linear", "mlp"])
def test_model_beats_the_running_mean_where_alignments_can_be_foreseen(kind):
    trained = train_on_waves(kind)
    assert trained.made.calibration.trust[STEP] == 1.0
    assert trained.model_error < 0.35 * trained.prior_error


def test_rssm_beats_the_running_mean_where_alignments_can_be_foreseen(trained_rssm):
    assert trained_rssm.made.calibration.trust[STEP] == 1.0
    assert trained_rssm.model_error < 0.35 * trained_rssm.prior_error


def test_rssm_loss_falls_on_a_learnable_sequence(trained_rssm):
    losses = trained_rssm.losses
    early, late = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert len(losses) > 120
    assert late < early - 1.5


def test_rssm_ensemble_spread_is_positive_once_trained(trained_rssm):
    made = trained_rssm.made
    said = made.model.decode(made._code)
    assert bool((said.spread[:, :2] > 0).all())
    path = made.model.imagine(4)
    assert path.mean.shape == (4, 4)
    assert torch.allclose(path.mean[0], said.mean.mean(0))
    assert not torch.equal(path.mean[1], path.mean[0])


def test_rssm_imagine_changes_nothing(trained_rssm):
    made = trained_rssm.made
    before = flatten(made.state_dict())
    first = made.loss_path(6)
    assert made.loss_path(6) == first
    assert flatten(made.state_dict()) == before
    assert len(first[0]) == len(first[1]) == 6


def test_rssm_latent_summarizes_the_hidden_state():
    made = predictor(RSSM(hidden_size=24))
    for one in noisy(12, L):
        made.observe(one)
    latent = made.forecast(slopes(L)).latent
    assert latent.shape == (24,)
    assert latent.dtype == torch.float64
    assert torch.equal(latent, made.model._state.hidden.mean(0).double())
    assert bool(latent.any())


def test_rssm_rollback_starts_a_new_sequence():
    made = predictor(RSSM(train_interval_steps=4))
    for one in noisy(14, L):
        made.observe(one)
    made.feedback(Outcome(0, 0.0, 1, 1.0, True))
    assert not made.model._state.hidden.any()
    for one in noisy(14, L, seed=1):
        made.observe(one)
    first = made.state_dict()["model"]["ring"]["first"]
    # 13 samples before the break (the 14th step has no successor), then a new start.
    assert [i for i, flag in enumerate(first) if flag] == [0, 13]


@pytest.mark.parametrize("kind", KINDS[1:], ids=NAMES[1:])
def test_features_are_finite_bounded_and_documented(kind):
    made = predictor(kind)
    for one in noisy(30, L):
        made.observe(one)
    seen = made._seen
    assert seen.shape == (L, len(FEATURES))
    assert seen.dtype == torch.float32
    assert bool((seen.abs() <= 5.0).all())
    vector, matrix, kernel = seen[:, -3], seen[:, -2], seen[:, -1]
    assert vector.tolist() == [0, 1, 0, 1, 0]
    assert matrix.tolist() == [1, 0, 0, 0, 0]
    assert kernel.tolist() == [0, 0, 1, 0, 1]


def test_global_hooks_and_autocast_do_not_reach_the_models_training():
    calls = []
    step = register_optimizer_step_post_hook(lambda *_: calls.append("optimizer"))
    forward = register_module_forward_hook(lambda *_: calls.append("module"))
    plain, cast = predictor(QUICK_RSSM), predictor(QUICK_RSSM)
    try:
        for one in noisy(40, L):
            plain.observe(one)
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
                cast.observe(one)
    finally:
        step.remove()
        forward.remove()
    assert calls == []
    assert torch.equal(plain._code, cast._code)
    a, b = plain.state_dict()["model"], cast.state_dict()["model"]
    assert a["network"]["updates"] > 5
    assert torch.equal(a["network"]["adam"], b["network"]["adam"])


def test_predictor_ignores_the_default_dtype():
    plain, other = predictor(QUICK_RSSM), None
    stream = noisy(30, L)
    for one in stream:
        plain.observe(one)
    torch.set_default_dtype(torch.float64)
    try:
        other = predictor(QUICK_RSSM)
        for one in stream:
            other.observe(one)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(plain._code, other._code)


def test_many_tensors_keep_the_ring_small():
    size = 150
    config = HybridConfig(predictor=RSSM())
    made = build_predictor(config, [10] * size, [2] * size)
    for i in range(20):
        flat = torch.full((size, 2), 0.1, dtype=torch.float64)
        made.observe(observation(i, flat))
    rows = made.state_dict()["model"]["ring"]["rows"]
    assert rows.shape[:2] == (16, 64)
    assert made.forecast(slopes(size)).coefficients.shape == (size, 2)
