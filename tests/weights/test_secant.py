from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hybridopt.config import SecantConfig
from hybridopt.errors import CheckpointError
from hybridopt.weights.flat import (
    flatten,
    flatten_gradients,
    preconditioner,
    set_flat_,
    supports,
)
from hybridopt.weights.secant import SecantMover, affordable_pairs
from hybridopt.weights.secant_pairs import PairMemory

Pair = tuple[Tensor, Tensor]


def two_loops(pairs: list[Pair], gradient: Tensor, scale: Tensor) -> Tensor:
    """Literal L-BFGS recursion, the slow twin of PairMemory.solve."""
    q, coefficients = gradient.clone(), []
    for s, y in reversed(pairs):
        a = (s @ q) / (s @ y)
        coefficients.append(a)
        q = q - a * y
    s, y = pairs[-1]
    q = q * scale * (s @ y) / (y @ (scale * y))
    for (s, y), a in zip(pairs, reversed(coefficients), strict=True):
        q = q + (a - (y @ q) / (s @ y)) * s
    return q


def random_pairs(count: int, size: int, dtype: torch.dtype) -> list[Pair]:
    generator = torch.Generator().manual_seed(count * 1000 + size)
    root = torch.randn(size, size, generator=generator, dtype=dtype)
    hessian = root @ root.T / size + 0.1 * torch.eye(size, dtype=dtype)
    pairs = []
    for i in range(count):
        s = torch.randn(size, generator=generator, dtype=dtype) * 10.0 ** -(i % 4)
        pairs.append((s, hessian @ s))
    return pairs


@settings(max_examples=40, deadline=None)
@given(capacity=st.integers(1, 8), count=st.integers(1, 20), size=st.integers(1, 24))
def test_pairs_solve_equals_the_two_loops(capacity: int, count: int, size: int) -> None:
    pairs = random_pairs(count, size, torch.float64)
    memory = PairMemory(capacity, size, torch.float64, torch.device("cpu"))
    assert all(memory.add(s, y, 1e-4) for s, y in pairs)
    gradient = torch.linspace(-1, 2, size, dtype=torch.float64)
    scale = torch.linspace(0.5, 3, size, dtype=torch.float64)
    expected = two_loops(pairs[-capacity:], gradient, scale)
    got = memory.solve(gradient, scale)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_pairs_solve_holds_in_float32() -> None:
    pairs = random_pairs(30, 200, torch.float32)
    memory = PairMemory(20, 200, torch.float32, torch.device("cpu"))
    for s, y in pairs:
        memory.add(s, y, 1e-4)
    gradient, scale = torch.ones(200), torch.linspace(0.5, 3, 200)
    exact = two_loops(
        [(s.double(), y.double()) for s, y in pairs[-20:]],
        gradient.double(),
        scale.double(),
    )
    error = (memory.solve(gradient, scale).double() - exact).norm() / exact.norm()
    assert error < 1e-4


def test_pairs_solve_boosts_the_initial_scale() -> None:
    memory = PairMemory(3, 4, torch.float64, torch.device("cpu"))
    s, y = random_pairs(1, 4, torch.float64)[0]
    memory.add(s, y, 1e-4)
    # Orthogonal to s and y only H0 acts, so the result there is proportional to boost.
    basis = torch.linalg.qr(torch.stack([s, y], 1), mode="complete").Q
    gradient, ones = basis[:, 2].clone(), torch.ones(4, dtype=torch.float64)
    once, twice = memory.solve(gradient, ones), memory.solve(gradient, ones, 2.0)
    torch.testing.assert_close(twice, 2.0 * once)


@pytest.mark.parametrize("count", [3, 5, 9])
def test_pairs_diagonal_is_the_mean_of_both_scales(count: int) -> None:
    pairs = random_pairs(count, 6, torch.float64)
    memory = PairMemory(5, 6, torch.float64, torch.device("cpu"))
    for s, y in pairs:
        memory.add(s, y, 1e-4)
    kept = [(s / s.norm(), y / s.norm()) for s, y in pairs[-5:]]
    moved = torch.stack([s for s, _ in kept]).norm(dim=0)
    changed = torch.stack([y for _, y in kept]).norm(dim=0)
    scale = torch.linspace(0.5, 3, 6, dtype=torch.float64)
    expected = (moved / changed * scale).sqrt()
    torch.testing.assert_close(memory.diagonal(scale), expected, rtol=1e-4, atol=0)


