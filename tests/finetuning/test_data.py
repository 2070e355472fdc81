"""What rows may look like, and in which order they are read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from grad_transformer.errors import DataError
from grad_transformer.finetuning import check_rows, load_rows, row_order


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"minimum": 1}}}


def load(tmp_path: Path, rows: list[dict[str, Any]], **arguments: Any) -> Dataset:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(path, **arguments)


def test_messages_end_in_the_turn_that_is_learned(tmp_path: Path) -> None:
    """All before the assistant's last turn is the prompt, earlier answers included; several messages are one turn."""
    before = [{"role": "system", "content": "s"}, USER, ASSISTANT, USER]
    rows = load(tmp_path, [{"messages": [*before, CALL, ASSISTANT]}, {"messages": [USER, ASSISTANT]}])
    assert rows.to_list() == [
        {"prompt": before, "completion": [CALL, ASSISTANT]},
        {"prompt": [USER], "completion": [ASSISTANT]},
    ]
    for messages, message in (
        ([USER], "do not end"),
        ([ASSISTANT], "nothing before"),
        ([], "not a list"),
        ("a", "not"),
    ):
        with pytest.raises(DataError, match=f"`messages` of line 1 .*{message}"):
            load(tmp_path, [{"messages": messages}])


def test_empty_cells_of_a_data_frame_are_missing(tmp_path: Path) -> None:
    alpaca = {"instruction": ["Add.", "Say hello."], "input": ["1 2", None], "output": ["3", "Hello."]}
    rows = check_rows(pandas.DataFrame({**alpaca, "task": [None, "hello"]}))
    assert rows["prompt"][1] == "### Instruction:\nSay hello.\n\n### Response:\n"
    assert rows["task"][:] == [None, "hello"]
    with pytest.raises(DataError, match="`completion` of row 1 is missing"):
        check_rows(pandas.DataFrame({"prompt": ["a", "b"], "completion": ["c", float("nan")]}))


def test_alpacas_columns_become_a_prompt_with_its_headings(tmp_path: Path) -> None:
    rows = load(
        tmp_path,
        [
            {"instruction": "Add.", "input": "1 2", "output": "3", "text": "ignored"},
            {"instruction": "Say hello.", "input": "", "output": "Hello."},
            {"instruction": "Say hello.", "output": "Hello."},
        ],
    )
    assert rows["completion"][:] == ["3", "Hello.", "Hello."]
    assert rows["prompt"][0] == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert rows["prompt"][1] == rows["prompt"][2] == "### Instruction:\nSay hello.\n\n### Response:\n"
    with pytest.raises(DataError, match="`output` of line 1 is not text"):
        load(tmp_path, [{"instruction": "a", "output": 3}])


def test_columns_can_be_named(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "prompt": "other", "completion": "other"}
    named = {"prompt_column": "question", "completion_column": "answer"}
    assert load(tmp_path, [row], **named).to_list() == [{"prompt": "q", "completion": "a"}]
    assert check_rows([row], **named).to_list() == [{"prompt": "q", "completion": "a"}]
    with pytest.raises(DataError, match="no column `answers`"):
        load(tmp_path, [row], completion_column="answers")


def test_dates_stay_text_in_messages_too(tmp_path: Path) -> None:
    chat = {"prompt": [USER], "completion": [{"role": "assistant", "content": "2024-03-01"}], "task": "2024-03-01"}
    assert load(tmp_path, [chat] * 5).to_list() == [chat] * 5


def test_parts_of_text_become_the_text_of_the_message() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rows = check_rows([{"prompt": [{"role": "user", "content": parts}], "completion": [ASSISTANT]}])
    assert rows[0]["prompt"] == [{"role": "user", "content": "ab"}]
    image = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
    with pytest.raises(DataError, match="`prompt` of row 0 is no text"):
        check_rows([{"prompt": image, "completion": [ASSISTANT]}])


def test_messages_and_tools_are_kept_as_they_are_and_not_filled_up_with_each_others_keys() -> None:
    rows = [
        {"prompt": [USER], "completion": [CALL], "tools": [TOOL]},
        {"prompt": [{**USER, "name": "x", "weight": 0.5, "nothing": None}], "completion": [ASSISTANT], "tools": None},
        {"prompt": [USER], "completion": [ASSISTANT], "tools": json.dumps([TOOL])},
    ]
    found = check_rows(rows).to_list()
    assert found[0] == rows[0]
    assert found[1]["prompt"] == [{**USER, "name": "x", "weight": 0.5}]
    assert [row["tools"] for row in found] == [[TOOL], None, [TOOL]]
    assert check_rows(check_rows(rows)).to_list() == found


