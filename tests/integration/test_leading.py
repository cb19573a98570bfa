"""Gradients are taken ahead of the weights where that pays; nothing else changes."""

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hybridopt import HybridPredictOptimizer, leading
from hybridopt.config import (
    DriftConfig,
    GainConfig,
    HybridConfig,
    LeadConfig,
    Prior,
    SecantConfig,
)
from hybridopt.moving import _may_lead
from hybridopt.run import Components
from hybridopt.weights import ahead
from hybridopt.weights.buckets import LEAD_KEYS, Bucket
from hybridopt.weights.tensors import HybridTensors
from tests.problems import assert_same_bits, regression, train, train_bare

RATE = 0.05
"""At which the base overshoots on the small regression problem."""


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    # Where the lead alone moves weights, the optimizer soon sleeps.
    monkeypatch.setattr(leading, "ASLEEP_INTERVAL_STEPS", leading.INTERVAL_STEPS)


@pytest.fixture(params=["whole", "sampled"])
def looks(request, monkeypatch):
    """Whether all weights are looked at without a lead, or some rows."""
    if request.param == "sampled":
        monkeypatch.setattr(ahead, "LARGE", 1)
        monkeypatch.setattr(ahead, "SHARES", 2)
    return request.param


def _build(problem, *, waits=True, base=None, **overrides):
    parameters = list(problem.model.parameters())
    if base is None:
        base = torch.optim.Adam(parameters, lr=RATE, fused=None if waits else True)
    settings = {"predictor": Prior(), "warmup_steps": 6, **overrides}
    skips_on = ("cuda",) if waits else ("cpu",)
    return HybridPredictOptimizer(
        base, components=Components(skips_on=skips_on), **settings
    )


def _alone(**lead):
    """A configuration in which nothing but the lead moves weights."""
    return {
        "gain": GainConfig(rate=0.0, initial=0.0, minimum=0.0),
        "drift": DriftConfig(enabled=False),
        "secant": SecantConfig(enabled=False),
        "max_predict_steps": 0,
        "lead": LeadConfig(**lead),
    }


def _loss(problem):
    with torch.no_grad():
        return sum(problem.loss(i).item() for i in range(400)) / 400


def _until_ahead(problem, opt, least=0.3):
    for step in range(400):
        if opt.statistics()["lead"] > least:
            return step
        train(problem, opt, 1, start=step)
    raise AssertionError("never ahead")


@pytest.mark.parametrize("seed", range(3))
def test_lead_alone_ends_lower_than_the_bare_base(looks, seed):
    problem = regression(seed=seed)
    twin = problem.twin()
    opt = _build(problem, **_alone())
    train(problem, opt, 400)
    train_bare(twin, torch.optim.Adam(twin.model.parameters(), lr=RATE), 400)
    assert opt.statistics()["lead"] > 0.0
    assert _loss(problem) < _loss(twin)


