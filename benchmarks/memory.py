"""Peak memory of building a delta dataset, and of training on it, with few pairs and with many.

    python -m benchmarks.memory --output memory.json

For each shape and number of pairs a plan and its run files are written (random walks of ten snapshots for each run).
Then three processes run: `build_delta_dataset`; loading, statistics, training with an evaluation on validation runs,
and held-out figures on test runs; and all of `grad-transformer train`, which also fits nearest shadow, the shift
reference and ridge (whose matrices are at most 4,096 x 4,096: it grows up to that many pairs). Every 20 ms each
process reads its own `RssAnon`: what it has allocated. Pages of memory-mapped files count as resident too while the
system finds room for them, and are given back when it does not; the table shows the peak of both together (`RSS`)
beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from benchmarks.lab import markdown
from grad_transformer import Root, create_root
from grad_transformer.finetuning import FineTuningRecipe
from grad_transformer.finetuning.sft import SftResult
from grad_transformer.scripts._training import train
from grad_transformer.shadow import build_delta_dataset, load_delta_dataset, plan_shadows
from grad_transformer.shadow.records import write_run
from grad_transformer.training import (
    GradTransformerTrainingArguments,
    MapperArguments,
    build_mapper,
    train_mapper,
)


SNAPSHOTS = 10
# Hidden size and layers of both base models; a pair is 12 kB, and 83 kB.
SHAPES = {"lab": {"source": (24, 2), "target": (96, 4)}, "wide": {"source": (256, 4), "target": (512, 6)}}


def make_root(folder: Path, hidden: int, layers: int) -> Root:
    """A root of rank 2 on the query and value projections of a random Qwen2."""
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "base")
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return create_root(folder / "base", lora, output_dir=folder / "root", seed=0)


def write_runs(folder: Path, shape: str, pairs: int) -> None:
    """A plan of `pairs / 10` runs, and the files that running it would leave."""
    roots = {side: make_root(folder / side, *sizes) for side, sizes in SHAPES[shape].items()}
    rows = [{"prompt": f"{row} >", "completion": f"{row}", "task": f"task-{row % 20}"} for row in range(200)]
    recipe = FineTuningRecipe(max_steps=SNAPSHOTS, warmup_steps=1, snapshot_last=SNAPSHOTS)
    plan = plan_shadows(
        datasets.Dataset.from_list(rows),
        num_runs=pairs // SNAPSHOTS,
        rows_per_run=4,
        source_root=roots["source"],
        target_root=roots["target"],
        source_recipe=recipe,
        target_recipe=recipe,
        data={"path": "nowhere"},
        strategy="per_task",
        validation_fraction=0.1,
        test_fraction=0.1,
    )
    plan.save(folder / "plan")
    generator = torch.Generator().manual_seed(0)
    for side, root in roots.items():
        root.save_pretrained(folder / "plan" / f"{side}_root")
        for run in plan.runs:
            snapshots = {
                key: value + 0.01 * torch.randn(SNAPSHOTS, *value.shape, generator=generator).cumsum(0)
                for key, value in root.adapter.tensors.items()
            }
            result = SftResult([1.0] * SNAPSHOTS, snapshots, list(range(1, SNAPSHOTS + 1)), 1.0)
            write_run(plan, folder / "plan", side, run.shadow_id, result, engine="none")


class PeakMemory(threading.Thread):
    """Watches this process's memory until it is read."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = {"RssAnon": 0, "VmRSS": 0}
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.peak:
                    self.peak[name] = max(self.peak[name], int(value.split()[0]))

    def read(self) -> dict[str, float]:
        """Peaks in MiB."""
        self._done.set()
        self.join()
        return {name: kib / 1024 for name, kib in self.peak.items()}


def work(stage: str, folder: Path, steps: int) -> dict[str, float]:
    """What a process of its own does; returns its peaks."""
    memory = PeakMemory()
    memory.start()
    if stage == "build":
        build_delta_dataset(folder / "plan", folder / "deltas")
        return memory.read()
    sizes = MapperArguments(d_model=64, d_ff=128)
    args = GradTransformerTrainingArguments(
        output_dir=str(folder / stage),
        max_steps=steps,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=steps,
        save_steps=steps,
        disable_tqdm=True,
        use_cpu=True,
    )
    if stage == "command":
        train(folder / "deltas", sizes, args)
        return memory.read()
    deltas = load_delta_dataset(folder / "deltas")
    mapper = build_mapper(deltas.splits["train"], deltas.source_root, deltas.target_root, sizes)
    train_mapper(mapper, deltas.splits, args)
    return memory.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the figures as JSON")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1000, 20000])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=100, help="training steps of 32 pairs")
    parser.add_argument("--stage", nargs=2, metavar=("STAGE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if args.stage:
        stage, folder = args.stage
        peaks = work(stage, Path(folder), args.steps)
        (Path(folder) / f"{stage}.json").write_text(json.dumps(peaks))
        return
    result: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    table = []
    for shape in args.shapes:
        for pairs in args.pairs:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                write_runs(folder, shape, pairs)
                for stage in ("build", "train", "command"):
                    command = [sys.executable, "-m", "benchmarks.memory", "--stage", stage, name]
                    environment = {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
                    subprocess.run(
                        [*command, "--steps", str(args.steps)],
                        env={**os.environ, **environment},
                        stdout=subprocess.DEVNULL,
                        check=True,
                    )
                    peaks = json.loads((folder / f"{stage}.json").read_text())
                    result.setdefault(shape, {}).setdefault(stage, {})[pairs] = peaks
        for stage, by_pairs in result[shape].items():
            anonymous = [by_pairs[pairs]["RssAnon"] for pairs in args.pairs]
            resident = " / ".join(f"{by_pairs[pairs]['VmRSS']:.0f}" for pairs in args.pairs)
            table.append(
                [shape, stage, *(f"{value:.0f}" for value in anonymous), anonymous[-1] / anonymous[0], resident]
            )
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    counts = [f"{pairs:,} pairs, MiB" for pairs in args.pairs]
    print(markdown(["shape", "stage", *counts, "most over fewest", "RSS with file pages, MiB"], table))


if __name__ == "__main__":
    main()
