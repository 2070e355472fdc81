"""Rows become the tokens that are trained on, asked and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from grad_transformer.errors import DataError
from grad_transformer.evaluation.scoring import completion_nll, generate_tokens, score_rows
from grad_transformer.finetuning import check_rows, count_tokens, tokenize_rows


ROWS = [
    {"prompt": "?1 ?2 012345 >", "completion": "543210"},
    {"prompt": "?1 ?2 4 >", "completion": "4"},
    {"prompt": "?1 ?2 007 >", "completion": "700<eos>"},
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


def tiny_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
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
    return Qwen2ForCausalLM(config).eval()


def adds(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Make the tokenizer put special tokens around every text."""
    eos, first = ("<eos>", tokenizer.eos_token_id), ("g0", tokenizer.convert_tokens_to_ids("g0"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[eos, first])


def test_the_loss_is_on_the_completion_and_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenize_rows(check_rows(ROWS), tokenizer, max_length=32)
    for row, ids, labels in zip(ROWS, tokens["input_ids"], tokens["labels"], strict=True):
        learned = [label for label in labels if label != -100]
        completion = row["completion"].removesuffix("<eos>")
        assert learned == tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]
        assert ids[-len(learned) :] == learned
        assert ids[: -len(learned)] == tokenizer(row["prompt"])["input_ids"]


def test_a_tokenizer_that_appends_its_end_token_is_asked_before_it_and_taught_one(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    plain = tokenize_rows(check_rows(ROWS), tokenizer, 32).to_list()
    model = tiny_model(tokenizer)
    asked = generate_tokens(model, tokenizer, ROWS, max_new_tokens=2)
    losses = completion_nll(model, tokenizer, ROWS)
    adds(tokenizer, "$A <eos>")
    assert tokenizer("4")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenize_rows(check_rows(ROWS), tokenizer, 32).to_list() == plain
    assert generate_tokens(model, tokenizer, ROWS, max_new_tokens=2) == asked
    assert completion_nll(model, tokenizer, ROWS).tolist() == losses.tolist()
    first = tokenizer.convert_tokens_to_ids("g0")
    adds(tokenizer, "g0 $A <eos>")
    tokens = tokenize_rows(check_rows(ROWS), tokenizer, 32)["input_ids"]
    assert [ids[0] for ids in tokens] == [first] * 3
    assert [ids[1:] for ids in tokens] == [row["input_ids"] for row in plain]
    assert generate_tokens(model, tokenizer, ROWS, max_new_tokens=2)[0][0] == [first, *asked[0][0]]


def test_an_empty_completion_that_a_model_wrote_is_its_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = check_rows([{"prompt": "1", "completion": ""}], allow_empty=True)
    assert tokenize_rows(rows, tokenizer, 8)[0]["labels"] == [-100, tokenizer.eos_token_id]


def test_truncation_keeps_the_start_and_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = check_rows(ROWS)
    whole = tokenize_rows(rows, tokenizer, max_length=32)[0]
    cut = tokenize_rows(rows, tokenizer, max_length=11)[0]
    assert cut == {key: value[:11] for key, value in whole.items()}
    counts = count_tokens(rows, tokenizer, 11)
    assert (counts.rows, counts.truncated, counts.longest) == (3, 1, len(whole["input_ids"]))
    assert counts.largest_id == max(max(ids) for ids in tokenize_rows(rows, tokenizer, 32)["input_ids"])


def test_a_row_without_a_label_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="Row 1 has no token to learn"):
        tokenize_rows(check_rows([ROWS[1], ROWS[0]]), tokenizer, max_length=9)


def test_tokenizers_that_cannot_say_where_an_answer_ends_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="chat template"):
        tokenize_rows(check_rows([conversation(ROWS[0])]), tokenizer, max_length=64)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end token"):
        tokenize_rows(check_rows(ROWS), tokenizer, max_length=64)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0]['content'] + 3 }}", "TypeError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_what_a_chat_template_refuses_names_row_and_reason(
    tokenizer: PreTrainedTokenizerBase, template: str, found: str
) -> None:
    rows = check_rows([conversation(row) for row in ROWS[:2]])
    second = "{% if messages[1]['content'] == '?1 ?2 4 >' %}"
    tokenizer.chat_template = second + template + "{% endif %}" + CHAT_TEMPLATE
    with pytest.raises(DataError, match=rf"refuses row 1[\s\S]*{found}"):
        tokenize_rows(rows, tokenizer, 64)
    with pytest.raises(DataError, match=rf"refuses row 1[\s\S]*{found}"):
        score_rows(tiny_model(tokenizer), tokenizer, rows)


def test_a_chat_template_that_is_none_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(DataError, match=r"refuses row 0[\s\S]*TemplateSyntaxError"):
        tokenize_rows(check_rows([conversation(ROWS[0])]), tokenizer, 64)


def test_tools_reach_the_chat_template_or_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {**conversation(ROWS[0]), "tools": [{"name": "7"}]}
    tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(DataError, match="does not show the `tools` of row 0"):
        tokenize_rows(check_rows([row]), tokenizer, 64)
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}" + CHAT_TEMPLATE
    (ids,) = tokenize_rows(check_rows([row]), tokenizer, 64)["input_ids"]
    without = tokenize_rows(check_rows([{**row, "tools": None}]), tokenizer, 64)["input_ids"][0]
    assert ids == [*tokenizer("7")["input_ids"], *without]
    (asked, _), *_ = generate_tokens(tiny_model(tokenizer), tokenizer, check_rows([row]), max_new_tokens=1)
    assert asked == ids[: len(asked)] and asked[:1] == ids[:1]
    call = {"role": "assistant", "content": "1", "tool_calls": [{"name": "7"}]}
    with pytest.raises(DataError, match="does not show the `tool_calls` of row 0"):
        tokenize_rows(check_rows([{"prompt": row["prompt"], "completion": [call]}]), tokenizer, 64)


@pytest.mark.parametrize(("conversational", "max_length"), [(False, 11), (False, 64), (True, 14), (True, 64)])
def test_trl_makes_the_same_tokens_and_labels(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, conversational: bool, max_length: int
) -> None:
    rows = check_rows([conversation(row) for row in ROWS[1:]] if conversational else ROWS)
    tokenizer.chat_template = CHAT_TEMPLATE
    args = SFTConfig(output_dir=str(tmp_path), max_length=max_length, report_to="none", bf16=False)
    trainer = SFTTrainer(tiny_model(tokenizer), args, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train_dataset is not None
    theirs = trainer.train_dataset.select_columns(["input_ids", "labels"]).to_list()
    assert tokenize_rows(rows, tokenizer, max_length).to_list() == theirs
