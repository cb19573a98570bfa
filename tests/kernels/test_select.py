"""Which backend runs: the errors of asking for one, the event of going without."""

from __future__ import annotations

import builtins

import pytest
import structlog
import torch

from hybridopt.errors import ConfigError, KernelUnavailableError, RecoveryAction
from hybridopt.kernels import select_ops
from hybridopt.kernels.torch_ops import TorchOps

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def no_cupy(monkeypatch):
    """A machine on which cupy is not installed."""
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "cupy" or name.startswith("cupy."):
            raise ModuleNotFoundError("No module named 'cupy'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_select_takes_torch_by_name(device):
    assert isinstance(select_ops("torch", device), TorchOps)


def test_select_auto_takes_torch_on_the_cpu_without_an_event():
    with structlog.testing.capture_logs() as events:
        assert isinstance(select_ops("auto", CPU), TorchOps)
    assert events == []


def test_select_cupy_on_the_cpu_says_that_it_needs_a_cuda_device():
    with pytest.raises(
        KernelUnavailableError, match=r"device cpu.*kernels='torch'"
    ) as e:
        select_ops("cupy", CPU)
    assert e.value.recovery is RecoveryAction.FIX_CONFIGURATION


def test_select_cupy_without_cupy_says_what_to_install(no_cupy):
    with pytest.raises(KernelUnavailableError, match=r"hybridopt\[cuda1[23]\]"):
        select_ops("cupy", CUDA)


def test_select_auto_falls_back_with_exactly_one_event(no_cupy):
    with structlog.testing.capture_logs() as events:
        ops = select_ops("auto", CUDA)
    assert isinstance(ops, TorchOps)
    assert [e["event"] for e in events] == ["kernels_fallback"]
    assert events[0]["backend"] == "torch"
    assert events[0]["device"] == "cuda:0"
    assert "cupy" in events[0]["reason"]


def test_select_refuses_an_unknown_name():
    with pytest.raises(ConfigError, match="kernels='triton'"):
        select_ops("triton", CPU)
