"""The Parquet files of a delta dataset: footers checked before a value is read, values before they are used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError
from pyarrow.dataset import ParquetFragmentScanOptions

from ..adapters import LoraLayout
from ..adapters.io import member
from ..adapters.rows import text_column
from ..errors import DeltaDatasetError, GradTransformerError
from ..hub import Fetched
from ..wording import describe_error, first_line


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
                "A file of the delta dataset belongs to no split.",
                path=folder / name,
                expected=", ".join(files),
                remedy="build or download the dataset again",
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
    if not path.is_file():
        # Opening a pipe would wait for whoever writes to it.
        raise DeltaDatasetError(
            "There is no such Parquet file.",
            path=path,
            expected="an ordinary file",
            found="something else" if path.exists() else "no file",
            remedy=_REMEDY,
        )
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
            "The file is missing or is no Parquet file.", path=path, found=first_line(cause), remedy=_REMEDY
        ) from cause


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)[:400]


def load_splits(folder: Path, manifest: Mapping[str, Any], schema: pa.Schema) -> dict[str, datasets.Dataset]:
    """All pairs by split, memory-mapped, after a look at every footer.

    Raises:
        [`DeltaDatasetError`]: a file is damaged, or says something else than the manifest and the roots.
    """
    files = data_files(folder, manifest)
    for split, paths in files.items():
        check_parquet(paths, schema, manifest["splits"][split]["pairs"])
    # By default Arrow holds a whole file while it is turned into a memory-mapped table.
    reading = ParquetFragmentScanOptions(use_buffered_stream=True, pre_buffer=False)
    with lean_arrow(), typed_errors(folder):
        return dict(
            datasets.load_dataset(
                "parquet",
                data_files={split: [str(path) for path in paths] for split, paths in files.items()},
                features=datasets.Features.from_arrow_schema(schema),
                fragment_scan_options=reading,
            )
        )


def stream_splits(
    fetched: Fetched, manifest: Mapping[str, Any], schema: pa.Schema, token: str | bool | None
) -> dict[str, Any]:
    """Rows as they come, each checked; the footers too of files that lie here."""
    features, folder = datasets.Features.from_arrow_schema(schema), fetched.folder
    if fetched.origin is None or (folder / "data").is_dir():
        files = data_files(folder, manifest)
        for split, paths in files.items():
            check_parquet(paths, schema, manifest["splits"][split]["pairs"])
        local = {split: [str(path) for path in paths] for split, paths in files.items()}
        with typed_errors(folder):
            splits = datasets.load_dataset("parquet", data_files=local, features=features, streaming=True)
    else:
        named = {
            split: [path.relative_to(folder).as_posix() for path in paths]
            for split, paths in data_files(folder, manifest).items()
        }
        origin = fetched.origin
        with typed_errors(folder):
            splits = datasets.load_dataset(
                origin.repo_id,
                data_files=named,
                features=features,
                revision=origin.sha,
                token=token,
                streaming=True,
            )
    return {
        split: datasets.IterableDataset.from_generator(
            _checked_rows, features=features, gen_kwargs={"rows": rows, "folder": folder}, split=split
        )
        for split, rows in splits.items()
    }


def checked_ids(rows: datasets.Dataset, split: str, folder: Path) -> list[str]:
    """The shadow run of each pair, where all of them are whole: no empty cells, and steps from 1 on."""
    table = rows.data
    chunks = [chunk for name in ("source_blocks", "target_blocks") for chunk in table.column(name).chunks]
    empty = sum(table.column(name).null_count for name in ("shadow_id", "step"))
    empty += sum(chunk.null_count + chunk.values.null_count for chunk in chunks)
    if empty or pc.min(table.column("step")).as_py() < 1:
        raise DeltaDatasetError(
            "A pair of the delta dataset is not whole.",
            path=folder,
            expected="shadow run, step from 1 on, and both deltas, in each row",
            found=f"{empty} empty cells in split {split}" if empty else f"a step below 1 in split {split}",
            remedy=_REMEDY,
        )
    return text_column(rows, "shadow_id")


def _checked_rows(rows: datasets.IterableDataset, folder: Path) -> Iterator[dict[str, Any]]:
    with typed_errors(folder):
        for row in rows:
            _check_row(row, folder)
            yield row


def _check_row(row: dict[str, Any], folder: Path) -> None:
    broken = row["shadow_id"] is None or row["step"] is None or row["step"] < 1
    for column in ("source_blocks", "target_blocks"):
        values = row[column]
        broken = broken or values is None or None in values or not math.isfinite(math.fsum(map(abs, values)))
    if broken:
        raise DeltaDatasetError(
            "A pair of the delta dataset is not whole, or not finite.",
            path=folder,
            found=f"run {row['shadow_id']}",
            remedy="build or download the dataset again",
        )


@contextmanager
def lean_arrow() -> Iterator[None]:
    """Arrow without threads and pools of its own, whose allocators keep what was freed: they grow with the file."""
    pool, threads, io_threads = pa.default_memory_pool(), pa.cpu_count(), pa.io_thread_count()
    pa.set_memory_pool(pa.system_memory_pool())
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    try:
        yield
    finally:
        pa.set_memory_pool(pool)
        pa.set_cpu_count(threads)
        pa.set_io_thread_count(io_threads)


@contextmanager
def typed_errors(folder: Path) -> Iterator[None]:
    """What Arrow and datasets say of a damaged file, as an error that names the dataset."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError, pa.ArrowException, DatasetsError) as cause:
        if isinstance(cause, GradTransformerError):
            raise
        raise DeltaDatasetError(
            "The pairs of the delta dataset cannot be read.",
            path=folder,
            found=describe_error(cause),
            remedy=_REMEDY,
        ) from cause
