"""Files of rows, read as they are written: nothing is guessed, taken for a pattern, or kept in a cache.

A path is a name, whatever characters it holds. Text stays text, in CSV too; JSON is strict; an error names file, line
and cause. A file is read as a stream, so that memory does not grow with it, but for `.json`, which is read whole.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from ..documents import strict_json
from ..errors import DataError
from ..wording import describe_error, first_line


KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
EXPECTED_FILES = f"{', '.join(KINDS)}, each but .parquet also as .gz"
MAX_LINE_BYTES = 16 * 2**20
MAX_JSON_BYTES = 256 * 2**20
MAX_FILES = 10_000
MAX_COLUMNS = 1_000
# Text seldom shrinks to a fiftieth; what unpacks to more than this is there to fill the memory.
MAX_EXPANSION, FREE_EXPANSION = 200, 64 * 2**20

# What other programs leave beside rows.
_NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"

# What libraries raise where a file is damaged.
_UNREADABLE = (
    *(OSError, EOFError, zlib.error, pa.ArrowException, ValueError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, MemoryError, RecursionError, NotImplementedError),
)

# Names of a file's columns to the names of those that are wanted.
Choose = Callable[[Sequence[str]], Sequence[str]]


class SourceRow(NamedTuple):
    """A row and where it stands (`"line 3"`), for messages."""

    path: str | Path | None
    place: str
    values: Mapping[str, Any]


class _CannotRead(ValueError):
    """What is wrong, and where; becomes a [`DataError`] with the file's path."""

    def __init__(self, message: str, *, expected: object = None, found: object = None, remedy: str | None = None):
        super().__init__(message)
        self.message, self.expected, self.found, self.remedy = message, expected, found, remedy


def kind_of(path: Path) -> str | None:
    """Suffix of a file of rows without `.gz`; None where it is no such file."""
    name = path.name.lower()
    packed = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in KINDS and not (packed and suffix == ".parquet") else None


def find_files(path: Path, split: str) -> list[Path]:
    """The files of a split: `path` itself, or those of a folder, in the order of their names.

    In a folder, names say the split: `train.jsonl`, `test-00000.parquet`. Where none does, all are of `"train"`.

    Raises:
        [`DataError`]: no such files.
    """
    if not path.is_dir():
        return [path]
    try:
        here = _row_files(path)
        files = here or (_row_files(path / "data") if (path / "data").is_dir() else [])
    except OSError as cause:
        raise DataError(
            "The folder cannot be read.",
            path=path,
            found=cause.strerror,
            remedy="see who may read it, or name a file in place of the folder",
        ) from cause
    if not files or len(files) > MAX_FILES:
        saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        raise DataError(
            "The folder holds no files of rows." if not files else "The folder holds too many files.",
            path=path,
            expected=f"files of these kinds: {EXPECTED_FILES}" if not files else f"at most {MAX_FILES}",
            found="what `Dataset.save_to_disk` writes" if saved else len(files),
            remedy="write it anew with `to_parquet` or `to_json`" if saved else None,
        )
    splits = {file: _split_of(file, split) for file in files}
    if not any(splits.values()):
        splits = dict.fromkeys(files, "train")
    elif not all(splits.values()):
        raise DataError(
            "Some files of the folder name a split, others do not.",
            path=path,
            expected="a split in all of their names, or in none",
            found=", ".join(file.name for file in files if not splits[file])[:200],
            remedy="name a file in place of the folder",
        )
    chosen = [file for file in files if splits[file] == _SPLIT_WORDS.get(split, split)]
    if not chosen:
        raise DataError(
            f"The folder has no split {split!r}.",
            path=path,
            expected=f"files whose names say {split!r}",
            found=", ".join(sorted({str(name) for name in splits.values()})),
            remedy="name another split, or a file in place of the folder",
        )
    return chosen


def read_files(files: Sequence[Path], choose: Choose = list) -> Iterator[SourceRow]:
    """All rows of these files, one after the other, as they are written.

    Args:
        files (`Sequence[Path]`): see [`find_files`].
        choose (`Callable`, *optional*): the columns that are read of a CSV or Parquet file, from the names of all; it
            may refuse them.

    Raises:
        [`DataError`]: a file that is missing, too large, damaged, or not of its kind.
    """
    for path in files:
        try:
            for place, values in _read(path, choose):
                yield SourceRow(path, place, values)
        except _CannotRead as cause:
            raise DataError(
                cause.message, path=path, expected=cause.expected, found=cause.found, remedy=cause.remedy
            ) from cause
        except _UNREADABLE as cause:
            if isinstance(cause, DataError):
                raise
            raise DataError(
                "The file cannot be read.",
                path=path,
                expected=f"a whole {kind_of(path)} file",
                found=describe_error(cause),
                remedy="write or copy it again",
            ) from cause


