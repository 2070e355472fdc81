"""The header of a safetensors file, parsed without trust: every entry is checked against the size of the file.

safetensors checks the same when it opens a file; a header from a stranger is read here first, where a wrong entry
can only be a typed error, and where nothing is mapped into memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..documents import parse_json


MAX_TENSORS = 200_000
MAX_KEY_LENGTH = 512
MAX_DIMENSIONS = 8

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class HeaderError(ValueError):
    """The header is not that of a safetensors file; the caller adds the path."""


def parse_header(content: bytes, data_bytes: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensor infos by key, and the metadata.

    Args:
        content (`bytes`): the header.
        data_bytes (`int`): bytes of the file after the header; the tensors must fill them exactly, without overlap.

    Raises:
        [`HeaderError`]: says what is wrong.
        [`DocumentError`]: it is not JSON.
    """
    header = parse_json(content, max_nodes=8 * MAX_TENSORS)
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise HeaderError(f"the header is not an object of at most {MAX_TENSORS} tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("__metadata__ does not map names to text")
    infos, spans = {}, []
    for key, entry in header.items():
        if len(key) > MAX_KEY_LENGTH or not key.isprintable():
            raise HeaderError(f"{key[:40]!r}... is no name of a tensor")
        infos[key], span = _parse_entry(key, entry)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise HeaderError(f"bytes {end} to {start} belong to no tensor, or to two")
        end = stop
    if end != data_bytes:
        raise HeaderError(f"the tensors take {end} bytes, and the file has {data_bytes}")
    return infos, metadata


def _parse_entry(key: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{key!r} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise HeaderError(f"{key!r} has a dtype that is not supported: {str(dtype)[:40]}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        raise HeaderError(f"{key!r} has no valid shape or data_offsets")
    info = TensorInfo(_DTYPES[dtype], tuple(shape))
    if offsets[1] - offsets[0] != math.prod(shape) * info.dtype.itemsize:
        raise HeaderError(f"{key!r} takes other bytes than its shape says")
    return info, (offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
