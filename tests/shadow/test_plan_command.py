"""What `plan` finds out before any weight is loaded or anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from grad_transformer.lab import make_lab_tokenizer
from grad_transformer.shadow import ShadowPlan
from tests.worlds import tiny_qwen2


TEXT = [{"question": f"?1 {row:02d} >", "answer": f"{row:02d}", "task": f"t{row % 2}"} for row in range(20)]
CHAT = [
    {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
    for row in TEXT
]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}<eos>"


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two base models without weights beside the rows, by their relative names."""
    for name in ("tinylm", "llm"):
        tiny_qwen2(tmp_path / name)
        make_lab_tokenizer().save_pretrained(tmp_path / name)
    write(tmp_path / "text.jsonl", TEXT)
    write(tmp_path / "chat.jsonl", CHAT)
    monkeypatch.chdir(tmp_path)
    command = ["plan", "--output_dir", "shadows", "--source_model", "tinylm", "--target_model", "llm"]
    return [*command, "--num_runs", "4", "--rows_per_run", "4"]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def named(path: str) -> list[str]:
    return ["--data", path, "--prompt_column", "question", "--completion_column", "answer"]


def set_template(folder: str, template: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def test_a_plan_is_found_from_any_folder(
    arguments: list[str], run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run_cli(*arguments, *named("text.jsonl"), "--max_length", "6")
    assert outcome.code == 0, outcome.stderr
    assert "2 tasks" in outcome.stdout
    assert "TinyLM: 20 of 20 rows lose their end to max_length 6; the longest has 7 tokens" in outcome.stdout
    plan = ShadowPlan.load("shadows")
    assert plan.source.root["base_model"] == str(tmp_path / "tinylm")
    assert plan.data["path"] == str(tmp_path / "text.jsonl")
    monkeypatch.chdir("/")
    assert plan.load_rows(tmp_path / "shadows")["prompt"][:] == [row["question"] for row in TEXT]


def test_every_row_is_rendered_for_both_models_before_weights_are_loaded(
    arguments: list[str], run_cli: Any, tmp_path: Path
) -> None:
    for model in ("tinylm", "llm"):
        (tmp_path / model / "model.safetensors").unlink()
    set_template("tinylm", TEMPLATE)
    outcome = run_cli(*arguments, "--data", "chat.jsonl")
    assert outcome.code != 0
    assert "no chat template" in outcome.stderr and str(tmp_path / "llm") in outcome.stderr
    set_template("llm", "{% if '07' in messages[0]['content'] %}{{ raise_exception('seven') }}{% endif %}" + TEMPLATE)
    outcome = run_cli(*arguments, "--data", "chat.jsonl")
    assert "refuses row 7" in outcome.stderr and "seven" in outcome.stderr
    outcome = run_cli(*arguments, *named("text.jsonl"), "--max_length", "3")
    assert "Row 0 has no token to learn" in outcome.stderr
    assert not (tmp_path / "shadows").exists()


def test_tokens_that_a_model_has_no_embedding_for_are_refused(arguments: list[str], run_cli: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained("llm")
    tokenizer.add_tokens([f"<extra {number}>" for number in range(40)])
    tokenizer.save_pretrained("llm")
    rows = [{"prompt": "1", "completion": f"2<extra {39 if row == 5 else 0}>"} for row in range(8)]
    write(Path("text.jsonl"), rows)
    outcome = run_cli(*arguments, "--data", "text.jsonl", "--dry_run")
    assert outcome.code != 0
    assert "Row 5 has a token" in outcome.stderr


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--num_runs", "2", "--test_fraction", "0.5", "--validation_fraction", "0.5"], "No run is left"),
        (["--max_steps", "10000000"], "`max_steps`"),
        (["--num_runs", "10000000"], "`num_runs`"),
    ],
)
def test_sizes_are_checked_before_anything_is_read(
    arguments: list[str], run_cli: Any, extra: list[str], message: str
) -> None:
    for more in ([], ["--estimate"]):
        outcome = run_cli(*arguments, "--data", "nowhere.jsonl", *extra, *more)
        assert outcome.code != 0
        assert message in outcome.stderr
