"""What a launcher remembers from call to call: tables, and tensors it has looked at.

Looking at every operand of every call would cost more host time than the launches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from operator import call, is_
from typing import Generic, TypeVar
from weakref import ref

import torch
from torch import Tensor

__all__ = ["Fingerprints", "Recent", "Seen", "Steady"]

_KEPT = 64
"""Entries kept; a training loop uses a few, one per set of addresses."""

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """A dictionary that forgets what was not asked for longest."""

    def __init__(self, size: int = _KEPT) -> None:
        self._size = size
        self._held: OrderedDict[Hashable, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable) -> Value | None:
        """The value kept for a key, or None."""
        value = self._held.get(key)
        if value is not None:
            self._held.move_to_end(key)
        return value

    def put(self, key: Hashable, value: Value) -> None:
        """Keep a value, at the cost of the oldest one if there are too many."""
        self._held[key] = value
        self._held.move_to_end(key)
        if len(self._held) > self._size:
            self._held.popitem(last=False)


class Steady(list[Tensor]):
    """A list that nobody changes once it has been used: same list, same tensors.

    Looking 150 tensors up costs a tenth of a millisecond where other work has driven
    them out of the caches, and a step has a dozen such lists.
    """


@dataclass(slots=True)
class Seen:
    """The tensors last seen at some addresses."""

    references: list[ref[Tensor]]
    addresses: tuple[int, ...]
    sizes: list[int]
    formats: list[torch.dtype]
    number: int
    """Same number: same addresses, sizes and formats."""
    kind: int
    """Same kind: same sizes, formats and devices, wherever in memory they are."""


class Fingerprints:
    """Numbers lists of tensors: same number, same addresses, sizes and formats.

    Addresses are read at every call, of a ``Steady`` list the first and the last: who
    moves the memory of its tensors (to another device and back) moves all. Sizes,
    formats and strides are read only when one of the tensors is another object than at
    the last call with these addresses: memory that was freed and given out again
    belongs to another tensor. Tensors are referred to weakly, so that none outlives its
    owner here. What goes unnoticed is a tensor whose ``data`` was replaced by another
    view that starts at the same address.
    """

    def __init__(self) -> None:
        self._seen: Recent[Seen] = Recent()
        self._numbers: Recent[int] = Recent()
        self._kinds: Recent[int] = Recent()
        self._steady: Recent[tuple[ref[Steady], Seen]] = Recent()
        self._next = count(1)

    def number(self, tensors: Sequence[Tensor]) -> int | None:
        """The number of a list, or None if not all of its tensors are contiguous."""
        seen = self.look(tensors)
        return None if seen is None else seen.number

    def look(self, tensors: Sequence[Tensor]) -> Seen | None:
        """What is known of a list, or None if not all of its tensors are contiguous."""
        if type(tensors) is not Steady:
            return self._look(tensors)
        kept = self._steady.get(id(tensors))
        if kept is not None and kept[0]() is tensors and _in_place(tensors, kept[1]):
            return kept[1]
        found = self._look(tensors)
        if found is not None:
            self._steady.put(id(tensors), (ref(tensors), found))
        return found

    def _look(self, tensors: Sequence[Tensor]) -> Seen | None:
        addresses = tuple(map(Tensor.data_ptr, tensors))
        seen = self._seen.get(addresses)
        if seen is None:
            return self._inspect(addresses, tensors, None)
        if all(map(is_, tensors, map(call, seen.references))):
            return seen
        return self._inspect(addresses, tensors, seen)

    def _inspect(
        self, addresses: tuple[int, ...], tensors: Sequence[Tensor], seen: Seen | None
    ) -> Seen | None:
        if not all(map(Tensor.is_contiguous, tensors)):
            return None
        sizes = list(map(Tensor.numel, tensors))
        formats = [t.dtype for t in tensors]
        if seen is not None and sizes == seen.sizes and formats == seen.formats:
            seen.references = list(map(ref, tensors))
            return seen
        # Kernels must never be given another device's addresses.
        devices = tuple(t.device for t in tensors)
        kind = self._number(self._kinds, (tuple(sizes), tuple(formats), devices))
        number = self._number(self._numbers, (addresses, kind))
        references = list(map(ref, tensors))
        found = Seen(references, addresses, sizes, formats, number, kind)
        self._seen.put(addresses, found)
        return found

    def _number(self, numbers: Recent[int], key: Hashable) -> int:
        number = numbers.get(key)
        if number is None:
            number = next(self._next)
            numbers.put(key, number)
        return number


def _in_place(tensors: Steady, seen: Seen) -> bool:
    """Whether the first and the last of them are where they were."""
    addresses = seen.addresses
    return not tensors or (
        tensors[0].data_ptr() == addresses[0]
        and tensors[-1].data_ptr() == addresses[-1]
    )
