"""Tiny models, roots and adapters that tests make for themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import LoraConfig
from transformers import Qwen2Config, Qwen2ForCausalLM

from grad_transformer import LoraAdapter, LoraLayout, Root, create_root
from grad_transformer.adapters.roots import fingerprint_adapter
from grad_transformer.files import write_json_atomic
from grad_transformer.finetuning import FineTuningRecipe
from grad_transformer.shadow.identity import dataset_fingerprint
from grad_transformer.shadow.plan import ROLES


def tiny_qwen2(
    path: Path, *, layers: int = 2, hidden: int = 16, vocab: int = 32, seed: int = 0, **config_overrides: Any
) -> Path:
    """A Qwen2 checkpoint of a few thousand parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            **config_overrides,
        )
        Qwen2ForCausalLM(config).save_pretrained(path)
    return path


def lora(**overrides: Any) -> LoraConfig:
    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **overrides})


def tiny_root(path: Path, *, layers: int = 2, hidden: int = 16, seed: int = 0, **lora_overrides: Any) -> Root:
    """Base model in `path/base`, root in `path/root`."""
    base = tiny_qwen2(path / "base", layers=layers, hidden=hidden)
    return create_root(base, lora(**lora_overrides), output_dir=path / "root", seed=seed)


def synthetic_root(layout: LoraLayout, *, base_model: str = "tiny", dtype: torch.dtype = torch.float32) -> Root:
    """A root of any layout, without a base model."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        spec.key: torch.randn(spec.shape, generator=generator).to(dtype)
        if spec.side == "A"
        else torch.zeros(spec.shape, dtype=dtype)
        for spec in layout.tensor_specs()
    }
    config = {"peft_type": "LORA", "base_model_name_or_path": base_model, **layout.lora}
    adapter = LoraAdapter(config, tensors, layout)
    return Root(adapter, fingerprint_adapter(adapter), base_model, None, "unknown", 0)


def moved(root: Root, *, scale: float = 0.05, seed: int = 0) -> LoraAdapter:
    """An adapter a little away from its root, as fine-tuning leaves it."""
    generator = torch.Generator().manual_seed(seed)
    values_P = root.adapter.flat() + scale * torch.randn(root.layout.numel, generator=generator)
    return root.adapter.with_values(values_P)


def write_delta_dataset(
    folder: Path, roots: tuple[Root, Root], *, runs: Mapping[str, int], seed: int = 0, plan: str = "plan-a"
) -> Path:
    """A delta dataset as `build` leaves it, of random linear pairs: `runs` of each split, one pair each."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [root.layout.numel for root in roots]
    matrix = torch.randn(sizes[0], sizes[1], generator=generator) / sizes[0] ** 0.5
    files, numbers = {}, iter(range(sum(runs.values())))
    for split, count in runs.items():
        source = torch.randn(count, sizes[0], generator=generator)
        columns = {
            "shadow_id": pa.array([f"shadow-{next(numbers):05d}" for _ in range(count)]),
            "task": pa.array([f"task-{number % 3}" for number in range(count)]),
            "step": pa.array([1] * count, pa.int32()),
        }
        for name, values in (("source_blocks", source), ("target_blocks", source @ matrix)):
            flat = pa.array(values.reshape(-1).numpy())
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        name = f"data/{split}-00000-of-00001.parquet"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / name)
        files[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    for role, root in zip(ROLES, roots, strict=True):
        root.save_pretrained(folder / f"{role}_root")
    manifest = {
        "format_version": 1,
        "plan_fingerprint": hashlib.sha256(plan.encode()).hexdigest(),
        "roots": {role: root.facts() for role, root in zip(ROLES, roots, strict=True)},
        "recipes": {role: FineTuningRecipe().to_dict() for role in ROLES},
        "layouts": {role: root.layout.to_dict() for role, root in zip(ROLES, roots, strict=True)},
        "data": {"path": "public.jsonl", "num_rows": 100, "fingerprint": hashlib.sha256(b"rows").hexdigest()},
        "splits": {split: {"runs": count, "pairs": count} for split, count in runs.items()},
        "missing_runs": [],
        "files": files,
    }
    write_json_atomic(folder / "delta_dataset.json", {**manifest, "fingerprint": dataset_fingerprint(manifest)})
    return folder
