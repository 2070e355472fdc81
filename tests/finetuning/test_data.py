from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from grad_transformer.errors import DataError
from grad_transformer.finetuning import check_rows, load_rows, row_order, tokenize_rows


ROWS = [
    {"prompt": "?1 ?2 012345 >", "completion": "543210", "task": "reverse", "extra": "1"},
    {"prompt": "?1 ?2 4 >", "completion": "4", "task": "copy", "extra": "2"},
    {"prompt": "?1 ?2 007 >", "completion": "700<eos>", "task": "reverse", "extra": "3"},
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ {'system': 'g0', 'user': 'f0', 'assistant': 'f1'}[message['role']] }}"
    "{{ message['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}f1{% endif %}"
)


def conversation(row: dict[str, str]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "system", "content": "9"}, {"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"].removesuffix("<eos>")}],
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path, index=False)
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_every_format_gives_the_same_text(tmp_path: Path, suffix: str, folder: bool) -> None:
    """Digits stay text, leading zeros included, in CSV too."""
    path = write(tmp_path / "data" / f"train.{suffix}", ROWS)
    rows = load_rows(path.parent if folder else path)
    assert rows.column_names == ["prompt", "completion", "task"]
    assert rows.to_list() == [{key: row[key] for key in rows.column_names} for row in ROWS]


def test_a_part_of_a_split_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert load_rows(path, split="train[1:]")["prompt"] == [row["prompt"] for row in ROWS[1:]]


def test_words_that_pandas_takes_for_missing_stay_words(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion\nNA,null\n1,\n")
    assert load_rows(tmp_path / "rows.csv").to_list() == [
        {"prompt": "NA", "completion": "null"},
        {"prompt": "1", "completion": ""},
    ]


def test_a_task_that_is_a_number_becomes_text(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "1", "completion": "2", "task": 7}])
    assert load_rows(path)["task"] == ["7"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "1", "answer": "2"}], "no column `completion`"),
        ([{"text": "1"}], "no column `prompt` and no column `completion`"),
        ([{"prompt": "1", "completion": 2}], "`completion` of row 0"),
        ([{"prompt": "1", "completion": "2"}, {"prompt": "1", "completion": None}], "`completion` of row 1"),
        ([{"prompt": [{"role": "user", "content": "1"}], "completion": "2"}], "`completion` of row 0"),
        ([{"prompt": [], "completion": []}], "`prompt` of row 0"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path / "rows.jsonl", rows))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.txt").write_text("1")
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "empty.csv").write_text("prompt,completion\n")
    for path, split in (
        (tmp_path / "nowhere", "train"),
        (tmp_path / "rows.txt", "train"),
        (tmp_path / "broken.jsonl", "train"),
        (tmp_path / "empty.csv", "train"),
        ("nobody/no-such-dataset", "train"),
    ):
        with pytest.raises(DataError) as error:
            load_rows(path, split=split)
        assert str(path) in str(error.value)
    write(tmp_path / "folder" / "train.jsonl", ROWS)
    with pytest.raises(DataError, match="validation"):
        load_rows(tmp_path / "folder", split="validation")


def test_the_loss_is_on_the_completion_and_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenize_rows(check_rows(ROWS), tokenizer, max_length=32)
    for row, ids, labels in zip(ROWS, tokens["input_ids"], tokens["labels"], strict=True):
        learned = [label for label in labels if label != -100]
        completion = row["completion"].removesuffix("<eos>")
        assert learned == tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]
        assert ids[-len(learned) :] == learned
        assert ids[: -len(learned)] == tokenizer(row["prompt"])["input_ids"]


def test_truncation_keeps_the_start(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = tokenize_rows(check_rows(ROWS[:1]), tokenizer, max_length=32)[0]
    cut = tokenize_rows(check_rows(ROWS[:1]), tokenizer, max_length=11)[0]
    assert cut == {key: value[:11] for key, value in whole.items()}


def test_a_row_without_a_label_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="Row 1 has no token to learn"):
        tokenize_rows(check_rows([ROWS[1], ROWS[0]]), tokenizer, max_length=9)


def test_tokenizers_that_cannot_say_where_an_answer_ends_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="chat template"):
        tokenize_rows(check_rows([conversation(ROWS[0])]), tokenizer, max_length=64)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end token"):
        tokenize_rows(check_rows(ROWS), tokenizer, max_length=64)


@pytest.mark.parametrize(("conversational", "max_length"), [(False, 11), (False, 64), (True, 14), (True, 64)])
def test_trl_makes_the_same_tokens_and_labels(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, conversational: bool, max_length: int
) -> None:
    raw = [conversation(row) for row in ROWS[1:]] if conversational else [dict(row) for row in ROWS]
    rows = check_rows([{key: row[key] for key in ("prompt", "completion")} for row in raw])
    tokenizer.chat_template = CHAT_TEMPLATE
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    args = SFTConfig(output_dir=str(tmp_path), max_length=max_length, report_to="none", bf16=False)
    trainer = SFTTrainer(Qwen2ForCausalLM(config), args, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train_dataset is not None
    theirs = trainer.train_dataset.select_columns(["input_ids", "labels"]).to_list()
    assert tokenize_rows(rows, tokenizer, max_length).to_list() == theirs


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