def has_surrogate(text: str) -> bool:
    """Whether text holds half of a surrogate pair, which no encoding can write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _row_files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if kind_of(file) and file.is_file() and file.name not in _NO_ROWS and not file.name.startswith((".", "_"))
    )


def _split_of(file: Path, asked: str) -> str | None:
    words = [word for word in re.split(r"[^a-z0-9]+", file.name.lower()) if word]
    if asked not in _SPLIT_WORDS and asked.lower() in words:
        return asked
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _read(path: Path, choose: Choose) -> Iterator[tuple[str, Mapping[str, Any]]]:
    kind = kind_of(path)
    if kind is None:
        raise _CannotRead(
            "Files of this kind are not read.", expected=EXPECTED_FILES, found=path.suffix or "no suffix"
        )
    size = _size(path)
    if kind == ".parquet":
        yield from _parquet_rows(path, choose)
        return
    packed = path.name.lower().endswith(".gz")
    with cast(BinaryIO, gzip.open(path, "rb")) if packed else open(path, "rb") as file:
        limit = size * MAX_EXPANSION + FREE_EXPANSION if packed else None
        if kind in (".csv", ".tsv"):
            yield from _csv_rows(_lines(file, limit), "\t" if kind == ".tsv" else ",", choose)
        elif kind == ".json":
            yield from _json_rows(file)
        else:
            yield from _json_lines(_lines(file, limit))


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as cause:
        raise _CannotRead("The file is missing or cannot be read.", found=cause.strerror) from cause
    if not stat.S_ISREG(status.st_mode):
        raise _CannotRead("That is no ordinary file.", expected="a file", found="a pipe, device or socket")
    return status.st_size


# Text


def _lines(file: BinaryIO, limit: int | None) -> Iterator[tuple[int, str]]:
    """Number and text of each line, with its end."""
    number = total = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        total += len(line)
        if len(line) > MAX_LINE_BYTES or (limit is not None and total > limit):
            raise _CannotRead(
                f"Line {number} is too long." if len(line) > MAX_LINE_BYTES else "The file unpacks to too much.",
                expected=f"at most {MAX_LINE_BYTES} bytes a line" if len(line) > MAX_LINE_BYTES else f"{limit} bytes",
                found="more",
            )
        yield number, _decode(line, number)


def _decode(line: bytes, number: int) -> str:
    if number == 1:
        if line.startswith(_UTF16):
            raise _CannotRead("The file is UTF-16.", expected="UTF-8", remedy="save it as UTF-8")
        line = line.removeprefix(_BOM)
    if b"\0" in line:
        raise _CannotRead(
            f"Line {number} holds a zero byte.", expected="UTF-8 text", remedy="save the file as UTF-8 text"
        )
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as cause:
        before = line[: cause.start].count(b"\n")
        raise _CannotRead(
            f"Line {number + before} is not UTF-8.",
            expected="UTF-8",
            found=f"byte 0x{line[cause.start]:02x}",
            remedy="save the file as UTF-8",
        ) from cause


# JSON


def _parse_json(text: str, place: str) -> Any:
    """JSON of rows, whose text may hold any character: what may not be trained on is refused by `columns.py`."""
    try:
        return strict_json(text)
    except json.JSONDecodeError as cause:
        where = f"column {cause.colno}" if cause.lineno == 1 else f"line {cause.lineno}, column {cause.colno}"
        raise _CannotRead(
            f"{place[:1].upper()}{place[1:]} is not valid JSON.",
            expected="one JSON object" if place.startswith("line") else "a list of JSON objects",
            found=f"{cause.msg} at {where}",
        ) from cause
    except (ValueError, RecursionError) as cause:
        found = "too deep nesting" if isinstance(cause, RecursionError) else first_line(cause)
        raise _CannotRead(f"{place[:1].upper()}{place[1:]} is not valid JSON.", found=found) from cause


def _json_lines(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in lines:
        if line.strip():
            yield _json_row(_parse_json(line, f"line {number}"), f"line {number}")


def _json_row(value: Any, place: str) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(value, dict):
        raise _CannotRead(
            f"{place[:1].upper()}{place[1:]} is not a JSON object.",
            expected='{"prompt": ..., "completion": ...}',
            found=f"{type(value).__name__} {str(value)[:40]!r}",
            remedy="a file that is one JSON list is called .json" if isinstance(value, list) else None,
        )
    return place, value


def _json_rows(file: BinaryIO) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A list of objects, also below `data`; one object; or, as many such files are, one object on each line."""
    content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise _CannotRead(
            "The file is too large for .json, which is read whole.",
            expected=f"at most {MAX_JSON_BYTES} bytes",
            found="more",
            remedy="write one object on each line, in a .jsonl file of any size",
        )
    text = _decode(content, 1)
    del content
    if not text.strip():
        return
    first, _, rest = text.lstrip().partition("\n")
    if first.startswith("{") and first.rstrip().endswith("}") and rest.strip():
        yield from _json_lines(enumerate(text.split("\n"), start=1))
        return
    value = _parse_json(text, "the file")
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise _CannotRead(
            "The file holds no rows.", expected="a list of JSON objects", found=f"{type(value).__name__}"
        )
    for index, row in enumerate(value):
        yield _json_row(row, f"row {index}")


