"""Where rows come from: a file or folder of this machine, or a dataset on the Hub. What is a name is decided here."""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset, load_dataset
from datasets.exceptions import DatasetsError

from ..errors import DataError, GradTransformerError
from ..files import nearest_path
from ..hub import resolve
from ..hub.transfer import TRANSFER_ERRORS, redact
from ..wording import describe_error
from .columns import ColumnNames
from .reading import KINDS, Choose, SourceRow, find_files, kind_of, read_files


_ID = r"[\w-][\w.-]*/[\w.-]+"
_NAME = re.compile(rf"(?P<path>{_ID})(?::(?P<name>[\w.+-]+))?(?:@(?P<revision>[\w.+/-]+))?")
_URL = re.compile(
    rf"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)datasets/(?P<path>{_ID})(?:@(?P<revision>[\w.+-]+))?"
    r"(?:/(?:tree|blob|resolve)/(?P<tree>[\w.+-]+)(?:/.*)?|/viewer(?:/(?P<name>[\w.+-]+)(?:/[\w.+-]+)?)?)?/?(?:[?#].*)?"
)
_SPLIT = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
# Suffixes of files, which no dataset's name has.
_FILE_SUFFIXES = {*KINDS, ".gz", ".arrow", ".txt", ".xlsx", ".yaml", ".zip", ".zst", ".xz"}


