"""Records and runs with known numbers."""

import math

from hybridopt.errors import RecoveryAction
from hybridopt.telemetry.comparison import (
    Arm,
    Comparison,
    Evaluation,
    GainHistory,
    Provenance,
)
from hybridopt.types import Level, Mover, Phase, StepRecord


def record(step=0, **changes):
    values = {
        "step": step,
        "phase": Phase.FULL,
        "mover": Mover.NONE,
        "loss": 2.5,
        "loss_predicted": False,
        "horizon": 0,
        "arm": 0,
        "confidence": 0.5,
        "progress": 0.0,
        "verdict": Level.OK,
        "action": RecoveryAction.CONTINUE,
        "gradient_norm": 1.0,
        "gain": 0.1,
        "learning_rate": 1e-3,
        "bookkeeping_s": 1e-4,
    }
    return StepRecord(**(values | changes))


def predicted(step, **changes):
    values = {
        "phase": Phase.PREDICT,
        "mover": Mover.GAIN,
        "loss_predicted": True,
        "horizon": 2,
        "gradient_norm": math.nan,
    }
    return record(step, **(values | changes))


def hybrid_records():
    """Warm-up 0-2, then cycles of one real and two predicted steps, one rollback."""
    records = [record(step, phase=Phase.WARMUP) for step in range(3)]
    for start in range(3, 30, 3):
        loss = 2.5 - start / 60
        records.append(record(start, mover=Mover.GAIN, horizon=2, loss=loss))
        records += [predicted(start + 1, loss=loss), predicted(start + 2, loss=loss)]
    records[21] = record(
        21,
        verdict=Level.CRITICAL,
        action=RecoveryAction.ROLL_BACK,
        reason="loss_sigma=9 (threshold <4>)",
    )
    return tuple(records)


def curve(losses, cost_per_point, wall_per_point=1.0):
    return tuple(
        Evaluation(index * 10, index * cost_per_point, index * wall_per_point, loss)
        for index, loss in enumerate(losses)
    )


def arm(name, losses, cost_per_point=10.0, records=(), **changes):
    evaluations = curve(losses, cost_per_point)
    backwards = round(cost_per_point * (len(losses) - 1))
    values = {
        "name": name,
        "description": f"run {name}",
        "scheduled_steps": 30,
        "evaluations": evaluations,
        "training": evaluations[1:],
        "forward_calls": backwards,
        "backward_calls": backwards,
        "samples": backwards * 8,
        "wall_s": float(len(losses) - 1),
        "state_bytes": 3 * 2**20,
        "records": records,
    }
    return Arm(**(values | changes))


GAINS = GainHistory(
    ("bytes.weight", "blocks.0.qkv.weight"), (3, 12, 24), ((0.1, 0.2), (1, 2), (3, 40))
)


def comparison(hybrid_losses=(3.0, 2.4, 2.0, 1.9), hybrid_cost=5.0, seed=0):
    """Bare spends 30 real steps down to 2.0; by default the hybrid is faster."""
    return Comparison(
        seed,
        arm("bare", (3.0, 2.5, 2.2, 2.0)),
        arm(
            "hybrid",
            hybrid_losses,
            hybrid_cost,
            hybrid_records(),
            gains=GAINS,
            statistics={"extra_bytes": 12345, "speedup_basis": "cost <b>"},
        ),
        arm("shortened", (3.0, 2.7, 2.5, 2.4), 5.0),
    )


ORIGIN = Provenance(
    title="demo <i>title</i>",
    command="hybridopt demo --text 'a & b'",
    created="2025-01-01T00:00:00Z",
    versions={"torch": "9.9.9"},
    hardware="a <fast> machine",
    settings={"seeds": "0"},
)
