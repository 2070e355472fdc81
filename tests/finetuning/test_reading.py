"""Files of rows are read as they are written, or refused with file, line and cause."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from grad_transformer.errors import DataError
from grad_transformer.finetuning import RowSource, load_rows
from grad_transformer.finetuning.reading import MAX_LINE_BYTES
from grad_transformer.finetuning.sources import load_table


ROWS = [
    {"prompt": "?1 ?2 012345 >", "completion": "543210", "task": "reverse", "extra": "1"},
    {"prompt": 'a, "b"\nc', "completion": "NA", "task": "copy", "extra": "2"},
    {"prompt": "2024-03-01T00:00:00", "completion": "1.10", "task": "007", "extra": "3"},
]
KEPT = [{name: row[name] for name in ("prompt", "completion", "task")} for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.partition(".")[2]
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
        return path
    if kind.startswith(("csv", "tsv")):
        mark = "," if kind.startswith("csv") else "\t"
        quoted = [[f'"{value}"' for value in (text.replace('"', '""') for text in row.values())] for row in rows]
        text = "\n".join(mark.join(fields) for fields in [list(rows[0]), *quoted])
    else:
        lines = kind.startswith(("jsonl", "ndjson"))
        text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize(
    "kind", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "jsonl.gz", "json.gz", "csv.gz", "tsv.gz"]
)
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_every_format_gives_the_same_text(tmp_path: Path, kind: str, folder: bool) -> None:
    """Digits, dates and what looks like a missing value stay text, in CSV too."""
    path = write(tmp_path / "data" / f"train.{kind}", ROWS)
    rows = load_rows(path.parent if folder else path)
    assert rows.column_names == ["prompt", "completion", "task"]
    assert rows.to_list() == KEPT


def test_json_may_be_one_object_a_list_below_data_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text in (LINES, json.dumps({"data": ROWS}), json.dumps(ROWS, indent=2), "\ufeff" + json.dumps(ROWS)):
        path.write_text(text, encoding="utf-8")
        assert load_rows(path).to_list() == KEPT
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert load_rows(path).to_list() == KEPT[:1]


def test_a_path_is_a_name_and_no_pattern(tmp_path: Path) -> None:
    """A folder of another client whose name the pattern would match is never read."""
    write(tmp_path / "client-1" / "train.jsonl", ROWS)
    for name in ("client-[0-9]", "client-*", "client-?"):
        with pytest.raises(DataError, match="no such file"):
            load_rows(tmp_path / name)
        with pytest.raises(DataError, match="no such file"):
            load_rows(tmp_path / name / "train.jsonl")
    path = tmp_path / "rows [1] *.csv"
    write(path, ROWS)
    assert load_rows(path).to_list() == KEPT


def test_new_content_under_the_same_path_and_time_is_read_and_no_cache_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "rows.jsonl"
    for word in ("OLD", "NEW"):
        path.write_text(json.dumps({"prompt": word, "completion": "x"}) + "\n")
        os.utime(path, (1, 1))
        rows = load_rows(path)
        assert rows["prompt"][:] == [word]
        assert rows.cache_files == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.csv", b"prompt,completion\nCapital of France?,Paris,\n", ["Line 2 has 3 fields"]),
        ("a.csv", b"prompt,completion\na,b\n\nTotal\n", ["Line 4 has 1 fields"]),
        ("a.csv", b'prompt,completion\na,"b\nc\n', ["Line 2 is not valid CSV"]),
        ("a.csv", b'prompt,completion\na,"b"c\n', ["Line 2 is not valid CSV"]),
        ("a.csv", b"prompt,completion,prompt\na,b,c\n", ["same name", "'prompt'"]),
        ("a.csv", b"prompt,completion,\na,b,c\n", ["Line 2", "without a name", "index=False"]),
        ("a.csv", b"prompt;completion\na;b\n", ["no column `prompt`", "prompt;completion"]),
        ("a.csv", b"\n\n", ["is empty"]),
        ("a.jsonl", b"", ["no rows"]),
        ("a.jsonl", b" \n\n", ["no rows"]),
        ("a.json", b"[]", ["no rows"]),
        ("a.json", b"null", ["holds no rows"]),
        ("a.jsonl", b"null", ["Line 1 is not a JSON object"]),
        ("a.jsonl", LINES.encode() + b"null\n", ["Line 4 is not a JSON object"]),
        ("a.json", b"[null]", ["Row 0 is not a JSON object"]),
        ("a.jsonl", b"[" + LINES.encode()[:-1].replace(b"\n", b",") + b"]", ["Line 1", "called .json"]),
        ("a.jsonl", LINES.encode() + b'{"prompt": "a", "completion": "b"', ["Line 4 is not valid JSON", "column"]),
        ("a.jsonl", b'{"prompt": "a", "completion": NaN}', ["Line 1", "NaN"]),
        ("a.jsonl", b'{"prompt": "a", "prompt": "b", "completion": "c"}', ["Line 1", "'prompt'", "twice"]),
        ("a.jsonl", b'{"prompt": "a", "completion": "\\ud800"}', ["`completion` of line 1", "surrogate"]),
        ("a.jsonl", b'{"prompt": "a", "completion": ' + b"[" * 5000, ["Line 1", "deep"]),
        ("a.jsonl", b'{"prompt": "a", "completion": ' + b"1" * 5000 + b"}", ["Line 1"]),
        ("a.jsonl", b'{"prompt": "a"}\x00', ["zero byte"]),
        ("a.jsonl", LINES.encode() + b"\xff\xfe\n", ["Line 4 is not UTF-8", "0xff"]),
        ("a.jsonl", LINES.encode("utf-16"), ["UTF-16"]),
        ("a.csv", "prompt,completion\na,b\n".encode("utf-16-le"), ["zero byte"]),
        ("a.json", LINES.encode() + b"\xff", ["Line 4 is not UTF-8"]),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:-9], ["cannot be read", "EOFError"]),
        ("a.jsonl.gz", LINES.encode(), ["cannot be read", "gzip"]),
        ("a.parquet", b"PAR1" + LINES.encode() + b"PAR1", ["cannot be read"]),
        ("a.parquet", b"", ["cannot be read"]),
        ("a.parquet.gz", b"", ["this kind are not read"]),
        ("a.txt", b"a", ["this kind are not read"]),
    ],
)
def test_what_cannot_be_read_is_refused_with_file_line_and_cause(
    tmp_path: Path, name: str, content: bytes, parts: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load_rows(path)
    for part in [str(path), *parts]:
        assert part in str(error.value)


def test_limits_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "' + b"x" * MAX_LINE_BYTES + b'"}')
    with pytest.raises(DataError, match="Line 1 is too long"):
        load_rows(path)
    monkeypatch.setattr("grad_transformer.finetuning.reading.MAX_JSON_BYTES", 10)
    with pytest.raises(DataError, match="jsonl file of any size"):
        load_rows(write(tmp_path / "rows.json", ROWS))
    monkeypatch.setattr("grad_transformer.finetuning.reading.FREE_EXPANSION", 0)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b"\n" * 10**6))
    with pytest.raises(DataError, match="unpacks to too much"):
        load_rows(packed)
    fifo = tmp_path / "pipe.jsonl"
    os.mkfifo(fifo)
    with pytest.raises(DataError, match="no ordinary file"):
        load_rows(fifo)


def test_the_index_that_pandas_writes_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",prompt,completion\n0,a,b\n1,c,d\n")
    assert load_rows(path).to_list() == [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    path.write_text("prompt,completion,\na,b,\n")
    assert load_rows(path).to_list() == [{"prompt": "a", "completion": "b"}]


def test_only_the_columns_that_are_used_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table(
        {"prompt": ["a"], "completion": ["b"], "vector": [np.zeros(3)], "when": pa.array([2**62], "date64")}
    )
    pq.write_table(table, path)
    assert load_rows(path).to_list() == [{"prompt": "a", "completion": "b"}]


def test_a_part_of_a_split_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    prompts = [row["prompt"] for row in ROWS]
    for split, expected in (
        ("train[1:]", prompts[1:]),
        ("test[:2]", prompts[:2]),
        ("train[-1:]", prompts[-1:]),
        ("train[:34%]", prompts[:1]),
        ("train[1:2]", prompts[1:2]),
    ):
        assert load_rows(path, split=split)["prompt"][:] == expected
    for split in ("train[", "train[a:b]", "train+test", "", "a/b"):
        with pytest.raises(DataError, match="no split"):
            load_rows(path, split=split)


def test_names_in_a_folder_say_the_split(tmp_path: Path) -> None:
    for number, name in enumerate(("train-0.jsonl", "train-1.csv", "dev.jsonl")):
        write(tmp_path / "data" / name, ROWS[number:])
    (tmp_path / "README.md").write_text("rows")
    assert len(load_rows(tmp_path)) == 5
    assert len(load_rows(tmp_path, split="validation")) == 1
    with pytest.raises(DataError, match="no split 'test'"):
        load_rows(tmp_path, split="test")
    write(tmp_path / "data" / "more.jsonl", ROWS)
    with pytest.raises(DataError, match=r"others do not[\s\S]*more.jsonl"):
        load_rows(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no files of rows"):
        load_rows(tmp_path / "empty")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="to_parquet"):
        load_rows(tmp_path / "saved")


def test_a_table_with_any_columns_keeps_its_types(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "2024-03-01", "choices": {"label": ["A"], "value": [1, 2.5, null]}}\n')
    assert load_table(path) == [{"question": "2024-03-01", "choices": {"label": ["A"], "value": [1, 2.5, None]}}]


# What is a name on the Hub


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name.v2:main", ("org/name.v2", "main", None)),
        ("org/name:main@v1.0", ("org/name", "main", "v1.0")),
        ("https://huggingface.co/datasets/org/name", ("org/name", None, None)),
        ("https://huggingface.co/datasets/org/name/tree/v1.0/data", ("org/name", None, "v1.0")),
        ("https://huggingface.co/datasets/org/name/viewer/main/train?row=3", ("org/name", "main", None)),
        ("hf://datasets/org/name@v2", ("org/name", None, "v2")),
    ],
)
def test_datasets_on_the_hub_are_named_by_id_configuration_and_revision(text: str, expected: tuple[Any, ...]) -> None:
    source = RowSource.of(text)
    assert (source.path, source.name, source.revision) == expected
    with pytest.raises(DataError, match="Two revisions"):
        RowSource.of("org/name:main@v1", revision="v2")


@pytest.mark.parametrize(
    "text",
    [
        "word.jsonl",
        "rows.jsnol",
        "./rows",
        "/no/such",
        "rows",
        "org/rows.csv",
        "tests/rows",
        "a/b/c",
        "~/a",
        "C:\\rows",
    ]
    + ["org/na[m]e", "org/../x", "https://example.com/datasets/a/b", "a\0b", "x" * 5000, ""],
)
def test_what_is_plainly_a_path_is_never_looked_for_on_the_hub(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grad_transformer.finetuning.sources.load_dataset", None)
    with pytest.raises(DataError, match="no such file"):
        load_rows(text)


def test_a_file_of_nearly_that_name_is_suggested(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match="did you mean .*rows.jsonl"):
        load_rows(tmp_path / "rows.jsnol")


def test_a_dataset_on_the_hub_is_loaded_at_its_configuration_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def load(path: str, name: str | None, *, cache_dir: str | None, **arguments: Any) -> Dataset:
        calls.append({"path": path, "name": name, "kept": cache_dir is None, **arguments})
        labels = datasets.ClassLabel(names=["sum", "rev"])
        features = datasets.Features({"prompt": datasets.Value("string"), "completion": datasets.Value("string")})
        rows = {"prompt": ["a", "b"], "completion": ["c", "d"], "task": [1, -1]}
        return Dataset.from_dict(rows, features=datasets.Features({**features, "task": labels}))

    monkeypatch.setattr("grad_transformer.finetuning.sources.load_dataset", load)
    rows = load_rows("org/name:main@v1", split="test[:2]", keep_cache=False)
    assert rows["task"][:] == ["rev", None]
    expected = {"path": "org/name", "name": "main", "split": "test[:2]", "revision": "v1"}
    assert calls == [{**expected, "kept": False, "keep_in_memory": True}]

    def fail(*_: Any, **__: Any) -> None:
        try:
            raise ValueError("line 7 of data.csv")
        except ValueError as cause:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from cause

    monkeypatch.setattr("grad_transformer.finetuning.sources.load_dataset", fail)
    with pytest.raises(DataError, match="line 7 of data.csv"):
        load_rows("org/name")


def test_a_source_is_pinned_to_an_absolute_path_or_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert RowSource.of("rows.jsonl").pinned().path == str(tmp_path / "rows.jsonl")
    assert RowSource.of("org/name@" + "a" * 40).pinned().revision == "a" * 40


# Damaged files


def test_damaged_files_are_refused_with_typed_errors_alone(tmp_path: Path) -> None:
    """Bytes are flipped, cut out and doubled; what can be read is read, all else is a `DataError`."""
    draw = np.random.default_rng(0)
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "task": "x"}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat * 3))
    kinds = ("jsonl", "json", "csv", "tsv", "parquet", "csv.gz")
    seeds = [tmp_path / "chat.jsonl", *(write(tmp_path / f"rows.{kind}", ROWS) for kind in kinds)]
    refused = 0
    for round_ in range(40):
        for seed in seeds:
            content = bytearray(seed.read_bytes())
            for _ in range(draw.integers(1, 4)):
                start, size = int(draw.integers(len(content) or 1)), int(draw.integers(1, 8))
                noise, there = draw.bytes(size), bytes(content[start : start + size])
                content[start : start + size] = (noise, b"", there * 2)[int(draw.integers(3))]
            path = tmp_path / f"damaged-{round_ % 2}{''.join(seed.suffixes)}"
            path.write_bytes(content)
            try:
                load_rows(path)
            except DataError:
                refused += 1
    assert refused > 100
