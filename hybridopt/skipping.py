"""Whether the base can be left to skip bad steps by itself."""

from __future__ import annotations

import torch

from hybridopt.run import Run

__all__ = ["honours_found_inf", "skips_on_device"]


def skips_on_device(run: Run) -> bool:
    """Whether the base leaves a step with NaN or inf undone, wherever it runs.

    Fused bases do when told by ``found_inf``; then no step needs the host before the
    base moves. Not at a parameter's first step: a skipped one leaves the momentum of
    torch's fused SGD uninitialized.
    """
    return (
        run.collective.world_size == 1
        and run.device.type in run.skips_on
        and (run.secant is None or run.secant_off or run.decays)
        and honours_found_inf(run.base)
        and not hasattr(run.base, "found_inf")
        and len({p.device for p in run.space.parameters()}) == 1
        and run.space.ready
        and run.space.complete()
    )


def honours_found_inf(base: torch.optim.Optimizer) -> bool:
    """Whether the base, as it is set up now, skips a step by its ``found_inf``."""
    # Copies of torch's own lose the attribute, but still do.
    known = type(base) in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
    if not (known or getattr(base, "_step_supports_amp_scaling", False)):
        return False
    return all(bool(g.get("fused")) for g in base.param_groups)
