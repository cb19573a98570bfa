"""Gains of the drift move: one move per window, measured by the window behind it."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch

from hybridopt.config import DriftConfig, GainConfig, Prior
from hybridopt.types import DRIFT, STEP, Outcome
from tests.dynamics.stream import SIZES, noisy, observation, predictor, slopes

L = len(SIZES)
K = 4
STILL = GainConfig(rate=0.0)


def drifting(**changes):
    config = DriftConfig(**({"window_steps": K, "initial": 0.5} | changes))
    return predictor(Prior(), drift=config, gain=STILL)


def test_window_gains_follow_their_literal_twin():
    made = drifting(rate=0.3, maximum=1.2, minimum=0.2)
    rule = [0.5] * L
    first, measured, evidence = True, False, 0.0
    persistence, proven, provens = 0.0, False, set()
    window: list = []
    seen: list = []
    retreated, trusts, highest, rates = set(), set(), [0.0], set()
    sign = torch.tensor([1.0, 1, 1, -1, 0]).double().unsqueeze(1)
    for i, plain in enumerate(noisy(30, L, seed=5)):
        # Half-way the drift turns against the gradients.
        tilt = 0.1 if i < 16 else -0.1
        one = observation(i, plain.alignment * sign + tilt)
        made.observe(one)
        window.append(one)
        seen.append(_cosine_of_all(one))
        said = made.forecast(slopes(L))
        if len(window) < K:
            assert not said.turns_window
            assert not said.coefficients[:, DRIFT].any()
            continue
        cosines = []
        for index in () if first else range(L):
            dots = sum(-float(step.dots[index, DRIFT]) for step in window)
            square = sum(float(step.gradient_sq[index]) for step in window)
            norm = math.sqrt(square * float(one.basis_sq[index, DRIFT]))
            cosines.append(dots / norm)
        if cosines:
            z = statistics.mean(cosines) / (statistics.stdev(cosines) / math.sqrt(L))
            evidence = 0.8 * evidence + 0.6 * min(max(z, -3.0), 3.0)
            steps = [_cosine_of_all(step, DRIFT) for step in window]
            error = statistics.stdev(steps) / math.sqrt(K)
            over_steps = min(max(statistics.mean(steps) / error, -3.0), 3.0)
            persistence = 0.8 * persistence + 0.6 * over_steps
            proven = persistence > (-1.5 if proven else 1.0)
            provens.add(proven)
        retreats = measured and (z < -0.8 or (not proven and persistence < -0.75))
        retreated.add(retreats)
        rate = 0.3 * (1.0 + _room(seen) * min(max(evidence - 2.0, 0.0), 3.0))
        rates.add(rate)
        for index, cosine in enumerate(cosines if measured else ()):
            factor = math.exp(rate * math.tanh(5 * cosine))
            factor = min(factor, 0.4) if retreats else factor
            rule[index] = min(max(rule[index] * factor, 0.2), 1.2)
        highest.append(max(rule))
        assert said.turns_window, i
        if first:
            # The start of a training says nothing about the way that it will take.
            assert not said.coefficients[:, DRIFT].any()
            first, window = False, []
            continue
        trust = min(max(evidence / 2.0, 0.0), 1.0)
        if not proven:
            trust *= min(max(1.0 + persistence / 0.75, 0.0), 1.0)
        trusts.add(trust)
        exact = torch.tensor(rule, dtype=torch.float64) * trust
        assert torch.allclose(said.coefficients[:, DRIFT], exact, rtol=1e-9), i
        assert said.drift_gain == pytest.approx(sum(rule) / L)
        measured, window = True, []
    assert min(rule) < 0.5 < max(highest)
    assert retreated == provens == {True, False}
    assert {0.0, 1.0} < trusts
    assert min(rates) == 0.3
    assert max(rates) > 0.35


def _cosine_of_all(one, column=STEP):
    """Of the gradient with the last base step, all tensors taken as one vector."""
    squares = float(one.gradient_sq.sum()) * float(one.basis_sq[:, column].sum())
    return -float(one.dots[:, column].sum()) / math.sqrt(squares)


def _room(cosines):
    """The literal twin of ``Room``."""
    weights = [0.95 ** (len(cosines) - 1 - i) for i in range(len(cosines))]
    mean = sum(w * c for w, c in zip(weights, cosines, strict=True)) / sum(weights)
    squares = [w * (c - mean) ** 2 for w, c in zip(weights, cosines, strict=True)]
    error = math.sqrt(sum(squares) / sum(weights)) * math.sqrt(0.05 / 1.95)
    return min(max(1.0 + mean / (error + 0.001) / 3.0, 0.0), 1.0)


def test_gains_grow_faster_only_where_steps_do_not_overshoot():
    typical = {}
    for room, tilt in (("none", -0.05), ("some", 0.05)):
        made = drifting(rate=0.1)
        for i, plain in enumerate(noisy(10 * K, L, seed=5)):
            # Both drift alike; only the step directions differ.
            alignment = plain.alignment.clone()
            alignment[:, STEP] = alignment[:, STEP] - 0.05 + tilt
            alignment[:, DRIFT] = 0.01 * alignment[:, DRIFT] + 0.1
            made.observe(observation(i, alignment))
            made.forecast(slopes(L))
        assert made.window.trust == 1.0
        typical[room] = made.window.gains.log().mean().exp()
    assert made.window.room.value == 1.0
    assert typical["some"] > 1.5 * typical["none"]


def test_room_survives_a_checkpoint_and_needs_no_entry_in_an_older_one():
    made = drifting()
    for one in noisy(3 * K, L, seed=5):
        made.observe(one)
    state = made.state_dict()
    other = drifting()
    other.load_state_dict(state)
    assert other.window.room.value == made.window.room.value > 0.0
    del state["window"]["room"]
    older = drifting()
    older.load_state_dict(state)
    assert older.window.room.value == 0.0


@pytest.mark.parametrize(
    ("tilts", "first_gain"),
    [([-0.3] * L, 0.2), ([-0.3, 0.3, -0.3, 0.3, -0.1], 0.5), ([0.3] * L, 0.5)],
)
def test_first_direction_says_only_whether_to_begin_carefully(tilts, first_gain):
    made = drifting()
    tilt = torch.tensor(tilts).double().unsqueeze(1)
    for i, plain in enumerate(noisy(2 * K, L, seed=5)):
        made.observe(observation(i, 0.2 * plain.alignment + tilt))
        moved = made.forecast(slopes(L)).coefficients[:, DRIFT]
    assert made.window.gains.tolist() == pytest.approx([first_gain] * L)
    # What speaks for the direction so far, of the two standard errors that it takes.
    shares = moved / first_gain
    assert shares.tolist() == pytest.approx([0.9 if min(tilts) > 0.0 else 0.0] * L)


def test_without_evidence_next_to_nothing_moves_and_no_rate_is_held():
    made = drifting(hold=2.0)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0]).double().unsqueeze(1)
    for i, plain in enumerate(noisy(20 * K, L, seed=5)):
        # Windows that contradict each other, tensor by tensor, leave gains alone.
        sign = signs if i // K % 2 else -signs
        made.observe(observation(i, 0.02 * plain.alignment + 0.3 * sign))
        said = made.forecast(slopes(L))
        assert said.hold < 0.05
        assert float(said.coefficients[:, DRIFT].max()) < 0.02
    # What steps speak against every other window is soon not worth its measuring.
    assert made.window.gains.tolist() == [0.02] * L


def test_evidence_of_several_windows_adds_up():
    made = drifting()
    trusts = []
    for i, plain in enumerate(noisy(12 * K, L, seed=5)):
        made.observe(observation(i, plain.alignment + 0.05))
        made.forecast(slopes(L))
        trusts.append(made.window.trust)
    assert trusts[2 * K - 2] == 0.0
    assert max(trusts) == 1.0
    other = drifting()
    other.load_state_dict(made.state_dict())
    assert other.window.trust == made.window.trust


def test_hold_follows_the_geometric_mean_of_gains_once_one_was_measured():
    made = drifting(hold=2.0)
    holds = []
    for one in noisy(6 * K, L, seed=5):
        made.observe(one)
        said = made.forecast(slopes(L))
        holds.append(said.hold)
        mean = math.exp(statistics.mean(math.log(g) for g in made.window.gains))
        held = 2.0 * (mean - 0.1) * made.window.trust
        least = 0.5 if made.window.persistence.proven else 0.0
        expected = min(max(held, least), 0.75)
        assert said.hold == pytest.approx(expected, rel=1e-12)
    assert holds[2 * K - 2] == 0.0 < holds[2 * K]
    assert drifting(hold=0.0).forecast(slopes(L)).hold == 0.0


def divided(i, share, total):
    """Tensors that contradict each other so far that their mean says nothing, while
    all weights together go this far along the drift at every step.
    """
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0]).double()
    one = observation(i, torch.zeros(L, 2, dtype=torch.float64))
    norms = (one.gradient_sq * one.basis_sq[:, DRIFT]).sqrt()
    whole = float((one.gradient_sq.sum() * one.basis_sq[:, DRIFT].sum()).sqrt())
    alignment = torch.zeros(L, 2, dtype=torch.float64)
    alignment[:, DRIFT] = share * signs
    # What the whole lacks, the last tensor has.
    lacks = total * whole - float((alignment[:, DRIFT] * norms).sum())
    alignment[-1, DRIFT] = lacks / norms[-1]
    dots = -alignment * (one.gradient_sq.unsqueeze(1) * one.basis_sq).sqrt()
    return replace(one, dots=dots)


def test_where_steps_have_spoken_for_the_drift_a_quarter_of_hold_is_the_least():
    holds = {}
    for hold in (2.0, 1.0, 0.0):
        made = drifting(hold=hold, rate=0.0)
        for i in range(6 * K):
            made.observe(divided(i, 0.5, 0.02 + 0.01 * (-1.0) ** (i // 2)))
            said = made.forecast(slopes(L))
        assert made.window.persistence.proven
        assert made.window.trust < 0.5
        holds[hold] = said.hold
    assert holds == {2.0: 0.5, 1.0: 0.25, 0.0: 0.0}
    small = drifting(hold=2.0, rate=0.0, initial=0.04)
    for i in range(6 * K):
        small.observe(divided(i, 0.5, 0.02 + 0.01 * (-1.0) ** (i // 2)))
        said = small.forecast(slopes(L))
    assert small.window.persistence.proven
    assert said.hold == 0.0


def test_drift_that_the_steps_speak_against_is_not_moved_along_and_soon_given_up():
    made = drifting(rate=0.0, hold=2.0)
    for i in range(6 * K):
        # Small tensors agree, with each other and not with the whole.
        one = divided(i, 0.0, -0.02 + 0.01 * (-1.0) ** (i // 2))
        agreeing = one.dots.clone()
        agreeing[:-1, DRIFT] = (
            -0.2 * (one.gradient_sq * one.basis_sq[:, DRIFT])[:-1].sqrt()
        )
        agreeing[-1, DRIFT] -= float(agreeing[:-1, DRIFT].sum())
        made.observe(replace(one, dots=agreeing))
        said = made.forecast(slopes(L))
        assert not said.coefficients[:, DRIFT].any()
        assert said.hold == 0.0
    assert made.window._evidence > 0.5  # what tensors say would move it
    assert made.window.mean_gain < 0.05


def test_persistence_survives_a_checkpoint_and_needs_no_entry_in_an_older_one():
    made, other = drifting(), drifting()
    for i in range(5 * K + 2):
        made.observe(divided(i, 0.5, 0.02 + 0.01 * (-1.0) ** (i // 2)))
        made.forecast(slopes(L))
    state = made.state_dict()
    other.load_state_dict(state)
    assert other.state_dict()["window"]["persistence"]["proven"]
    for i in range(5 * K + 2, 7 * K):
        for each in (made, other):
            each.observe(divided(i, 0.5, 0.02))
            each.forecast(slopes(L))
    assert other.window.persistence.state_dict() == made.window.persistence.state_dict()
    del state["window"]["persistence"]
    drifting().load_state_dict(state)


def test_hold_ends_where_drift_does_not_pay():
    made = drifting(hold=2.0)
    for i, plain in enumerate(noisy(20 * K, L, seed=5)):
        made.observe(observation(i, 0.2 * plain.alignment - 0.2))
        made.forecast(slopes(L))
    assert made.forecast(slopes(L)).hold == 0.0
    assert made.state_dict()["window"]["measured"]


def test_no_rate_is_held_while_the_loss_lies_above_its_lowest_window():
    made = drifting(hold=2.0)
    holds = []
    for i, plain in enumerate(noisy(30 * K, L, seed=5)):
        # From the tenth window to the twentieth it is as high as at the start.
        above = 2.0 if 10 * K <= i < 20 * K else 1.0 - 0.001 * i
        one = replace(plain, loss=above + 0.0001 * (i % 3))
        made.observe(replace(one, dots=one.dots - 0.05 * one.dots.abs()))
        holds.append(made.forecast(slopes(L)).hold)
    assert min(holds[8 * K : 10 * K]) > 0.3
    # Ranks need eight losses, here two windows, to say so.
    assert max(holds[12 * K : 20 * K]) == 0.0
    assert min(holds[22 * K :]) > 0.3


def test_losses_of_the_schedules_warm_up_are_not_what_later_ones_are_compared_with():
    made = drifting(hold=2.0)
    made.moving = False
    for i, plain in enumerate(noisy(30 * K, L, seed=5)):
        made.moving = i >= 4 * K
        loss = (0.5 if i < 4 * K else 1.0) + 0.0001 * (i % 3) - 1e-6 * i
        made.observe(replace(plain, loss=loss))
        made.forecast(slopes(L))
    assert made.window.level.calm == 1.0


def test_checkpoints_from_before_the_level_load():
    made = drifting(hold=2.0)
    for one in noisy(6 * K, L, seed=5):
        made.observe(one)
        made.forecast(slopes(L))
    state = made.state_dict()
    del state["window"]["level"]
    other = drifting(hold=2.0)
    other.load_state_dict(state)
    assert other.window.hold == made.window.hold > 0.0


def test_window_turns_without_moving_before_warm_up_is_over():
    made = drifting()
    made.moving = False
    turns = 0
    for one in noisy(3 * K, L):
        made.observe(one)
        said = made.forecast(slopes(L))
        turns += said.turns_window
        assert not said.coefficients[:, DRIFT].any()
    assert turns == 3
    assert made.window.gains.tolist() == [0.5] * L


@pytest.mark.parametrize(
    "changes", [{"drift": DriftConfig(enabled=False)}, {"memory": "low"}]
)
def test_window_that_is_off_never_turns(changes):
    made = predictor(Prior(), **changes)
    for one in noisy(90, L):
        made.observe(one)
        said = made.forecast(slopes(L))
        assert not said.turns_window
        assert not said.coefficients[:, DRIFT].any()
        assert said.drift_gain == 0.0


def test_window_gains_shrink_after_a_rollback():
    made = drifting(minimum=0.02)
    made.feedback(Outcome(0, 0.0, 1, 1.0, True))
    assert made.window.gains.tolist() == [0.125] * L


def test_window_without_a_direction_leaves_its_gains():
    made = drifting()
    flat = torch.zeros(L, 2, dtype=torch.float64)
    for i in range(3 * K):
        made.observe(observation(i, flat, dots=flat, basis_sq=flat))
        made.forecast(slopes(L))
    assert made.window.gains.tolist() == [0.5] * L