def test_pairs_diagonal_is_finite_for_weights_that_never_moved() -> None:
    memory = PairMemory(2, 3, torch.float32, torch.device("cpu"))
    memory.add(torch.tensor([1.0, 0.0, 1e-3]), torch.tensor([2.0, 0.0, 0.0]), 1e-4)
    diagonal = memory.diagonal(torch.ones(3))
    assert torch.isfinite(diagonal).all()
    assert diagonal[1] == 0.0


@pytest.mark.parametrize("value", [-1.0, 1e-5, math.nan, math.inf])
def test_pairs_refuse_bad_curvature(value: float) -> None:
    memory = PairMemory(4, 2, torch.float64, torch.device("cpu"))
    s = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert not memory.add(s, torch.tensor([value, 1.0], dtype=torch.float64), 1e-4)
    assert not memory.add(torch.zeros_like(s), s, 1e-4)
    assert memory.count == 0


def test_pairs_refuse_a_state_of_another_shape() -> None:
    memory = PairMemory(4, 6, torch.float64, torch.device("cpu"))
    for s, y in random_pairs(3, 6, torch.float64):
        memory.add(s, y, 1e-4)
    other = PairMemory(4, 7, torch.float64, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="capacity 4"):
        other.load_state_dict(memory.state_dict())
    assert other.count == 0


class Loop:
    """The order of calls at a real step, as the optimizer makes them."""

    def __init__(self, mover: SecantMover, lr: float = 0.02, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = [(3, 4), (5,), (2, 3, 2)]
        self.weights = [
            torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_()
            for s in shapes
        ]
        self.target = torch.randn(29, generator=generator, dtype=torch.float64)
        self.curvature = torch.logspace(-2, 1, 29, dtype=torch.float64)
        self.base = torch.optim.Adam(self.weights, lr=lr)
        self.mover, self.anchor = mover, flatten(self.weights)
        self.base_steps = 0

    def loss(self) -> Tensor:
        x = torch.cat([w.reshape(-1) for w in self.weights]) - self.target
        return (self.curvature * (torch.cosh(x) - 1.0)).sum()

    def step(self, spoil: Callable[[float], float] = float) -> float:
        """One real step; ``spoil`` stands in for a loss that a bad move led to."""
        self.base.zero_grad()
        value = self.loss()
        value.backward()
        loss = spoil(float(value.detach()))
        accepted = self.mover.judge(loss)
        self.mover.record(flatten(self.weights), flatten_gradients(self.weights))
        if accepted:
            self.base.step()
            self.base_steps += 1
            self.anchor = flatten(self.weights)
            direction = self.mover.direction(preconditioner(self.base, self.weights))
            if direction is not None:
                set_flat_(self.weights, self.mover.propose(direction, loss))
            return loss
        shorter = self.mover.retry()
        set_flat_(self.weights, self.anchor if shorter is None else shorter)
        return loss


@pytest.mark.parametrize("spoiled", [(), (9,), (9, 10), (14, 15, 16, 17)])
def test_mover_knows_what_its_pairs_make_of_the_gradient(
    spoiled: tuple[int, ...],
) -> None:
    loop = Loop(SecantMover(6, SecantConfig()))
    for step in range(24):
        loop.step(worse if step in spoiled else float)
        if step == 20:
            loop.mover.abandon()
    memory, gradient = loop.mover._memory, loop.mover._gradient
    assert memory is not None
    assert gradient is not None
    scale = torch.linspace(0.5, 3, 29, dtype=torch.float64)
    direct = memory.solve(gradient, scale)
    torch.testing.assert_close(
        memory.solve(gradient, scale, seen=True), direct, rtol=1e-8, atol=1e-12
    )
    # The kept inverse too must be that of the products of the pairs in memory.
    k, head = memory.count, memory.head
    order = [(head + i) % k for i in range(k)]
    S, Y = memory._s[order], memory._y[order]
    inverse = memory._inverse[order][:, order]
    torch.testing.assert_close(
        inverse @ (S @ Y.T).triu(),
        torch.eye(k, dtype=torch.float64),
        rtol=0,
        atol=1e-7,
    )


def worse(loss: float) -> float:
    return loss + 1e6


def test_mover_beats_the_base_on_a_smooth_problem() -> None:
    loop = Loop(SecantMover(20, SecantConfig()))
    losses = [loop.step() for _ in range(60)]
    plain = Loop(SecantMover(20, SecantConfig(minimum_curvature=1e30)))
    base = [plain.step() for _ in range(60)]
    assert plain.mover.proposed == 0
    assert losses[-1] < 1e-6 * base[-1]


def test_mover_leads_to_x_plus_direction() -> None:
    loop = Loop(SecantMover(20, SecantConfig()))
    for _ in range(5):
        loop.step()
    x = flatten(loop.weights)
    loop.step()
    assert loop.mover.pending
    direction = loop.mover.state_dict()["direction"]
    torch.testing.assert_close(flatten(loop.weights), x + direction)


def test_mover_retries_shorter_then_stays_at_the_anchor() -> None:
    config = SecantConfig(shrink=0.5, max_rejects=2)
    loop = Loop(SecantMover(20, config))
    for _ in range(6):
        loop.step()
    x, anchor = loop.mover.state_dict()["position"], loop.anchor
    direction = loop.mover.state_dict()["direction"]
    steps = loop.base_steps
    for factor in (0.5, 0.25):
        loop.step(worse)
        torch.testing.assert_close(flatten(loop.weights), x + factor * direction)
        assert loop.mover.scale == factor
    loop.step(worse)
    torch.testing.assert_close(flatten(loop.weights), anchor)
    assert not loop.mover.pending
    assert loop.base_steps == steps
    loop.step()
    assert loop.base_steps == steps + 1
    assert loop.mover.pending


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_mover_rejects_losses_that_are_not_finite(loss: float) -> None:
    loop = Loop(SecantMover(20, SecantConfig()))
    for _ in range(5):
        loop.step()
    assert loop.mover.pending
    assert not loop.mover.judge(loss)
    assert loop.mover.retry() is not None


def test_mover_keeps_pairs_of_rejected_points_but_not_the_point() -> None:
    loop = Loop(SecantMover(20, SecantConfig()))
    for _ in range(5):
        loop.step()
    count, position = loop.mover.count, loop.mover.state_dict()["position"]
    loop.step(worse)
    assert loop.mover.count == count + 1
    assert torch.equal(loop.mover.state_dict()["position"], position)


def test_mover_accepts_when_nothing_is_pending() -> None:
    mover = SecantMover(4, SecantConfig())
    assert mover.judge(math.nan)
    assert mover.retry() is None
    assert mover.direction(torch.ones(3)) is None


def test_mover_proposes_nothing_before_a_point_is_recorded() -> None:
    with pytest.raises(RuntimeError, match="record"):
        SecantMover(4, SecantConfig()).propose(torch.ones(3), 1.0)


def test_mover_gives_no_direction_for_a_bad_gradient() -> None:
    mover = SecantMover(4, SecantConfig())
    for s, y in random_pairs(3, 4, torch.float64):
        mover.record(s.clone(), y.clone())
    assert mover.count == 2
    bad = torch.full((4,), math.nan, dtype=torch.float64)
    mover.record(torch.zeros_like(bad), bad)
    assert mover.count == 2
    assert mover.direction(torch.ones(4, dtype=torch.float64)) is None


def test_mover_slopes_are_products_with_the_move() -> None:
    mover = SecantMover(4, SecantConfig())
    x, g = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    assert mover.record(x, g) is None
    slopes = mover.record(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 1.0]))
    assert slopes == (1.0, 3.0)


