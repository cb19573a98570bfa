"""The RSSM's equations against a twin in plain Python, one number at a time."""

from __future__ import annotations

import math

import torch

from hybridopt.config import RSSM
from hybridopt.dynamics.features import ACTIONS, FEATURES
from hybridopt.dynamics.rssm import RSSMNetwork, State

CONFIG = RSSM(hidden_size=5, categoricals=3, classes=4, ensemble_size=2, free_nats=0.01)
F = len(FEATURES)


def network_and_weights(seed=0):
    network = RSSMNetwork(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.4
        for name, shape in network.shapes.items()
    }
    return network, weights


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def affine(inputs, matrix, bias):
    return [
        sum(x * row[j] for x, row in zip(inputs, matrix, strict=True)) + bias[j]
        for j in range(len(bias))
    ]


def softmax(row):
    raised = [math.exp(x - max(row)) for x in row]
    return [x / sum(raised) for x in raised]


class Twin:
    """Weights as nested lists; the equations as the papers write them."""

    def __init__(self, weights):
        self.w = {name: value.double().tolist() for name, value in weights.items()}

    def cell(self, h, z, a):
        size = CONFIG.hidden_size
        matrix = self.w["cell"] + self.w["cell_actions"]
        gates = affine(h + z + a, matrix, self.w["cell_bias"])
        new = []
        for i in range(size):
            reset = sigmoid(gates[i])
            candidate = math.tanh(reset * gates[size + i])
            update = sigmoid(gates[2 * size + i] - 1)
            new.append(update * candidate + (1 - update) * h[i])
        return new

    def posterior(self, h, x):
        embedded = [
            e * sigmoid(e) for e in affine(x, self.w["embed"], self.w["embed_bias"])
        ]
        matrix = self.w["posterior"] + self.w["posterior_embed"]
        return affine(h + embedded, matrix, self.w["posterior_bias"])

    def mix(self, logits):
        groups = [logits[i : i + 4] for i in range(0, 12, 4)]
        return [[0.99 * p + 0.01 / 4 for p in softmax(group)] for group in groups]

    def one_hot(self, scores):
        return [float(i == row.index(max(row))) for row in scores for i in range(4)]


