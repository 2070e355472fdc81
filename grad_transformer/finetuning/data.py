"""Rows of text for fine-tuning: loaded, checked, and put in order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, Json, Value
from datasets.fingerprint import generate_random_fingerprint

from ..errors import DataError
from .columns import COMPLETION, PROMPT, TASK, TOOLS, ColumnNames, Example, RowShape, check_same_kind
from .reading import SourceRow
from .sources import RowSource, dataset_rows


# Rows of one piece of a table, whose text must stay below 2 GiB.
_ROWS_OF_A_PIECE = 100
_KEPT = "kept"
_COLUMNS = (PROMPT, COMPLETION, TASK, TOOLS, _KEPT)


def load_rows(
    path_or_repo: str | Path,
    *,
    split: str = "train",
    revision: str | None = None,
    name: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    keep_column: str | None = None,
    keep_cache: bool = True,
) -> Dataset:
    """Read rows and check them.

    A file is read strictly and as it is written: no type is guessed, no path is a pattern, nothing is cached, and an
    error names the line. Rows are `prompt` and `completion`; or `messages`, whose last turn of the assistant is the
    completion; or Alpaca's `instruction`, `input` and `output`.

    Args:
        path_or_repo (`str` or `Path`): a `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv` or `.parquet` file, all but the
            last also as `.gz`, in UTF-8; a folder of such files; or a dataset on the Hub, `org/name`,
            `org/name:configuration`, `org/name@revision`, or its pasted address.
        split (`str`, *optional*, defaults to `"train"`): split, or part of one (`"train[:1000]"`). A file has any.
        revision, name (`str`, *optional*): revision and configuration of a dataset on the Hub.
        prompt_column, completion_column (`str`, *optional*): where the columns are called otherwise.
        keep_column (`str`, *optional*): a further column that the result keeps, as text: the group of a row, say.
        keep_cache (`bool`, *optional*, defaults to `True`): whether `datasets` keeps its table of a dataset on the
            Hub.

    Returns:
        `datasets.Dataset` in memory, with columns `prompt` and `completion`, both strings or both lists of messages,
        and where there are some `task` (string) and `tools` (lists of JSON schemas).

    Raises:
        [`DataError`]: nothing to read there, no such split, a damaged file, a missing column, no rows, or a row that
            cannot be trained on: numbers, empty prompts and empty completions are refused.
    """
    source = RowSource.of(
        path_or_repo,
        split=split,
        revision=revision,
        name=name,
        prompt_column=prompt_column,
        completion_column=completion_column,
    )
    return load_source(source, keep_column=keep_column, keep_cache=keep_cache)


def load_source(source: RowSource, *, keep_column: str | None = None, keep_cache: bool = True) -> Dataset:
    """[`load_rows`] of a source."""

    try:
        columns = replace(source.columns, keep=keep_column)
        return _table(source.read(columns.choose, keep_cache=keep_cache), columns, path=source.path)
    except DataError as error:
        if error.path is not None:
            raise
        raise DataError(
            error.message, path=source.path, expected=error.expected, found=error.found, remedy=error.remedy
        ) from error


def check_rows(
    rows: Dataset | Iterable[Mapping[str, Any]],
    *,
    path: str | Path | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    allow_empty: bool = False,
) -> Dataset:
    """Keep the columns that are used, and refuse rows that cannot be trained on.

    Args:
        rows (`Dataset` or `Iterable[Mapping]`): a dataset, a list of dicts, or a pandas DataFrame; columns as in
            [`load_rows`].
        path (`str` or `Path`, *optional*): where they are from, for messages.
        prompt_column, completion_column (`str`, *optional*): where the columns are called otherwise.
        allow_empty (`bool`, *optional*, defaults to `False`): whether completions may be empty, as those that a model
            wrote.

    Returns:
        as [`load_rows`].

    Raises:
        [`DataError`]: as [`load_rows`], or something that is no rows.
    """

    columns = ColumnNames(prompt_column, completion_column)
    given = dataset_rows(rows, columns.choose, path=path) if isinstance(rows, Dataset) else _given_rows(rows, path)
    return _table(given, columns, path=path, allow_empty=allow_empty)


def row_order(num_rows: int, num_examples_needed: int, seed: int) -> list[int]:
    """Which row is read when: one seeded permutation of the rows after the other, cut after `num_examples_needed`.

    The order of a shorter fine-tune is the beginning of that of a longer one with the same seed.
    """
    assert num_rows > 0
    epochs = -(-num_examples_needed // num_rows)
    order = [np.random.default_rng([seed, epoch]).permutation(num_rows) for epoch in range(epochs)]
    return np.concatenate(order)[:num_examples_needed].tolist() if order else []


def _given_rows(rows: Any, path: str | Path | None) -> Iterator[SourceRow]:
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        rows = map(_without_nan, rows.to_dict("records"))  # a pandas DataFrame
    if isinstance(rows, Mapping | str | bytes) or not isinstance(rows, Iterable):
        splits = isinstance(rows, Mapping) and all(isinstance(value, Dataset) for value in rows.values())
        raise DataError(
            "These are no rows.",
            path=path,
            expected="a Dataset, a list of dicts, or a DataFrame",
            found=f"{type(rows).__name__}" + (f" of splits {', '.join(map(str, rows))}" if splits else ""),
            remedy='choose a split: rows["train"]' if splits else "load files with `load_rows`",
        )
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(
                f"Row {index} is no row.", path=path, expected="a dict of columns", found=type(row).__name__
            )
        yield SourceRow(path, f"row {index}", row)


def _without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of pandas, whose empty cells are NaN."""
    return {name: None if isinstance(value, float) and value != value else value for name, value in row.items()}