@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_mover_continues_bit_for_bit_after_a_load(spoiled: int) -> None:
    def drive(loop: Loop, first: int, last: int) -> list[float]:
        return [
            loop.step(worse if t in range(9, 9 + spoiled) else float)
            for t in range(first, last)
        ]

    whole = Loop(SecantMover(4, SecantConfig()))
    drive(whole, 0, 10)
    state = whole.mover.state_dict()
    split = Loop(SecantMover(4, SecantConfig()))
    with torch.no_grad():
        for target, source in zip(split.weights, whole.weights, strict=True):
            target.copy_(source)
    split.base.load_state_dict(copy.deepcopy(whole.base.state_dict()))
    split.anchor = whole.anchor
    split.mover.load_state_dict(state, torch.device("cpu"))
    assert drive(split, 10, 20) == drive(whole, 10, 20)
    assert torch.equal(flatten(split.weights), flatten(whole.weights))


def test_mover_loads_to_where_the_weights_are_whatever_the_checkpoint_is_on() -> None:
    loop = Loop(SecantMover(4, SecantConfig()))
    for _ in range(6):
        loop.step()
    moved = SecantMover(4, SecantConfig())
    # A device that every machine has besides the CPU.
    moved.load_state_dict(loop.mover.state_dict(), torch.device("meta"))
    state = moved.state_dict()
    tensors = [state["position"], state["gradient"], *state["memory"].values()]
    assert moved.count == loop.mover.count > 0
    assert {t.device.type for t in tensors if isinstance(t, torch.Tensor)} == {"meta"}


