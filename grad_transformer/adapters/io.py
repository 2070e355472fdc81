"""Tensor files: whole or absent when written, checked by their header before a tensor is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import AdapterFormatError, GradTransformerError, IncompleteArtifactError
from ..files import atomic_write, check_size, read_json, read_record, write_json_atomic, write_text_atomic
from ..hub import resolve_folder
from .header import HeaderError, TensorInfo, parse_header


__all__ = [
    "TensorInfo",
    "atomic_write",
    "load_tensors",
    "member",
    "read_header",
    "read_json",
    "read_record",
    "read_tensors",
    "resolve_folder",
    "save_tensors_atomic",
    "write_json_atomic",
    "write_text_atomic",
]

MAX_HEADER_BYTES = 16 * 2**20
# What strangers may send: an adapter's config and metadata, and its tensors.
MAX_ADAPTER_JSON_BYTES = 2**20
MAX_TENSOR_FILE_BYTES = 64 * 2**30


def save_tensors_atomic(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all."""
    with atomic_write(path) as temporary:
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata=dict(metadata or {})
        )


def read_header(path: str | Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and validate the header of a safetensors file: tensor infos by key, and the metadata. No tensor is read.

    Raises:
        [`AdapterFormatError`]: missing, no ordinary file, truncated, not safetensors, an oversized header, or an
            unknown dtype.
    """
    path = Path(path)
    try:
        size = check_size(path, MAX_TENSOR_FILE_BYTES, error=AdapterFormatError)
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
            content = file.read(header_bytes)
        return parse_header(content, size - 8 - header_bytes)
    except (OSError, HeaderError, ValueError, RecursionError) as cause:
        if isinstance(cause, GradTransformerError):
            raise
        raise AdapterFormatError(
            "The file is missing or is not a safetensors file.",
            path=path,
            expected="a readable safetensors file",
            found=str(cause)[:200],
            remedy="download or save the file again",
        ) from cause


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


def load_tensors(path: str | Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a file that this library wrote, header first.

    Args:
        path (`str` or `Path`): the file.
        shapes (`Mapping[str, tuple[int, ...]]`, *optional*): the names and shapes that it must have.

    Raises:
        [`IncompleteArtifactError`]: it is missing or damaged, holds other tensors, or values that are not finite.
    """
    try:
        found = {key: info.shape for key, info in read_header(path)[0].items()}
        if shapes is None or found == shapes:
            return read_tensors(path, list(found))
    except AdapterFormatError as cause:
        raise IncompleteArtifactError(
            f"{Path(path).name} cannot be used.", path=path, found=cause.message, remedy="save or download it again"
        ) from cause
    raise IncompleteArtifactError(
        f"{Path(path).name} does not hold the tensors that it must.",
        path=path,
        expected=dict(shapes),
        found=dict(list(found.items())[:8]),
        remedy="save or download it again",
    )


def member(folder: Path, name: str, *, error: type[GradTransformerError] = AdapterFormatError) -> Path:
    """The path of a file in a folder from elsewhere; a link that leads out of the folder is refused.

    In a snapshot of the Hub's cache, files are links to the blobs of the same repository, and may be.

    Raises:
        `error`: the file lies somewhere else.
    """
    path = folder / name
    homes = [folder.resolve()]
    for parent in (folder, *folder.parents):
        if parent.name == "snapshots":
            homes.append(parent.parent.resolve() / "blobs")
            break
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as cause:
        raise error(f"{name} cannot be found.", path=path, found=cause) from cause
    if not any(real.is_relative_to(home) for home in homes):
        raise error(
            f"{name} is a link that leads out of its folder.",
            path=path,
            expected="a file inside the folder",
            found="a file somewhere else",
            remedy="copy the file into the folder, if you trust it",
        )
    return path