def features(steps, batch, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((steps, batch, F), generator=generator)


def test_rssm_observe_follows_its_literal_twin():
    network, weights = network_and_weights()
    twin = Twin(weights)
    state = network.start(2)
    h, z = [[0.0] * 5] * 2, [[0.0] * 12] * 2
    for x in features(6, 2):
        state = network.observe(weights, state, x)
        for b in range(2):
            row = x[b].double().tolist()
            h[b] = twin.cell(h[b], z[b], row[ACTIONS])
            z[b] = twin.one_hot(twin.mix(twin.posterior(h[b], row)))
        assert torch.allclose(
            state.hidden.double(), torch.tensor(h).double(), atol=1e-5
        )
        assert state.latent.tolist() == z


def test_rssm_imagine_follows_its_literal_twin():
    network, weights = network_and_weights()
    twin = Twin(weights)
    x = features(1, 1)[0]
    state = network.observe(weights, network.start(1), x)
    action = x[0, ACTIONS].double().tolist()
    h, z = state.hidden[0].double().tolist(), state.latent[0].tolist()
    for imagined in network.imagine(weights, state, x[:, ACTIONS], 4):
        h = twin.cell(h, z, action)
        logits = affine(h, twin.w["prior"], twin.w["prior_bias"])
        z = twin.one_hot(twin.mix(logits))
        expected = torch.tensor([h]).double()
        assert torch.allclose(imagined.hidden.double(), expected, atol=1e-5)
        assert imagined.latent.tolist() == [z]


def test_rssm_loss_follows_its_literal_twin():
    network, weights = network_and_weights()
    twin = Twin(weights)
    x = features(5, 1)
    targets = features(5, 1, seed=2)[..., :4]
    targets[2, 0, 3] = math.nan
    masks = torch.tensor([[1.0, 0.0], [1, 1], [0, 1], [1, 1], [0, 0]]).unsqueeze(1)
    first = torch.tensor([[True], [False], [False], [True], [False]])
    noise = features(5, 1, seed=3)[..., :12].abs().view(5, 1, 3, 4) + 0.01
    h, z, nll, shown, rebuilt, kl = [0.0] * 5, [0.0] * 12, 0.0, 0.0, [], []
    for t in range(5):
        row = x[t, 0].double().tolist()
        if first[t]:
            h, z = [0.0] * 5, [0.0] * 12
        h = twin.cell(h, z, row[ACTIONS])
        after = twin.mix(twin.posterior(h, row))
        before = twin.mix(affine(h, twin.w["prior"], twin.w["prior_bias"]))
        drawn = noise[t, 0].double().tolist()
        z = twin.one_hot(
            [
                [p / e for p, e in zip(*pair, strict=True)]
                for pair in zip(after, drawn, strict=True)
            ]
        )
        heads = affine(h + z, twin.w["heads"], twin.w["heads_bias"])
        for head in range(2):
            shown += float(masks[t, 0, head])
            for channel in range(4):
                y = float(targets[t, 0, channel])
                if not math.isnan(y):
                    mean = heads[head * 8 + channel]
                    log_scale = 1.5 * math.tanh(heads[head * 8 + 4 + channel] / 1.5)
                    error = (y - mean) * math.exp(-log_scale)
                    nll += float(masks[t, 0, head]) * (error**2 / 2 + log_scale)
        decoded = affine(h + z, twin.w["decoder"], twin.w["decoder_bias"])
        rebuilt += [(a - b) ** 2 / 2 for a, b in zip(decoded, row, strict=True)]
        kl.append(
            sum(
                p * math.log(p / q)
                for ps, qs in zip(after, before, strict=True)
                for p, q in zip(ps, qs, strict=True)
            )
        )
    divergence = sum(max(k, CONFIG.free_nats) for k in kl) / 5
    expected = nll / shown + sum(rebuilt) / len(rebuilt) + 1.1 * divergence
    loss = network.loss(weights, (x, targets, masks, first), noise)
    assert math.isclose(float(loss), expected, rel_tol=1e-4)


def test_rssm_sample_passes_the_gradient_of_its_probabilities():
    network, _ = network_and_weights()
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(4))
    logits.requires_grad_()
    direction = torch.randn(3, 12, generator=torch.Generator().manual_seed(5))
    noise = torch.ones(3, 3, 4)
    drawn = network._sample(logits, noise)
    assert sorted(set(drawn.detach().round(decimals=5).flatten().tolist())) == [0, 1]
    (through,) = torch.autograd.grad((drawn * direction).sum(), logits)
    mix = network._mix(logits).flatten(-2)
    (expected,) = torch.autograd.grad((mix * direction).sum(), logits)
    assert torch.allclose(through, expected)


def test_rssm_latent_samples_have_the_mixed_probabilities():
    network, _ = network_and_weights()
    logits = torch.tensor([2.0, 0, 0, -1] * 3)
    generator = torch.Generator().manual_seed(6)
    noise = torch.empty(4000, 3, 4).exponential_(generator=generator)
    share = network._sample(logits.expand(4000, 12), noise).mean(0)
    expected = torch.tensor([p for row in Twin({}).mix(logits.tolist()) for p in row])
    assert torch.allclose(share, expected, atol=0.03)


def test_rssm_state_starts_at_zero_whatever_came_before_a_break():
    network, weights = network_and_weights()
    x = features(4, 1)
    first = torch.tensor([[True], [False], [True], [False]])
    noise = torch.ones(4, 1, 3, 4)
    hidden, _, _ = network._unroll(weights, x, first, noise)
    fresh, _, _ = network._unroll(weights, x[2:], first[2:], noise[2:])
    assert torch.allclose(hidden[2:], fresh, atol=1e-6)
    zero = network.observe(weights, network.start(1), x[2])
    assert isinstance(zero, State)
    assert torch.allclose(zero.hidden, hidden[2], atol=1e-6)
