"""Two processes over gloo train as one does; the shipped configurations load; bfloat16 leaves float32 weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from grad_transformer.training import MapperArguments
from tests.training import worker
from tests.training.test_training import make_splits, roots, train  # noqa: F401 - a fixture
from tests.worlds import tiny_root


REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "examples" / "distributed").glob("*.yaml"))


def test_two_processes_train_as_one_does(roots, tmp_path):  # noqa: F811
    """Same global batch: same losses, same evaluation, and the same held-out figures, to 1e-4."""
    splits = make_splits(roots)
    # A number of pairs that steps divide: else the last step of an epoch repeats pairs in several processes.
    splits["train"] = splits["train"].select(range(64))
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    for side, root in zip(("source", "target"), roots, strict=True):
        root.save_pretrained(tmp_path / side)
    worker.main(tmp_path, 16)
    one = json.loads((tmp_path / "log.json").read_text())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.training.worker", str(tmp_path), "8"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "log.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, value in one["heldout"].items():
        assert two["heldout"][name] == pytest.approx(value, rel=1e-4, abs=1e-4)
    for name in ("loss", "grad_norm", "eval_loss", "eval_r2"):
        curves = [[entry[name] for entry in run["log_history"] if name in entry] for run in (one, two)]
        assert len(curves[0]) >= 2
        assert curves[1] == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_are_read_by_accelerate_without_complaint(path):
    assert load_config_from_file(str(path)).num_processes >= 2


@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_bfloat16_arithmetic_does_with_blocks_of_several_types(tmp_path, decoding):
    pattern = {"layers.1.self_attn.q_proj": 3}
    mixed = tiny_root(tmp_path / "tiny", rank_pattern=pattern), tiny_root(tmp_path / "large", rank_pattern=pattern)
    assert all(len(root.layout.type_widths) == 2 for root in mixed)
    mapper = MapperArguments(d_model=32, d_ff=64, num_layers=1, num_heads=2, decoding=decoding)
    short: dict[str, Any] = {"max_steps": 2, "logging_steps": 1, "eval_steps": 2, "save_steps": 2}
    losses = []
    for bf16 in (False, True):
        trainer, _ = train(mixed, make_splits(mixed), tmp_path / str(bf16), mapper=mapper, bf16=bf16, **short)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_bfloat16_arithmetic_keeps_weights_and_moments_in_float32(roots, tmp_path):  # noqa: F811
    losses: dict[bool, list[float]] = {}
    short: dict[str, Any] = {"max_steps": 12, "logging_steps": 1, "eval_steps": 12, "save_steps": 12}
    for bf16 in (False, True):
        trainer, heldout = train(roots, make_splits(roots), tmp_path / str(bf16), bf16=bf16, **short)
        losses[bf16] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
        assert moments and {moment.dtype for moment in moments} == {torch.float32}
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
