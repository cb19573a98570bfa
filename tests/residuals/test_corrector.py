from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from hybridopt.config import ResidualConfig
from hybridopt.errors import CheckpointError
from hybridopt.protocols import Corrector
from hybridopt.residuals import SimilarityCorrector, build_corrector

SIZE, K = (6, 2), 4


@dataclass
class Stream:
    """Predictions, what would have been right, and how well the corrector did."""

    bias: Tensor
    noise: float = 0.0
    spread: float = 0.0
    by_latent: bool = False
    growth: float = 1.0
    generator: torch.Generator = field(
        default_factory=lambda: torch.Generator().manual_seed(0)
    )
    raw: list[float] = field(default_factory=list)
    left: list[float] = field(default_factory=list)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def run(self, corrector: Corrector, steps: int) -> None:
        for _ in range(steps):
            scale = self.growth ** len(self.raw)
            latent = self.draw(K)
            predicted = scale * (1 + self.spread * self.draw(*SIZE))
            sign = torch.sign(latent[0]) if self.by_latent else 1.0
            if self.by_latent:
                latent = latent + 3 * sign * torch.eye(K, dtype=torch.float64)[0]
            missing = scale * (sign * self.bias + self.noise * self.draw(*SIZE))
            correction = corrector.correction(latent, SIZE)
            self.raw.append(float(missing.norm()))
            self.left.append(float((missing - correction).norm()))
            corrector.update(latent, predicted, predicted + missing)

    def share_left(self, last: int) -> float:
        return sum(self.left[-last:]) / sum(self.raw[-last:])


def corrector(**changes: object) -> SimilarityCorrector:
    return build_corrector(ResidualConfig(enabled=True, **changes))  # type: ignore[arg-type]


BIAS = torch.tensor([[0.5, -0.3]] * 6, dtype=torch.float64)


def test_corrector_satisfies_the_protocol() -> None:
    assert isinstance(corrector(), Corrector)


def test_corrector_with_an_empty_store_gives_zeros() -> None:
    correction = corrector().correction(torch.ones(K), SIZE)
    assert correction.dtype is torch.float64
    assert torch.equal(correction, torch.zeros(SIZE, dtype=torch.float64))


def test_corrector_corrects_nothing_before_it_has_evidence() -> None:
    one = corrector()
    latent, ones = torch.ones(K), torch.ones(SIZE)
    one.update(latent, ones, 2 * ones)
    assert not one.correction(latent, SIZE).any()


@pytest.mark.parametrize(("noise", "spread"), [(0.0, 0.0), (0.02, 0.3), (0.05, 0.5)])
def test_corrector_learns_a_constant_bias(noise: float, spread: float) -> None:
    stream = Stream(BIAS, noise, spread)
    stream.run(corrector(), 60)
    assert stream.left[0] == stream.raw[0]
    assert stream.share_left(40) <= 0.2


def test_corrector_follows_a_bias_that_grows_with_the_gains() -> None:
    stream = Stream(BIAS, growth=1.05)
    stream.run(corrector(), 120)
    assert stream.share_left(40) <= 0.2


def test_corrector_ends_near_zero_on_noise() -> None:
    for seed in range(3):
        one = corrector()
        generator = torch.Generator().manual_seed(seed)
        stream = Stream(0 * BIAS, noise=1.0, spread=0.3, generator=generator)
        stream.run(one, 300)
        assert stream.share_left(100) <= 1.01
        correction = one.correction(stream.draw(K), SIZE)
        assert float(correction.norm()) < 0.1 * stream.raw[-1]


def test_corrector_tells_situations_apart_by_latent_state() -> None:
    near = Stream(BIAS, by_latent=True)
    near.run(corrector(temperature=0.1), 120)
    far = Stream(BIAS, by_latent=True)
    far.run(corrector(temperature=1e6), 120)
    assert near.share_left(40) <= 0.3
    assert far.share_left(40) >= 0.7


