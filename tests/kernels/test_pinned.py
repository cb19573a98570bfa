"""Snapshots off the device, on the CPU here; on a device in ``test_gpu``."""

from __future__ import annotations

import math

import pytest
import torch

from hybridopt.errors import HybridError, RecoveryAction
from hybridopt.kernels.pinned import PinnedSnapshot
from tests.kernels import twin


def test_snapshot_restores_every_bit():
    tensors = [torch.tensor([math.nan, -0.0, math.inf, 1e-45]), torch.tensor(3.0)]
    tensors += twin.tensors([(3, 4), (0,)], [torch.bfloat16], 1)
    before = [t.clone() for t in tensors]
    snapshot = PinnedSnapshot()
    snapshot.save(tensors)
    for t in tensors:
        t.fill_(7)
    snapshot.release()
    snapshot.restore(tensors)
    assert torch.equal(tensors[0].view(torch.int32), before[0].view(torch.int32))
    assert all(torch.equal(a, b) for a, b in zip(tensors[1:], before[1:], strict=True))
    assert snapshot.bytes == 4 * 4 + 4 + 2 * 12


def test_snapshot_is_overwritten_by_the_next_save():
    snapshot, tensor = PinnedSnapshot(), torch.ones(3)
    snapshot.save([tensor])
    held = snapshot.wait()[0]
    snapshot.save([tensor * 2])
    assert snapshot.wait()[0] is held
    assert held.tolist() == [2.0] * 3


def test_snapshot_refuses_other_shapes_and_writes_nothing():
    snapshot, other = PinnedSnapshot(), torch.zeros(4)
    snapshot.save([torch.ones(3)])
    with pytest.raises(HybridError, match="snapshot of 1 tensors") as error:
        snapshot.restore([other])
    assert error.value.recovery is RecoveryAction.RESTORE_CHECKPOINT
    assert not other.any()
