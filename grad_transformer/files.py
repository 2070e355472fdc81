"""Text, JSON and YAML files: whole or absent when written, checked before they are read.

Every JSON or YAML file that is read has a schema (`schemas.py`) and goes through [`read_record`] or [`read_yaml`].

An artifact's manifest is written last and alone says that the artifact is whole; a killed process leaves at most a
hidden temporary file.
"""

from __future__ import annotations

import difflib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from .constants import FORMAT_VERSION
from .documents import MAX_NODES, DocumentError, check_schema, parse_json, parse_yaml
from .errors import FormatVersionError, GradTransformerError, IncompleteArtifactError, UsageError
from .schemas import FILES, Object


T = TypeVar("T")

MAX_JSON_BYTES = 16 * 2**20
MAX_YAML_BYTES = 2**20


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


def read_record(
    path: str | Path,
    schema: type[T],
    *,
    error: type[GradTransformerError] = IncompleteArtifactError,
    max_bytes: int = MAX_JSON_BYTES,
    max_nodes: int = MAX_NODES,
) -> T:
    """Read a JSON file as its schema asks.

    Args:
        path (`str` or `Path`): the file.
        schema (`type`): a typed dict or dataclass; fields that it does not know stay in a typed dict.
        error (`type`, *optional*): what is raised.
        max_bytes (`int`, *optional*, defaults to 16 MiB), max_nodes (`int`, *optional*, defaults to a million): larger
            files, or files of more values, are not read.

    Raises:
        `error`: the file is missing, no ordinary file, too large, not JSON, or does not keep its schema.
        [`FormatVersionError`]: it carries a `format_version` newer than this library's.
    """
    return parse_record(
        _read_bytes(Path(path), max_bytes, error=error), schema, path=path, error=error, max_nodes=max_nodes
    )


def read_json(
    path: str | Path,
    *,
    error: type[GradTransformerError] = IncompleteArtifactError,
    max_bytes: int = MAX_JSON_BYTES,
) -> dict[str, Any]:
    """[`read_record`] with the schema that `schemas.FILES` has for the file's name; of other names, any object."""
    return dict(read_record(path, FILES.get(Path(path).name, Object), error=error, max_bytes=max_bytes))


def parse_record(
    content: bytes | str,
    schema: type[T],
    *,
    path: str | Path,
    error: type[GradTransformerError] = IncompleteArtifactError,
    max_nodes: int = MAX_NODES,
) -> T:
    """[`read_record`] for JSON that was read already, or stands inside another file."""
    try:
        data = parse_json(content, max_nodes=max_nodes)
    except DocumentError as cause:
        raise error(
            f"{Path(path).name} is not valid JSON.",
            path=path,
            expected="a JSON object",
            found=cause,
            remedy="mend it, or write or download it again",
        ) from cause
    return check_record(data, schema, path=path, error=error)


def read_yaml(
    path: str | Path,
    schema: type[T],
    *,
    error: type[GradTransformerError] = UsageError,
    max_bytes: int = MAX_YAML_BYTES,
) -> T:
    """Read a YAML file (JSON is YAML too) as its schema asks; see [`read_record`] and [`parse_yaml`]."""
    content = _read_bytes(Path(path), max_bytes, error=error)
    try:
        data = parse_yaml(content)
    except DocumentError as cause:
        raise error(f"{Path(path).name} is not valid YAML.", path=path, found=cause, remedy="mend the file") from cause
    return check_record(data, schema, path=path, error=error)


def check_record(
    data: Any,
    schema: type[T],
    *,
    path: str | Path | None = None,
    error: type[GradTransformerError] = IncompleteArtifactError,
) -> T:
    """Plain data as a schema asks, see [`read_record`]."""
    check_version(data.get("format_version") if isinstance(data, dict) else None, path=path)
    try:
        return check_schema(data, schema)
    except DocumentError as cause:
        name = "The data are" if path is None else f"{Path(path).name} is"
        raise error(
            f"{name} not as expected.",
            path=path,
            expected=cause.expected,
            found=cause.found,
            remedy="mend it, or write or download it again",
        ) from cause


def check_version(version: object, *, path: str | Path | None = None) -> None:
    """Raises [`FormatVersionError`] where a file says that a newer version of this library wrote it."""
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatVersionError(
            "The artifact was written by a newer version of grad_transformer.",
            path=path,
            expected=f"format version up to {FORMAT_VERSION}",
            found=version,
            remedy="pip install --upgrade grad-transformer",
        )


def check_size(path: Path, max_bytes: int, *, error: type[GradTransformerError]) -> int:
    """Size of an ordinary file; pipes and devices, which never end, and files that are too large raise `error`."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path.name} is not an ordinary file.", path=path, expected="a file", found="another kind")
    if status.st_size > max_bytes:
        raise error("The file is too large.", path=path, expected=f"at most {max_bytes} bytes", found=status.st_size)
    return status.st_size


def nearest_path(path: Path, names: Iterable[str]) -> str:
    """The remedy for a path that is not there: the nearest of the names beside it."""
    close = difflib.get_close_matches(path.name, list(names), n=1)
    return f"did you mean {path.parent / close[0]}?" if close else "check the spelling"


def _read_bytes(path: Path, max_bytes: int, *, error: type[GradTransformerError]) -> bytes:
    try:
        check_size(path, max_bytes, error=error)
        return path.read_bytes()
    except OSError as cause:
        raise error(
            f"{path.name} is missing or cannot be read.",
            path=path,
            expected="a file",
            found=cause.strerror,
            remedy="check the path, and that whatever writes the file has ended",
        ) from cause
    except ValueError as cause:
        if isinstance(cause, GradTransformerError):
            raise
        raise error("This is no path of a file.", path=repr(path)[:200], found=cause) from cause