def test_mover_refuses_a_damaged_state_and_stays_as_it_was() -> None:
    loop = Loop(SecantMover(4, SecantConfig()))
    for _ in range(6):
        loop.step()
    state: dict[str, Any] = loop.mover.state_dict()
    damaged = {**state, "position": torch.zeros(3)}
    with pytest.raises(CheckpointError, match="same length"):
        loop.mover.load_state_dict(damaged, torch.device("cpu"))
    other = SecantMover(5, SecantConfig())
    with pytest.raises(CheckpointError, match="capacity 5"):
        other.load_state_dict(state, torch.device("cpu"))
    assert other.count == 0
    after = loop.mover.state_dict()
    assert torch.equal(after["position"], state["position"])


def test_mover_abandons_the_move_but_keeps_pairs() -> None:
    loop = Loop(SecantMover(20, SecantConfig()))
    for _ in range(6):
        loop.step()
    count = loop.mover.count
    loop.mover.abandon()
    assert not loop.mover.pending
    assert loop.mover.count == count
    assert loop.mover.direction(torch.ones(29, dtype=torch.float64)) is None
    loop.mover.reset()
    assert loop.mover.count == 0


def test_affordable_pairs_follow_the_budget() -> None:
    config = SecantConfig(pairs=100)
    assert affordable_pairs(config, 1000, 4, 64 * 2**20) == 100
    assert affordable_pairs(config, 1000, 4, 27 * 4000) == 10
    assert affordable_pairs(config, 1000, 4, 10 * 4000) == 0
    assert affordable_pairs(config, 10**9, 4, 64 * 2**20) == 0


def test_flat_vectors_round_trip_whatever_the_strides() -> None:
    tensors = [
        torch.arange(12.0).view(3, 4).T,
        torch.tensor(5.0),
        torch.zeros(0, 3),
        torch.arange(8.0)[::2],
    ]
    before = [t.clone() for t in tensors]
    flat = flatten(tensors)
    assert flat.shape == (17,)
    assert torch.equal(flat[:12], tensors[0].reshape(-1))
    flat[0] = 100.0
    assert tensors[0][0, 0] == 0.0
    flat[0] = 0.0
    set_flat_(tensors, 1.5 * flat)
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now, 1.5 * then)
    with pytest.raises(ValueError, match="must have 17"):
        set_flat_(tensors, flat[:3])


def test_flat_vector_of_one_tensor_is_a_copy() -> None:
    tensor = torch.ones(3, requires_grad=True)
    flat = flatten([tensor])
    assert not flat.requires_grad
    flat.zero_()
    assert tensor.tolist() == [1.0, 1.0, 1.0]


def test_flat_gradients_are_zero_where_there_are_none() -> None:
    layer = nn.Linear(2, 1)
    layer.weight.grad = torch.ones(1, 2)
    assert flatten_gradients(list(layer.parameters())).tolist() == [1.0, 1.0, 0.0]


def test_flat_support_needs_one_plain_dtype() -> None:
    a, b = torch.zeros(2), torch.zeros(3)
    assert supports([a, b])
    assert supports([a.double()])
    assert not supports([])
    assert not supports([a, b.double()])
    assert not supports([a.bfloat16()])
    assert not supports([a.to_sparse()])
    assert not supports([a, torch.zeros(2, device="meta")])


OPTIMIZERS: list[Any] = [
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_preconditioner_is_the_adaptive_diagonal(kind: Any) -> None:
    weights = [torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)]
    optimizer = kind(weights, lr=0.1)
    for w in weights:
        w.grad = torch.linspace(0.5, 2.0, w.numel())
    optimizer.step()
    gradient = flatten_gradients(weights)
    # After one step the corrected mean of squares is the square itself.
    size = gradient.abs() * (0.1 if kind is torch.optim.RMSprop else 1.0)
    torch.testing.assert_close(preconditioner(optimizer, weights), 1.0 / (size + 1e-8))


def test_preconditioner_of_plain_sgd_is_the_relative_rate() -> None:
    a, b = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    groups = [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.0}]
    optimizer = torch.optim.SGD(groups)
    a.grad, b.grad = torch.ones(2), torch.ones(1)
    assert preconditioner(optimizer, [a, b]).tolist() == [1.0, 1.0, 0.0]


def test_preconditioner_handles_tensors_of_different_age() -> None:
    a, b = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([a, b], lr=0.1)
    for step in range(3):
        a.grad = torch.full((2,), 2.0)
        b.grad = torch.full((1,), 4.0) if step == 2 else None
        optimizer.step()
    got = preconditioner(optimizer, [a, b])
    torch.testing.assert_close(got, torch.tensor([0.5, 0.5, 0.25]))
