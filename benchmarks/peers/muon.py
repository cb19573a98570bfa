"""Muon for matrices with AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.peers.wrapper import Closure

__all__ = ["MuonAdamW"]


class MuonAdamW(Optimizer):
    """Hidden weight matrices by ``torch.optim.Muon``, the rest by AdamW.

    Embeddings and heads go to AdamW, as Muon's author advises. ``match_rms_adamw``
    scales Muon's update to AdamW's size, so that one learning rate serves both. Both
    parts share this object's parameter groups and state.
    """

    def __init__(
        self, model: nn.Module, lr: float = 1e-3, *, weight_decay: float = 0.01
    ) -> None:
        matrices, others = split_parameters(model)
        self.parts: tuple[Optimizer, ...] = ()
        parts: list[Optimizer] = []
        if matrices:
            parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=lr,
                    weight_decay=weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            parts.append(torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay))
        super().__init__([g for part in parts for g in part.param_groups], {"lr": lr})
        self.parts = tuple(parts)
        self._share()

    def _share(self) -> None:
        """Point both parts at this object's groups and state."""
        self.state = defaultdict(dict, self.state)
        start = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[start : start + count]
            part.state = self.state
            start += count

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        loss: Tensor | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices of hidden linear layers, and all other trainable parameters.

    The last linear layer and everything tied to an embedding count as others.
    """
    embedded = {
        id(p)
        for m in model.modules()
        if isinstance(m, nn.Embedding)
        for p in m.parameters()
    }
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hidden = {
        id(m.weight)
        for m in linears[:-1]
        if m.weight.requires_grad and id(m.weight) not in embedded
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if id(p) in hidden]
    others = [p for p in trainable if id(p) not in hidden]
    return matrices, others
