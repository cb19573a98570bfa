"""The kernels' own source, compiled for the host, against the reference backend."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from hybridopt.kernels.fused import AdamWStep, BaseTensors, SGDStep, fused_move
from hybridopt.kernels.torch_ops import TorchOps
from hybridopt.weights.ahead import put_ahead
from tests.kernels import twin
from tests.kernels.host import COMPILER, host_ops

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = (*twin.SHAPES, (65,), (33, 3))
REFERENCE = TorchOps()
FORMATS = [
    ((F32,), (F32,), (BF16,)),
    ((BF16,), (BF16,), (BF16,)),
    ((F16, F32), (F32,), (F32,)),
]


@pytest.fixture(scope="module")
def ops():
    """One launcher for all tests, so that a variant is compiled once."""
    return host_ops()


@pytest.fixture(autouse=True)
def kernels_only(ops, monkeypatch):
    """A silent fallback would compare the reference with itself."""
    monkeypatch.setattr(ops, "_reference", None)


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
    )


@pytest.mark.parametrize(("_params", "grads", "basis"), FORMATS)
@pytest.mark.parametrize("directions", [0, 2])
def test_observe_kernel_equals_the_reference(ops, _params, grads, basis, directions):
    g = twin.tensors(SHAPES, grads, 1)
    bs = [twin.tensors(SHAPES, basis, 2 + j) for j in range(directions)]
    assert_close(ops.observe(g, bs), REFERENCE.observe(g, bs))


@pytest.mark.parametrize(("params", "grads", "basis"), FORMATS)
def test_advance_kernel_equals_the_reference_bit_for_bit(ops, params, grads, basis):
    results, sums = [], []
    for backend in (ops, REFERENCE):
        theta, anchor = (twin.tensors(SHAPES, params, i) for i in (1, 2))
        s, v = (twin.tensors(SHAPES, basis, i) for i in (3, 4))
        g = twin.tensors(SHAPES, grads, 5)
        sums.append(backend.advance(theta, g, anchor, s, v, 0.97))
        results.append([*theta, *anchor, *s, *v])
    for ours, want in zip(*results, strict=True):
        assert torch.equal(ours, want)
    assert_close(*sums)


@pytest.mark.parametrize(("params", "grads", "basis"), FORMATS)
def test_advance_move_kernel_equals_advance_and_apply(ops, params, grads, basis):
    gains = torch.linspace(-1.0, 2.0, len(SHAPES))
    results, sums = [], []
    for backend in (ops, REFERENCE):
        theta, anchor = (twin.tensors(SHAPES, params, i) for i in (1, 2))
        s, v = (twin.tensors(SHAPES, basis, i) for i in (3, 4))
        g = twin.tensors(SHAPES, grads, 5)
        lists = (theta, g, anchor, s, v)
        if backend is ops:
            sums.append(backend.advance_move(*lists, 0.97, gains))
        else:
            sums.append(backend.advance(*lists, 0.97))
            backend.apply(theta, [s], gains.unsqueeze(1), 1.0)
            backend.copy(theta, anchor)
        results.append([*theta, *anchor, *s, *v])
    for ours, want in zip(*results, strict=True):
        assert_close(ours, want, 1e-6 if ours.dtype == F32 else 1e-2)
    count = len(SHAPES)
    for ours, anchor in zip(results[0][:count], results[0][count:], strict=False):
        assert torch.equal(ours, anchor)
    assert_close(*sums)


def test_advance_move_kernel_leaves_a_weight_that_would_overflow(ops):
    theta = [torch.tensor([1.0, 3e38, -3e38] * 3)]
    anchor = [torch.tensor([0.5, 1e38, 1e38] * 3)]
    g, s, v = ([torch.zeros(9)] for _ in range(3))
    ops.advance_move(theta, g, anchor, s, v, 0.9, torch.tensor([2.0]))
    assert theta[0].tolist() == torch.tensor([2.0, 3e38, -3e38] * 3).tolist()
    assert torch.equal(anchor[0], theta[0])


@pytest.mark.parametrize("basis", [F32, BF16])
@pytest.mark.parametrize(("lead", "made"), [(0, 0), (0, 1.7), (0.3, 0), (2.5, 1.7)])
@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
def test_lead_kernel_equals_the_reference(ops, basis, lead, made, skip):
    results = []
    for backend in (ops, REFERENCE):
        theta = twin.tensors(SHAPES, [F32], 1)
        older, newest = (twin.tensors(SHAPES, [basis], i) for i in (3, 4))
        # A skipped step has left the weights as they were.
        before = [t.clone() for t in theta] if skip else twin.tensors(SHAPES, [F32], 2)
        if basis is F32:
            newest = before
        bucket = SimpleNamespace(parameters=theta, leads=(older, newest))
        flag = None if skip is None else torch.tensor(skip)
        put_ahead(backend, [bucket], [before], 0, lead, made, flag)
        results.append([*theta, *older, *newest])
    for ours, want in zip(*results, strict=True):
        assert_close(ours, want, 1e-6 if ours.dtype == F32 else 1e-2)


def test_lead_kernel_takes_back_what_it_added_to_the_last_bit(ops):
    # Powers of two: sums are exact, so only a product that differs could show.
    theta = [torch.zeros(65)]
    older, newest = [torch.zeros(65, dtype=BF16)], twin.tensors([(65,)], [BF16], 4)
    bucket = SimpleNamespace(parameters=theta, leads=(older, newest))
    before = twin.tensors([(65,)], [F32], 2)
    put_ahead(ops, [bucket], [before], 0, 1.3, 0.0)
    assert bool(theta[0].all())
    put_ahead(ops, [bucket], [[t.clone() for t in theta]], 1, 0.0, 1.3)
    assert not theta[0].any()


@pytest.mark.parametrize(("params", "_grads", "basis"), FORMATS)
@pytest.mark.parametrize("directions", [0, 1, 2])
def test_apply_kernel_equals_the_reference(ops, params, _grads, basis, directions):
    theta = twin.tensors(SHAPES, params, 1)
    other = [t.clone() for t in theta]
    bs = [twin.tensors(SHAPES, basis, 2 + j) for j in range(directions)]
    c = twin.tensors([(len(SHAPES), directions)], [F32], 9)[0]
    if directions == 2:
        c[3, 1] = c[4, 0] = 0.0
    ours, want = ops.apply(theta, bs, c, 0.5), REFERENCE.apply(other, bs, c, 0.5)
    assert_close(ours, want)
    assert ours[-1] == 1.0
    for a, b in zip(theta, other, strict=True):
        assert_close(a, b, 1e-6 if a.dtype == F32 else 1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "direction", "coefficient"])
def test_apply_kernel_writes_nothing_when_not_finite(ops, bad, where):
    theta = twin.tensors(SHAPES, [F32], 1)
    bs = [twin.tensors(SHAPES, [BF16], 2 + j) for j in range(2)]
    c = torch.ones(len(SHAPES), 2)
    {"weight": theta[-1][7], "direction": bs[1][-1][32], "coefficient": c[-1]}[where][
        1
    ] = bad
    before = [t.clone() for t in theta]
    result = ops.apply(theta, bs, c, 1.0)
    assert result[-1] == 0.0
    assert all(
        torch.equal(a.nan_to_num(5.0), b.nan_to_num(5.0))
        for a, b in zip(theta, before, strict=True)
    )


@pytest.mark.parametrize(("push", "fits"), [(400.0, True), (600.0, False)])
def test_apply_kernel_judges_the_rounded_weight(ops, push, fits):
    theta = [torch.full((9,), 65000.0, dtype=F16), torch.ones(40)]
    result = ops.apply(
        theta, [[torch.full((9,), push), torch.ones(40)]], torch.ones(2, 1), 1
    )
    assert result[-1] == float(fits)
    assert theta[1][0] == (2.0 if fits else 1.0)


def test_apply_kernel_leaves_a_direction_without_coefficient_unread(ops):
    theta = [torch.ones(20)]
    bs = [[torch.full((20,), 0.5)], [torch.full((20,), math.inf)]]
    assert ops.apply(theta, bs, torch.tensor([[2.0, 0.0]]), 1.0).tolist() == [20.0, 1.0]
    assert theta[0].tolist() == [2.0] * 20


@pytest.mark.parametrize("source", twin.FLOATS)
@pytest.mark.parametrize("target", twin.FLOATS)
def test_copy_kernel_converts_as_torch_does(ops, source, target):
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-40, 65519.0, 3e38])
    values = [special.repeat(9).to(source), *twin.tensors(SHAPES, [source], 1)]
    got = [torch.zeros_like(t, dtype=target) for t in values]
    ops.copy(values, got)
    for a, b in zip(got, values, strict=True):
        want = b.to(target)
        assert torch.equal(a.isnan(), want.isnan())
        assert torch.equal(a.nan_to_num(2.0), want.nan_to_num(2.0))
        assert torch.equal(a.signbit() & ~a.isnan(), want.signbit() & ~a.isnan())


def test_copy_kernel_keeps_the_payload_of_a_nan(ops):
    bits = torch.tensor([0x7FC12345, 0x7F800001, -1], dtype=torch.int32)
    target = [torch.zeros(3)]
    ops.copy([bits.view(F32)], target)
    assert torch.equal(target[0].view(torch.int32), bits)


def test_kernels_take_misaligned_views_and_equal_strides(ops):
    base = twin.tensors([(50,)] * 2, [F32], 1)
    g, b = [base[0][1:]], [base[1][1:]]
    assert g[0].data_ptr() % 16
    assert_close(ops.observe(g, [b]), REFERENCE.observe(g, [b]))
    g, b = (twin.transposed([t[:48].view(6, 8)]) for t in base)
    assert not g[0].is_contiguous()
    assert_close(ops.observe(g, [b]), REFERENCE.observe(g, [b]))


@pytest.mark.parametrize("lists", [[], [torch.empty(0), torch.empty(0, 3)]])
def test_kernels_take_nothing(ops, lists):
    count = len(lists)
    assert torch.equal(ops.observe(lists, [lists]), torch.zeros(count, 3))
    assert torch.equal(ops.advance(*[lists] * 5, 0.9), torch.zeros(count, 2))
    result = ops.apply(lists, [lists], torch.ones(count, 1), 1.0)
    assert result.tolist() == [0.0] * count + [1.0]
    ops.copy(lists, lists)


def test_tables_longer_than_one_fill_reach_every_tensor(ops):
    g = [torch.full((3,), float(i)) for i in range(300)]
    want = torch.tensor([[3.0 * i * i] * 3 for i in range(300)])
    assert_close(ops.observe(g, [g]), want)


@pytest.mark.parametrize("shape", [(0,), (1,), (301,), (441, 2), (1760, 2), (1761, 2)])
def test_coefficients_reach_the_kernels_whichever_way_they_travel(ops, shape):
    coefficients = torch.randn(shape, dtype=torch.float64)
    travelled = ops.launcher.factors(coefficients)
    assert travelled.shape == shape
    assert travelled.is_contiguous()
    assert torch.equal(travelled, coefficients.float())


def adamw_reference(theta, grads, steps, **options):
    parameters = [torch.nn.Parameter(t.clone()) for t in theta]
    optimizer = torch.optim.AdamW(parameters, foreach=False, **options)
    for g in grads[:steps]:
        for p, x in zip(parameters, g, strict=True):
            p.grad = x.clone()
        optimizer.step()
    state = [optimizer.state[p] for p in parameters]
    return parameters, [s["exp_avg"] for s in state], [s["exp_avg_sq"] for s in state]


@pytest.mark.parametrize("on_kernels", [True, False])
def test_fused_adamw_follows_torch(ops, on_kernels):
    shapes = [s for s in SHAPES if 0 not in s]
    start = twin.tensors(shapes, [F32], 1)
    grads = [twin.tensors(shapes, [F32], 10 + i) for i in range(3)]
    theta = [t.clone() for t in start]
    m, v = ([torch.zeros_like(t) for t in theta] for _ in range(2))
    backend = ops if on_kernels else REFERENCE
    for i, g in enumerate(grads):
        hyper = AdamWStep(1e-2, 0.9, 0.99, 1e-8, 0.1, i + 1)
        fused_move(backend, BaseTensors(theta, g, m, v), hyper, torch.zeros(len(g), 1))
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    want = adamw_reference(start, grads, 3, **options)
    for ours, theirs in zip((theta, m, v), want, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b.detach(), 2e-6)


@pytest.mark.parametrize("on_kernels", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
def test_fused_sgd_follows_torch(ops, on_kernels, nesterov):
    start, g1, g2 = (twin.tensors([(33,), (4, 5)], [F32], i) for i in (1, 2, 3))
    theta = [t.clone() for t in start]
    momentum = [torch.zeros_like(t) for t in theta]
    backend = ops if on_kernels else REFERENCE
    parameters = [torch.nn.Parameter(t.clone()) for t in start]
    options = {"momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov}
    optimizer = torch.optim.SGD(parameters, 0.1, foreach=False, **options)
    for i, g in enumerate((g1, g2)):
        step = SGDStep(0.1, 0.9, 0.0, 0.1, nesterov, starts=i == 0)
        fused_move(backend, BaseTensors(theta, g, momentum), step, torch.zeros(2, 1))
        for p, x in zip(parameters, g, strict=True):
            p.grad = x.clone()
        optimizer.step()
    for a, b in zip(theta, parameters, strict=True):
        assert_close(a, b.detach(), 2e-6)


@pytest.mark.parametrize("on_kernels", [True, False])
def test_fused_move_adds_the_predicted_delta_to_the_base_step(ops, on_kernels):
    shapes = [(33,), (4, 5)]
    start, g, lag = (
        twin.tensors(shapes, [f], i) for i, f in ((1, F32), (2, F32), (3, BF16))
    )
    backend = ops if on_kernels else REFERENCE
    hyper = AdamWStep(1e-2, 0.9, 0.99, 1e-8, 0.0, 1)
    plain, moved = ([t.clone() for t in start] for _ in range(2))
    c = torch.tensor([[2.0, 0.5], [0.0, -1.0]])
    for theta, factors, lists in ((plain, c * 0, ()), (moved, c, (lag,))):
        m, v = ([torch.zeros_like(t) for t in theta] for _ in range(2))
        used = factors if lists else factors[:, :1]
        fused_move(backend, BaseTensors(theta, g, m, v, lists), hyper, used, 0.5)
    for i in range(2):
        delta = c[i, 0] * (plain[i] - start[i]) + c[i, 1] * lag[i].float()
        assert_close(moved[i], plain[i] + 0.5 * delta, 2e-6)
