"""Every knob, typed, documented and validated however it is built.

Each field's rule is written once, as ``msgspec.Meta``; the constructor, ``replace``,
``from_file`` and ``decode`` all enforce it and raise ``ConfigError`` with field, value,
rule and way out. Nothing here needs changing for a normal run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from hybridopt.checked import (
    Checked,
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    OpenFraction,
    Positive,
)
from hybridopt.config_files import read_values, write_values
from hybridopt.errors import ConfigError

__all__ = [
    "DivergenceConfig",
    "DriftConfig",
    "FixedHorizon",
    "GainConfig",
    "HybridConfig",
    "Linear",
    "LeadConfig",
    "LinUCB",
    "MLP",
    "Prior",
    "RSSM",
    "ResidualConfig",
    "SecantConfig",
]


class GainConfig(Checked, frozen=True, kw_only=True):
    """Per-tensor gains on the last real step's displacement (one-step moves)."""

    rate: NonNegative = 0.25
    """eta, largest change of a log gain per real step. 0 freezes the gains."""
    initial: NonNegative = 0.1
    """Gain at the first move, in base steps."""
    minimum: NonNegative = 0.02
    """Smallest gain; keeps a way back up."""
    maximum: Positive = 128.0
    """Largest gain, in base steps."""
    lone_maximum: Positive = 16.0
    """Largest gain of one tensor that the others do not bear out: more takes headroom,
    or gains of all tensors that are at least a quarter of it in the geometric mean."""
    significance: NonNegative = 1.0
    """t0, standard errors by which the mean alignment must differ from zero before
    its gain changes."""
    memory: OpenFraction = 0.8
    """rho, decay per real step of the running mean of alignments."""
    relaxation: Fraction = 0.03
    """r, share of its distance to ``minimum`` (in logs) that a gain gives up per real
    step without significant evidence. 0: gains stay where noise has carried them."""
    boost: NonNegative = 1.0
    """How much faster gains grow, relative to ``rate``, at full headroom: all tensors
    together say that the learning rate is far too low."""
    eager: NonNegative = 1.0
    """Gain at the first move at full headroom, in base steps; at least ``initial``."""


class DriftConfig(Checked, frozen=True, kw_only=True):
    """Per-tensor gains on the filtered drift: the EMA's displacement over a window."""

    enabled: bool = True
    """Whether the filtered drift is a mover at all."""
    beta: OpenFraction = 0.97
    """Decay per real step of the weight EMA; also filters ``evaluation_weights``."""
    window_steps: Annotated[int, Meta(ge=2)] = 40
    """K, real steps between two drift moves."""
    rate: NonNegative = 0.4
    """eta of the drift gains, per window; up to four times as much where evidence is
    more than enough and the base's steps do not overshoot."""
    initial: NonNegative = 0.25
    """Drift gain at the first move, in windows of drift."""
    minimum: NonNegative = 0.02
    """Smallest drift gain; keeps a way back up."""
    maximum: Positive = 8.0
    """Largest drift gain."""
    memory_budget: NonNegative = 1024.0
    """MiB that window and drift may take together, in bf16 if need be (4 bytes per
    weight, a third weight copy); a model that needs more makes no drift moves."""
    hold: NonNegative = 2.0
    """How much of a rate that a schedule takes away is kept where drift pays: the step
    is made (peak rate / rate)^gamma times as long, gamma = hold (b - 0.1) t in
    [0, 0.75] with b the geometric mean of the drift gains and t in [0, 1] the evidence
    for them, and at least hold / 4 where steps have spoken for the drift; less of it
    where the loss has risen. 0 follows the schedule."""


class LeadConfig(Checked, frozen=True, kw_only=True):
    """How far ahead of the base's trajectory gradients are taken."""

    enabled: bool = True
    """Whether weights are put ahead at all."""
    on_gpu: bool = True
    """Whether weights on a GPU are put ahead too. Looking for a lead took 3 % of a step
    of 18 ms that waits for the host, when it was done twice as often."""
    rate: NonNegative = 0.15
    """eta, largest change of the lead per measurement, in base steps. 0: no lead."""
    maximum: NonNegative = 4.0
    """Longest lead, in base steps."""
    relaxation: Fraction = 0.03
    """Share of the lead that is given up per measurement without significant
    evidence."""
    memory_budget: NonNegative = 1024.0
    """MiB that the two displacements may take together, in bf16 if need be (4 bytes per
    weight, a fourth weight copy); a model that needs more takes no lead."""


class SecantConfig(Checked, frozen=True, kw_only=True):
    """Quasi-Newton moves from free secant pairs on low-noise problems."""

    enabled: bool = True
    """Whether secant moves are a mover at all."""
    pairs: Count = 100
    """m, most secant pairs kept; fewer when ``memory_budget`` is short."""
    warmup_steps: Count = 20
    """Real steps before the first secant move."""
    noise_threshold: Positive = 0.08
    """Secant moves run only while the median relative misfit of the trapezoid rule
    (measured loss change against the gradients along the step) is below this."""
    minimum_curvature: Positive = 1e-4
    """A pair (s, y) is kept when s.y exceeds this times ||s|| ||y||."""
    shrink: OpenFraction = 0.25
    """Factor on the move after each rejection."""
    max_rejects: Count = 3
    """Rejections in a row before the base step is taken instead."""


