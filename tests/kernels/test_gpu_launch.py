"""How the kernels are launched on a real card: order, streams, graphs, memory."""

from __future__ import annotations

import pytest
import torch

from hybridopt.kernels import select_ops
from tests.kernels import twin

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
F32, BF16 = torch.float32, torch.bfloat16
SHAPES = (*twin.SHAPES, (65,), (33, 3), (70001,), (257, 129))


@pytest.fixture(scope="module")
def ops():
    return select_ops("cupy", torch.device("cuda", 0))


@pytest.fixture
def kernels_only(ops, monkeypatch):
    """A silent fallback would run the reference instead."""
    monkeypatch.setattr(ops, "_reference", None)


def make(formats, seed, shapes=SHAPES):
    return twin.tensors(shapes, formats, seed, "cuda")


def test_results_are_the_same_bits_every_time(ops):
    g, b = (make([F32], i, [(3_000_001,), (777,)]) for i in (1, 2))
    first = ops.observe(g, [b])
    for _ in range(5):
        assert torch.equal(ops.observe(g, [b]), first)


def test_operations_wait_for_nothing_and_take_no_memory_from_cupy(ops):
    import cupy

    theta, g, anchor, s, v = (make([F32], i) for i in range(5))
    c = torch.zeros(len(SHAPES), 2, device="cuda")
    versions = theta[0]._version, anchor[0]._version
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.observe(g, [s, v])
        ops.advance(theta, g, anchor, s, v, 0.9)
        ops.apply(theta, [s, v], c, 1.0)
        ops.copy(theta, anchor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cupy.get_default_memory_pool().total_bytes() == 0
    assert theta[0]._version == versions[0] + 1
    assert anchor[0]._version == versions[1] + 2


def test_kernels_run_in_order_on_the_current_stream(ops):
    g = [torch.zeros(1 << 22, device="cuda")]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        g[0].fill_(1.0)
        result = ops.observe(g, [])
        g[0].fill_(2.0)
    stream.synchronize()
    assert result.item() == 1 << 22


def test_one_table_per_stream_serves_the_same_tensors(ops):
    g = [torch.ones(5000, device="cuda")]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(ops.observe(g, []))
    torch.cuda.synchronize()
    assert torch.cat(results).unique().tolist() == [5000.0]


def test_graph_capture_replays_with_new_values(ops, kernels_only):
    theta, g, anchor, s, v = (make([F32], i) for i in range(5))
    c = torch.full((len(SHAPES), 2), 0.25, device="cuda")

    def work():
        seen = ops.observe(g, [s, v])
        sums = ops.advance(theta, g, anchor, s, v, 0.9)
        return seen, sums, ops.apply(theta, [s, v], c, 0.5)

    saved = [[t.clone() for t in ts] for ts in (theta, g, anchor, s, v)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for lists, old in zip((theta, g, anchor, s, v), saved, strict=True):
        ops.copy([2 * t for t in old], lists)
    graph.replay()
    replayed = [[t.clone() for t in ts] for ts in (theta, anchor, s, v)]
    sums = [r.clone() for r in captured]
    for lists, old in zip((theta, g, anchor, s, v), saved, strict=True):
        ops.copy([2 * t for t in old], lists)
    eager = work()
    for a, b in zip(sums, eager, strict=True):
        assert torch.equal(a, b)
    for got, lists in zip(replayed, (theta, anchor, s, v), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, lists, strict=True))


def test_same_addresses_with_another_format_make_another_table(ops):
    storage = torch.ones(4096, device="cuda")
    assert ops.observe([storage], []).item() == 4096
    as_half = storage.view(BF16)
    assert ops.observe([as_half], []).item() == pytest.approx(4096)
    assert ops.observe([storage[:10]], []).item() == 10
