"""State dictionaries as one checked string, so that they travel in parameter groups.

Parameter groups may hold only plain scalars and strings if distributed checkpointing
is to carry them, and files must load with ``weights_only=True``. So the controller's
state becomes msgpack, then base64, framed by a version and a checksum:
``hybridopt:<version>:<sha256>:<payload>``.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import hashlib
from typing import Any

import msgspec
import torch
from torch import Tensor

from hybridopt.errors import CheckpointError

__all__ = ["VERSION", "decode", "encode"]

VERSION = 2
"""Format of the payload; raised when an older reader would misread a newer state."""

_TENSOR_CODE = 1
_WAY_OUT = "Load another checkpoint, or drop the 'hybrid' keys to start in warm-up."


class _PackedTensor(msgspec.Struct, array_like=True, frozen=True):
    dtype: str
    shape: list[int]
    data: bytes


def _pack(value: Any) -> msgspec.msgpack.Ext:
    if not isinstance(value, Tensor):
        raise CheckpointError(
            f"state value of type {type(value).__name__}: cannot be saved. Use None, "
            "bool, int, float, str, bytes, Tensor, or lists and dicts of those."
        )
    plain = value.detach().cpu().contiguous()
    # Raw memory: exact for every dtype, and numpy, which could do it, is no dependency.
    raw = ctypes.string_at(plain.data_ptr(), plain.nbytes) if plain.numel() else b""
    packed = _PackedTensor(str(plain.dtype).removeprefix("torch."), [*plain.shape], raw)
    return msgspec.msgpack.Ext(_TENSOR_CODE, msgspec.msgpack.encode(packed))


def _unpack(code: int, data: memoryview) -> Tensor:
    if code != _TENSOR_CODE:
        raise CheckpointError(
            f"hybrid state: unknown extension code {code}. {_WAY_OUT}"
        )
    packed = msgspec.msgpack.decode(data, type=_PackedTensor)
    dtype = getattr(torch, packed.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"hybrid state: unknown dtype {packed.dtype!r}. {_WAY_OUT}"
        )
    if not packed.data:
        return torch.empty(packed.shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(packed.data), dtype=dtype)
    return flat.reshape(packed.shape)


def encode(state: dict[str, Any]) -> str:
    """Turn a state dictionary into one line of ASCII.

    Raises:
        CheckpointError: A value has a type that no checkpoint can hold.
    """
    payload = base64.b64encode(msgspec.msgpack.encode(state, enc_hook=_pack)).decode()
    checksum = hashlib.sha256(payload.encode()).hexdigest()[:16]
    return f"hybridopt:{VERSION}:{checksum}:{payload}"


def decode(text: str) -> dict[str, Any]:
    """Turn ``encode``'s line back into a state dictionary, tensors bit for bit.

    Raises:
        CheckpointError: Not such a line, another version, truncated or corrupted.
    """
    parts = text.split(":", 3) if isinstance(text, str) else []
    if len(parts) != 4 or parts[0] != "hybridopt":
        raise CheckpointError(
            f"hybrid state {str(text)[:40]!r}: must be the string that state_dict() "
            f"wrote. {_WAY_OUT}"
        )
    _, version, checksum, payload = parts
    if version != str(VERSION):
        raise CheckpointError(
            f"hybrid state version {version}: this hybridopt reads version {VERSION}. "
            f"Use the hybridopt that wrote it. {_WAY_OUT}"
        )
    if hashlib.sha256(payload.encode()).hexdigest()[:16] != checksum:
        raise CheckpointError(
            f"hybrid state checksum {checksum}: does not match the payload; the "
            f"checkpoint is truncated or corrupted. {_WAY_OUT}"
        )
    try:
        state = msgspec.msgpack.decode(base64.b64decode(payload), ext_hook=_unpack)
    except (msgspec.DecodeError, binascii.Error, RuntimeError, ValueError) as error:
        raise CheckpointError(f"hybrid state: {error}. {_WAY_OUT}") from None
    if not isinstance(state, dict):
        raise CheckpointError(
            f"hybrid state of type {type(state).__name__}: must be a dict. {_WAY_OUT}"
        )
    return state