class Prior(Checked, frozen=True, kw_only=True, tag="prior"):
    """No learned model: gains follow the significance of their alignment."""


class Linear(Checked, frozen=True, kw_only=True, tag="linear"):
    """Online ridge regression on the features refines the prior."""

    ridge: Positive = 1.0
    """Penalty, relative to the mean squared feature."""
    memory: OpenFraction = 0.995
    """Discount per real step of past samples."""


class MLP(Checked, frozen=True, kw_only=True, tag="mlp"):
    """A small multilayer perceptron refines the prior."""

    hidden_size: Count = 32
    """Width of the two hidden layers."""
    learning_rate: Positive = 3e-3
    """Step size of the model's own Adam."""
    train_interval_steps: Count = 8
    """Real steps between training updates."""


class RSSM(Checked, frozen=True, kw_only=True, tag="rssm"):
    """Recurrent state-space model over per-tensor alignment sequences."""

    hidden_size: Count = 32
    """Width of the GRU state h."""
    categoricals: Count = 4
    """Number of categorical latents."""
    classes: Annotated[int, Meta(ge=2)] = 4
    """Classes per categorical latent."""
    ensemble_size: Annotated[int, Meta(ge=2)] = 3
    """Heads whose spread is the epistemic uncertainty."""
    unimix: Fraction = 0.01
    """Share of the uniform distribution mixed into every categorical."""
    free_nats: NonNegative = 1.0
    """KL below this costs nothing."""
    sequence_steps: Annotated[int, Meta(ge=2)] = 16
    """Length of training sequences, in real steps."""
    batch_size: Count = 16
    """Sequences (tensors) per training update."""
    learning_rate: Positive = 1e-3
    """Step size of the model's own Adam."""
    train_interval_steps: Count = 16
    """Real steps between training updates."""


class LinUCB(Checked, frozen=True, kw_only=True, tag="linucb"):
    """Discounted LinUCB with disjoint arms over the horizon."""

    exploration: NonNegative = 0.5
    """alpha, width of the confidence bound."""
    ridge: Positive = 1.0
    """lambda, prior precision per arm."""
    discount: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.99
    """gamma per update: A <- gamma A + x x' + (1 - gamma) lambda I."""


class FixedHorizon(Checked, frozen=True, kw_only=True, tag="fixed"):
    """Always the longest horizon that the progress bound allows; learns nothing."""


class DivergenceConfig(Checked, frozen=True, kw_only=True):
    """When the monitor raises the alarm, and what a rollback may cost."""

    loss_sigma_threshold: Positive = 4.0
    """Standard deviations of the loss above its running mean: caution at this many,
    warning at 1.5 times, critical at 2 times."""
    gradient_norm_multiplier: Annotated[float, Meta(gt=1.0)] = 10.0
    """Gradient norm over its running median that counts as an explosion."""
    vanishing_gradient_threshold: NonNegative = 1e-12
    """Gradient norm below which the gradient counts as vanished."""
    prediction_error_threshold: Positive = 3.0
    """Error of the expected loss, in its own standard deviations."""
    oscillation_threshold: Fraction = 0.9
    """Share of sign changes of the loss difference over the window."""
    check_interval_steps: Count = 1
    """Real steps between full checks; NaN and inf are checked at every step."""
    window_steps: Annotated[int, Meta(ge=4)] = 50
    """Length of the running statistics, in real steps."""
    max_rollbacks: Count = 3
    """Rollbacks within ``rollback_window_steps`` after which predictions pause."""
    rollback_window_steps: Count = 100
    """Window for ``max_rollbacks``, in calls to step."""
    cooldown_steps: CountOrZero = 5
    """Real steps without moves after a rollback."""
    pause_steps: Count = 200
    """Calls to step for which predictions pause when rollbacks exceed their bound;
    doubles each time."""


class ResidualConfig(Checked, frozen=True, kw_only=True):
    """How past prediction errors correct the next prediction."""

    enabled: bool = False
    """Whether the corrector's output is added to the coefficients."""
    capacity: Count = 64
    """Residuals kept in the ring."""
    rank: CountOrZero = 0
    """Rank of weight-space residual factors (PowerSGD); 0 keeps none."""
    temperature: Positive = 1.0
    """Softmax temperature over latent distances."""


