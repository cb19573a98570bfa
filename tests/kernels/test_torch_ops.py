"""The reference backend against literal float64 twins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridopt.kernels import flat
from hybridopt.kernels.torch_ops import TorchOps
from hybridopt.protocols import Ops
from tests.kernels import twin

OPS = TorchOps()
SHAPE_LISTS = st.lists(st.sampled_from(twin.SHAPES), min_size=1, max_size=5)
DTYPES = st.lists(st.sampled_from(twin.FLOATS), min_size=1, max_size=3)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=["whole", "in parts"])
def way(request, monkeypatch):
    """Both ways through every operation: all at once, or in bounded parts."""
    if request.param == "in parts":
        monkeypatch.setattr(flat, "_GROUP_LIMIT", 40)
        monkeypatch.setattr(flat, "_DOT_LIMIT", 16)
    return request.param


def close(actual, expected, tolerance):
    """Equal up to a tolerance relative to the largest magnitude of the expected."""
    assert actual.shape == expected.shape
    if expected.numel():
        error = (actual.double() - expected.double()).abs().max()
        assert error <= tolerance * (1 + expected.double().abs().max())


def test_torch_ops_is_an_ops():
    assert isinstance(OPS, Ops)
    assert OPS.name == "torch"


@settings(deadline=None, max_examples=40)
@given(SHAPE_LISTS, DTYPES, st.integers(0, 3), st.booleans())
def test_observe_equals_the_twin(shapes, dtypes, directions, strided):
    g = twin.tensors(shapes, dtypes, 1)
    basis = [twin.tensors(shapes, dtypes[::-1], 2 + j) for j in range(directions)]
    if strided:
        g = twin.transposed(g)
    result = OPS.observe(g, basis)
    assert result.dtype == torch.float32
    close(result, twin.observe(g, basis), 1e-5)


def test_observe_both_ways_agree_with_the_twin(way):
    g = twin.tensors(twin.SHAPES, [torch.float32], 1)
    basis = [twin.tensors(twin.SHAPES, [torch.float32], j) for j in (2, 3)]
    close(OPS.observe(g, basis), twin.observe(g, basis), 1e-6)


def test_observe_float64_gradients_give_float64_sums(way):
    g = twin.tensors(twin.SHAPES, [torch.float64], 1)
    basis = [twin.tensors(twin.SHAPES, [torch.float32], 2)]
    result = OPS.observe(g, basis)
    assert result.dtype == torch.float64
    close(result, twin.observe(g, basis), 1e-14)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_observe_shows_a_bad_value_in_its_own_row_only(way, bad):
    g = twin.tensors([(4,), (5,), (6,)], [torch.float32], 1)
    basis = [twin.tensors([(4,), (5,), (6,)], [torch.float32], 2)]
    g[1][2] = bad
    result = OPS.observe(g, basis)
    assert not result[1, 0].isfinite()
    assert not result[1, 1].isfinite()
    assert result[1, 2].isfinite()
    assert result[[0, 2]].isfinite().all()


def test_observe_and_advance_and_apply_take_no_tensors():
    assert OPS.observe([], [[], []]).shape == (0, 5)
    assert OPS.advance([], [], [], [], [], 0.9).shape == (0, 2)
    assert OPS.apply([], [[]], torch.zeros(0, 1), 1.0).tolist() == [1.0]
    OPS.copy([], [])


@settings(deadline=None, max_examples=40)
@given(
    SHAPE_LISTS,
    DTYPES,
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.floats(0, 1, width=32),
)
def test_advance_equals_the_twin(shapes, dtypes, stored, beta):
    theta, anchor = (twin.tensors(shapes, dtypes, seed) for seed in (1, 2))
    g = twin.tensors(shapes, dtypes[::-1], 3)
    s, v = (twin.tensors(shapes, [stored], seed) for seed in (4, 5))
    want_s, want_v = twin.advance(theta, anchor, v, beta)
    before = [t.clone() for t in theta]
    sums = OPS.advance(theta, g, anchor, s, v, beta)
    for i in range(len(shapes)):
        assert torch.equal(theta[i], before[i])
        assert torch.equal(anchor[i], theta[i])
        close(s[i], want_s[i], TOLERANCE[stored])
        close(v[i], want_v[i], TOLERANCE[stored])
    rounded = twin.observe(g, [s])[:, 1:]
    close(sums, rounded, 1e-5)


def test_advance_both_ways_write_the_same_bits(monkeypatch):
    results = []
    for limit in (1 << 24, 40):
        monkeypatch.setattr(flat, "_GROUP_LIMIT", limit)
        lists = [twin.tensors(twin.SHAPES, [torch.float32], i) for i in range(5)]
        theta, g, anchor, s, v = lists
        OPS.advance(theta, g, anchor, s, v, 0.97)
        results.append([*s, *v, *anchor])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_advance_lag_is_the_distance_to_the_moving_average():
    generator = torch.Generator().manual_seed(0)
    theta = [torch.randn(9, generator=generator, dtype=torch.float64)]
    anchor, s, v = (
        [theta[0].clone()],
        [torch.zeros(9).double()],
        [torch.zeros(9).double()],
    )
    average = theta[0].clone()
    for _ in range(20):
        theta[0].add_(torch.randn(9, generator=generator, dtype=torch.float64))
        average = 0.9 * average + 0.1 * theta[0]
        OPS.advance(theta, theta, anchor, s, v, 0.9)
    close(v[0], theta[0] - average, 1e-13)


@settings(deadline=None, max_examples=40)
@given(
    SHAPE_LISTS, DTYPES, st.integers(0, 3), st.booleans(), st.floats(-2, 2, width=32)
)
def test_apply_equals_the_twin(shapes, dtypes, directions, strided, scale):
    theta = twin.tensors(shapes, dtypes, 1)
    if strided:
        theta = twin.transposed(theta)
    basis = [twin.tensors(shapes, dtypes[::-1], 2 + j) for j in range(directions)]
    c = twin.tensors([(len(shapes), directions)], [torch.float32], 9)[0]
    deltas, moved = twin.apply(theta, basis, c, scale)
    result = OPS.apply(theta, basis, c, scale)
    assert result.shape == (len(shapes) + 1,)
    assert result.dtype == torch.float32
    assert result[-1] == 1.0
    for i in range(len(shapes)):
        close(theta[i], moved[i], TOLERANCE[theta[i].dtype])
        close(result[i], (deltas[i] * deltas[i]).sum(), 1e-5)


@pytest.mark.parametrize("where", ["weight", "direction", "coefficient"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_apply_writes_nothing_when_a_weight_would_not_be_finite(way, where, bad):
    theta = twin.tensors([(4,), (5,)], [torch.float32], 1)
    basis = [twin.tensors([(4,), (5,)], [torch.float32], 2)]
    c = torch.ones(2, 1)
    target = {"weight": theta[1], "direction": basis[0][1], "coefficient": c[1]}[where]
    target[0] = bad
    before = [t.clone() for t in theta]
    result = OPS.apply(theta, basis, c, 1.0)
    assert result[-1] == 0.0
    for old, new in zip(before, theta, strict=True):
        assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("dtype", "start", "push", "fits"),
    [
        (torch.float16, 65000.0, 400.0, True),
        (torch.float16, 65000.0, 600.0, False),
        (torch.bfloat16, 3.3e38, 0.05e38, True),
        (torch.bfloat16, 3.3e38, 0.2e38, False),
        (torch.float32, 3.4e38, 1e36, False),
        (torch.float32, 3.3e38, 1e36, True),
    ],
)
def test_apply_judges_the_rounded_weight(way, dtype, start, push, fits):
    theta = [torch.tensor([start] * 9, dtype=dtype), torch.zeros(3, dtype=dtype)]
    basis = [[torch.full((9,), push), torch.ones(3)]]
    before = [t.clone() for t in theta]
    result = OPS.apply(theta, basis, torch.ones(2, 1), 1.0)
    assert result[-1] == float(fits)
    assert torch.equal(theta[1], before[1]) is not fits
    assert theta[0].isfinite().all()


def test_apply_counts_a_direction_without_coefficient_as_zero(way):
    theta = [torch.ones(4)]
    basis = [[torch.full((4,), 0.5)], [torch.full((4,), math.inf)]]
    result = OPS.apply(theta, basis, torch.tensor([[2.0, 0.0]]), 0.5)
    assert result.tolist() == [1.0, 1.0]
    assert theta[0].tolist() == [1.5] * 4


@pytest.mark.parametrize("factor", [math.inf, math.nan, 3e38])
def test_apply_of_absurd_factors_is_refused_where_it_reaches_a_weight(factor):
    theta, empty = [torch.ones(3)], [torch.ones(0)]
    factors = torch.tensor([[factor]])
    assert OPS.apply(empty, [[torch.ones(0)]], factors, 2.0)[-1] == 1.0
    assert OPS.apply(theta, [[torch.ones(3)]], factors, 2.0)[-1] == 0.0
    assert torch.equal(theta[0], torch.ones(3))


def test_apply_takes_what_is_known_and_moves_alike():
    start = twin.tensors(twin.SHAPES, [torch.float32], 1)
    basis = [twin.tensors(twin.SHAPES, [torch.float32], j) for j in (2, 3)]
    coefficients = torch.rand(len(start), 2)
    coefficients[::2, 1] = 0.0
    squares = list(OPS.observe(start, basis)[:, 3:].unbind(1))
    results = []
    for known in ((), squares, (None, squares[1])):
        for finite in (False, True):
            theta = [t.clone() for t in start]
            sums = OPS.apply(theta, basis, coefficients, 0.5, known, finite)
            results.append((theta, sums))
    for theta, sums in results[1:]:
        assert all(map(torch.equal, theta, results[0][0]))
        assert torch.equal(sums, results[0][1])


def test_observe_returns_known_norms_as_they_are():
    g = twin.tensors(twin.SHAPES, [torch.float32], 1)
    basis = [twin.tensors(twin.SHAPES, [torch.float32], j) for j in (2, 3)]
    measured = OPS.observe(g, basis)
    known = torch.arange(float(len(g)))
    found = OPS.observe(g, basis, [None, known])
    assert torch.equal(found[:, :4], measured[:, :4])
    assert torch.equal(found[:, 4], known)


def test_apply_without_directions_still_judges_the_weights(way):
    good, bad = [torch.ones(3)], [torch.tensor([1.0, math.nan])]
    assert OPS.apply(good, [], torch.zeros(1, 0), 1.0).tolist() == [0.0, 1.0]
    assert OPS.apply(bad, [], torch.zeros(1, 0), 1.0).tolist() == [0.0, 0.0]


def test_operations_leave_no_graph_and_bump_versions(way):
    theta = [torch.nn.Parameter(torch.ones(3))]
    s, v, anchor = ([torch.zeros(3)] for _ in range(3))
    before = theta[0]._version
    OPS.advance(theta, [torch.ones(3)], anchor, s, v, 0.9)
    result = OPS.apply(theta, [s], torch.ones(1, 1), 1.0)
    assert theta[0]._version > before
    assert s[0]._version > 0
    assert not result.requires_grad
    assert theta[0].grad_fn is None


def test_copy_keeps_every_bit_and_casts_where_it_must():
    odd = torch.tensor([math.nan, -0.0, math.inf, 1e-45])
    source = [odd, torch.tensor(2.5), torch.empty(0)]
    target = [torch.zeros(4), torch.zeros((), dtype=torch.bfloat16), torch.empty(0)]
    OPS.copy(source, target)
    assert torch.equal(target[0].view(torch.int32), odd.view(torch.int32))
    assert target[1].item() == 2.5


def test_device_way_of_apply_agrees_with_the_host_way(monkeypatch):
    from hybridopt.kernels.torch_apply import apply_on_device

    monkeypatch.setattr(flat, "_GROUP_LIMIT", 40)
    for bad in (False, True):
        lists = [twin.tensors(twin.SHAPES, twin.FLOATS, i) for i in range(3)]
        theta, *basis = lists
        if bad:
            theta[4][3, 3] = math.inf
        other = [t.clone() for t in theta]
        c = torch.randn(len(theta), 2, generator=torch.Generator().manual_seed(5))
        want = OPS.apply(theta, basis, c, 0.5)
        got = apply_on_device(other, basis, c * 0.5)
        close(got.nan_to_num(), want.nan_to_num(), 1e-6)
        assert got[-1] == float(not bad)
        for a, b in zip(theta, other, strict=True):
            close(a.nan_to_num(1, 1, 1), b.nan_to_num(1, 1, 1), 1e-6)
