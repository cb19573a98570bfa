"""A convolutional network with BatchNorm on Fashion-MNIST."""

from __future__ import annotations

import gzip
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tasks.base import (
    BatchTask,
    EpochOrder,
    Setting,
    TaskUnavailableError,
)

__all__ = ["Split", "digits", "evaluator", "fashion_mnist", "make", "make_digits"]

Split = tuple[Tensor, Tensor, Tensor, Tensor]
"""Training images (N, 1, H, W) and labels (N,), then held-out ones."""
Pair = tuple[Tensor, Tensor]


def make(setting: Setting) -> BatchTask[Pair]:
    """Fashion-MNIST from ``setting.data``.

    Raises:
        TaskUnavailableError: It is not there.
    """
    if setting.data is None:
        raise TaskUnavailableError(
            "fashion-mnist: --data names no folder. python -m benchmarks fetch FOLDER, "
            "then --data FOLDER."
        )
    return _task(fashion_mnist(setting.data), setting, batch=128)


def make_digits(setting: Setting) -> BatchTask[Pair]:
    """The same network on scikit-learn's digits, for tests of its parts."""
    return _task(digits(), setting, batch=64)


def _task(split: Split, setting: Setting, batch: int) -> BatchTask[Pair]:
    x, y, held_x, held_y = (t.to(setting.device) for t in split)
    order = EpochOrder(len(x), batch, setting.seed)
    width = {"quick": 16, "full": 24, "gpu": 32}[setting.scale]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        model = network(width, pools=x.shape[-1] >= 16).to(setting.device)

    def rows(index: int) -> Pair:
        chosen = order(index).to(x.device)
        return x[chosen], y[chosen]

    def loss(pair: Pair) -> Tensor:
        return F.cross_entropy(model(pair[0]), pair[1], label_smoothing=0.05)

    return BatchTask(model, loss, rows, evaluator(model, held_x, held_y))


def network(width: int, *, pools: bool) -> nn.Sequential:
    """Three convolutions with BatchNorm, then the mean over the picture."""
    stride = 2 if pools else 1
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def evaluator(model: nn.Module, x: Tensor, y: Tensor):  # type: ignore[no-untyped-def]
    """Held-out cross-entropy in eval mode; leaves the mode as it was."""

    @torch.no_grad()
    def evaluate() -> float:
        training = model.training
        model.eval()
        total = sum(
            float(F.cross_entropy(model(a), b, reduction="sum"))
            for a, b in zip(x.split(1024), y.split(1024), strict=True)
        )
        model.train(training)
        return total / len(x)

    return evaluate


@lru_cache(maxsize=1)
def digits() -> Split:
    """1797 digits of 8 x 8 pixels in [0, 1]; 1400 to train on.

    Raises:
        TaskUnavailableError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise TaskUnavailableError(
            "digits: scikit-learn is missing. pip install scikit-learn."
        ) from None
    raw = load_digits()
    x = torch.tensor(raw.data.tolist(), dtype=torch.float32).view(-1, 1, 8, 8) / 16.0
    y = torch.tensor(raw.target.tolist())
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1400], y[:1400], x[1400:], y[1400:]


@lru_cache(maxsize=1)
def fashion_mnist(folder: Path) -> Split:
    """Fashion-MNIST, normalized, from ``fashion-mnist.npz`` (which may be a subset) or
    its four gzip files anywhere below ``folder``.

    Raises:
        TaskUnavailableError: Neither is there.
    """
    packed = next(iter(sorted(folder.rglob("fashion-mnist.npz"))), None)
    parts = _read_npz(packed) if packed is not None else _read_gzip(folder)
    x, y, held_x, held_y = parts
    return _normalized(x), y.long(), _normalized(held_x), held_y.long()


def _normalized(images: Tensor) -> Tensor:
    # Mean and deviation of all 60,000 training images.
    return (images.view(-1, 1, 28, 28).float() / 255.0 - 0.286) / 0.353


def _read_npz(path: Path) -> Split:
    import numpy

    with numpy.load(path) as arrays:
        names = ("x", "y", "held_x", "held_y")
        x, y, held_x, held_y = (torch.from_numpy(arrays[name]) for name in names)
    return x, y, held_x, held_y


def _read_gzip(folder: Path) -> Split:
    def read(name: str, header: int) -> Tensor:
        path = next(iter(sorted(folder.rglob(f"{name}-idx*-ubyte.gz"))), None)
        if path is None:
            raise TaskUnavailableError(
                f"{folder}: neither fashion-mnist.npz nor {name}-idx?-ubyte.gz below "
                "it. python -m benchmarks fetch FOLDER, or unpack the Debian package "
                "dataset-fashion-mnist there."
            )
        raw = bytearray(gzip.decompress(path.read_bytes())[header:])
        return torch.frombuffer(raw, dtype=torch.uint8)

    return (
        read("train-images", 16),
        read("train-labels", 8),
        read("t10k-images", 16),
        read("t10k-labels", 8),
    )
