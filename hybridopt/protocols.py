"""The extension points. Implement one of these and pass it in; nothing is registered.

Every method says what it may change. All coefficient-space tensors are float64 on the
CPU, shape (L, J) for L parameter tensors and J basis directions (``hybridopt.types``).
State dictionaries hold None, bool, int, float, str, bytes, Tensor, and lists or
string-keyed dicts of those; they must be complete: load and continue is bit-identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from hybridopt.types import (
    Forecast,
    Observation,
    Outcome,
    SignalReading,
)

__all__ = ["Collective", "Corrector", "HorizonPolicy", "Ops", "Predictor", "Signal"]


@runtime_checkable
class Ops(Protocol):
    """Weight-space arithmetic: one implementation per kernel backend, stateless.

    Lists have one tensor per parameter, in group order, all on one device; tensors may
    be empty, 0-dim or non-contiguous. Directions may have a lower precision than the
    parameters; arithmetic is float32 (float64 for float64 parameters). A backend may
    also have ``advance_move`` and ``put_ahead`` (``CupyOps``), then preferred.
    """

    name: str

    def observe(
        self,
        gradients: Sequence[Tensor],
        basis: Sequence[Sequence[Tensor]],
        squares: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """Inner products of the gradient with every basis direction, in one pass.

        Args:
            gradients: L gradients.
            basis: J lists of L directions.
            squares: J times (L,) ||b_jl||^2 where known, None where not, or nothing at
                all; a backend may return these instead of measuring them again.

        Returns:
            (L, 1 + 2 J) float32 on the device (float64 for float64 gradients):
            ||g_l||^2, then <g_l, b_jl> for each j, then ||b_jl||^2 for each j. NaN and
            inf in the input show up in the output. Nothing is written.
        """

    def advance(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        anchor: Sequence[Tensor],
        step: Sequence[Tensor],
        lag: Sequence[Tensor],
        beta: float,
    ) -> Tensor:
        """Take in the base optimizer's step: displacement, drift filter, new anchor.

        With theta the parameters after the base step and ``anchor`` those before it:
        s <- theta - anchor, v <- beta (v + s), anchor <- theta, in place. v is the lag
        theta - ema(theta) of an EMA with decay beta.

        Returns:
            (L, 2) float32 on the device (float64 for float64 parameters):
            <g_l, s_l>, ||s_l||^2.
        """

    def apply(
        self,
        parameters: Sequence[Tensor],
        basis: Sequence[Sequence[Tensor]],
        coefficients: Tensor,
        scale: float,
        squares: Sequence[Tensor | None] = (),
        finite: bool = False,
    ) -> Tensor:
        """theta_l += scale * sum_j coefficients[l, j] b_jl, if all of it is finite.

        Args:
            coefficients: (L, J) float32, on the parameters' device or the CPU.
            scale: Share of the move that this call makes.
            squares: As for ``observe``.
            finite: The caller knows that every weight is finite; a backend may then
                look at the directions alone.

        Returns:
            (L + 1,) float32 on the device: ||delta_l||^2 per tensor, then 1.0 when the
            move was written and 0.0 when some new weight would not have been finite;
            in that case no weight was written.
        """

    def copy(self, source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """target_l <- source_l for all l, bit for bit when the dtypes agree."""


@runtime_checkable
class Predictor(Protocol):
    """Learns in coefficient space where the weights go. Never sees an n-sized tensor.

    ``observe`` is called once per accepted real step, in order, at the step itself or
    at the next one; then ``forecast`` may be called; ``feedback`` once per finished
    cycle. What an observation measures is in it (``Observation.move``).
    """

    moving: bool
    """Whether moves may be made; set by the caller when warm-up is over."""

    def observe(self, observation: Observation) -> None:
        """Learn from one accepted real step. Changes only the predictor."""

    def forecast(self, slopes: Tensor) -> Forecast:
        """Say which move to make behind the base step that was just taken.

        Args:
            slopes: (L,) -<g_l, s_l>, the first-order loss decrease of the base step
                per tensor: the weights of a move's worth in step equivalents,
                sum_l a_l slope_l / sum_l slope_l.

        Deterministic given the state; changes nothing.
        """

    def feedback(self, outcome: Outcome) -> None:
        """Take in how the last cycle turned out (a rollback shrinks the gains)."""

    def reset(self) -> None:
        """Forget what was learned; the next forecast is the prior's."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next ``forecast`` depends on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError and changes nothing on a mismatch."""


@runtime_checkable
class HorizonPolicy(Protocol):
    """Chooses how many steps a Predict phase may consume."""

    horizons: tuple[int, ...]
    """The arms: horizon per arm in steps, ``horizons[0] == 0``."""

    def choose(self, context: Sequence[float], longest: int) -> int:
        """Index of the arm to play; its horizon is at most ``longest``. Arm 0 always
        qualifies. Deterministic; may count the pull.
        """

    def update(self, arm: int, context: Sequence[float], reward: float) -> None:
        """Learn the reward (progress per unit cost) of an arm in a context."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``choose`` depends on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError and changes nothing on a mismatch."""


@runtime_checkable
class Signal(Protocol):
    """One way of noticing that training goes wrong."""

    name: str

    def read(self, observation: Observation) -> SignalReading:
        """Judge one observation against what was normal so far. Pure."""

    def absorb(self, observation: Observation) -> None:
        """Add an accepted observation to what counts as normal."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``read`` depends on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError and changes nothing on a mismatch."""


@runtime_checkable
class Corrector(Protocol):
    """Turns past residuals into a correction of the next prediction."""

    def correction(self, latent: Tensor, size: tuple[int, int]) -> Tensor:
        """(L, J) to add to the next coefficients, given the predictor's latent."""

    def update(self, latent: Tensor, predicted: Tensor, ideal: Tensor) -> None:
        """Learn from one residual: ``ideal - predicted``, both (L, J)."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``correction`` depends on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError and changes nothing on a mismatch."""


@runtime_checkable
class Collective(Protocol):
    """How ranks agree. One fused sum per observation, before the monitor sees it."""

    world_size: int

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, the same bits on every rank."""

    def broadcast(self, values: Tensor) -> Tensor:
        """The values of rank 0 on every rank."""
