"""The Parquet files of a delta dataset, checked by their footers before a value is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..adapters import LoraLayout
from ..adapters.io import member
from ..errors import DeltaDatasetError


MAX_FOOTER_BYTES = 64 * 2**20
# Snappy makes a 20th of what repeats, Parquet's own run lengths a millionth: so much a file may hold over its size.
MAX_RATIO = 64
_REMEDY = "build or download the dataset again"


def data_files(folder: Path, manifest: Mapping[str, Any]) -> dict[str, list[Path]]:
    """The files of each split that the manifest names, all of them inside the folder.

    Raises:
        [`DeltaDatasetError`]: a split without files, a file without a split, or a link that leads out of the folder.
    """
    files: dict[str, list[Path]] = {split: [] for split in manifest["splits"]}
    for name in sorted(manifest["files"]):
        split = name.removeprefix("data/").partition("-")[0]
        if split not in files:
            raise DeltaDatasetError(
                "A file of the delta dataset belongs to no split.", path=folder / name, expected=", ".join(files)
            )
        files[split].append(member(folder, name, error=DeltaDatasetError))
    empty = [split for split, paths in files.items() if not paths]
    if empty or "train" not in files:
        raise DeltaDatasetError(
            "A split of the delta dataset has no files.",
            path=folder,
            expected=f"data/{(empty or ['train'])[0]}-*.parquet",
            found=", ".join(sorted(manifest["files"])) or "none",
            remedy=_REMEDY,
        )
    return files


def schema_of(layouts: Mapping[str, LoraLayout]) -> pa.Schema:
    """The columns of a delta dataset between two layouts."""
    numel = {role: layout.numel for role, layout in layouts.items()}
    return pa.schema(
        {
            "shadow_id": pa.string(),
            "task": pa.string(),
            "step": pa.int32(),
            "source_blocks": pa.list_(pa.float32(), numel["source"]),
            "target_blocks": pa.list_(pa.float32(), numel["target"]),
        }
    )


def check_parquet(paths: list[Path], expected: pa.Schema, num_pairs: int) -> None:
    """Refuse the files of a split whose footers say something else than the manifest and the roots.

    Args:
        paths (`list[Path]`): its files.
        expected (`pa.Schema`): see [`schema_of`].
        num_pairs (`int`): rows of all of them together.

    Raises:
        [`DeltaDatasetError`]: no Parquet, other columns or widths, another number of rows, or more of them than such
            a file can hold.
    """
    found = 0
    width = 4 * sum(field.type.list_size for field in expected if pa.types.is_fixed_size_list(field.type))
    for path in paths:
        metadata, schema = _read_footer(path)
        columns = {field.name: field.type for field in schema}
        if columns != {field.name: field.type for field in expected}:
            raise DeltaDatasetError(
                "The columns of the delta dataset are not those of its roots.",
                path=path,
                expected=_describe(expected),
                found=_describe(schema),
                remedy=_REMEDY,
            )
        size = path.stat().st_size
        if metadata.num_rows * width > MAX_RATIO * size:
            raise DeltaDatasetError(
                "The Parquet file claims more rows than it can hold.",
                path=path,
                expected=f"at most {MAX_RATIO * size // width} rows in {size} bytes",
                found=metadata.num_rows,
                remedy=_REMEDY,
            )
        found += metadata.num_rows
    if found != num_pairs:
        raise DeltaDatasetError(
            "The delta dataset has another number of pairs than its manifest says.",
            path=paths[0].parent,
            expected=num_pairs,
            found=found,
            remedy=_REMEDY,
        )


def _read_footer(path: Path) -> tuple[pq.FileMetaData, pa.Schema]:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 8))
            tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or length > min(size - 8, MAX_FOOTER_BYTES):
            raise pa.ArrowInvalid(f"a footer of {length} bytes in a file of {size}")
        with pq.ParquetFile(
            path, thrift_string_size_limit=MAX_FOOTER_BYTES, thrift_container_size_limit=10**6
        ) as parquet:
            return parquet.metadata, parquet.schema_arrow
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as cause:
        raise DeltaDatasetError(
            "The file is missing or is no Parquet file.", path=path, found=str(cause)[:200], remedy=_REMEDY
        ) from cause


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)[:400]
