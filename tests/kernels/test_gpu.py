"""The CUDA backend on a real card; every test here needs one and CuPy."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import structlog
import torch

from hybridopt.kernels import select_ops
from hybridopt.kernels.fused import AdamWStep, BaseTensors, fused_move
from hybridopt.kernels.pinned import PinnedSnapshot
from hybridopt.kernels.torch_ops import TorchOps
from hybridopt.weights.ahead import put_ahead, remember
from tests.kernels import twin

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = (*twin.SHAPES, (65,), (33, 3), (70001,), (257, 129))
REFERENCE = TorchOps()
DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def ops():
    return select_ops("cupy", DEVICE)


@pytest.fixture
def kernels_only(ops, monkeypatch):
    """A silent fallback would compare the reference with itself."""
    monkeypatch.setattr(ops, "_reference", None)


def make(formats, seed, shapes=SHAPES):
    return twin.tensors(shapes, formats, seed, "cuda")


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    scale = 1 + expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.cpu().double(), expected.cpu().double(), rtol=0, atol=tolerance * scale
    )


def step_tolerance(dtype):
    return {F32: 2e-6, BF16: 8e-3, F16: 1e-3}[dtype]


@pytest.mark.parametrize("grads", twin.FLOATS)
@pytest.mark.parametrize("basis", [F32, BF16])
@pytest.mark.parametrize("directions", [0, 1, 2, 3])
def test_parity_observe(ops, kernels_only, grads, basis, directions):
    g = make([grads], 1)
    bs = [make([basis], 2 + j) for j in range(directions)]
    close(ops.observe(g, bs), twin.observe(g, bs), 1e-5)


@pytest.mark.parametrize("params", twin.FLOATS)
@pytest.mark.parametrize("grads", twin.FLOATS)
@pytest.mark.parametrize("basis", [F32, BF16])
def test_parity_advance(ops, kernels_only, params, grads, basis):
    theta, anchor, g = make([params], 1), make([params], 2), make([grads], 3)
    s, v = make([basis], 4), make([basis], 5)
    want_s, want_v = twin.advance(theta, anchor, v, 0.97)
    sums = ops.advance(theta, g, anchor, s, v, 0.97)
    for i in range(len(SHAPES)):
        assert torch.equal(anchor[i], theta[i])
        close(s[i], want_s[i], step_tolerance(basis))
        close(v[i], want_v[i], step_tolerance(basis))
    close(sums, twin.observe(g, [s])[:, 1:], 1e-5)


@pytest.mark.parametrize("params", twin.FLOATS)
@pytest.mark.parametrize("basis", [F32, BF16])
def test_advance_move_equals_advance_and_apply(ops, kernels_only, params, basis):
    gains = torch.linspace(-1.0, 2.0, len(SHAPES))
    results, sums = [], []
    for fused in (True, False):
        theta, anchor, g = make([params], 1), make([params], 2), make([params], 3)
        s, v = make([basis], 4), make([basis], 5)
        if fused:
            sums.append(ops.advance_move(theta, g, anchor, s, v, 0.97, gains))
        else:
            sums.append(ops.advance(theta, g, anchor, s, v, 0.97))
            assert ops.apply(theta, [s], gains.unsqueeze(1), 1.0)[-1] == 1.0
            ops.copy(theta, anchor)
        results.append([*theta, *anchor, *s, *v])
    for ours, want in zip(*results, strict=True):
        assert torch.equal(ours, want)
    assert torch.equal(*sums)


@pytest.mark.parametrize("basis", [F32, BF16])
@pytest.mark.parametrize(("lead", "made"), [(0, 0), (0, 1.7), (0.3, 0), (2.5, 1.7)])
@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
def test_parity_lead(ops, kernels_only, basis, lead, made, skip):
    results = []
    for backend in (ops, REFERENCE):
        theta, older, newest = make([F32], 1), make([basis], 3), make([basis], 4)
        bucket = SimpleNamespace(parameters=theta, leads=(older, newest))
        before = remember([bucket], 0)
        if not skip:
            torch._foreach_add_(theta, make([F32], 5))
        flag = None if skip is None else torch.tensor(skip, device="cuda")
        put_ahead(backend, [bucket], before, 0, lead, made, flag)
        results.append([*theta, *older, *newest])
    for ours, want in zip(*results, strict=True):
        close(ours, want, step_tolerance(ours.dtype))


@pytest.mark.parametrize("params", twin.FLOATS)
@pytest.mark.parametrize("basis", [F32, BF16])
@pytest.mark.parametrize("on_host", [False, True])
def test_parity_apply(ops, kernels_only, params, basis, on_host):
    theta = make([params], 1)
    bs = [make([basis], 2 + j) for j in range(2)]
    c = twin.tensors([(len(SHAPES), 2)], [F32], 9)[0]
    c[5, 1] = c[6, 0] = 0.0
    deltas, moved = twin.apply(theta, bs, c, 0.5)
    result = ops.apply(theta, bs, c if on_host else c.cuda(), 0.5)
    assert result[-1] == 1.0
    for i in range(len(SHAPES)):
        close(theta[i], moved[i], step_tolerance(params))
        close(result[i], (deltas[i] ** 2).sum(), 1e-5)


@pytest.mark.parametrize("source", twin.FLOATS)
@pytest.mark.parametrize("target", twin.FLOATS)
def test_parity_copy(ops, kernels_only, source, target):
    values = make([source], 1)
    got = make([target], 2)
    ops.copy(values, got)
    assert all(torch.equal(a, b.to(target)) for a, b in zip(got, values, strict=True))


def test_parity_mixed_formats_in_one_call(ops, kernels_only):
    g, theta = make([F32, BF16, F16], 1), make([F16, F32], 2)
    bs = [make([BF16, F32], 3 + j) for j in range(2)]
    close(ops.observe(g, bs), twin.observe(g, bs), 1e-5)
    c = torch.full((len(SHAPES), 2), 0.5, device="cuda")
    _, moved = twin.apply(theta, bs, c, 1.0)
    assert ops.apply(theta, bs, c, 1.0)[-1] == 1.0
    for a, b in zip(theta, moved, strict=True):
        close(a, b, step_tolerance(a.dtype))


def test_parity_strided_and_misaligned(ops, kernels_only):
    g, b = (twin.transposed(make([F32], i)) for i in (1, 2))
    close(ops.observe(g, [b]), twin.observe(g, [b]), 1e-5)
    g, b = ([t[1:] for t in make([BF16], i, [(999,)])] for i in (1, 2))
    close(ops.observe(g, [b]), twin.observe(g, [b]), 1e-5)


def test_calls_that_kernels_do_not_serve_run_on_the_reference(ops):
    g, b = make([torch.float64], 1), make([F32], 2)
    close(ops.observe(g, [b]), twin.observe(g, [b]), 1e-12)
    g, b = make([F32], 1), twin.transposed(make([F32], 2))
    close(ops.observe(g, [b]), twin.observe(g, [b]), 1e-5)
    host = [torch.empty_like(t, device="cpu") for t in g]
    ops.copy(g, host)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(g, host, strict=True))


def test_reference_on_the_device_agrees_with_itself_on_the_host():
    results = []
    for device in ("cuda", "cpu"):
        lists = [twin.tensors(SHAPES, [F32], i, device) for i in range(5)]
        theta, g, anchor, s, v = lists
        c = torch.full((len(SHAPES), 2), 0.5, device=device)
        c[7, 1] = 0.0
        found = [REFERENCE.observe(g, [s, v])]
        found.append(REFERENCE.advance(theta, g, anchor, s, v, 0.9))
        found.append(REFERENCE.apply(theta, [s, v], c, 1.0))
        theta[-1][0, 0] = math.inf
        found.append(REFERENCE.apply(theta, [s, v], c, 1.0)[-1:])
        results.append([*found, *theta[:-1], *anchor, *s, *v])
    for ours, want in zip(*results, strict=True):
        close(ours, want, 1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "direction", "coefficient"])
def test_apply_writes_nothing_when_a_weight_would_not_be_finite(
    ops, kernels_only, bad, where
):
    theta, b = make([F32], 1), make([BF16], 2)
    c = torch.ones(len(SHAPES), 1, device="cuda")
    {"weight": theta[-2], "direction": b[-2], "coefficient": c[-2]}[where][-1] = bad
    before = [t.clone() for t in theta]
    assert ops.apply(theta, [b], c, 1.0)[-1] == 0.0
    for old, new in zip(before, theta, strict=True):
        assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))
    rows = ops.observe(theta, [b]).isfinite().all(1)
    assert rows[: len(SHAPES) - 2].all()


def test_more_than_two_to_the_31_weights_in_one_tensor(ops, kernels_only):
    size = (1 << 31) + 4097
    theta = torch.ones(size, dtype=BF16, device="cuda")
    move = torch.ones(size, dtype=BF16, device="cuda")
    theta[-1] = 3.0
    assert ops.observe([theta], [[move]])[0, 0].item() == pytest.approx(
        size + 8, rel=1e-6
    )
    c = torch.ones(1, 1, device="cuda")
    result = ops.apply([theta], [[move]], c, 2.0)
    assert result[0].item() == pytest.approx(4 * size, rel=1e-6)
    assert theta[-1].item() == 5.0
    assert theta[-2].item() == 3.0
    assert theta[0].item() == 3.0
    move[-1] = math.inf
    assert ops.apply([theta], [[move]], c, 2.0)[-1] == 0.0
    assert theta[0].item() == 3.0
    ops.copy([theta], [move])
    assert move[-1].item() == 5.0


def test_fused_adamw_follows_torch_fused(ops):
    shapes = [s for s in SHAPES if 0 not in s]
    start = make([F32], 1, shapes)
    theta = [t.clone() for t in start]
    parameters = [torch.nn.Parameter(t.clone()) for t in start]
    optimizer = torch.optim.AdamW(parameters, 1e-2, weight_decay=0.1, fused=True)
    m, v = ([torch.zeros_like(t) for t in theta] for _ in range(2))
    for i in range(3):
        g = make([F32], 10 + i, shapes)
        hyper = AdamWStep(1e-2, 0.9, 0.999, 1e-8, 0.1, i + 1)
        zero = torch.zeros(len(g), 1, device="cuda")
        fused_move(ops, BaseTensors(theta, g, m, v), hyper, zero)
        for p, x in zip(parameters, g, strict=True):
            p.grad = x
        optimizer.step()
    for a, b in zip(theta, parameters, strict=True):
        close(a, b.detach(), 2e-6)


def test_fused_move_equals_the_base_step_and_the_move(ops):
    start, g, b = make([F32], 1), make([F32], 2), make([BF16], 3)
    c = torch.tensor([[0.5, -0.25]], device="cuda").repeat(len(SHAPES), 1)
    hyper = AdamWStep(1e-2, 0.9, 0.999, 1e-8, 0.1, 1)
    results = []
    for backend in (ops, REFERENCE):
        theta = [t.clone() for t in start]
        m, v = ([torch.zeros_like(t) for t in theta] for _ in range(2))
        fused_move(backend, BaseTensors(theta, g, m, v, [b]), hyper, c, 2.0)
        results.append([*theta, *m, *v])
    for ours, want in zip(*results, strict=True):
        close(ours, want, 2e-6)


def test_pinned_snapshot_restores_every_bit_without_waiting():
    theta = make([F32, BF16], 1)
    before = [t.clone() for t in theta]
    snapshot = PinnedSnapshot()
    snapshot.save(theta)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        snapshot.save(theta)
        snapshot.release()
        for t in theta:
            t.mul_(3.0)
        snapshot.restore(theta)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(t.is_pinned() for t in snapshot.wait() if t.numel())
    assert all(torch.equal(a, b) for a, b in zip(theta, before, strict=True))


def test_select_takes_the_kernels_where_they_run():
    with structlog.testing.capture_logs() as events:
        ops = select_ops("auto", torch.device("cuda"))
    assert ops.name == "cupy"
    assert events == []
    assert copy.deepcopy(ops).name == "cupy"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_kernels_run_on_a_device_that_is_not_current():
    ops = select_ops("cupy", torch.device("cuda", 1))
    g = [torch.ones(1000, device="cuda:1")]
    assert ops.observe(g, []).device.index == 1
    assert ops.observe(g, []).item() == 1000
    assert torch.cuda.current_device() == 0
