from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridopt.errors import CheckpointError, ConfigError
from hybridopt.residuals import ResidualStore


def residual(
    value: float, k: int = 3, size: tuple[int, int] = (4, 2)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def fill(*shape: int) -> torch.Tensor:
        return torch.full(shape, value, dtype=torch.float64)

    return fill(k), fill(*size), fill(*size) + 1


def held(store: ResidualStore) -> list[float]:
    """What the store holds, newest first."""
    slots = store.newest(len(store))
    assert torch.equal(
        store.ideal[slots] - store.predicted[slots], torch.ones_like(store.ideal)
    )
    return store.latents[slots, 0].tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(0, 20))
def test_store_keeps_the_newest_in_order(capacity: int, count: int) -> None:
    store = ResidualStore(capacity, 2**20)
    for i in range(count):
        assert store.add(*residual(float(i)))
    assert len(store) == min(count, capacity)
    expected = [float(i) for i in range(count)][::-1][:capacity]
    if expected:
        assert held(store) == expected
        assert store.latents[store.newest(2), 0].tolist() == expected[:2]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(0, 2000))
def test_store_stays_within_its_byte_limit(capacity: int, limit: int) -> None:
    store = ResidualStore(capacity, limit)
    item = 8 * (3 + 2 * 8)
    for i in range(60):
        assert store.add(*residual(float(i))) is (limit >= item)
        assert store.nbytes <= limit
    assert len(store) == min(capacity, limit // item)


def test_store_starts_anew_with_another_shape() -> None:
    store = ResidualStore(5, 2**20)
    store.add(*residual(1.0))
    store.add(*residual(2.0, k=2, size=(7, 2)))
    assert len(store) == 1
    assert store.size == (7, 2)


def test_store_leaves_out_what_is_not_finite() -> None:
    store = ResidualStore(5, 2**20)
    store.add(*residual(1.0))
    for position in range(3):
        parts = list(residual(2.0))
        parts[position] = parts[position] * float("nan")
        assert store.add(*parts) is False
    assert held(store) == [1.0]


def test_store_copies_what_it_keeps() -> None:
    store = ResidualStore(5, 2**20)
    parts = residual(1.0)
    store.add(*parts)
    for part in parts:
        part.zero_()
    assert held(store) == [1.0]


def test_store_says_which_shapes_it_needs() -> None:
    latent, predicted, ideal = residual(1.0)
    store = ResidualStore(5, 2**20)
    with pytest.raises(ConfigError, match=r"predicted \(4, 2\), ideal \(2, 4\)"):
        store.add(latent, predicted, ideal.T)
    with pytest.raises(ConfigError, match="latent"):
        store.add(latent[None], predicted, ideal)


@pytest.mark.parametrize(("capacity", "limit"), [(0, 10), (1, -1)])
def test_store_refuses_impossible_bounds(capacity: int, limit: int) -> None:
    with pytest.raises(ConfigError, match="must be >="):
        ResidualStore(capacity, limit)


@pytest.mark.parametrize("count", [0, 3, 4, 7])
def test_store_state_continues_exactly(count: int) -> None:
    one, other = ResidualStore(4, 2**20), ResidualStore(4, 2**20)
    for i in range(count):
        one.add(*residual(float(i)))
    other.add(*residual(50.0))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for i in range(10, 16):
        for store in (one, other):
            store.add(*residual(float(i)))
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.predicted, other.predicted)
        assert torch.equal(one.ideal, other.ideal)
        assert one.newest(4) == other.newest(4)


def test_store_refuses_broken_state_and_keeps_its_own() -> None:
    store = ResidualStore(4, 2**20)
    for i in range(6):
        store.add(*residual(float(i)))
    good = store.state_dict()
    damage = [
        {"shape": [3, 4]},
        {"shape": [3, -4, 2]},
        {"slots": 5},
        {"next": 4},
        {"next": -1},
        {"next": None},
        {"latents": good["latents"][:2]},
        {"latents": None},
        {"ideal": good["ideal"] * float("nan")},
        {"predicted": good["predicted"].float()},
        {"predicted": good["predicted"][:, :3]},
    ]
    for change in damage:
        with pytest.raises(CheckpointError):
            store.load_state_dict({**copy.deepcopy(good), **change})
    with pytest.raises(CheckpointError):
        store.load_state_dict({})
    assert held(store) == [5.0, 4.0, 3.0, 2.0]


def test_store_refuses_the_state_of_another_capacity() -> None:
    store = ResidualStore(4, 2**20)
    store.add(*residual(1.0))
    with pytest.raises(CheckpointError, match="slots=4: must be 9"):
        ResidualStore(9, 2**20).load_state_dict(store.state_dict())
