"""Each peer against a literal twin of its paper's formulas, or a known iterate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.counting import Meter
from benchmarks.peers import (
    SNOO,
    EMAEvaluation,
    EMANesterov,
    FilteredExtrapolation,
    Hypergradient,
    IteratedLBFGS,
    Lookahead,
    MuonAdamW,
)
from benchmarks.peers.muon import split_parameters

A = torch.tensor([[3.0, 0.4], [0.4, 0.7]], dtype=torch.float64)
RATE = 0.1


class Quadratic(nn.Module):
    """x'Ax / 2 in two tensors of one number each, so that 'per tensor' shows."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        self.v = nn.Parameter(torch.tensor([-2.0], dtype=torch.float64))

    def forward(self) -> Tensor:
        x = torch.cat([self.u, self.v])
        return 0.5 * x @ A @ x

    def point(self) -> Tensor:
        return torch.cat([self.u, self.v]).detach().clone()


def classic(model: Quadratic, optimizer):
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    return closure


def trajectory(wrap, steps: int) -> list[Tensor]:
    model = Quadratic()
    peer = wrap(torch.optim.SGD(model.parameters(), lr=RATE))
    points = []
    for _ in range(steps):
        peer.step(classic(model, peer))
        points.append(model.point())
    return points


def check(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def start() -> Tensor:
    return torch.tensor([1.0, -2.0], dtype=torch.float64)


def test_lookahead_follows_its_algorithm():
    expected, slow = [], start()
    for _ in range(4):
        fast = slow
        for i in range(3):
            fast = fast - RATE * A @ fast
            if i == 2:
                slow = slow + 0.3 * (fast - slow)
                fast = slow
            expected.append(fast)
    check(trajectory(lambda b: Lookahead(b, k=3, alpha=0.3), 12), expected)


def test_lookahead_is_judged_at_its_slow_weights():
    model = Quadratic()
    peer = Lookahead(torch.optim.SGD(model.parameters(), lr=RATE), k=5)
    peer.step(classic(model, peer))
    moved = model.point()
    with peer.evaluation():
        assert torch.equal(model.point(), start())
    assert torch.equal(model.point(), moved)


def test_snoo_equals_torch_nesterov_on_the_pseudo_gradient():
    outer = nn.Parameter(start())
    nesterov = torch.optim.SGD([outer], lr=0.68, momentum=0.37, nesterov=True)
    expected = []
    for _ in range(5):
        inner = outer.detach().clone()
        for i in range(4):
            inner = inner - RATE * A @ inner
            if i == 3:
                outer.grad = outer.detach() - inner
                nesterov.step()
                inner = outer.detach().clone()
            expected.append(inner)
    check(trajectory(lambda b: SNOO(b, k=4), 20), expected)


def test_ema_nesterov_follows_its_algorithm_inside_its_window():
    x, m, expected = start(), torch.zeros(2, dtype=torch.float64), []
    for t in range(10):
        ahead = x + (0.6 * m if 2 <= t < 8 else 0.0 * m)
        new = ahead - RATE * A @ ahead
        m = 0.9 * m + 0.1 * (new - x)
        x = new
        expected.append(x)
    check(trajectory(lambda b: EMANesterov(b, gamma=0.9, window=(2, 8)), 10), expected)


def test_ema_nesterov_scales_its_lookahead_with_the_learning_rate():
    model = Quadratic()
    base = torch.optim.SGD(model.parameters(), lr=RATE)
    peer = EMANesterov(base, beta=0.5, gamma=0.0)
    peer.step(classic(model, peer))
    first = model.point()
    base.param_groups[0]["lr"] = RATE / 4
    peer.step(classic(model, peer))
    ahead = first + 0.5 / 4 * (first - start())
    torch.testing.assert_close(model.point(), ahead - RATE / 4 * A @ ahead)


def test_extrapolation_moves_iterate_and_filter_alike():
    x, e, expected = start(), start(), []
    last = e
    for t in range(1, 13):
        x = x - RATE * A @ x
        e = 0.8 * e + 0.2 * x
        if t % 4 == 0:
            d = 0.5 * (e - last)
            x, e = x + d, e + d
            last = e
        expected.append(x)
    got = trajectory(lambda b: FilteredExtrapolation(b, k=4, beta=0.8, gain=0.5), 12)
    check(got, expected)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_hypergradient_scales_by_the_alignment(per_tensor):
    x, scale, u, expected = start(), torch.ones(2, dtype=torch.float64), None, []
    for _ in range(8):
        g = A @ x
        if u is not None and per_tensor:
            scale = scale * (1 + 0.1 * (-(g * u) / (g.abs() * u.abs())))
        elif u is not None:
            scale = scale * (1 + 0.1 * float(-(g @ u) / (g.norm() * u.norm())))
        u = -RATE * g
        x = x + scale * u
        expected.append(x)
    got = trajectory(lambda b: Hypergradient(b, rate=0.1, per_tensor=per_tensor), 8)
    for a, b in zip(got, expected, strict=True):
        # The scale is kept in float32, like a learning rate.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_hypergradient_over_adamw_equals_adamw_at_the_scaled_rate():
    wrapped, plain = Quadratic(), Quadratic()
    base = torch.optim.AdamW(wrapped.parameters(), lr=0.01, weight_decay=0.1)
    peer = Hypergradient(base, rate=0.05)
    twin = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(10):
        peer.step(classic(wrapped, peer))
        twin.param_groups[0]["lr"] = 0.01 * float(peer.scale[0])
        closure = classic(plain, twin)
        closure()
        twin.step()
    assert float(peer.scale[0]) > 1.1
    torch.testing.assert_close(wrapped.point(), plain.point(), rtol=1e-6, atol=1e-7)


def test_ema_evaluation_averages_and_leaves_training_alone():
    model, plain = Quadratic(), Quadratic()
    peer = EMAEvaluation(torch.optim.SGD(model.parameters(), lr=RATE), beta=0.5)
    twin = torch.optim.SGD(plain.parameters(), lr=RATE)
    average = start()
    for t in range(1, 9):
        peer.step(classic(model, peer))
        classic(plain, twin)()
        twin.step()
        beta = min(0.5, (1 + t) / (10 + t))
        average = beta * average + (1 - beta) * plain.point()
    assert torch.equal(model.point(), plain.point())
    with peer.evaluation():
        torch.testing.assert_close(model.point(), average)
    assert torch.equal(model.point(), plain.point())


def test_lbfgs_solves_a_quadratic_and_never_pays_twice_for_a_point():
    model = Quadratic()
    meter = Meter(model)
    peer = IteratedLBFGS(model)
    seen: list[tuple[float, ...]] = []

    def closure() -> Tensor:
        peer.optimizer.zero_grad()
        seen.append(tuple(model.point().tolist()))
        loss = meter.forward()
        loss.backward()
        return loss

    for _ in range(8):
        peer.step(closure)
    assert model.point().norm() < 1e-6
    assert len(seen) == len(set(seen)) == meter.forwards == meter.backwards


def test_lbfgs_takes_the_same_steps_as_torch():
    model, plain = Quadratic(), Quadratic()
    peer = IteratedLBFGS(model)
    twin = torch.optim.LBFGS(
        plain.parameters(), max_iter=5, max_eval=100, line_search_fn="strong_wolfe",
        tolerance_grad=0.0, tolerance_change=0.0,
    )  # fmt: skip
    for _ in range(5):
        peer.step(classic(model, peer.optimizer))
    twin.step(classic(plain, twin))
    torch.testing.assert_close(model.point(), plain.point(), rtol=1e-9, atol=1e-10)


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2))


def test_muon_splits_hidden_matrices_from_the_rest():
    model = small_network()
    matrices, others = split_parameters(model)
    assert [p.shape for p in matrices] == [(8, 4), (8, 8)]
    assert len(others) == 4


def test_muon_shares_groups_and_state_even_after_a_load():
    model = small_network()
    optimizer = MuonAdamW(model, lr=0.01)
    model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert set(optimizer.state) == set(model.parameters())
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)


def test_muon_step_equals_its_two_parts():
    model, plain = small_network(), small_network()
    optimizer = MuonAdamW(model, lr=0.01)
    matrices, others = split_parameters(plain)
    twins = (
        torch.optim.Muon(
            matrices, lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=0.01, weight_decay=0.01),
    )
    for m in (model, plain):
        m(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()
    for twin in twins:
        twin.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert bool(model[0].weight.isfinite().all())
