"""Tensor files: whole or absent when written, checked by their header before a tensor is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import AdapterFormatError
from ..files import atomic_write, read_json, write_json_atomic, write_text_atomic
from ..hub import resolve_folder


__all__ = [
    "TensorInfo",
    "atomic_write",
    "read_header",
    "read_json",
    "read_tensors",
    "resolve_folder",
    "save_tensors_atomic",
    "write_json_atomic",
    "write_text_atomic",
]

MAX_HEADER_BYTES = 16 * 2**20

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
_FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def save_tensors_atomic(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all."""
    with atomic_write(path) as temporary:
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata=dict(metadata or {})
        )


def read_header(path: str | Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and validate the header of a safetensors file: tensor infos by key, and the metadata.

    Raises:
        [`AdapterFormatError`]: missing, truncated, not safetensors, an oversized header, or an unknown dtype.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise AdapterFormatError(
                "The header of the safetensors file is too large or cut off.",
                path=path,
                expected=f"at most {min(max(size - 8, 0), MAX_HEADER_BYTES)} bytes",
                found=header_bytes,
                remedy="download or save the file again",
            )
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            keys = list(file.keys())
            slices = {key: file.get_slice(key) for key in keys}
            raw = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (OSError, SafetensorError) as cause:
        raise AdapterFormatError(
            "The file is missing or is not a safetensors file.",
            path=path,
            expected="a readable safetensors file",
            found=cause,
            remedy="download or save the file again",
        ) from cause
    infos = {}
    for key, (dtype, shape) in raw.items():
        if dtype not in _DTYPES:
            raise AdapterFormatError(
                f"Tensor {key} has a dtype that is not supported.", path=path, expected=sorted(_DTYPES), found=dtype
            )
        infos[key] = TensorInfo(_DTYPES[dtype], shape)
    return infos, metadata


def read_tensors(path: str | Path, keys: Sequence[str]) -> dict[str, torch.Tensor]:
    """Read tensors of a file whose header was validated, and refuse NaN and infinity.

    Raises:
        [`AdapterFormatError`]: a tensor cannot be read, or holds values that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in keys}
    except (OSError, SafetensorError) as cause:
        raise AdapterFormatError("A tensor cannot be read.", path=path, found=cause) from cause
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterFormatError(
                f"Tensor {key} holds NaN or infinite values.",
                path=path,
                expected="finite values",
                found=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} not finite",
                remedy="the fine-tune diverged: lower its learning rate and run it again",
            )
    return tensors
