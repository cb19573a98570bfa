"""A snapshot of device tensors in pinned host memory, copied without waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridopt.errors import HybridError, RecoveryAction

__all__ = ["PinnedSnapshot"]


class PinnedSnapshot:
    """Keeps an exact copy of a list of tensors off the device.

    ``save`` copies to the host on a stream of its own, so that the next forward runs
    meanwhile; ``restore`` copies back on the current stream. Both order themselves by
    events, never by waiting on the host. The tensors that were saved must not be
    written before ``release`` has been called on the stream that writes them. On the
    CPU it is an ordinary copy.
    """

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None
        self._saved: torch.cuda.Event | None = None

    @property
    def bytes(self) -> int:
        """Host memory that the snapshot takes."""
        return sum(t.nbytes for t in self._held)

    @torch.no_grad()
    def save(self, tensors: Sequence[Tensor]) -> None:
        """Start copying ``tensors`` to the host; an earlier snapshot is overwritten."""
        self._allocate(tensors)
        if not tensors or tensors[0].device.type != "cuda":
            for held, tensor in zip(self._held, tensors, strict=True):
                held.copy_(tensor)
            return
        device = tensors[0].device
        with torch.cuda.device(device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                for held, tensor in zip(self._held, tensors, strict=True):
                    held.copy_(tensor, non_blocking=True)
                    # Else the allocator could hand the memory out before the copy ran.
                    tensor.record_stream(self._stream)
                self._saved = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._saved.record(self._stream)

    def release(self) -> None:
        """Let the current stream write the saved tensors, once they are copied."""
        if self._saved is not None:
            torch.cuda.current_stream(self._stream_device()).wait_event(self._saved)

    @torch.no_grad()
    def restore(self, tensors: Sequence[Tensor]) -> None:
        """Write the snapshot back, bit for bit.

        Raises:
            HybridError: Number, shapes or dtypes differ from what was saved; nothing
                was written.
        """
        kinds = [(t.shape, t.dtype) for t in tensors]
        if kinds != [(t.shape, t.dtype) for t in self._held]:
            raise HybridError(
                f"snapshot of {len(self._held)} tensors: must be restored to as "
                f"many of equal shape and dtype, not to these {len(tensors)}. Save "
                "again after the parameters changed.",
                recovery=RecoveryAction.RESTORE_CHECKPOINT,
            )
        self.release()
        for held, tensor in zip(self._held, tensors, strict=True):
            tensor.copy_(held, non_blocking=True)
        if self._stream is not None:
            # The next save must not overwrite what this copy still reads.
            self._stream.wait_stream(torch.cuda.current_stream(self._stream_device()))

    def wait(self) -> list[Tensor]:
        """The host tensors, once the copy is complete; blocks the host."""
        if self._saved is not None:
            self._saved.synchronize()
        return self._held

    def _stream_device(self) -> torch.device | None:
        return None if self._stream is None else self._stream.device

    def _allocate(self, tensors: Sequence[Tensor]) -> None:
        kinds = [(t.shape, t.dtype) for t in tensors]
        if kinds == [(t.shape, t.dtype) for t in self._held]:
            return
        if self._saved is not None:
            self._saved.synchronize()
        self._held = [
            torch.empty(t.shape, dtype=t.dtype, pin_memory=t.device.type == "cuda")
            for t in tensors
        ]
