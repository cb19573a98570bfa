"""One line per step: a JSON Lines file, a list in memory, or both.

The file has one ``StepRecord`` per line. Values that are not finite become ``null``,
since JSON has no NaN, and are read back as nan.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from hybridopt.errors import HybridError, RecoveryAction
from hybridopt.types import StepRecord

__all__ = ["MetricsSink", "read_metrics"]

_FLOAT_FIELDS = tuple(
    field.name for field in dataclasses.fields(StepRecord) if field.type == "float"
)


class MetricsSink:
    """Takes in step records and keeps or writes them.

    A file is started anew by a record of step 0 and continued by any other, so that a
    resumed run goes on in the same file; ``read_metrics`` drops the lines that the
    resumed run made again. The file is open only while lines are written, which keeps
    the sink picklable.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        keep: bool = False,
        flush_interval: int = 100,
    ) -> None:
        """Create a sink; nothing is opened or written yet.

        Args:
            path: File to write; its directory is created at the first flush.
            keep: Whether ``records`` grows.
            flush_interval: Lines between two writes.
        """
        self.path = None if path is None else Path(path)
        self.keep = keep
        self.flush_interval = flush_interval
        self.records: list[StepRecord] = []
        self._held: list[StepRecord] = []
        self._pending: list[bytes] = []
        self._starts_anew = False
        self._arm_finalizer()

    @property
    def active(self) -> bool:
        """Whether records go anywhere; if not, they need not be made for the sink."""
        return self.keep or self.path is not None

    def write(self, record: StepRecord) -> None:
        """Take in one record; writes when ``flush_interval`` lines have gathered.

        Raises:
            OSError: The file cannot be written; the lines stay pending.
        """
        if self._held:
            self._held.append(record)
            return
        if self.keep:
            self.records.append(record)
        if self.path is None:
            return
        if record.step == 0:
            self._pending.clear()
            self._starts_anew = True
        self._pending.append(msgspec.json.encode(record) + b"\n")
        if len(self._pending) >= self.flush_interval:
            self.flush()

    def hold(self, record: StepRecord) -> None:
        """Take in a record that still lacks its numbers, and keep back what follows."""
        if self.active:
            self._held.append(record)

    def complete(self, record: StepRecord) -> None:
        """Take in the held record with its numbers, and then what was kept back."""
        if not self._held:
            return
        later = self._held[1:]
        self._held.clear()
        for one in (record, *later):
            self.write(one)

    def flush(self) -> None:
        """Write the pending lines."""
        if self.path is None or not self._pending:
            return
        _write(self.path, self._pending, "wb" if self._starts_anew else "ab")
        self._starts_anew = False
        self._pending.clear()

    def close(self) -> None:
        """Write what is pending; ``write`` and ``close`` still work afterwards."""
        self.flush()

    def __enter__(self) -> MetricsSink:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _arm_finalizer(self) -> None:
        # A program that ends without close() would lose the last lines. The finalizer
        # must not hold the sink itself, hence the bare list and path.
        weakref.finalize(self, _write_rest, self.path, self._pending, self._held)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Pending lines belong to the original: a copy would write them twice.
        self._pending = []
        self._held = []
        self._arm_finalizer()


def _write(path: Path, lines: Iterable[bytes], mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode) as file:
        file.writelines(lines)


def _write_rest(
    path: Path | None, pending: list[bytes], held: list[StepRecord]
) -> None:
    """Write what a sink left behind when it was collected or the program ended."""
    pending = pending + [msgspec.json.encode(record) + b"\n" for record in held]
    if path is not None and pending:
        # The directory may be gone by now (a temporary one): nobody could act on it.
        with contextlib.suppress(OSError):
            _write(path, pending, "ab")


def read_metrics(path: str | Path) -> list[StepRecord]:
    """Read a metrics file, one record per step, in step order.

    When the step number goes back, a run was resumed from a checkpoint: the lines that
    it made again replace the older ones. A torn last line (the program was killed while
    writing) is dropped.

    Raises:
        HybridError: A line is not a step record; the message names it.
        OSError: The file cannot be read.
    """
    lines = Path(path).read_bytes().split(b"\n")
    records: list[StepRecord] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = _decode(line)
        except msgspec.DecodeError as error:
            if number == len(lines):
                break
            raise HybridError(
                f"metrics file {path}, line {number}: {error}. It must hold one step "
                "record per line, as written through HybridConfig.metrics_path.",
                recovery=RecoveryAction.FIX_CONFIGURATION,
            ) from None
        while records and records[-1].step >= record.step:
            records.pop()
        records.append(record)
    return records


def _decode(line: bytes) -> StepRecord:
    values = msgspec.json.decode(line)
    if isinstance(values, dict):
        for name in _FLOAT_FIELDS:
            if name in values and values[name] is None:
                values[name] = math.nan
    return msgspec.convert(values, StepRecord)