def test_corrector_unlearns_a_bias_that_has_gone() -> None:
    one, stream = corrector(capacity=16), Stream(BIAS, noise=0.1)
    stream.run(one, 60)
    assert stream.share_left(20) < 0.6
    stream.bias = 0 * BIAS
    stream.run(one, 100)
    assert stream.share_left(20) < 1.1


def test_corrector_trusts_each_direction_by_its_own_record() -> None:
    bias = BIAS.clone()
    bias[:, 1] = 0.0
    one, stream = corrector(), Stream(bias)
    noisy = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for _ in range(120):
        latent = stream.draw(K)
        ones = torch.ones(SIZE, dtype=torch.float64)
        one.update(latent, ones, ones + bias + noisy * stream.draw(*SIZE))
    trusted, distrusted = one.trust.weights.tolist()
    assert trusted > 0.9
    assert distrusted < 0.5


def test_corrector_is_bounded_when_a_prediction_was_absurdly_wrong() -> None:
    one = corrector()
    Stream(BIAS).run(one, 40)
    ones = torch.ones(SIZE, dtype=torch.float64)
    one.update(torch.zeros(K), ones, 1e9 * torch.eye(*SIZE))
    stream = Stream(BIAS)
    stream.run(one, 80)
    assert all(v == v for v in stream.left)
    assert stream.share_left(10) <= 0.2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_corrector_never_gives_nan_away(bad: float) -> None:
    one = corrector()
    Stream(BIAS).run(one, 30)
    before = one.correction(torch.zeros(K), SIZE)
    ones = torch.ones(SIZE)
    for position in range(3):
        parts = [torch.ones(K), ones, 2 * ones]
        parts[position] = parts[position] * bad
        one.update(*parts)
    assert torch.equal(one.correction(torch.zeros(K), SIZE), before)
    assert not one.correction(torch.full((K,), bad), SIZE).any()


def test_corrector_gives_zeros_for_another_model() -> None:
    one = corrector()
    Stream(BIAS).run(one, 30)
    assert one.correction(torch.zeros(K), SIZE).any()
    assert not one.correction(torch.zeros(K), (3, 2)).any()
    assert not one.correction(torch.zeros(K + 1), SIZE).any()


def test_corrector_works_without_a_latent_state() -> None:
    one, ones = corrector(), torch.ones(SIZE, dtype=torch.float64)
    for _ in range(30):
        one.update(torch.zeros(0), ones, ones + BIAS)
    torch.testing.assert_close(
        one.correction(torch.zeros(0), SIZE), BIAS, rtol=0.1, atol=0
    )


def test_corrector_handles_predictions_and_ideals_of_zero() -> None:
    one, zeros = corrector(), torch.zeros(SIZE)
    for _ in range(10):
        one.update(torch.ones(K), zeros, zeros)
    assert torch.equal(one.correction(torch.ones(K), SIZE), zeros.double())


# -- weight space ----------------------------------------------------------------------

LIKE = [torch.zeros(8, 6), torch.zeros(8), torch.zeros(5, 8)]


def weights_bias(seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(t.shape[0], 1, generator=g)
        @ torch.randn(1, t.shape[-1], generator=g)
        if t.ndim == 2
        else torch.randn(t.shape, generator=g)
        for t in LIKE
    ]


def test_corrector_learns_a_constant_bias_in_weight_space() -> None:
    one, bias = corrector(rank=2), weights_bias()
    assert one.weight_correction(LIKE) is None
    for _ in range(12):
        assert one.update_weights(bias)
    correction = one.weight_correction(LIKE)
    assert correction is not None
    for part, truth in zip(correction, bias, strict=True):
        if truth.ndim == 2:
            assert float((part - truth).norm()) < 0.2 * float(truth.norm())
        else:
            assert not part.any()


