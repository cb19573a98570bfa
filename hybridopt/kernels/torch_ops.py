"""The reference backend: weight-space arithmetic in plain torch, on any device.

Two ways through each operation. Few weights on the CPU are packed into one flat matrix,
because there every torch call costs more than its arithmetic. Everything else runs
tensor by tensor or through ``torch._foreach_*``, in groups that bound the temporaries.
Nothing here reads a CUDA value on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridopt.kernels.flat import (
    dot,
    flat,
    groups,
    pack,
    precision_of,
    segment_sums,
    uniform,
    wide,
    wide_of,
)
from hybridopt.kernels.torch_apply import (
    apply_on_device,
    apply_on_host,
    apply_packed,
)

__all__ = ["TorchOps"]


class TorchOps:
    """Implements ``hybridopt.protocols.Ops`` with torch operations."""

    name = "torch"

    @torch.no_grad()
    def observe(
        self, gradients: Sequence[Tensor], basis: Sequence[Sequence[Tensor]]
    ) -> Tensor:
        """Inner products of the gradient with every basis direction.

        Args:
            gradients: L gradients.
            basis: J lists of L directions.

        Returns:
            (L, 1 + 2 J) on the device: ||g||^2, <g, b_j> for each j, ||b_j||^2 for
            each j. float64 if any gradient is, else float32.
        """
        count, directions = len(gradients), len(basis)
        precision = precision_of(gradients)
        lists = [gradients, *basis]
        packed = pack(lists, precision)
        if packed is not None:
            products = torch.cat([packed * packed[0], packed[1:].square()])
            return segment_sums(products, gradients)
        if count == 0:
            return torch.zeros(0, 1 + 2 * directions, dtype=precision)
        sums: list[Tensor] = []
        for row in zip(*lists, strict=True):
            vectors = [flat(t, precision) for t in row]
            sums += [dot(vectors[0], v) for v in vectors]
            sums += [dot(v, v) for v in vectors[1:]]
        return torch.stack(sums).view(count, 1 + 2 * directions)

    @torch.no_grad()
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
            (L, 3) on the device: <g, s>, ||s||^2, ||v||^2. float64 if any parameter
            is, else float32.
        """
        precision = precision_of(parameters)
        if len(parameters) == 0:
            return torch.zeros(0, 3, dtype=precision)
        for part in groups(parameters):
            thetas, anchors = list(parameters[part]), list(anchor[part])
            steps, lags = list(step[part]), list(lag[part])
            if uniform(thetas, anchors, steps, lags):
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
        return _advance_sums(gradients, step, lag, precision)

    @torch.no_grad()
    def apply(
        self,
        parameters: Sequence[Tensor],
        basis: Sequence[Sequence[Tensor]],
        coefficients: Tensor,
        scale: float,
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
        factors = coefficients.detach().to(precision) * scale
        packed = pack([parameters, *basis], precision)
        if packed is not None and factors.device.type == "cpu":
            return apply_packed(parameters, packed, factors)
        if parameters[0].device.type == "cpu":
            return apply_on_host(parameters, basis, factors.cpu())
        return apply_on_device(parameters, basis, factors)

    @torch.no_grad()
    def copy(self, source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """target_l <- source_l for all l, bit for bit when the dtypes agree."""
        if len(source) != 0:
            torch._foreach_copy_(list(target), list(source))


def _advance_sums(
    gradients: Sequence[Tensor],
    step: Sequence[Tensor],
    lag: Sequence[Tensor],
    precision: torch.dtype,
) -> Tensor:
    packed = pack([step, lag, gradients], precision)
    if packed is not None:
        products = torch.cat([packed[2:] * packed[0], packed[:2].square()])
        return segment_sums(products, step)
    sums: list[Tensor] = []
    for g, s, v in zip(gradients, step, lag, strict=True):
        move, filtered = flat(s, precision), flat(v, precision)
        sums += [
            dot(flat(g, precision), move),
            dot(move, move),
            dot(filtered, filtered),
        ]
    return torch.stack(sums).view(len(step), 3)
