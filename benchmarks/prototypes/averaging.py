"""Averages of held-rate iterates around a base: what Schedule-Free wins, in a wrapper.

With f the rate over its peak, per step from the displacement s of the base:

    z' = z + f^-gamma d,   x' = x + c (z' - x),   y' = x' + (1 - beta) (z' - x'),

gradients at y, judged at x. d is s itself, or the base's direction without its momentum
(``exact``; then beta 0.9, gamma 1 and uniform weights are Schedule-Free AdamW, Defazio
et al. 2024, arXiv 2405.15682). c weighs steps by (rate of z)^2 q^r, q counting from the
start, with at least 1 - ``memory`` for the newest. What came out is in
docs/research-notes.md, "Held rates".

    python -m benchmarks.prototypes.averaging --data DATA --jobs 15 --out table.md \
        finetune-tuned:1:2 pretrain-wsd:1:2      # case:length in N:seeds
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks import arms
from benchmarks.cases import CASES
from benchmarks.peers.wrapper import Closure, PeerOptimizer, swapped
from benchmarks.runner import Limits, Run, run
from benchmarks.tasks.base import Setting

LARGEST_FACTOR = 64.0


class Averaging(PeerOptimizer):
    """The family above.

    Args:
        base: Stepped at y, for its state and its displacement.
        exact: Directions without momentum (Adam and SGD); else displacements.
        beta: Share of x in y.
        gamma: Exponent of the share of a decaying rate that z keeps.
        memory: 1 for averages of everything, below for a bounded memory.
        r: Exponent of the steps' weights.
        wait: Steps without averaging at the start and behind a rising rate; -1: none.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        exact: bool = True,
        beta: float = 0.9,
        gamma: float = 1.0,
        memory: float = 1.0,
        r: float = 0.0,
        wait: int = 10,
    ) -> None:
        super().__init__(base)
        self.exact, self.beta, self.gamma = exact, beta, gamma
        self.memory, self.r, self.wait = memory, r, wait
        self.x, self.z = self.copies(), self.copies()
        self.steps = self.averaged = self.last_rise = 0
        self.peak = self.last_rate = self.weights = 0.0

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        rate = float(self.base.param_groups[0]["lr"])
        self.peak = max(self.peak, rate)
        before = self.copies()
        loss = self.gradient(closure)
        gradients = [p.grad.clone() for p in self.tensors if p.grad is not None]
        self.base.step()
        self.steps += 1
        direction = self._direction(before, gradients, rate)
        if rate > self.last_rate * (1 + 1e-6):
            self.last_rise = self.steps
        self.last_rate = rate
        risen = self.last_rise + self.wait if self.last_rise > 1 else 0
        if self.steps <= max(self.wait, risen) and self.wait >= 0:
            torch._foreach_copy_(self.x, self.tensors)
            torch._foreach_copy_(self.z, self.tensors)
            return loss
        self.averaged += 1
        factor = min((self.peak / rate) ** self.gamma, LARGEST_FACTOR) if rate else 1.0
        torch._foreach_add_(self.z, direction, alpha=factor)
        weight = (rate * factor) ** 2 * self.averaged**self.r
        self.weights += weight
        newest = max(weight / self.weights, 1.0 - self.memory)
        torch._foreach_lerp_(self.x, self.z, newest)
        self.write(torch._foreach_lerp(self.x, self.z, 1.0 - self.beta))
        return loss

    def _direction(
        self, before: list[Tensor], gradients: list[Tensor], rate: float
    ) -> list[Tensor]:
        group = self.base.param_groups[0]
        if self.exact and "betas" in group:
            decay = group["weight_decay"]
            decay = decay if isinstance(self.base, torch.optim.AdamW) else 0.0
            made = []
            for p, g, old in zip(self.tensors, gradients, before, strict=True):
                state = self.base.state[p]
                square = state["exp_avg_sq"] / (
                    1 - group["betas"][1] ** float(state["step"])
                )
                made.append(-rate * (g / (square.sqrt() + group["eps"]) + decay * old))
            return made
        if self.exact and group.get("momentum"):
            return [g * (-rate / (1 - group["momentum"])) for g in gradients]
        return list(torch._foreach_sub(self.tensors, before))

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """The average in the weights."""
        with swapped(self.tensors, self.x):
            yield


def _arm(**settings: Any) -> arms.Build:
    return arms._wrapped(lambda base, _: Averaging(base, **settings), judged=True)


def _kept(**settings: Any) -> arms.Build:
    return _arm(exact=False, beta=0.0, **settings)


RULES: dict[str, arms.Build] = {
    "base": arms.BASE.build,
    "hybrid": arms.HYBRID.build,
    "schedule-free": arms._schedule_free,
    "free": _arm(wait=-1),
    "free r 2": _arm(wait=-1, r=2.0),
    "free beta .95 r 2": _arm(wait=-1, r=2.0, beta=0.95),
    "free r 2 gamma .5": _arm(wait=-1, r=2.0, gamma=0.5),
    "free r 6": _arm(wait=-1, r=6.0),
    "free behind warm-up": _arm(),
    "free behind warm-up r 2": _arm(r=2.0),
    "free behind warm-up r 2 gamma .5": _arm(r=2.0, gamma=0.5),
    "free behind warm-up beta .8 r 2": _arm(r=2.0, beta=0.8),
    "momentum gamma 1 memory .9": _kept(memory=0.9),
    "momentum gamma 1 memory .95": _kept(memory=0.95),
    "momentum gamma 1 memory .98": _kept(memory=0.98),
    "momentum gamma .5 memory .9": _kept(gamma=0.5, memory=0.9),
    "momentum gamma .5 memory .95": _kept(gamma=0.5, memory=0.95),
    "momentum gamma .5 memory .98": _kept(gamma=0.5, memory=0.98),
    "momentum gamma .25 memory .95": _kept(gamma=0.25, memory=0.95),
    "momentum gamma .5 r 8": _kept(gamma=0.5, r=8.0),
    "momentum beta .3 gamma 0": _arm(exact=False, beta=0.3, gamma=0.0, memory=0.97),
    "momentum beta .3 gamma .5": _arm(exact=False, beta=0.3, gamma=0.5, memory=0.97),
}
Job = tuple[str, float, int, str, Path | None]


def _run(job: Job) -> tuple[Job, float]:
    name, length, seed, rule, data = job
    torch.set_num_threads(1)
    case = CASES[name]
    setup = case.setup("quick", length)
    task = case.make(Setting(seed, "quick", "cpu", data))
    account = Run(name, rule, seed, length, setup.steps, setup.lr)
    arm = arms.Arm(rule, RULES[rule])
    return job, run(task, arm, setup, account, Limits(evaluations=1)).final_loss


def main() -> None:
    """Every rule on the named cases, one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", help="case:length in N:seeds")
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rules = options.rules.split(",")
    cases = [text.split(":") for text in options.cases]
    jobs = [
        (name, float(length), seed, rule, options.data)
        for name, length, seeds in cases
        for seed in range(int(seeds))
        for rule in rules
    ]
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        losses = dict(pool.imap_unordered(_run, jobs, chunksize=1))
    lines = []
    for name, length, _ in cases:
        lines += [f"## {name} {length}", ""]
        for rule in rules:
            own = [
                loss
                for job, loss in sorted(losses.items(), key=lambda kv: kv[0][2])
                if (job[0], job[1], job[3]) == (name, float(length), rule)
            ]
            each = " ".join(f"{loss:.4f}" for loss in own)
            lines.append(f"- {rule}: {statistics.mean(own):.4f} ({each})")
        lines.append("")
    options.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