@dataclass(frozen=True)
class RowSource:
    """Where rows come from, and how they are read.

    Args:
        path (`str`): a file, a folder, or a dataset on the Hub: `org/name`, `org/name:configuration`,
            `org/name@revision`, or its pasted address.
        split (`str`, *optional*, defaults to `"train"`): split, or part of one (`"train[:1000]"`, `"train[10%:20%]"`).
        revision, name (`str`, *optional*): of a dataset on the Hub: revision and configuration.
        prompt_column, completion_column (`str`, *optional*): where the columns are called otherwise.
    """

    path: str
    split: str = "train"
    revision: str | None = None
    name: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None

    @property
    def columns(self) -> ColumnNames:
        return ColumnNames(self.prompt_column, self.completion_column)

    @property
    def is_local(self) -> bool:
        return os.path.exists(self.path)

    @classmethod
    def of(cls, path: str | Path, **arguments: Any) -> RowSource:
        """A source whose `path` is a path, or the bare id of a dataset.

        Raises:
            [`DataError`]: neither a file, nor a folder, nor what could be an id; or two revisions.
        """
        source = cls(str(path), **arguments)
        if source.is_local:
            return source
        match = _URL.fullmatch(source.path) or _NAME.fullmatch(source.path)
        if match is None or _is_file_name(match["path"]):
            raise _no_such_file(source.path)
        found = match.groupdict()
        revisions = {value for value in (found.get("tree"), found["revision"], source.revision) if value}
        names = {value for value in (found["name"], source.name) if value}
        if len(revisions) > 1 or len(names) > 1:
            raise DataError(
                "Two revisions or configurations are given.",
                path=source.path,
                expected="one",
                found=", ".join(sorted(revisions if len(revisions) > 1 else names)),
                remedy="give it once: in the name, or with the flag",
            )
        return replace(source, path=found["path"], revision=next(iter(revisions), None), name=next(iter(names), None))

    def pinned(self) -> RowSource:
        """The same rows from anywhere and at any time: an absolute path, or a commit.

        Raises:
            [`HubError`]: no such dataset or revision, or no network.
        """
        if self.is_local:
            return replace(self, path=str(Path(self.path).resolve()))
        return replace(self, revision=resolve(self.path, revision=self.revision, repo_type="dataset").sha)

    def to_dict(self) -> dict[str, str]:
        """What is known, as [`RowSource`] takes it."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def read(self, choose: Choose = list, *, keep_cache: bool = True) -> Iterator[SourceRow]:
        """The rows, one after the other; those of a local file never touch a cache.

        Args:
            choose (`Callable`, *optional*): the wanted ones of a table's columns, from the names of all.
            keep_cache (`bool`, *optional*, defaults to `True`): whether `datasets` keeps its table of a dataset on the
                Hub. The download itself stays where huggingface_hub keeps downloads.

        Raises:
            [`DataError`]: nothing to read there, or no such split.
        """
        if not self.is_local:
            yield from dataset_rows(self.load_from_hub(keep_cache=keep_cache), choose, path=self.path)
            return
        split, start, stop = self._parts()
        files = find_files(Path(self.path), split)
        if _is_relative(start) or _is_relative(stop):
            # Counted first: no rows are kept.
            total = sum(1 for _ in read_files(files, choose))
            start, stop = _bound(start, total), _bound(stop, total)
        yield from islice(read_files(files, choose), int(start or 0), None if stop is None else int(stop))

    def _parts(self) -> tuple[str, str | int | None, str | int | None]:
        match = _SPLIT.fullmatch(self.split)
        if match is None:
            raise DataError(
                "That is no split of a file or folder.",
                path=self.path,
                expected="train, train[:1000] or train[10%:20%]",
                found=repr(self.split[:80]),
            )
        return match["name"], match["start"], match["stop"]

    def load_from_hub(self, *, keep_cache: bool = True) -> Dataset:
        """The whole table, as `datasets` loads it; arguments and errors as in [`~RowSource.read`]."""
        with nullcontext(None) if keep_cache else tempfile.TemporaryDirectory() as cache:
            try:
                return load_dataset(
                    self.path,
                    self.name,
                    split=self.split,
                    revision=self.revision,
                    cache_dir=cache,
                    keep_in_memory=not keep_cache,
                )
            except (*TRANSFER_ERRORS, ValueError, TypeError, LookupError, pa.ArrowException, DatasetsError) as cause:
                if isinstance(cause, GradTransformerError):
                    raise
                raise DataError(
                    "The dataset cannot be loaded from the Hub.",
                    path=self.path,
                    expected=f"split {self.split!r}"
                    + (f" of configuration {self.name!r}" if self.name else "")
                    + (f" at {self.revision}" if self.revision else "")
                    + " of a dataset on the Hub",
                    found=_innermost(cause),
                    remedy="check the name, the split, the network and your access token; `org/name:configuration` "
                    "names a configuration",
                ) from cause


def dataset_rows(rows: Dataset, choose: Choose, *, path: str | Path | None = None) -> Iterator[SourceRow]:
    """The rows of a dataset that is loaded; labels of classes by their names."""
    table = rows.with_format(None).select_columns(list(choose(rows.column_names)))
    labels = {name: feature for name, feature in table.features.items() if isinstance(feature, ClassLabel)}
    for index, values in enumerate(table):
        for name, feature in labels.items():
            values[name] = None if values[name] in (None, -1) else feature.int2str(values[name])
        yield SourceRow(path, f"row {index}", values)


def load_table(
    path_or_repo: str | Path, *, split: str = "train", revision: str | None = None, name: str | None = None
) -> list[dict[str, Any]] | Dataset:
    """Read a table with any columns; arguments and errors as in [`load_rows`]."""
    source = RowSource.of(path_or_repo, split=split, revision=revision, name=name)
    if source.is_local:
        return [dict(row.values) for row in source.read()]
    return source.load_from_hub()


def _is_relative(bound: str | int | None) -> bool:
    return isinstance(bound, str) and (bound.startswith("-") or bound.endswith("%"))


def _bound(bound: str | int | None, total: int) -> int | None:
    """A bound of a slice as a number of rows, as `datasets` counts them."""
    if bound is None:
        return None
    text = str(bound)
    number = round(total * int(text[:-1]) / 100) if text.endswith("%") else int(text)
    return min(max(number + total if number < 0 else number, 0), total)


def _is_file_name(text: str) -> bool:
    """Whether what is no file was meant as one: its suffix, nearly, or its folder says so."""
    path = Path(text)
    suffix = path.suffix.lower()
    close = difflib.get_close_matches(suffix, _FILE_SUFFIXES, n=1, cutoff=0.75) if suffix else []
    return suffix in _FILE_SUFFIXES or bool(close) or path.parent.is_dir()


def _no_such_file(text: str) -> DataError:
    path = Path(text)
    try:
        beside = [file.name for file in path.parent.iterdir() if kind_of(file) or file.is_dir()]
    except (OSError, ValueError):
        beside = []
    return DataError(
        "There is no such file or folder of rows.",
        path=text,
        expected="a file, a folder, or a dataset on the Hub as org/name, org/name:configuration or org/name@revision",
        found="nothing",
        remedy=nearest_path(path, beside),
    )


def _innermost(cause: BaseException) -> str:
    """What went wrong first: `datasets` says little on the outside."""
    for _ in range(10):
        if cause.__cause__ is None:
            break
        cause = cause.__cause__
    return redact(describe_error(cause))
