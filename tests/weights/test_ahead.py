"""A sample of rows is made of views, and eight turns see every weight once."""

from types import SimpleNamespace

import pytest
import torch

from hybridopt.kernels.torch_ops import TorchOps
from hybridopt.weights.ahead import LARGE, SHARES, put_ahead, remember, sample

SHAPES = ((300, 200), (64, 32, 3, 3), (16, 1024), (5, 9000), (40,), ())


def _bucket(*, gradients=True, last=False):
    def zeros():
        tensors = [torch.zeros(shape) for shape in SHAPES]
        if last:
            tensors[1] = tensors[1].to(memory_format=torch.channels_last)
        return tensors

    return SimpleNamespace(
        parameters=zeros(),
        gradients=zeros() if gradients else [],
        leads=(zeros(), zeros()),
    )


@pytest.mark.parametrize("last", [False, True])
def test_turns_together_see_every_weight_of_large_tensors_once(last):
    bucket = _bucket(last=last)
    for turn in range(SHARES):
        (part,) = sample([bucket], turn)
        for lists in (part.parameters, part.gradients, *part.leads):
            for tensor in lists:
                tensor.add_(1.0)
    for tensors in (bucket.parameters, bucket.gradients, *bucket.leads):
        for tensor in tensors:
            large = tensor.numel() >= LARGE and tensor.shape[0] >= SHARES
            assert tensor.unique().tolist() == [1.0 if large else float(SHARES)]


def test_one_turn_is_about_an_eighth_of_the_large_tensors():
    bucket = _bucket()
    (part,) = sample([bucket], 11)
    for seen, whole in zip(part.parameters, bucket.parameters, strict=True):
        if whole.numel() < LARGE or whole.shape[0] < SHARES:
            assert seen is whole
        else:
            assert seen.numel() == pytest.approx(whole.numel() / SHARES, rel=0.03)


def test_bucket_without_gradients_has_none_in_its_sample():
    (part,) = sample([_bucket(gradients=False)], 0)
    assert part.gradients == []
    assert len(part.leads[0]) == len(part.leads[1]) == len(SHAPES)


@pytest.mark.parametrize("last", [False, True])
def test_displacements_of_sampled_rows_are_those_of_the_whole(last):
    whole, rows = _bucket(last=last), _bucket(last=last)
    (part,) = sample([rows], 3)
    before, kept = remember([whole], 0), remember([part], 0)
    for p, q in zip(whole.parameters, rows.parameters, strict=True):
        p.copy_(torch.randn(p.shape))
        q.copy_(p)
    put_ahead(TorchOps(), [whole], before, 0, 0.0, 0.0)
    put_ahead(TorchOps(), [part], kept, 0, 0.0, 0.0)
    (expected,) = sample([whole], 3)
    for found, wanted in zip(part.leads[1], expected.leads[1], strict=True):
        assert torch.equal(found, wanted)
        assert bool(found.any())
