import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridopt.codec import decode, encode
from hybridopt.errors import CheckpointError, RecoveryAction

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text() | st.floats()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


def _same(a, b):
    if isinstance(a, float):
        return math.isnan(a) == math.isnan(b) and (math.isnan(a) or a == b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b and type(a) is type(b)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_plain_values_come_back_equal(state):
    assert _same(state, decode(encode(state)))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(5, dtype=torch.float64),
        torch.randn(4, 6).T,
        torch.randn(7).bfloat16(),
        torch.zeros(0, 3),
        torch.tensor(2.5),
        torch.tensor([True, False]),
        torch.Generator().get_state(),
        torch.tensor([float("nan"), float("inf")]),
    ],
)
def test_tensors_come_back_bit_for_bit(tensor):
    back = decode(encode({"t": tensor}))["t"]
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(
        back.contiguous().reshape(-1).view(torch.uint8),
        tensor.contiguous().reshape(-1).view(torch.uint8),
    )


def test_decoded_tensors_are_writable():
    back = decode(encode({"t": torch.ones(3)}))["t"]
    back.add_(1)
    assert back.tolist() == [2.0, 2.0, 2.0]


@given(st.integers(0, 10_000), st.characters(min_codepoint=33, max_codepoint=126))
def test_any_single_changed_character_is_noticed(position, character):
    text = encode({"a": [1, 2.5, "three"], "t": torch.arange(5)})
    position %= len(text)
    changed = text[:position] + character + text[position + 1 :]
    if changed == text:
        return
    with pytest.raises(CheckpointError) as caught:
        decode(changed)
    assert caught.value.recovery is RecoveryAction.RESTORE_CHECKPOINT


@pytest.mark.parametrize("value", [object(), torch.nn.Linear(1, 1), torch.float32])
def test_values_that_no_checkpoint_holds_are_refused(value):
    with pytest.raises(CheckpointError, match="cannot be saved"):
        encode({"v": value})
