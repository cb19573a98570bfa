"""What launchers remember between calls, and that none of it is ever mistaken."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from hybridopt.kernels.launch import Launcher
from hybridopt.kernels.recent import Fingerprints, Recent, Steady
from tests.kernels import twin
from tests.kernels.host import COMPILER, host_ops


def test_recent_forgets_what_was_not_asked_for_longest():
    recent = Recent(2)
    recent.put("a", 1)
    recent.put("b", 2)
    assert recent.get("a") == 1
    recent.put("c", 3)
    assert [recent.get(k) for k in "abc"] == [1, None, 3]
    assert len(recent) == 2


def test_fingerprint_of_the_same_tensors_is_found_without_inspection(monkeypatch):
    prints, tensors = Fingerprints(), [torch.ones(3), torch.ones(2, 2)]
    number = prints.number(tensors)
    monkeypatch.setattr(prints, "_inspect", None)
    assert prints.number(tensors) == prints.number(list(tensors)) == number


def test_fingerprint_of_new_tensors_in_the_same_memory_is_the_same():
    prints, storage = Fingerprints(), torch.ones(16)
    number = prints.number([storage])
    for _ in range(3):
        assert prints.number([storage.detach()]) == number


@pytest.mark.parametrize(
    "change",
    [lambda t: t.view(torch.bfloat16), lambda t: t.view(torch.int32), lambda t: t[:10]],
    ids=["narrower", "another-format", "shorter"],
)
def test_fingerprint_tells_tensors_at_one_address_apart(change):
    prints, storage = Fingerprints(), torch.ones(16)
    tensors = [storage, torch.ones(4)]
    number = prints.number(tensors)
    tensors[0] = change(storage)
    other = prints.number(tensors)
    assert tensors[0].data_ptr() == storage.data_ptr()
    assert other != number
    tensors[0] = storage
    assert prints.number(tensors) == number
    tensors[0] = change(storage)
    assert prints.number(tensors) == other


def test_fingerprint_is_none_when_strides_change_at_one_address():
    prints, square = Fingerprints(), torch.ones(4, 4)
    number = prints.number([square])
    assert number is not None
    assert prints.number([square.t()]) is None
    assert prints.number([square]) == number


def test_fingerprint_follows_data_that_moves_under_the_same_tensor():
    prints, weight = Fingerprints(), torch.nn.Parameter(torch.ones(8))
    number = prints.number([weight])
    first = weight.data
    weight.data = torch.ones(8)
    assert prints.number([weight]) != number
    weight.data = first
    assert prints.number([weight]) == number


def test_fingerprints_keep_no_tensor_alive():
    prints, tensors = Fingerprints(), [torch.ones(8)]
    prints.number(tensors)
    watch = weakref.ref(tensors[0])
    tensors.clear()
    gc.collect()
    assert watch() is None


def test_steady_lists_are_looked_up_once(monkeypatch):
    prints, tensors = Fingerprints(), Steady([torch.ones(3), torch.ones(2, 2)])
    seen = prints.look(tensors)
    assert seen is not None
    assert seen.number == prints.number(list(tensors))
    monkeypatch.setattr(prints, "_look", None)
    assert prints.look(tensors) is seen
    monkeypatch.undo()
    empty = prints.look(Steady())
    assert empty is not None
    assert empty.addresses == ()


@pytest.mark.parametrize("place", [0, -1])
def test_steady_lists_whose_memory_moves_are_looked_up_again(place):
    tensors = Steady([torch.nn.Parameter(torch.ones(8)) for _ in range(3)])
    prints = Fingerprints()
    number = prints.number(tensors)
    first = tensors[place].data
    tensors[place].data = torch.ones(8)
    assert prints.number(tensors) != number
    tensors[place].data = first
    assert prints.number(tensors) == number


def test_steady_lists_and_their_tensors_are_not_kept_alive():
    prints, tensors = Fingerprints(), Steady([torch.ones(8)])
    number = prints.number(tensors)
    watch = weakref.ref(tensors[0])
    del tensors
    gc.collect()
    assert watch() is None
    # A new list may well get the old one's place in memory.
    for _ in range(50):
        assert prints.number(Steady([torch.ones(9)])) != number


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
def test_launcher_serves_each_format_at_one_address_its_own_table(monkeypatch):
    ops = host_ops()
    monkeypatch.setattr(ops, "_reference", None)
    storage = torch.ones(64)
    for _ in range(3):
        assert ops.observe([storage], []).item() == 64
        assert ops.observe([storage[:10]], []).item() == 10
        halves = ops.observe([storage.view(torch.bfloat16)], [])
        assert halves.item() == pytest.approx(64)


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
def test_launcher_builds_one_table_for_gradients_that_return_to_their_memory():
    ops, storage = host_ops(), torch.ones(64)
    ops.observe([storage], [])
    build = ops.launcher._build
    built = []
    ops.launcher._build = lambda *args: built.append(args) or build(*args)
    filled = []
    fill = ops.launcher._fill
    ops.launcher._fill = lambda *args: filled.append(args) or fill(*args)
    for _ in range(5):
        ops.observe([storage.detach()], [])
    assert filled == []
    assert ops.observe([2 * torch.ones(64)], []).item() == 256
    assert built == []
    assert len(filled) == 1
    assert ops.observe([storage], []).item() == 64
    ops.observe([torch.ones(63)], [])
    assert len(built) == 1


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
def test_launcher_writes_new_addresses_in_the_order_of_the_formats(monkeypatch):
    ops = host_ops()
    monkeypatch.setattr(ops, "_reference", None)
    shapes = [(5,), (40,), (7, 3), (1,)]
    formats = [torch.float32, torch.bfloat16, torch.float32, torch.float16]
    kept = []  # so that every round has its own addresses
    for seed in range(4):
        g, b = (twin.tensors(shapes, formats, seed + 10 * k) for k in range(2))
        kept += [g, b]
        for left, right in ((g, b), (b, g), (g, kept[1])):
            ours = ops.observe(left, [right])
            want = twin.observe(left, [right])
            assert torch.allclose(ours.double(), want.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("current", [0, 1])
def test_launcher_switches_devices_only_when_it_must(monkeypatch, current):
    events = []

    @contextmanager
    def entered(what):
        events.append(what)
        yield

    stream = SimpleNamespace(from_external=lambda s: entered(s.__cuda_stream__()[1]))
    launcher = Launcher(
        SimpleNamespace(cuda=SimpleNamespace(Stream=stream)), torch.device("cuda", 1)
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda d: entered(d.index))
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77)
    )
    with launcher.on_stream() as pointer:
        events.append(pointer)
    assert events == ([77, 77] if current == 1 else [1, 77, 77])


def test_lists_on_other_devices_are_of_another_kind():
    prints = Fingerprints()
    here, there = ([torch.empty(3, device=d)] for d in ("cpu", "meta"))
    first, second = prints.look(here), prints.look(there)
    assert first is not None
    assert second is not None
    assert first.kind != second.kind
    again = prints.look([torch.empty(3)])
    assert again is not None
    assert again.kind == first.kind