def test_corrector_distrusts_noise_in_weight_space() -> None:
    one = corrector(rank=2)
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        noise = [torch.randn(t.shape, generator=g) for t in LIKE]
        one.update_weights(noise)
    correction = one.weight_correction(LIKE)
    assert correction is not None
    assert float(correction[0].norm()) < 0.1 * float(noise[0].norm())


@pytest.mark.parametrize(
    ("rank", "budget", "kept", "feedback"),
    [
        (0, 64.0, False, False),
        (2, 64.0, True, True),
        (2, 0.0, False, False),
        (2, 0.0005, True, False),
    ],
)
def test_corrector_keeps_weight_factors_within_the_memory_budget(
    rank: int, budget: float, kept: bool, feedback: bool
) -> None:
    one = build_corrector(ResidualConfig(rank=rank), budget)
    assert one.update_weights(weights_bias()) is kept
    assert (one.factors is not None) is kept
    if one.factors is not None:
        assert one.factors.error_feedback is feedback
        assert one.factors.nbytes <= budget * 2**20


def test_corrector_keeps_weight_residuals_that_are_not_finite_out() -> None:
    one, bias = corrector(rank=2), weights_bias()
    one.update_weights(bias)
    before = one.state_dict()
    assert one.update_weights([t * float("nan") for t in bias]) is False
    after = one.state_dict()
    assert torch.equal(before["factors"]["Q"][0], after["factors"]["Q"][0])
    assert torch.equal(before["weight_trust"]["z"], after["weight_trust"]["z"])


# -- state -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 10, 40])
def test_corrector_resumes_bit_for_bit(steps: int) -> None:
    one, other = corrector(capacity=16), corrector(capacity=16)
    stream = Stream(BIAS, noise=0.3, spread=0.3)
    stream.run(one, steps)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    twin = copy.deepcopy(stream)
    twin.generator.set_state(stream.generator.get_state())
    stream.run(one, 25)
    twin.run(other, 25)
    assert stream.left == twin.left
    latent = torch.ones(K, dtype=torch.float64)
    assert torch.equal(one.correction(latent, SIZE), other.correction(latent, SIZE))


@pytest.mark.parametrize("seen", [False, True])
def test_corrector_resumes_weight_factors_bit_for_bit(seen: bool) -> None:
    one, other = corrector(rank=2), corrector(rank=2)
    for seed in range(4):
        one.update_weights(weights_bias(seed))
    if seen:
        other.update_weights(weights_bias(99))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    again = corrector(rank=2)
    again.load_state_dict(copy.deepcopy(other.state_dict()))
    for candidate in (one, other, again):
        # Before any weights were seen, a checkpoint is all there is to go by.
        assert candidate.weight_correction(LIKE) is not None
        candidate.update_weights(weights_bias(5))
    for candidate in (other, again):
        pairs = zip(
            one.weight_correction(LIKE) or [],
            candidate.weight_correction(LIKE) or [],
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)
        assert torch.equal(one.weight_trust.weights, candidate.weight_trust.weights)


def test_corrector_refuses_broken_state_and_keeps_its_own() -> None:
    one = corrector(capacity=8)
    Stream(BIAS).run(one, 20)
    good = copy.deepcopy(one.state_dict())
    before = one.correction(torch.zeros(K), SIZE)
    nan = {"z": torch.tensor([float("nan")] * 2).double(), "n": torch.zeros(2).double()}
    for broken in (
        {},
        None,
        {**good, "more": 1},
        {**good, "store": {}},
        {**good, "trust": nan},
        {**good, "trust": {"z": torch.zeros(2).double(), "n": torch.zeros(1).double()}},
        {**good, "trust": {"z": torch.zeros(1).double(), "n": -torch.ones(1).double()}},
        {**good, "weight_trust": None},
    ):
        with pytest.raises(CheckpointError):
            one.load_state_dict(broken)  # type: ignore[arg-type]
    assert torch.equal(one.correction(torch.zeros(K), SIZE), before)
