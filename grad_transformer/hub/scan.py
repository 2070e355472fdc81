"""What must not leave the machine, wherever it stands in a file: access tokens, signed addresses, local paths.

Text is read as text: JSON and markdown, the metadata of safetensors, the string columns and the footer of Parquet, the
comments of PNG. Numbers are read as bytes, all of them, for tokens and for the home and temporary folder of this
machine.
"""

from __future__ import annotations

import io
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import get_token

from ..documents import parse_json
from ..errors import UsageError
from ..wording import describe_error


# Each begins with a fixed text: such a pattern is searched for at the speed of memory.
_TOKENS = (
    r"hf_[A-Za-z0-9]{20}",
    r"api_org_[A-Za-z0-9]{20}",
    r"gh[opsu]_[A-Za-z0-9]{30}",
    r"github_pat_\w{22}",
    r"glpat-[\w-]{20}",
    r"AKIA[0-9A-Z]{16}",
    r"AIza[\w-]{35}",
    r"xox[abeprs]-[A-Za-z0-9-]{20}",
    r"PRIVATE KEY-----",
)
_TOKEN_TEXT = re.compile("|".join((*_TOKENS, r"\bsk-[A-Za-z0-9_-]{32}")))
_SIGNED = re.compile(
    r"[?&;](?:x-(?:amz|goog)-(?:signature|credential|security-token)|sig|signature|(?:\w+_)?token|api_?key|password)="
    r"[^&\s]|://[^/\s:@]+:[^/\s@]+@",
    re.IGNORECASE,
)
_STARTS = r"""(?:^|(?<=[\s"'`(\[{=,;:|>]))"""
_PATH = re.compile(
    "|".join(
        (
            _STARTS + r"/(?:[^\s/\\\"'`<>|:*?]+/)+[^\s/]",
            r"(?<![\w.~])~[/\\]\w",
            r"(?<![\w.])\.{1,2}/[\w.]",
            # Not what is a regular expression for modules, such as `layers\.\d+`.
            _STARTS + r"\.{1,2}\\\w\w",
            r"(?<!\w)[A-Za-z]:[/\\]\w",
            _STARTS + r"\\\\[\w.-]+\\[\w$.-]",
            r"\bfile:/",
        )
    ),
    re.IGNORECASE,
)
_CHUNK = 16 * 2**20
# Longer than anything that is looked for.
_OVERLAP = 1024
_MAX_HEADER = 100 * 2**20
_MAX_COMMENT = 2**20


def find_private(text: str) -> str | None:
    """What must not be published in a text, in words; `None` where there is nothing."""
    token = get_token()
    if _TOKEN_TEXT.search(text) or (token and token in text):
        return "an access token"
    if _SIGNED.search(text):
        return "a signed address, or one with a password"
    return "a path of this machine" if _PATH.search(text) else None


def find_private_in_file(name: str, content: Path | bytes) -> str | None:
    """The same for a file that is not JSON, by the kind that its name says.

    Raises:
        [`UsageError`]: it is no file of that kind, so that it cannot be searched.
    """
    texts = {".md": _whole, ".yaml": _whole, ".safetensors": _safetensors, ".parquet": _parquet, ".png": _png}
    read = texts.get(Path(name).suffix)
    try:
        for text in () if read is None else read(content):
            found = find_private(text)
            if found is not None:
                return found
    except (OSError, ValueError, RecursionError, pa.ArrowException, zlib.error) as cause:
        raise UsageError(
            f"{name} cannot be read, so that it is not known what it would publish.",
            expected="a whole file of the kind that its name says",
            found=describe_error(cause),
            remedy="write the file again",
        ) from cause
    return _in_bytes(content)


@contextmanager
def _open(content: Path | bytes) -> Iterator[BinaryIO]:
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        yield file


def _in_bytes(content: Path | bytes) -> str | None:
    token = get_token()
    tokens = [re.compile(pattern.encode()) for pattern in _TOKENS] + (
        [re.compile(re.escape(token.encode()))] if token else []
    )
    places = {str(Path.home()), tempfile.gettempdir()} - {"/", ""}
    machine = [re.compile(re.escape(f"{place}/".encode()) + rb"[\w.-]{3}") for place in sorted(places)]
    with _open(content) as file:
        window = b""
        while chunk := file.read(_CHUNK):
            window += chunk
            if any(pattern.search(window) for pattern in tokens):
                return "an access token"
            if any(pattern.search(window) for pattern in machine):
                return "a path of this machine"
            window = window[-_OVERLAP:]
    return None


def _whole(content: Path | bytes) -> Iterator[str]:
    with _open(content) as file:
        yield file.read().decode("utf-8")


def _safetensors(content: Path | bytes) -> Iterator[str]:
    with _open(content) as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MAX_HEADER:
            raise ValueError("the header of the safetensors file is too large")
        header = parse_json(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("the header of the safetensors file is no object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise ValueError("the metadata of the safetensors file is no object")
    yield from (str(text) for text in (*header, *metadata, *metadata.values()))


def _parquet(content: Path | bytes) -> Iterator[str]:
    with _open(content) as file, pq.ParquetFile(file) as table:
        for name, value in (table.metadata.metadata or {}).items():
            # Arrow's schema is base64 of what the other entries and the columns say.
            if name != b"ARROW:schema":
                yield f"{name.decode('utf-8', 'replace')} {value.decode('utf-8', 'replace')}"
        columns = [table.schema.column(number) for number in range(len(table.schema))]
        yield from (column.path for column in columns)
        strings = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        for batch in table.iter_batches(batch_size=1024, columns=strings) if strings else ():
            for column in batch.columns:
                yield from texts_in(column.unique().to_pylist() if _is_flat(column.type) else column.to_pylist())


def _is_flat(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def texts_in(value: object) -> Iterator[str]:
    """Every text in a value of JSON or Arrow, keys too."""
    if isinstance(value, bytes):
        yield value.decode("utf-8", "replace")
    elif isinstance(value, dict):
        yield from texts_in(list(value.items()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, str):
        yield value


def _png(content: Path | bytes) -> Iterator[str]:
    with _open(content) as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            raise ValueError("no PNG")
        while head := file.read(8):
            size, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind not in (b"tEXt", b"zTXt", b"iTXt", b"eXIf"):
                file.seek(size + 4, io.SEEK_CUR)
                continue
            comment = file.read(size)
            file.seek(4, io.SEEK_CUR)
            yield comment.decode("latin-1")
            keyword, _, rest = comment.partition(b"\0")
            if kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1"):
                packed = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
                yield zlib.decompressobj().decompress(packed, _MAX_COMMENT).decode("utf-8", "replace")