def _table(
    rows: Iterable[SourceRow], columns: ColumnNames, *, path: str | Path | None, allow_empty: bool = False
) -> Dataset:
    """Checked rows as an Arrow table in memory, which grows piece by piece."""
    first: Example | None = None
    shape: RowShape | None = None
    pieces: list[pa.RecordBatch] = []
    piece: list[Example] = []
    for row in rows:
        shape = shape or columns.shape(row.values)
        example = shape.read(row, allow_empty=allow_empty)
        first = first or example
        check_same_kind(row, example, first)
        piece.append(example)
        if len(piece) == _ROWS_OF_A_PIECE:
            pieces.append(_piece(piece, first.conversational))
            piece = []
    if first is None:
        raise DataError(
            "There are no rows.",
            path=path,
            expected="at least one row",
            found=0,
            remedy="check the file and the split",
        )
    if piece:
        pieces.append(_piece(piece, first.conversational))
    table = pa.Table.from_batches(pieces)
    table = table.drop_columns([name for name in (TASK, TOOLS, _KEPT) if table[name].null_count == len(table)])
    if _KEPT in table.column_names:
        known = columns.keep in table.column_names
        table = table.drop_columns([_KEPT]) if known else table.rename_columns({_KEPT: str(columns.keep)})
    text = Json() if first.conversational else Value("string")
    kinds = {PROMPT: text, COMPLETION: text, TOOLS: Json()}
    info = DatasetInfo(features=Features({name: kinds.get(name, Value("string")) for name in table.column_names}))
    # A fingerprint of its own: `datasets` would hash all of the table for one.
    return Dataset(table, info=info, fingerprint=generate_random_fingerprint())


def _piece(examples: list[Example], conversational: bool) -> pa.RecordBatch:
    columns = {name: [getattr(example, name) for example in examples] for name in _COLUMNS}
    as_json = {PROMPT: conversational, COMPLETION: conversational, TOOLS: True}
    return pa.RecordBatch.from_pydict(
        {
            name: _json(values) if as_json.get(name) else pa.array(values, pa.string())
            for name, values in columns.items()
        }
    )


def _json(values: list[Any]) -> pa.Array:
    texts = [None if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False) for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))
