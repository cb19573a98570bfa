"""The records that pass between rooms, every field with its unit and shape.

Symbols used throughout: L parameter tensors, J basis directions, H horizon in steps.
Coefficient-space tensors live on the CPU in float64; they hold a few numbers per
parameter tensor, never one per weight.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybridopt.errors import RecoveryAction

__all__ = [
    "BASIS_SIZE",
    "DRIFT",
    "STEP",
    "Extent",
    "Forecast",
    "Level",
    "Move",
    "Mover",
    "Observation",
    "Outcome",
    "Phase",
    "Plan",
    "SignalReading",
    "StepRecord",
    "Verdict",
    "step_column",
]

STEP = 0
"""Basis column of the last real step's own displacement, s = theta_t - theta_{t-1}."""
DRIFT = 1
"""Basis column of the filtered drift, the EMA's displacement over the last window."""
BASIS_SIZE = 2
"""J, the number of basis directions that weight space keeps."""


def step_column(table: Tensor) -> npt.NDArray[np.float64]:
    """The (L,) STEP column of an (L, J) host table; shares its memory."""
    column: npt.NDArray[np.float64] = table.numpy()[:, STEP]
    return column


class Phase(enum.Enum):
    """Where the optimizer is in its cycle Warmup -> Full -> Predict -> Correct."""

    WARMUP = "warmup"
    FULL = "full"
    PREDICT = "predict"
    CORRECT = "correct"
    """The first measurement behind a Predict phase: a forward-only validation when one
    is due, else the real gradient that is due anyway. Only here can moves that consumed
    steps be rolled back."""


class Mover(enum.Enum):
    """What proposes a predicted delta."""

    NONE = "none"
    """No predicted move: the base optimizer's own step and nothing else."""
    GAIN = "gain"
    """Per-tensor gains on the last step's displacement and on the filtered drift."""
    SECANT = "secant"
    """Quasi-Newton move from free secant pairs; low-noise problems only."""


class Extent(enum.Enum):
    """How much of a real step is measured and taken in; less where less is needed."""

    WHOLE = "whole"
    DRIFT = "drift"
    """Coasting: the gradient's norm and its product with the drift, while one-step
    moves are worth nothing but drift moves are."""
    TURN = "turn"
    """As DRIFT, and the drift window may turn behind the step: it is brought up to
    date."""
    NORM = "norm"
    """Asleep, or behind a secant move: the gradient's norm alone."""
    GLANCE = "glance"
    """Asleep or coasting: whether loss and gradient are finite. Nobody judges them and
    nobody learns from them. Where neither the host can tell without waiting nor the
    base skips on the device, the step is measured as if it were DRIFT or NORM."""

    @property
    def along_drift(self) -> bool:
        """Whether the drift is measured, and the displacement along the step is not."""
        return self in (Extent.DRIFT, Extent.TURN)


class Level(enum.IntEnum):
    """How bad an observation is, in rising order."""

    OK = 0
    CAUTION = 1
    """Shorten the horizon."""
    WARNING = 2
    """Correct now."""
    CRITICAL = 3
    """Roll back and cool down."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the next ``step()`` will do; decided at the end of the step before."""

    phase: Phase
    mover: Mover = Mover.NONE
    horizon: int = 0
    """H, length of the current Predict phase in steps; 0 outside it."""
    position: int = 0
    """How many of the H predicted steps have been made."""
    arm: int = 0
    """Index of the bandit arm that chose this horizon."""
    validates: bool = False
    """Whether the step runs a forward-only validation."""

    @property
    def runs_backward(self) -> bool:
        """Whether the step needs a real gradient."""
        return self.phase is not Phase.PREDICT and not self.validates