# CSV


def _csv_rows(
    lines: Iterator[tuple[int, str]], delimiter: str, choose: Choose
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every field is text, and every row has as many as the header. A first column without a name is pandas' index."""
    reader = csv.reader((line for _, line in lines), delimiter=delimiter, strict=True)
    before = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        header: list[str] = []
        while not header:
            header = _csv_next(reader, first=True)
        wanted = _csv_columns(header, choose)
        while True:
            line = reader.line_num + 1
            try:
                fields = _csv_next(reader)
            except StopIteration:
                return
            if not fields:
                continue
            if len(fields) != len(header):
                raise _CannotRead(
                    f"Line {line} has {len(fields)} fields, the header has {len(header)}.",
                    expected=f"{len(header)} fields: {', '.join(header)[:200]}",
                    found=f"{len(fields)} fields: {delimiter.join(fields)[:80]!r}",
                    remedy="put fields that hold a separator between double quotes; every line has the same number",
                )
            for index, name in enumerate(header):
                if not name.strip() and index > 0 and fields[index].strip():
                    raise _CannotRead(
                        f"Line {line} has text in a column without a name.",
                        expected=f"a name for column {index + 1} in the header",
                        found=repr(fields[index][:40]),
                        remedy="name the column; pandas writes no index with `to_csv(index=False)`",
                    )
            yield f"line {line}", {name: fields[index] for name, index in wanted.items()}
    finally:
        csv.field_size_limit(before)


def _csv_next(reader: Any, *, first: bool = False) -> list[str]:
    line = reader.line_num + 1
    try:
        return cast(list[str], next(reader))
    except StopIteration:
        if first:
            raise _CannotRead(
                "The file is empty.", expected="a line of column names, and rows", found="nothing"
            ) from None
        raise
    except csv.Error as cause:
        raise _CannotRead(
            f"Line {line} is not valid CSV.",
            expected="fields between separators; double quotes around fields that hold quotes, doubled inside",
            found=cause,
        ) from cause


def _csv_columns(header: Sequence[str], choose: Choose) -> dict[str, int]:
    """Wanted columns and where they stand."""
    if len(header) > MAX_COLUMNS:
        raise _CannotRead("There are too many columns.", expected=f"at most {MAX_COLUMNS}", found=len(header))
    places = {name: index for index, name in enumerate(header) if name.strip()}
    named = [name for name in header if name.strip()]
    if len(places) != len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise _CannotRead("Two columns have the same name.", expected="names that differ", found=repr(twice[:40]))
    return {name: places[name] for name in choose(list(places))}


# Parquet


def _parquet_rows(path: Path, choose: Choose) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if len(set(names)) != len(names) or len(names) > MAX_COLUMNS:
            raise _CannotRead(
                "The names of the columns cannot be used.",
                expected=f"at most {MAX_COLUMNS} columns whose names differ",
                found=f"{len(names)} columns",
            )
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=list(choose(names))):
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1
