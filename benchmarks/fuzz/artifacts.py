"""Valid artifacts of every kind, small, made without a base model and without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import T5Config

from grad_transformer import GradTransformer, LoraAdapter, LoraDeltaTokenizer, LoraLayout, Root
from grad_transformer.adapters.privacy import PrivacyStatement
from grad_transformer.adapters.roots import fingerprint_adapter
from grad_transformer.adapters.statistics import BlockAgreement
from grad_transformer.constants import HELDOUT_NAME, REPORT_NAME, TRAINING_LOG_NAME
from grad_transformer.evaluation.controls import CONTROLS
from grad_transformer.evaluation.records import ClientReport, HeldoutScores, Report
from grad_transformer.evaluation.shift import ShiftReference
from grad_transformer.files import write_json_atomic
from grad_transformer.finetuning import FineTuningRecipe, SftResult
from grad_transformer.shadow import ShadowPlan, build_delta_dataset, plan_shadows
from grad_transformer.shadow.records import write_run


RECIPE = FineTuningRecipe(max_steps=4, warmup_steps=1, max_length=16, snapshot_last=2, per_device_batch_size=2)
SHA = "0123456789abcdef0123456789abcdef01234567"


def make_root(layers: int = 2, *, name: str = "acme/tiny") -> Root:
    """A root for layers of width 8."""
    generator = torch.Generator().manual_seed(layers)
    prefix = "base_model.model.model.layers"
    shapes = {
        f"{prefix}.{layer}.self_attn.{module}.lora_{side}.weight": (2, 8) if side == "A" else (8, 2)
        for layer in range(layers)
        for module in ("q_proj", "v_proj")
        for side in "AB"
    }
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": name,
        "r": 2,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
    }
    layout = LoraLayout.from_adapter_config(config, shapes)
    tensors = {
        key: torch.randn(shape, generator=generator) if "lora_A" in key else torch.zeros(shape)
        for key, shape in shapes.items()
    }
    adapter = LoraAdapter(config, tensors, layout)
    return Root(adapter, fingerprint_adapter(adapter), name, None, "unknown", 0)


def make_tokenizer(role: Literal["source", "target"] = "source", *, fitted: bool = False) -> LoraDeltaTokenizer:
    root = make_root() if role == "source" else make_root(3, name="acme/large")
    tokenizer = LoraDeltaTokenizer(root, role=role, scale="block" if fitted else "none", recipe=RECIPE.to_dict())
    if fitted:
        generator = torch.Generator().manual_seed(0)
        tokenizer.fit([0.05 * torch.randn(8, tokenizer.layout.numel, generator=generator)])
    return tokenizer


def write_client(folder: Path, tokenizer: LoraDeltaTokenizer) -> None:
    """A client's adapter, with all that `client` writes beside it."""
    generator = torch.Generator().manual_seed(1)
    values_P = tokenizer.root.adapter.flat() + 0.05 * torch.randn(tokenizer.layout.numel, generator=generator)
    statement = PrivacyStatement(
        epsilon=8.0,
        delta=1e-5,
        accountant="prv",
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=0.1,
        expected_batch_size=16.0,
        steps=10,
        planned_steps=10,
    )
    metadata = {
        "format_version": 1,
        "root": tokenizer.root.facts(),
        "mapper": {"repo_id": "acme/mapper", "revision": "v1.0", "sha": SHA},
        "num_examples": 100,
        "differential_privacy": statement.to_dict(),
    }
    tokenizer.root.adapter.with_values(values_P, metadata=metadata).save_pretrained(folder)


def write_generated(folder: Path, tokenizer: LoraDeltaTokenizer) -> None:
    """A generated adapter, with all that `generate` writes beside it."""
    generated = {
        "source_base_model": "acme/tiny",
        "mapper": {"repo_id": "acme/mapper", "revision": "v1.0", "sha": SHA},
        "num_clients": 2,
        "clients": [{"repo_id": "bank/a", "revision": None, "sha": SHA}, {"sha256": "ab" * 32}],
        "order": "aggregate_first",
        "aggregation": "mean",
        "shift": [{"shift": 0.5, "quantile": 0.5, "distance": 1.0, "mahalanobis": 1.0, "num_heldout": 4}],
        "refinement": [{"candidate": "mapper", "agreement_by_round": [0.5, 0.75], "annotators": ["add"]}],
    }
    adapter = tokenizer.decode_delta(0.01 * torch.ones(tokenizer.layout.numel))
    adapter.metadata["generated"] = generated
    adapter.save_pretrained(folder)
    write_json_atomic(folder / "hub_origin.json", {"repo_id": "acme/made", "revision": "v1.0", "sha": SHA})


def write_mapper(folder: Path) -> None:
    """A mapper with tokenizers, shift reference, held-out figures and training log."""
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=2, dropout_rate=0.0)
    tokenizers = [make_tokenizer(role, fitted=True) for role in ("source", "target")]
    GradTransformer.from_backbone(config, *tokenizers).save_pretrained(folder)
    deltas = 0.05 * torch.randn(12, tokenizers[0].layout.numel)
    ShiftReference.fit(deltas[:8], deltas[8:], widths=tokenizers[0].layout.widths).save_pretrained(folder)
    heldout = {"r2": 0.5, "r2_teacher_forced": 0.6, "r2_permuted_inputs": 0.0, "r2_ceiling": 0.7, "block_mse": [0.5]}
    write_json_atomic(folder / HELDOUT_NAME, {**heldout, "r2_ridge": 0.4})
    write_json_atomic(folder / TRAINING_LOG_NAME, {"log_history": [{"loss": 1.0, "step": 1}]})


