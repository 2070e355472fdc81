"""Files: whole or absent when written, checked by their header before a tensor is read.

An artifact's manifest is written last and alone says that the artifact is whole; a killed process leaves at most a
hidden temporary file.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..constants import FORMAT_VERSION
from ..errors import AdapterFormatError, FormatVersionError, GradTransformerError, IncompleteArtifactError, UsageError
from .header import HeaderError, TensorInfo, parse_header


MAX_HEADER_BYTES = 16 * 2**20
MAX_JSON_BYTES = 64 * 2**20
# What strangers may send: an adapter's config and metadata, and its tensors.
MAX_ADAPTER_JSON_BYTES = 2**20
MAX_TENSOR_FILE_BYTES = 64 * 2**30


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` when the block ends, remove it if the block fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: str | Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: str | Path, data: Mapping[str, Any], *, indent: int | None = 2) -> None:
    write_text_atomic(path, json.dumps(data, indent=indent, allow_nan=False) + "\n")


def save_tensors_atomic(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all."""
    with atomic_write(path) as temporary:
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata=dict(metadata or {})
        )


def read_json(
    path: str | Path,
    *,
    error: type[GradTransformerError] = IncompleteArtifactError,
    max_bytes: int = MAX_JSON_BYTES,
) -> dict[str, Any]:
    """Read a JSON object: strict JSON, in which NaN and Infinity are no numbers.

    Args:
        path (`str` or `Path`): the file.
        error (`type`, *optional*): what is raised.
        max_bytes (`int`, *optional*, defaults to 64 MiB): larger files are not read.

    Raises:
        `error`: the file is missing, no ordinary file, too large, not JSON, or not an object.
        [`FormatVersionError`]: it carries a `format_version` newer than this library's.
    """
    path = Path(path)
    try:
        check_size(path, max_bytes, error=error)
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as cause:
        raise error(
            f"{path.name} is missing or cannot be read.", path=path, expected="a JSON file", found=cause.strerror
        ) from cause
    except GradTransformerError:
        raise
    except (ValueError, RecursionError) as cause:
        raise error(f"{path.name} is not valid JSON.", path=path, expected="a JSON object", found=cause) from cause
    if not isinstance(data, dict):
        raise error(f"{path.name} is not a JSON object.", path=path, expected="an object", found=type(data).__name__)
    version = data.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatVersionError(
            "The artifact was written by a newer version of grad_transformer.",
            path=path,
            expected=f"format version up to {FORMAT_VERSION}",
            found=version,
            remedy="pip install --upgrade grad-transformer",
        )
    return data


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


def check_size(path: Path, max_bytes: int, *, error: type[GradTransformerError]) -> int:
    """Size of an ordinary file; pipes and devices, which never end, and files that are too large raise `error`."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path.name} is not an ordinary file.", path=path, expected="a file", found="another kind")
    if status.st_size > max_bytes:
        raise error("The file is too large.", path=path, expected=f"at most {max_bytes} bytes", found=status.st_size)
    return status.st_size


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


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def resolve_folder(
    name_or_path: str | Path,
    *,
    allow_patterns: Sequence[str],
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """A local folder as it is, or the snapshot of a Hub repository (only files that match `allow_patterns`).

    Args:
        name_or_path (`str` or `Path`): a folder, or a repository id.
        allow_patterns (`Sequence[str]`): file names below `subfolder` that may be downloaded.
        subfolder (`str`, *optional*): folder below it.
        revision, token, cache_dir, local_files_only: as in `huggingface_hub.snapshot_download`.

    Raises:
        [`UsageError`]: neither an existing folder nor a repository that can be reached.
    """
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    if ".." in Path(prefix).parts:
        raise UsageError("`subfolder` leads out of the repository.", expected="a folder below it", found=subfolder)
    folder = Path(name_or_path)
    if not folder.is_dir():
        try:
            folder = Path(
                snapshot_download(
                    str(name_or_path),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    allow_patterns=[prefix + pattern for pattern in allow_patterns],
                )
            )
        except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as cause:
            raise UsageError(
                "Neither a folder nor a Hub repository that can be reached.",
                path=name_or_path,
                expected="an existing folder, or the id of a repository on the Hub",
                found=f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}",
                remedy="check the spelling, the network (HF_HUB_OFFLINE), and your access token (HF_TOKEN)",
            ) from cause
    folder = folder / prefix if prefix else folder
    if not folder.is_dir():
        raise UsageError("The folder does not exist.", path=folder, remedy=f"check `subfolder` ({subfolder!r})")
    return folder