class HybridConfig(Checked, frozen=True, kw_only=True):
    """Configuration of ``HybridPredictOptimizer``."""

    enabled: bool = True
    """False: bit-identical to the bare base optimizer, no extra memory."""
    warmup_steps: CountOrZero = 10
    """Real steps before the first move. A learning-rate warm-up extends it: no move is
    made while the scheduler still raises the rate for the first time."""
    full_steps: Count = 1
    """K, real steps between two Predict phases."""
    max_predict_steps: CountOrZero = 16
    """Longest horizon H. 0: moves are only folded into real steps."""
    confidence_threshold: Fraction = 0.3
    """Predictor confidence below which no scheduled step is consumed."""
    divergence_threshold: Positive = 1.0
    """Relative excess of the loss over its running mean that is always critical."""
    validation_interval: CountOrZero = 0
    """Predict phases between two forward-only validations; 0: only on caution."""
    gain: GainConfig = GainConfig()
    """One-step moves."""
    drift: DriftConfig = DriftConfig()
    """Filtered-drift moves."""
    lead: LeadConfig = LeadConfig()
    """Gradients taken ahead of the weights."""
    secant: SecantConfig = SecantConfig()
    """Secant moves."""
    predictor: RSSM | MLP | Linear | Prior = Prior()
    """What refines the gains; a table with a ``type`` key in files. The learned ones
    have not yet earned their time (research notes), so none is on by default."""
    bandit: LinUCB | FixedHorizon = LinUCB()
    """What chooses the horizon."""
    divergence: DivergenceConfig = DivergenceConfig()
    """The monitor."""
    residual: ResidualConfig = ResidualConfig()
    """The residual corrector."""
    memory: Literal["default", "low"] = "default"
    """default: 2 extra weight copies, a third for drift moves and a fourth for leads
    where they fit into ``drift.memory_budget`` and ``lead.memory_budget``; low: 1 at
    most, no drift, no lead, the snapshot in host memory."""
    memory_budget: NonNegative = 64.0
    """MiB for optional buffers (secant pairs, full-precision directions, residual
    factors) beyond the copies of ``memory``."""
    kernels: Literal["auto", "torch", "cupy"] = "auto"
    """Weight-space backend. auto: cupy where it runs, else torch."""
    clip_grad_norm: Positive | None = None
    """Clip the global gradient norm of forward closures to this value."""
    collect_metrics: bool = False
    """Keep one record per step in memory (``telemetry.metrics``)."""
    metrics_path: str | None = None
    """JSON Lines file that gets one record per step."""
    seed: CountOrZero = 0
    """Seed of hybridopt's own random generator; the user's is never touched."""

    PRESETS: ClassVar[tuple[str, ...]] = ("safe", "balanced", "aggressive")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gain.minimum > self.gain.maximum:
            raise ConfigError(
                f"GainConfig.minimum={self.gain.minimum}: must not exceed "
                f"maximum={self.gain.maximum}. Lower minimum or raise maximum."
            )

    @classmethod
    def preset(cls, name: str) -> HybridConfig:
        """A named starting point: ``safe``, ``balanced`` (the default), ``aggressive``.

        Raises:
            ConfigError: Unknown name.
        """
        match name:
            case "balanced":
                return cls()
            case "safe":
                return cls(
                    warmup_steps=50,
                    max_predict_steps=4,
                    confidence_threshold=0.6,
                    validation_interval=8,
                    gain=GainConfig(significance=2.0, maximum=16.0, boost=0.0),
                    divergence=DivergenceConfig(loss_sigma_threshold=3.0),
                )
            case "aggressive":
                return cls(
                    warmup_steps=5,
                    max_predict_steps=64,
                    confidence_threshold=0.1,
                    gain=GainConfig(rate=0.5, initial=1.0),
                )
        raise ConfigError(
            f"preset={name!r}: unknown. Use one of {', '.join(cls.PRESETS)}."
        )

    def replace(self, **changes: Any) -> HybridConfig:
        """A copy with some fields changed, validated.

        Raises:
            ConfigError: Unknown field or value outside its range.
        """
        unknown = sorted(set(changes) - set(self.__struct_fields__))
        if unknown:
            raise ConfigError(
                f"HybridConfig.{unknown[0]}: no such field. "
                f"Fields: {', '.join(self.__struct_fields__)}."
            )
        return msgspec.structs.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HybridConfig:
        """Build from plain values, as read from a file.

        Raises:
            ConfigError: Unknown key, wrong type or value outside its range.
        """
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(
                f"HybridConfig: {error}. See docs/configuration.md for every field."
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``from_dict`` gives an equal configuration back."""
        values: dict[str, Any] = msgspec.to_builtins(self)
        return values

    @classmethod
    def from_file(cls, path: str | Path) -> HybridConfig:
        """Read a ``.toml`` or ``.json`` file.

        Raises:
            ConfigError: Unknown suffix, broken syntax, or a bad value.
            OSError: The file cannot be read.
        """
        return cls.from_dict(read_values(Path(path)))

    def to_file(self, path: str | Path) -> None:
        """Write a ``.toml`` or ``.json`` file that ``from_file`` reads back equal.

        Fields that are None are left out of TOML, which has no null.

        Raises:
            ConfigError: Unknown suffix; nothing is written.
        """
        write_values(Path(path), self.to_dict())
