"""Text and JSON files: whole or absent when written, checked before they are read.

An artifact's manifest is written last and alone says that the artifact is whole; a killed process leaves at most a
hidden temporary file.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .constants import FORMAT_VERSION
from .errors import FormatVersionError, GradTransformerError, IncompleteArtifactError


MAX_JSON_BYTES = 64 * 2**20


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
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        sync_and_move(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_and_move(temporary: Path, path: Path) -> None:
    """Give a whole file its name, once its bytes are on the disk."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text_atomic(path: str | Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: str | Path, data: Mapping[str, Any], *, indent: int | None = 2) -> None:
    write_text_atomic(path, json.dumps(data, indent=indent, allow_nan=False) + "\n")


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


def check_size(path: Path, max_bytes: int, *, error: type[GradTransformerError]) -> int:
    """Size of an ordinary file; pipes and devices, which never end, and files that are too large raise `error`."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path.name} is not an ordinary file.", path=path, expected="a file", found="another kind")
    if status.st_size > max_bytes:
        raise error("The file is too large.", path=path, expected=f"at most {max_bytes} bytes", found=status.st_size)
    return status.st_size


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")
