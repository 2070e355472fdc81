"""A killed `run_shadows` loses the run in progress and no other; the next one does what is missing."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grad_transformer import create_root
from grad_transformer.adapters.io import write_text_atomic
from grad_transformer.finetuning import FineTuningRecipe, load_rows
from grad_transformer.lab import make_lab_tokenizer
from grad_transformer.shadow import ShadowPlan, missing_runs, plan_shadows, run_shadows
from tests.worlds import lora, tiny_qwen2


# Enough that the process is killed before it ends, few enough to finish them soon.
NUM_RUNS = {"trl": 8, "batched": 40}
SCRIPT = """
import sys
from grad_transformer.shadow import run_shadows

run_shadows(sys.argv[1], roles=["source"], engine=sys.argv[2], adapters_per_batch=2)
"""


def make_plan(tmp_path: Path, num_runs: int) -> Path:
    base = tiny_qwen2(tmp_path / "base")
    make_lab_tokenizer().save_pretrained(base)
    rows = "".join(f'{{"prompt": "?1 ?2 {row:04d} >", "completion": "{9999 - row:04d}"}}\n' for row in range(60))
    write_text_atomic(tmp_path / "public.jsonl", rows)
    plan_dir = tmp_path / "plan"
    roots = [create_root(base, lora(), output_dir=plan_dir / f"{role}_root") for role in ("source", "target")]
    recipe = FineTuningRecipe(learning_rate=1e-2, max_steps=8, per_device_batch_size=4, warmup_steps=1, max_length=16)
    plan_shadows(
        load_rows(tmp_path / "public.jsonl"),
        num_runs=num_runs,
        rows_per_run=8,
        source_root=roots[0],
        target_root=roots[1],
        source_recipe=recipe,
        target_recipe=recipe,
        data={"path": str(tmp_path / "public.jsonl")},
    ).save(plan_dir)
    return plan_dir


def finished(plan_dir: Path) -> dict[str, tuple[int, str]]:
    """Time of the last change and digest of every run's file."""
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted((plan_dir / "runs" / "source").glob("*.safetensors"))
    }


@pytest.mark.parametrize("engine", NUM_RUNS)
def test_killed_and_started_again(tmp_path: Path, engine: str) -> None:
    num_runs = NUM_RUNS[engine]
    plan_dir = make_plan(tmp_path, num_runs)
    plan = ShadowPlan.load(plan_dir)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(plan_dir), engine],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(finished(plan_dir)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"

    before = finished(plan_dir)
    missing = missing_runs(plan, plan_dir, "source")
    assert 3 <= len(before) < num_runs
    assert len(missing) == num_runs - len(before)
    done = run_shadows(plan_dir, roles=["source"], engine=engine, adapters_per_batch=2)  # type: ignore[arg-type]
    assert done == {"source": len(missing)}
    after = finished(plan_dir)
    assert len(after) == num_runs
    assert {name: after[name] for name in before} == before

    # A run done after the restart is what it would have been without it.
    redone = plan_dir / "runs" / "source" / f"{missing[0]}.safetensors"
    tensors = load_file(redone)
    redone.unlink()
    assert run_shadows(plan_dir, roles=["source"], engine="trl") == {"source": 1}
    for key, value in load_file(redone).items():
        torch.testing.assert_close(value, tensors[key], rtol=1e-4, atol=1e-6)
    assert run_shadows(plan_dir, roles=["source"]) == {"source": 0}
