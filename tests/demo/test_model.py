import math

import pytest
import torch
from torch.nn import functional as F

from hybridopt.demo.model import BYTES, ByteGPT, ModelConfig
from hybridopt.demo.presets import PRESETS, preset, rate_factor
from hybridopt.errors import ConfigError

CONFIG = ModelConfig(layers=2, heads=2, width=16, context=12)


def test_model_loss_at_initialization_is_that_of_a_uniform_guess():
    model = ByteGPT(CONFIG).initialize(0)
    tokens = torch.randint(BYTES, (4, 13), generator=torch.Generator().manual_seed(0))
    loss = model.loss(tokens[:, :-1], tokens[:, 1:]).item()
    assert loss == pytest.approx(math.log(BYTES), abs=0.05)


def test_model_never_looks_ahead():
    model = ByteGPT(CONFIG).initialize(0)
    tokens = torch.randint(BYTES, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % BYTES
    before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :7], after[0, :7])
    assert not torch.equal(before[0, 7:], after[0, 7:])


def test_model_initialization_depends_on_its_seed_only():
    torch.manual_seed(1)
    first = ByteGPT(CONFIG).initialize(3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = ByteGPT(CONFIG).initialize(3)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.set_rng_state(state)
    ByteGPT(CONFIG).initialize(3)
    other = ByteGPT(CONFIG).initialize(4)
    assert not torch.equal(first.bytes.weight, other.bytes.weight)


def test_model_learns_a_repeating_text():
    model = ByteGPT(CONFIG).initialize(0)
    tokens = torch.tensor(list(b"abcabcabcabca")).unsqueeze(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    assert model.loss(tokens[:, :-1], tokens[:, 1:]).item() < 0.2


def test_model_loss_is_the_mean_cross_entropy_of_its_logits():
    model = ByteGPT(CONFIG).initialize(0)
    tokens = torch.randint(BYTES, (3, 13), generator=torch.Generator().manual_seed(0))
    logits = model(tokens[:, :-1])
    wanted = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])
    assert torch.allclose(model.loss(tokens[:, :-1], tokens[:, 1:]), wanted)


def test_presets_have_the_promised_sizes():
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in ByteGPT(chosen.model).parameters())
            for name, chosen in PRESETS.items()
        }
    assert 400_000 < sizes["tiny"] < 800_000
    assert 4_000_000 < sizes["small"] < 6_000_000
    # GPT-2's body without its table of 50,257 tokens.
    assert 80_000_000 < sizes["gpt2"] < 130_000_000


def test_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match="tiny, small, gpt2"):
        preset("huge")


def test_rate_warms_up_then_decays_linearly_to_zero():
    factors = [rate_factor(step, 10, 2) for step in range(11)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[2] == 1.0
    assert factors[6] == pytest.approx(0.5)
    assert factors[10] == 0.0
    assert rate_factor(0, 10, 0) == 1.0