def test_tasks_are_text_or_whole_numbers() -> None:
    row = {"prompt": "1", "completion": "2"}
    assert check_rows([{**row, "task": 7}, {**row, "task": np.int64(8)}, row])["task"][:] == ["7", "8", None]
    assert "task" not in check_rows([{**row, "task": None}]).column_names
    for task in (["x"], 1.5, True, {"a": 1}, float("nan")):
        with pytest.raises(DataError, match="`task` of row 1 is not text"):
            check_rows([{**row, "task": "x"}, {**row, "task": task}])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "1", "answer": "2"}], "no column `completion`"),
        ([{"text": "1"}], "no column `prompt` and no column `completion`"),
        ([{"prompt": "1", "completion": 2}], "`completion` of line 1"),
        (
            [{"prompt": "1", "completion": "2"}, {"prompt": "1", "completion": None}],
            "`completion` of line 2 is missing",
        ),
        ([{"prompt": "1", "completion": "2"}, {"prompt": "1"}], "`completion` of line 2 is missing"),
        ([{"prompt": [USER], "completion": "2"}], "`completion` of line 1"),
        ([{"prompt": [USER], "completion": [ASSISTANT]}, {"prompt": "1", "completion": "2"}], "`prompt` of line 2"),
        ([{"prompt": [], "completion": []}], "`prompt` of line 1"),
        ([{"prompt": [{"content": "1"}], "completion": [ASSISTANT]}], "`prompt` of line 1"),
        ([{"prompt": [USER], "completion": [{"role": "assistant", "content": None}]}], "has no content"),
        ([{"prompt": [USER], "completion": [{"role": "assistant", "content": 3}]}], "no text"),
        ([{"prompt": [{**USER, "x": 2**70}], "completion": [ASSISTANT]}], "what JSON cannot hold"),
        ([{"prompt": "1", "completion": ""}], "`completion` of line 1 is empty"),
        ([{"prompt": "1", "completion": " \n"}], "`completion` of line 1 is empty"),
        ([{"prompt": "", "completion": "1"}], "`prompt` of line 1 is empty"),
        (
            [{"prompt": [USER], "completion": [{"role": "assistant", "content": ""}]}],
            "`completion` of line 1 is empty",
        ),
        ([{"prompt": "1", "completion": "2", "tools": [TOOL]}], "`tools` of line 1 has no place"),
        ([{"prompt": [USER], "completion": [ASSISTANT], "tools": "f"}], "`tools` of line 1 is not a list"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, rows)
    assert str(tmp_path / "rows.jsonl") in str(error.value)


def test_what_is_no_rows_is_refused() -> None:
    rows = Dataset.from_list([{"prompt": "1", "completion": "2"}])
    frame = SimpleNamespace(columns=["prompt", "completion"], to_dict=lambda _: rows.to_list())
    assert check_rows(frame).to_list() == rows.to_list()  # type: ignore[arg-type]
    assert check_rows(iter(rows.to_list())).to_list() == rows.to_list()
    for other, message in (
        (DatasetDict(train=rows), 'rows\\["train"\\]'),
        ({"prompt": ["1"]}, "no rows"),
        ("rows.jsonl", "load_rows"),
        ([], "no rows"),
        (["a"], "Row 0 is no row"),
        (3, "no rows"),
    ):
        with pytest.raises(DataError, match=message):
            check_rows(other)  # type: ignore[arg-type]


def test_too_deep_messages_are_refused() -> None:
    value: Any = "x"
    for _ in range(100):
        value = [value]
    with pytest.raises(DataError, match="what JSON cannot hold"):
        check_rows([{"prompt": [{**USER, "x": value}], "completion": [ASSISTANT]}])


@given(st.integers(1, 30), st.integers(0, 100), st.integers(0, 2**31))
def test_rows_are_read_epoch_after_epoch(num_rows: int, needed: int, seed: int) -> None:
    order = row_order(num_rows, needed, seed)
    assert len(order) == needed
    for start in range(0, needed, num_rows):
        counts = Counter(order[start : start + num_rows])
        assert set(counts.values()) == {1}
        assert set(counts) <= set(range(num_rows))
    assert row_order(num_rows, needed + 5, seed)[:needed] == order


def test_the_order_of_a_seed_is_frozen() -> None:
    """A plan keeps the seed alone: the same seed must give the same order in every version."""
    assert row_order(8, 12, 0) == [2, 4, 3, 6, 5, 0, 1, 7, 1, 3, 7, 6]
    assert row_order(8, 12, 1) != row_order(8, 12, 0)
    assert row_order(8, 16, 0)[:8] != row_order(8, 16, 0)[8:]
