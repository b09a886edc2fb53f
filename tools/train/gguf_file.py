"""Writes GGUF v3 files of float tensors; the whole format that the export and the fixtures need.

Owns: the container's bytes. Knows nothing of models. Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
TENSOR_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> tuple[int, bytes]:
    """The type tag and bytes of a metadata value; plain integers are u32, lists are of one type."""
    match value:
        case bool():
            return BOOL, struct.pack("<?", value)
        case int():
            return U32, struct.pack("<I", value)
        case float():
            return F32, struct.pack("<f", value)
        case str():
            return STRING, _string(value)
        case np.ndarray() if value.dtype == np.int32:
            return ARRAY, struct.pack("<IQ", I32, len(value)) + value.astype("<i4").tobytes()
        case [str(), *_]:
            return ARRAY, struct.pack("<IQ", STRING, len(value)) + b"".join(map(_string, value))
    raise TypeError(f"no GGUF type for {value!r}")


def _padding(length: int) -> bytes:
    return b"\0" * (-length % ALIGNMENT)


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Writes `tensors` (row-major, so the last axis is GGUF's first) after `metadata`, both in the order given."""
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        tag, data = _value(value)
        head += _string(key) + struct.pack("<I", tag) + data
    offset = 0
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]
        head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", TENSOR_TYPES[tensor.dtype], offset)
        offset += tensor.nbytes + len(_padding(tensor.nbytes))
    with open(path, "wb") as file:
        file.write(head + _padding(len(head)))
        for tensor in tensors.values():
            data = np.ascontiguousarray(tensor).tobytes()
            file.write(data + _padding(len(data)))
