"""The line that a training mapper shows."""

from __future__ import annotations

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from grad_transformer.training.progress import TrainingProgress


def test_logs_become_words_behind_one_bar(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    args, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(max_steps=10, is_world_process_zero=True)
    before = logging.is_progress_bar_enabled()
    progress = TrainingProgress()
    progress.on_train_begin(args, state, control)
    assert not logging.is_progress_bar_enabled(), "one bar at a time"
    for logs in ({"loss": 0.5, "grad_norm": 0.1, "epoch": 1.0}, {"eval_r2": 0.25, "eval_block_mse_0": 1.0}):
        state.global_step += 5
        progress.on_log(args, state, control, logs=logs)
        progress.on_prediction_step(args, state, control)
        progress.on_step_end(args, state, control)
    progress.on_train_end(args, state, control)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "step 10 of 10, loss 0.500, validation R² 0.250" in printed.err
    assert "{" not in printed.err and "grad_norm" not in printed.err
    assert logging.is_progress_bar_enabled() is before
