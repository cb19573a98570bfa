"""Readings: one transfer, and nothing is looked at before it has arrived."""

from __future__ import annotations

import math

import pytest
import torch

from hybridopt.types import BASIS_SIZE, DRIFT, STEP
from hybridopt.weights.reading import PendingReading


def test_loss_on_its_way_is_not_looked_at(monkeypatch):
    def refuse(self):
        raise AssertionError("a number that is on a GPU would be waited for")

    monkeypatch.setattr(PendingReading, "_plain", refuse)
    reading = PendingReading(1, torch.tensor(2.5))
    reading.add_statistics([0], torch.ones(1, 1 + 2 * BASIS_SIZE))
    assert reading.wait().loss == 2.5


@pytest.mark.parametrize(("loss", "expected"), [(1.5, 1.5), (None, None)])
def test_plain_losses_need_no_transfer(loss, expected):
    reading = PendingReading(1, loss)
    reading.add_statistics([0], torch.ones(1, 1 + 2 * BASIS_SIZE))
    found = reading.wait().loss
    assert found == expected or (expected is None and found != found)


@pytest.mark.parametrize("first", [STEP, DRIFT])
def test_one_direction_goes_to_its_own_columns(first):
    reading = PendingReading(3, None)
    reading.add_statistics([2, 0], torch.tensor([[1.0, 2, 3], [4, 5, 6]]), first)
    found = reading.wait().statistics
    want = torch.zeros(3, 1 + 2 * BASIS_SIZE, dtype=torch.float64)
    for row, (square, dot, length) in ((2, (1, 2, 3)), (0, (4, 5, 6))):
        want[row, 0] = square
        want[row, 1 + first] = dot
        want[row, 1 + BASIS_SIZE + first] = length
    assert torch.equal(found, want)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1.0, None])
def test_a_loss_that_is_a_host_number_is_in_the_flag_too(loss):
    reading = PendingReading(1, loss)
    reading.add_statistics([0], torch.ones(1, 5))
    bad = loss is not None and not math.isfinite(loss)
    assert reading.non_finite(torch.device("cpu")) == float(bad)