def test_fixed_lead_is_quasi_hyperbolic_momentum():
    # theta <- theta - lr ((1 - nu) g + nu m), m <- beta m + (1 - beta) g with
    # nu = 1 - kappa (1 - beta) / beta is momentum with a lead of kappa steps; torch's
    # sum of gradients is m / (1 - beta).
    beta, rate, kappa, warm = 0.9, 0.02, 1.5, 6
    problem = regression()
    twin = problem.twin()
    base = torch.optim.SGD(problem.model.parameters(), lr=rate, momentum=beta)
    opt = _build(problem, base=base, **_alone(relaxation=0.0))
    train(problem, opt, warm)
    opt.run.lead.length.learn = lambda statistics: None
    parameters = list(twin.model.parameters())
    with torch.no_grad():
        for p, q in zip(parameters, problem.model.parameters(), strict=True):
            p.copy_(q)
    sums = [
        base.state[p]["momentum_buffer"].clone() for p in problem.model.parameters()
    ]
    opt.run.lead.length.value = kappa
    train(problem, opt, 40, start=warm)
    for step in range(40):
        twin.model.zero_grad()
        twin.loss(warm + step).backward()
        with torch.no_grad():
            for p, total in zip(parameters, sums, strict=True):
                before = total.clone()
                total.mul_(beta).add_(p.grad)
                # The first lead has nothing to take back.
                p.sub_(rate * (total + kappa * (total - (before if step else 0.0))))
    for p, q in zip(parameters, problem.weights(), strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("waits", [True, False])
def test_leads_do_not_add_up(looks, waits):
    # Gradients that do not depend on the weights: once the lead is taken back, the
    # weights are the bare base's, whatever the leads in between were.
    problem = regression()
    twin = problem.twin()
    opt = _build(problem, waits=waits, **_alone())
    bare = torch.optim.Adam(twin.model.parameters(), lr=RATE)
    g = torch.Generator().manual_seed(0)
    opt.run.lead.length.learn = lambda statistics: None
    for step in range(60):
        for p, q in zip(
            problem.model.parameters(), twin.model.parameters(), strict=True
        ):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        opt.run.lead.length.value = 0.0 if step > 50 else (step % 7) / 2
        opt.step()
        bare.step()
    assert opt.statistics()["lead"] == 0.0
    for p, q in zip(problem.weights(), twin.weights(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("waits", [True, False])
def test_resume_while_ahead_equals_uninterrupted(looks, waits, tmp_path):
    problem = regression()
    opt = _build(problem, waits=waits)
    step = _until_ahead(problem, opt)
    for extra in range(3):  # whatever is measured now
        torch.save(opt.state_dict(), tmp_path / "opt.pt")
        twin = problem.twin()
        other = _build(twin, waits=waits)
        other.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
        again = copy.deepcopy((problem, opt))
        first = train(*again, 40, start=step + extra)
        assert first == train(twin, other, 40, start=step + extra)
        assert_same_bits(again[0].weights(), twin.weights())
        assert again[1].statistics()["lead"] == other.statistics()["lead"]
        train(problem, opt, 1, start=step + extra)
    pickle.loads(pickle.dumps(opt))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("waits", [True, False])
def test_step_that_does_not_happen_leaves_weights_and_lead(waits, bad):
    problem = regression()
    opt = _build(problem, waits=waits, **_alone())
    step = _until_ahead(problem, opt)
    twin, same = copy.deepcopy((problem, opt))
    before = problem.weights()
    for p in problem.model.parameters():
        p.grad = torch.full_like(p, bad)
    opt.step()
    assert_same_bits(problem.weights(), before)
    # What the lead is ahead by is known as before: taken back, the weights are those of
    # a run in which the bad step never was.
    for each, (task, optimizer) in enumerate(((problem, opt), (twin, same))):
        optimizer.run.lead.length.learn = lambda statistics: None
        optimizer.run.lead.length.value = 0.0
        train(task, optimizer, 1, start=step)
        assert optimizer.run.lead.made == 0.0, each
    for p, q in zip(problem.weights(), twin.weights(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("turns", [1, 3])
def test_looks_measure_the_rows_whose_turn_it_is(looks, turns):
    problem = regression()
    opt = _build(problem, **_alone())
    seen = []
    opt.run.lead.length.learn = lambda statistics: seen.append(statistics)
    trail = []
    for step in range(200):
        train(problem, opt, 1, start=step)
        trail.append((problem.weights(), [p.grad for p in problem.model.parameters()]))
        if len(seen) == turns:
            break
    (old, _), (mid, _), (new, _) = trail[-4:-1]
    gradients = trail[-1][1]
    shares = ahead.SHARES if looks == "sampled" else 1
    sums = torch.zeros(4, dtype=torch.float64)
    for a, b, c, gradient in zip(old, mid, new, gradients, strict=True):
        # Tensors as small as these are kept as vectors.
        turn, size = (turns - 1) % shares, a.numel()
        own = slice(size * turn // shares, size * (turn + 1) // shares)
        whole = (c - b, b - a, gradient)
        s, p, g = (t.double().flatten()[own if size > 1 else ...] for t in whole)
        sums += torch.stack([g @ g, -(g @ s), -(g @ p), s @ s])
    assert torch.allclose(seen[-1].sum(0), sums, rtol=1e-3, atol=1e-7)


def test_checkpoint_between_two_looks_goes_on_bit_for_bit(looks, tmp_path):
    problem = regression()
    opt = _build(problem, **_alone())
    train(problem, opt, 9)
    for step in range(9, 17):
        torch.save(opt.state_dict(), tmp_path / "opt.pt")
        twin = problem.twin()
        other = _build(twin, **_alone())
        other.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
        again = copy.deepcopy((problem, opt))
        assert train(*again, 60, start=step) == train(twin, other, 60, start=step)
        lengths = [o.run.lead.length.state_dict() for o in (again[1], other)]
        assert lengths[0] == lengths[1]
        train(problem, opt, 1, start=step)


def test_sample_kept_on_the_cpu_is_not_measured_elsewhere(monkeypatch):
    monkeypatch.setattr(ahead, "LARGE", 1)
    monkeypatch.setattr(ahead, "SHARES", 2)
    problem = regression()
    opt = _build(problem, **_alone())
    train(problem, opt, 7)
    lead = opt.run.lead
    while not (lead._known == 2 and lead._due(1, leading.INTERVAL_STEPS)):
        train(problem, opt, 1)
    assert lead._sampled
    monkeypatch.setattr(Bucket, "on_host", False)
    measured = []
    monkeypatch.setattr(lead, "_measure", lambda *arguments: measured.append(arguments))
    train(problem, opt, 1)
    assert measured == []
    assert (lead._sampled, lead._known) == (False, 1)
    train(problem, opt, 2 * leading.INTERVAL_STEPS)
    assert measured


def test_base_that_fails_costs_the_older_displacement_and_no_more():
    problem = regression()
    opt = _build(problem, **_alone())
    step = _until_ahead(problem, opt)
    plain, before = opt.base.step, problem.weights()

    def fails(closure=None):
        raise RuntimeError("the base failed")

    opt.base.step = fails
    with pytest.raises(RuntimeError, match="the base failed"):
        train(problem, opt, 1, start=step)
    assert_same_bits(problem.weights(), before)
    opt.base.step = plain
    losses = train(problem, opt, 40, start=step)
    assert all(math.isfinite(loss) for loss in losses)
    assert opt.statistics()["lead"] > 0.0


def test_parameter_without_gradient_gets_its_lead_taken_back():
    problem = regression()
    opt = _build(problem, **_alone())
    step = _until_ahead(problem, opt)
    opt.run.lead.length.learn = lambda statistics: None
    frozen = next(problem.model.parameters())
    ahead = opt.statistics()["lead"]
    side = opt.run.lead._side
    last = -opt.state[frozen][LEAD_KEYS[side]].clone()
    before = frozen.detach().clone()
    problem.loss(step).backward()
    frozen.grad = None
    opt.step()
    torch.testing.assert_close(frozen.detach(), before - ahead * last)


def test_no_lead_and_nothing_kept_where_it_is_off_or_cannot_be_taken_back():
    for dtype, overrides in (
        (torch.float32, {"lead": LeadConfig(enabled=False)}),
        (torch.float32, {"lead": LeadConfig(memory_budget=0.0)}),
        (torch.float32, {"memory": "low"}),
        (torch.bfloat16, {}),
    ):
        model = nn.Linear(6, 3, dtype=dtype)
        base = torch.optim.Adam(model.parameters(), lr=RATE)
        opt = HybridPredictOptimizer(base, warmup_steps=2, **overrides)
        x = torch.randn(16, 6, dtype=dtype)
        for _ in range(80):
            opt.step(lambda: model(x + torch.randn_like(x)).square().mean())  # noqa: B023
        assert opt.statistics()["lead"] == 0.0
        assert not any(key in opt.state[model.weight] for key in LEAD_KEYS)


def test_weights_elsewhere_than_on_the_cpu_are_not_put_ahead_unless_asked():
    parameters = [torch.empty(3, 2, device="meta")]
    base = torch.optim.SGD(parameters, lr=0.1)
    for on_gpu in (False, True):
        config = HybridConfig(lead=LeadConfig(on_gpu=on_gpu))
        assert HybridTensors(base, config).leads(parameters) is on_gpu


def test_rate_of_zero_is_no_lead():
    problem = regression()
    twin = problem.twin()
    opt = _build(problem, **_alone(rate=0.0))
    other = _build(twin, **_alone(enabled=False))
    train(problem, opt, 120)
    train(twin, other, 120)
    assert_same_bits(problem.weights(), twin.weights())


def test_no_lead_behind_secant_moves_or_in_warm_up():
    dropped = []
    run = SimpleNamespace(
        lead=SimpleNamespace(drop=lambda: dropped.append(1)),
        controller=SimpleNamespace(warm=True),
    )
    assert _may_lead(run, held=False)
    assert not _may_lead(run, held=True)
    assert dropped
    run.controller.warm = False
    assert not _may_lead(run, held=False)


def test_checkpoint_from_before_there_were_leads_loads_and_goes_on():
    problem = regression()
    opt = _build(problem, lead=LeadConfig(enabled=False))
    train(problem, opt, 60)
    twin = problem.twin()
    other = _build(twin)
    other.load_state_dict(opt.state_dict())
    train(twin, other, 200, start=60)
    assert other.statistics()["lead"] > 0.0


def test_directions_in_bf16_are_taken_back_exactly_too():
    problem = regression()
    twin = problem.twin()
    opt = _build(problem, memory_budget=0.0, **_alone())
    bare = torch.optim.Adam(twin.model.parameters(), lr=RATE)
    opt.run.lead.length.learn = lambda statistics: None
    g = torch.Generator().manual_seed(0)
    for step in range(200):
        for p, q in zip(
            problem.model.parameters(), twin.model.parameters(), strict=True
        ):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        opt.run.lead.length.value = 0.0 if step > 190 else 2.0
        opt.step()
        bare.step()
    parameter = next(problem.model.parameters())
    assert opt.state[parameter][LEAD_KEYS[0]].dtype is torch.bfloat16
    for p, q in zip(problem.weights(), twin.weights(), strict=True):
        # Sums of a few hundred float32 numbers of size 1, not of bf16 ones.
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