@dataclass(slots=True)
class Move:
    """A predicted move: planned behind one real step, measured by the next."""

    coefficients: Tensor
    """(L, J), the whole move."""
    rates: Tensor
    """(L,) learning rates of the real step that the directions came from."""
    horizon: int
    """Steps that it consumes; 0 when it was folded into the real step."""
    arm: int
    context: list[float]
    progress: float
    """Expected progress in step equivalents."""
    worth: float
    """First-order worth sum_l a_l slope_l over slopes that point downhill, in loss
    units, at the move's beginning."""
    base_worth: float
    """The same of the base step, sum_l slope_l."""
    slope: float = math.nan
    """sum_l a_l slope_l over all slopes, uphill ones too."""
    loss: float = math.nan
    """Expected loss behind the move."""
    loss_sigma: float = math.nan
    predicted: Tensor | None = None
    """(L, J) coefficients before the residual correction; None without corrector."""
    latent: Tensor | None = None
    """The predictor's latent when the move was planned; None without corrector."""
    slopes: Tensor | None = None
    """(L,) slopes that the move was planned with; None without corrector."""

    def as_state(self) -> dict[str, Any]:
        """The fields by name, for state dictionaries."""
        return {name: getattr(self, name) for name in Move.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class Observation:
    """One real step as the host sees it, reduced over all ranks.

    Taken after the backward and before any weight moves.
    """

    step: int
    """Index of this call to ``step``, from 0, predicted steps counted."""
    loss: float
    """Loss of the closure; nan when the user stepped without a closure."""
    gradient_norm: float
    """Global L2 norm of the gradient, before clipping."""
    finite: bool
    """Loss (where known) and every gradient element are finite."""
    gradient_sq: Tensor
    """(L,) squared gradient norm per tensor."""
    dots: Tensor
    """(L, J) inner product of the gradient with each basis direction."""
    basis_sq: Tensor
    """(L, J) squared norm of each basis direction."""
    learning_rate: float
    """Largest learning rate over the parameter groups, as used by this step."""
    lr_ratio: float
    """This step's learning rate over that of the previous real step; 1 at first."""
    slopes: Tensor | None = None
    """(L,) -<g, s> of the base step before, by the gradient that made it; None on
    validations."""
    partial: bool = False
    """Whether the STEP column was not measured; it is zero or stale then."""
    move: Move | None = None
    """What was moved since the previous real step, and what was expected of it; the
    ``dots`` measure it. None where only the base moved."""
    before_turn: bool = False
    """Whether the drift window turned after this was measured but before it was taken
    in: its drift column then still belongs to the direction before."""
    drift_measured: bool = True
    """Whether the DRIFT column was measured; else it is zero. Of a step that was only
    glanced at ``gradient_sq`` is zero too."""
    drift_memory: float = 0.0
    """Memory of the base's average that stood in for the gradient in the DRIFT column;
    0 where it was the gradient itself."""

    @property
    def moved_progress(self) -> float:
        """Progress that was expected of the move, in step equivalents."""
        return 0.0 if self.move is None else self.move.progress

    @property
    def expected_loss(self) -> float:
        """What the predictor said that ``loss`` would be; nan if it said nothing."""
        return math.nan if self.move is None else self.move.loss

    @property
    def expected_loss_sigma(self) -> float:
        """Standard deviation that the predictor gave to ``expected_loss``."""
        return math.nan if self.move is None else self.move.loss_sigma

    @property
    def alignment(self) -> Tensor:
        """(L, J) cosine of the descent direction -g with each basis direction.

        Positive: going further along the direction would still lower the loss.
        Zero where a direction or a gradient vanishes.
        """
        # NumPy: asked for at every real step, and at this size three times as fast.
        with np.errstate(all="ignore"):
            squares = self.gradient_sq.numpy()[:, None] * self.basis_sq.numpy()
            cosines = -self.dots.numpy() / np.sqrt(squares)
        known = np.isfinite(cosines)
        if not known.all():
            cosines[~known] = 0.0
        return torch.from_numpy(cosines)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the predictor says about the next move."""

    coefficients: Tensor
    """(L, J) multipliers of the basis directions; the whole move, not one step."""
    confidence: float
    """In [0, 1]; below ``confidence_threshold`` no step is consumed."""
    progress: float
    """How many base steps the move is worth, in step equivalents."""
    progress_lower: float
    """Lower confidence bound of ``progress``; what a horizon may consume at most."""
    loss: float = float("nan")
    """Expected loss of the next real step."""
    loss_sigma: float = float("nan")
    """Standard deviation of ``loss``."""
    turns_window: bool = False
    """Whether a drift window ends here: its displacement becomes the DRIFT direction,
    and the coefficients are meant for it."""
    turns_in: int = 0
    """Real steps behind this one until the drift window turns; 0 without drift."""
    drift_gain: float = 0.0
    """Mean gain on the drift direction, whether or not it moves now."""
    hold: float = 0.0
    """Exponent in [0, 1] of the share of a decaying rate to hold; see ``RateHold``."""
    latent: Tensor | None = None
    """(latent_size,) summary of the predictor's state; what residuals are compared
    by. None when the predictor has no latent state."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a finished cycle (one real step and the moves behind it) turned out."""

    arm: int
    """Bandit arm that chose the horizon."""
    progress: float
    """Measured progress of the moves in step equivalents; negative when harmful."""
    consumed_steps: int
    """Scheduled steps that the moves consumed."""
    cost: float
    """Cost of the cycle in real steps (forward 1/3, backward 2/3)."""
    rolled_back: bool
    """Whether the moves were taken back."""


@dataclass(frozen=True, slots=True)
class SignalReading:
    """What one signal of the divergence monitor says."""

    name: str
    level: Level
    value: float
    """Measured value, in the signal's own unit."""
    threshold: float
    """The value at which the level rises above OK."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The monitor's judgement of one observation, made before any weight moves."""

    level: Level
    action: RecoveryAction
    readings: tuple[SignalReading, ...] = ()
    """Every signal that is not OK, worst first."""

    @property
    def reason(self) -> str:
        """The worst signal in words, or 'ok'."""
        if not self.readings:
            return "ok"
        worst = self.readings[0]
        return f"{worst.name}={worst.value:.4g} (threshold {worst.threshold:.4g})"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What the last ``step()`` did; one per call, also the metrics line."""

    step: int
    """Index of the call, from 0."""
    phase: Phase
    """Phase that the step belonged to."""
    mover: Mover
    """Mover whose move the step made; NONE when only the base moved."""
    loss: float
    """Measured loss on real and validated steps, expected loss otherwise."""
    loss_predicted: bool
    """Whether ``loss`` is an expectation, not a measurement."""
    horizon: int
    """Length of the Predict phase that the step belongs to or started; 0 if none."""
    arm: int
    """Bandit arm in force."""
    confidence: float
    """The predictor's confidence, in [0, 1]."""
    progress: float
    """Progress expected of the move behind this step, in step equivalents."""
    verdict: Level
    """The monitor's level."""
    action: RecoveryAction
    """What was done about it."""
    gradient_norm: float
    """Global gradient norm; nan on predicted steps, and on steps that a GPU passed
    without the host (``unseen.py``; never where records are collected)."""
    gain: float
    """Mean gain over tensors on the step direction."""
    learning_rate: float
    """Largest learning rate over the groups."""
    bookkeeping_s: float
    """Seconds spent in hybridopt's own work in this call."""
    reason: str = "ok"
    """The worst signal in words."""
