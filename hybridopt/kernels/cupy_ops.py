"""The CUDA backend: fused multi-tensor kernels, compiled on first use through CuPy.

CuPy compiles and launches, nothing else: kernels run on torch's current stream over
torch memory, results and scratch space come from torch's allocator, and nothing waits
for the device. The only module that imports cupy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridopt.errors import KernelUnavailableError
from hybridopt.kernels.fused import AdamWStep, BaseStep, BaseTensors
from hybridopt.kernels.launch import Launcher
from hybridopt.kernels.torch_ops import TorchOps

__all__ = ["CupyOps"]

_MAX_DIRECTIONS = 8
"""More directions than this do not fit into registers; torch serves such calls."""


class CupyOps:
    """Implements ``hybridopt.protocols.Ops`` with fused CUDA kernels.

    Calls that the kernels do not serve (float64, other strides per operand, operands on
    several devices) run on ``TorchOps``. Holds compiled kernels and address tables,
    nothing that influences a result.
    """

    name = "cupy"

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise KernelUnavailableError(
                f"kernels='cupy' on device {device}: needs a CUDA device. "
                "Move the model there, or use kernels='torch' or 'auto'."
            )
        try:
            import cupy
        except ImportError as error:
            raise KernelUnavailableError(
                f"kernels='cupy': cupy cannot be imported ({error}). Install "
                "hybridopt[cuda12] or hybridopt[cuda13], whichever CUDA torch was "
                "built for, or use kernels='torch' or 'auto'."
            ) from error
        self.device = device
        self._reference = TorchOps()
        try:
            if str(device) == "cuda":
                self.device = torch.device("cuda", torch.cuda.current_device())
            self.launcher = Launcher(cupy, self.device)
            # A broken set-up shows here and by its cause, not in the training loop.
            found = self.observe([torch.ones(3, device=self.device)], [])[0, 0].item()
        except Exception as error:
            raise KernelUnavailableError(
                f"kernels='cupy' on device {device}: a trial kernel failed "
                f"({type(error).__name__}: {error}). Install the cupy wheel for your "
                "CUDA version, or use kernels='torch' or 'auto'."
            ) from error
        if found != 3.0:
            raise KernelUnavailableError(
                f"kernels='cupy' on device {device}: a trial kernel gave {found}, not "
                "3.0. Use kernels='torch' or 'auto' and report this."
            )

    def __reduce__(self) -> tuple[type[CupyOps], tuple[torch.device]]:
        """Copies and pickles are built anew: compiled kernels belong to a process."""
        return (CupyOps, (self.device,))

    def observe(
        self,
        gradients: Sequence[Tensor],
        basis: Sequence[Sequence[Tensor]],
        squares: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """Inner products of the gradient with every basis direction, in one pass.

        ``squares`` are measured anew: the kernel reads the directions anyway.

        Returns:
            (L, 1 + 2 J) float32 on the device: ||g||^2, <g, b_j>, ||b_j||^2.

        Cost: reads each gradient and direction once (fp32 gradient, two bf16
        directions: 8 bytes per weight); two launches.
        """
        count, width = len(basis), 1 + 2 * len(basis)
        if count > _MAX_DIRECTIONS:
            return self._reference.observe(gradients, basis)
        run = self.launcher
        with run.on_stream() as stream:
            table = run.table(stream, [gradients, *basis], _alike(1, count))
            if table is None:
                return self._reference.observe(gradients, basis)
            partials = run.floats(table.layout.chunks * width)
            roles = (0, 0, 1 if count else 0)
            run.sweep("observe", table, roles, (count,), partials.data_ptr())
            result = run.floats(len(gradients), width)
            run.total(table, partials, width, result)
        return result

    def advance(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        anchor: Sequence[Tensor],
        step: Sequence[Tensor],
        lag: Sequence[Tensor],
        beta: float,
    ) -> Tensor:
        """Do s <- theta - anchor, v <- beta (v + s), anchor <- theta in one pass.

        Returns:
            (L, 2) float32 on the device: <g, s>, ||s||^2 of what is stored.

        Cost: reads theta, g, anchor, v and writes s, v, anchor once (fp32 weights, bf16
        directions: 22 bytes per weight); two launches.
        """
        lists = [parameters, gradients, anchor, step, lag]
        result = self._advance(lists, beta, None)
        if result is None:
            return self._reference.advance(
                parameters, gradients, anchor, step, lag, beta
            )
        return result

    def advance_move(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        anchor: Sequence[Tensor],
        step: Sequence[Tensor],
        lag: Sequence[Tensor],
        beta: float,
        gains: Tensor,
    ) -> Tensor | None:
        """``advance``, and the move theta_l += gains[l] s_l behind it, in one pass.

        For moves that nobody takes back: the anchor is the weight behind the move, and
        a weight that would not be finite stays where it is while the others move.

        Args:
            gains: (L,) float32, on the host or the device.

        Returns:
            As ``advance``; None if the kernels do not serve these tensors, and then
            nothing was written.

        Cost: as ``advance`` and one write of theta (26 bytes per weight where
        ``advance``, ``apply`` and the copy of the anchor move 46); two launches.
        """
        lists = [parameters, gradients, anchor, step, lag]
        return self._advance(lists, beta, gains)

    def _advance(
        self, lists: list[Sequence[Tensor]], beta: float, gains: Tensor | None
    ) -> Tensor | None:
        parameters, _, anchor, step, lag = lists
        run = self.launcher
        with run.on_stream() as stream:
            table = run.table(stream, lists, ((0, 2), (3, 4)))
            if table is None:
                return None
            partials = run.floats(table.layout.chunks * 3)
            factors = None if gains is None else run.factors(gains)
            address = 0 if factors is None else factors.data_ptr()
            args = (partials.data_ptr(), run.number(beta), address)
            run.sweep("advance", table, (0, 1, 3), (int(gains is not None),), *args)
            result = run.floats(len(parameters), 3)
            run.total(table, partials, 3, result)
        _mark_written(step, lag, anchor)
        if gains is not None:
            _mark_written(parameters)
        return result[:, :2]

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

        The kernels look at every new weight, whatever is known about the old ones.

        A direction whose coefficient is exactly zero for a tensor counts as zero there
        and is not read. Inside a graph capture the coefficients must be on the device.

        Returns:
            (L + 1,) float32 on the device: ||delta_l||^2, then the written flag.

        Cost: reads theta and the directions twice, writes theta once (fp32 weights, two
        bf16 directions: 20 bytes per weight); three launches. No host decision.
        """
        count = len(basis)
        if count > _MAX_DIRECTIONS:
            return self._reference.apply(parameters, basis, coefficients, scale)
        run = self.launcher
        with run.on_stream() as stream:
            table = run.table(stream, [parameters, *basis], _alike(1, count))
            if table is None:
                return self._reference.apply(parameters, basis, coefficients, scale)
            factors, share = run.factors(coefficients), run.number(scale)
            partials = run.floats(table.layout.chunks * 2)
            result = run.floats(len(parameters) + 1)
            judged, flag = partials.data_ptr(), result.data_ptr() + 4 * len(parameters)
            roles, variant = (0, 0, 1 if count else 0), (count,)
            args = (factors.data_ptr(), share)
            run.sweep("apply.judge", table, roles, variant, judged, *args)
            run.verdict(table, partials, result)
            run.sweep("apply.commit", table, roles, variant, flag, *args)
        _mark_written(parameters)
        return result

    def copy(self, source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """target_l <- source_l for all l, bit for bit when the dtypes agree.

        Cost: one read, one write, one launch.
        """
        run = self.launcher
        with run.on_stream() as stream:
            table = run.table(stream, [source, target])
            if table is None:
                self._reference.copy(source, target)
                return
            run.sweep("copy", table, (0, 0, 1), (0,))
        _mark_written(target)

    def put_ahead(
        self,
        parameters: Sequence[Tensor],
        before: Sequence[Tensor],
        older: Sequence[Tensor],
        newest: Sequence[Tensor],
        lead: float,
        made: float,
        skip: Tensor | None,
    ) -> bool:
        """``weights.ahead.put_ahead`` of one bucket, in one pass.

        Returns:
            False if the kernels do not serve these tensors; then nothing was written.

        Cost: reads theta, the weights before the step and the older displacement,
        writes theta and the newest one (fp32 weights, bf16 displacements: 16 bytes per
        weight; 10 without a lead); one launch.
        """
        run = self.launcher
        lists = [parameters, before, older, newest]
        moves = lead > 0.0 or made > 0.0
        with run.on_stream() as stream:
            table = run.table(stream, lists, ((0, 1), (2, 3)))
            if table is None:
                return False
            stays = None if skip is None else skip.to(self.device, torch.float32)
            flag = 0 if stays is None else stays.data_ptr()
            args = (run.number(lead), run.number(made), flag)
            run.sweep("lead", table, (0, 0, 2), (int(moves),), *args)
        _mark_written(newest)
        if moves:
            _mark_written(parameters)
        return True

    def base_move(
        self, tensors: BaseTensors, step: BaseStep, coefficients: Tensor, scale: float
    ) -> bool:
        """One base step and the predicted move behind it (``fused.fused_move``).

        Returns:
            False if the kernels do not serve these tensors; then nothing was written.
        """
        moments = step.moments(tensors)
        count, start = len(tensors.directions), 2 + len(moments)
        lists = [tensors.parameters, tensors.gradients, *moments, *tensors.directions]
        same = (*((0, 2 + m) for m in range(len(moments))), *_alike(start, count))
        run = self.launcher
        with run.on_stream() as stream:
            table = run.table(stream, lists, same)
            if table is None or count > _MAX_DIRECTIONS:
                return False
            factors = run.factors(coefficients)
            numbers = [run.number(x) for x in (scale, *step.numbers())]
            roles = (0, 1, start if count else 0)
            variant = (count, isinstance(step, AdamWStep))
            run.sweep("base", table, roles, variant, factors.data_ptr(), *numbers)
        _mark_written(tensors.parameters, *moments)
        return True


def _alike(start: int, count: int) -> tuple[tuple[int, int], ...]:
    """Pairs that make ``count`` operands from ``start`` on share one format."""
    return tuple((start, j) for j in range(start + 1, start + count))


def _mark_written(*lists: Sequence[Tensor]) -> None:
    """Bump version counters: autograd does not see what a raw kernel writes."""
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)
