"""The reference backend: weight-space arithmetic in plain torch, on any device.

Everything runs tensor by tensor or through ``torch._foreach_*``, in groups that bound
the temporaries. With few weights on the CPU every torch call costs more than its
arithmetic, so there what is known is not measured again. Nothing here reads a CUDA
value on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridopt.kernels.flat import (
    dots,
    graphless,
    groups,
    pieces,
    precision_of,
    uniform,
    vector,
    wide,
    wide_of,
)
from hybridopt.kernels.torch_apply import (
    apply_on_device,
    apply_on_host,
)

__all__ = ["TorchOps"]


class TorchOps:
    """Implements ``hybridopt.protocols.Ops`` with torch operations."""

    name = "torch"

    @graphless
    def observe(
        self,
        gradients: Sequence[Tensor],
        basis: Sequence[Sequence[Tensor]],
        squares: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """Inner products of the gradient with every basis direction.

        Args:
            gradients: L gradients.
            basis: J lists of L directions.
            squares: J times (L,) ||b_j||^2 that need no measuring, None where they do.

        Returns:
            (L, 1 + 2 J) on the device: ||g||^2, <g, b_j> for each j, ||b_j||^2 for
            each j. float64 if any gradient is, else float32.
        """
        count, directions = len(gradients), len(basis)
        precision = precision_of(gradients)
        if count == 0:
            return torch.zeros(0, 1 + 2 * directions, dtype=precision)
        fresh = [vector(g, precision) for g in gradients]
        known = [*squares, *(None,) * (directions - len(squares))]
        sums = dots(fresh, fresh)
        norms: list[Tensor] = []
        for direction, square in zip(basis, known, strict=True):
            along = [vector(b, precision) for b in direction]
            sums += dots(fresh, along)
            norms.append(torch.stack(dots(along, along)) if square is None else square)
        if not norms:
            return torch.stack(sums).unsqueeze(1)
        return torch.cat([torch.stack(sums), *norms]).view(-1, count).t()

    @graphless
    def advance(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        anchor: Sequence[Tensor],
        step: Sequence[Tensor],
        lag: Sequence[Tensor],
        beta: float,
    ) -> Tensor:
        """Do s <- theta - anchor, v <- beta (v + s), anchor <- theta in place.

        The difference and the filter are computed in float32 and then rounded to the
        precision of ``step`` and ``lag``; sums are taken over the rounded values, so
        that they describe what is stored.

        Returns:
            (L, 2) on the device: <g, s>, ||s||^2. float64 if any parameter is, else
            float32.
        """
        precision = precision_of(parameters)
        if len(parameters) == 0:
            return torch.zeros(0, 2, dtype=precision)
        for part in groups(parameters):
            thetas, anchors = list(parameters[part]), list(anchor[part])
            steps, lags = list(step[part]), list(lag[part])
            alike = uniform(thetas, anchors, steps, lags)
            if thetas[0].device.type == "cpu" and not alike:
                for tensors in zip(thetas, anchors, steps, lags, strict=True):
                    _take_in(*tensors, beta)
                continue
            if alike:
                for theta, before, moved in zip(thetas, anchors, steps, strict=True):
                    torch.sub(theta, before, out=moved)
                torch._foreach_add_(lags, steps)
                torch._foreach_mul_(lags, beta)
            else:
                work = [t.to(wide(t), copy=True) for t in thetas]
                torch._foreach_sub_(work, [wide_of(a) for a in anchors])
                torch._foreach_copy_(steps, work)
                torch._foreach_add_(work, [wide_of(v) for v in lags])
                torch._foreach_mul_(work, beta)
                torch._foreach_copy_(lags, work)
            torch._foreach_copy_(anchors, thetas)
        moves = [vector(s, precision) for s in step]
        sums = dots([vector(g, precision) for g in gradients], moves)
        return torch.stack(sums + dots(moves, moves)).view(2, -1).t()

    @graphless
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

        A direction whose coefficient is exactly zero for a tensor counts as zero there,
        whatever it holds (on the CPU it is not even read).

        Returns:
            (L + 1,) float32 on the device: ||delta_l||^2, then 1.0 if the move was
            written, 0.0 if some new weight would not have been finite; then no weight
            was written.
        """
        precision = precision_of(parameters)
        if len(parameters) == 0:
            return torch.ones(1)
        if parameters[0].device.type != "cpu":
            factors = coefficients.detach().to(precision) * scale
            return apply_on_device(parameters, basis, factors)
        rows = [[k * scale for k in row] for row in coefficients.tolist()]
        return apply_on_host(parameters, basis, rows, squares, finite)

    @graphless
    def copy(self, source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """target_l <- source_l for all l, bit for bit when the dtypes agree."""
        if len(source) != 0:
            torch._foreach_copy_(list(target), list(source))


def _take_in(
    theta: Tensor, anchor: Tensor, step: Tensor, lag: Tensor, beta: float
) -> None:
    """``advance`` of one tensor whose parts have several precisions, on the CPU."""
    for now, before, moved, filtered in pieces(theta, anchor, step, lag):
        work = now.to(wide(now), copy=True)
        work.sub_(wide_of(before))
        moved.copy_(work)
        filtered.copy_(work.add_(wide_of(filtered)).mul_(beta))
        before.copy_(now)
