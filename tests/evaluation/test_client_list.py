"""`clients.yaml` and the rows that it names: everything wrong is said before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from grad_transformer.errors import DataError, UsageError
from grad_transformer.evaluation.scoring import check_scorable
from grad_transformer.lab import make_lab_tokenizer
from grad_transformer.scripts._clients import read_clients


CLIENT = {"id": "a", "adapter": "client-a", "test_data": "test.jsonl"}


def read(tmp_path: Path, *entries: Any) -> list[dict[str, str]]:
    path = tmp_path / "clients.yaml"
    path.write_text(yaml.safe_dump(list(entries)))
    return read_clients(path)


def test_values_are_text_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    clients = read(tmp_path, {**CLIENT, "id": 7, "task": 12, "kind": "seen", "llm_adapter": None}, CLIENT)
    assert clients == [{**CLIENT, "id": "7", "task": "12", "kind": "seen"}, CLIENT]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([CLIENT, {**CLIENT, "adapter": "another"}], "same id"),
        ([{**CLIENT, "id": 7}, {**CLIENT, "id": "7"}], "same id"),
        ([{**CLIENT, "kind": "known"}], "`0.kind`: input should be 'seen'"),
        ([{**CLIENT, "kind": ["seen"]}], "`0.kind`"),
        ([CLIENT, {**CLIENT, "id": "b", "adapter": [5]}], "`1.adapter`"),
        ([{**CLIENT, "id": True}], "`0.id`"),
        ([{**CLIENT, "id": ""}], "`0.id`"),
        ([{**CLIENT, "id": "\x1b[2Jbank"}], "mislead a reader"),
        ([{**CLIENT, "test_data": None}], "`0.test_data`"),
        ([{**CLIENT, "colour": "blue"}], "`0.colour`: extra"),
        ([{**CLIENT, 5: "x"}], "`0.5`: extra"),
        ([{"id": "a"}], "`0.adapter`: field required"),
        ([], "at least 1 item"),
        (["a"], "`0`"),
    ],
)
def test_entries_that_cannot_be_used_are_refused(tmp_path: Path, entries: list[Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        read(tmp_path, *entries)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("content", [b"- [", b"\xff\xfe", b"- id: 2020-13-45", b"[" * 5000])
def test_files_that_are_no_yaml_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "clients.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError):
        read_clients(path)


def test_rows_are_looked_at_before_a_model_is_loaded() -> None:
    tokenizer = make_lab_tokenizer()
    row = {"prompt": "?1 >", "completion": "1"}
    check_scorable(tokenizer, [row, row])
    for rows, words in (
        ([row, {**row, "completion": ""}], "completion of row 1 is empty"),
        ([{"prompt": "?1 >"}], "no `completion`"),
        ([], "no rows"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            check_scorable(tokenizer, rows, path="test.jsonl")
        assert caught.value.path == "test.jsonl"