def make_report() -> Report:
    client = ClientReport(
        id="seen-0",
        kind="seen",
        task="add",
        n_test=8,
        tinylm=0.25,
        llm_base=0.0,
        llm_finetuned=0.75,
        generated=0.5,
        controls=dict.fromkeys(CONTROLS, 0.25),
        pgr=50.0,
        pgr_interval=(20.0, 80.0),
        methods={"refined": 0.5},
        nll={"generated": 1.0},
    )
    return Report(
        preset="quick",
        seed=0,
        wall_seconds={"train": 1.0},
        heldout=HeldoutScores(0.5, 0.6, 0.0, 0.7, {"ridge": 0.4}),
        delta_reproducibility={"tinylm": 0.5, "llm": 0.6},
        delta_cosine={"tinylm": 0.5, "llm": 0.6},
        clients=[client],
        blocks=BlockAgreement([0.9], [1.0]),
    )


def write_report_file(folder: Path) -> None:
    write_json_atomic(folder / REPORT_NAME, make_report().to_dict())


def write_plan(folder: Path) -> ShadowPlan:
    """A plan, both roots, and the files of all of its runs."""
    roots = {"source": make_root(), "target": make_root(3, name="acme/large")}
    rows = datasets.Dataset.from_list([{"prompt": f"{row}?", "completion": f"{row}"} for row in range(24)])
    plan = plan_shadows(
        rows,
        num_runs=6,
        rows_per_run=4,
        source_root=roots["source"],
        target_root=roots["target"],
        source_recipe=RECIPE,
        target_recipe=RECIPE,
        data={"path": "public.jsonl"},
        validation_fraction=0.2,
        test_fraction=0.2,
    )
    plan.save(folder)
    generator = torch.Generator().manual_seed(2)
    for role, root in roots.items():
        root.save_pretrained(folder / f"{role}_root")
        for run in plan.runs:
            snapshots = {
                key: tensor + 0.05 * torch.randn(2, *tensor.shape, generator=generator)
                for key, tensor in root.adapter.tensors.items()
            }
            result = SftResult([1.0, 0.5, 0.4, 0.3], snapshots, [3, 4], 0.1)
            write_run(plan, folder, role, run.shadow_id, result, engine="batched")
    return plan


def write_delta_dataset(folder: Path, plan_dir: Path) -> None:
    write_plan(plan_dir)
    build_delta_dataset(plan_dir, folder)


COMMAND_YAML: dict[str, dict[str, Any]] = {
    "plan": {
        "tinylm": "acme/tiny",
        "llm": "acme/large",
        "data": "public.jsonl",
        "output_dir": "shadows",
        "num_runs": 10,
        "rows_per_run": 8,
    },
    "train": {
        "dataset": "deltas",
        "output_dir": "mapper",
        "max_steps": 4,
        "learning_rate": 0.001,
        "lr_scheduler_type": "cosine",
        "report_to": ["none"],
    },
    "generate": {"mapper": "mapper", "adapters": ["a", "b"], "output_dir": "out", "mapper_revision": "v1.0"},
    "client": {"mapper": "acme/mapper", "data": "rows.jsonl", "output_dir": "out", "dp_epsilon": 8.0},
}
STUDY = """seeds: [0]
experiments: [all]
lora: {r: 2, lora_alpha: 8, lora_dropout: 0.0, target_modules: [q_proj, v_proj]}
recipe:
  adam_epsilon: 0.1
  per_device_batch_size: 16
  warmup_steps: 2
tinylm_recipe:
  learning_rate: 0.03
  max_steps: 12
llm_recipe:
  max_steps: 8
shadows:
  num_runs: 8
  rows_per_run: 16
  checkpoints: 2
  validation_fraction: 0.1
  adapters_per_batch: 4
mapper:
  d_model: 16
  num_layers: 1
training:
  max_steps: 4
  learning_rate: 0.001
clients:
  rows: 8
  single: 1
privacy:
  rows: 16
  delta: 0.00001
ablations:
  epsilons: [8.0]
refinement:
  num_prompts: 6
  rounds: 1
"""
TEXT_STUDY = """world: text
seeds: [0]
experiments: [single_client]
tinylm: S
llm: L
tasks: [gsm8k]
tinylms:
  S:
    model: acme/small
    revision: 1.10
llms:
  L:
    model: acme/large
recipe:
  max_steps: 8
  warmup_steps: 2
mapper:
  backbone: acme/t5
configs:
  acme/small:
    model_type: qwen2
    hidden_size: 16
    num_hidden_layers: 2
    num_attention_heads: 2
    num_key_value_heads: 2
    intermediate_size: 32
    vocab_size: 32
  acme/large:
    model_type: qwen2
    hidden_size: 32
    num_hidden_layers: 2
    num_attention_heads: 2
    num_key_value_heads: 2
    intermediate_size: 32
    vocab_size: 32
  acme/t5:
    model_type: t5
    d_model: 16
    num_layers: 1
    num_heads: 2
    d_kv: 8
    d_ff: 16
    vocab_size: 2
"""
CLIENTS = """- id: bank-a
  adapter: bank-a/tinylm-adapter
  test_data: bank-a/test.jsonl
  llm_adapter: bank-a/ceiling
  kind: seen
  task: summaries
- id: 007
  adapter: b
  test_data: b.jsonl
"""


def write_rows(folder: Path) -> None:
    """The same rows in each format, and as messages."""
    rows = [{"prompt": f"{row} plus 1?", "completion": f"{row + 1}", "task": "add"} for row in range(6)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows))
    lines = ["prompt,completion,task", *(f'"{row["prompt"]}","{row["completion"]}",{row["task"]}' for row in rows)]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
