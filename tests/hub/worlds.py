"""Artifacts of all four kinds, small, made without training."""

from __future__ import annotations

from pathlib import Path

import datasets
import torch
from transformers import T5Config

from grad_transformer import GradTransformer, LoraAdapter, LoraDeltaTokenizer, Root
from grad_transformer.files import write_json_atomic
from tests import manifests
from tests.worlds import moved, tiny_root


def tiny_roots(folder: Path) -> tuple[Root, Root]:
    return tiny_root(folder / "tiny", layers=2), tiny_root(folder / "large", layers=3, hidden=32)


def tiny_mapper(roots: tuple[Root, Root], *, seed: int = 0) -> GradTransformer:
    tokenizers = []
    for root, role in zip(roots, ("source", "target"), strict=True):
        tokenizer = LoraDeltaTokenizer(root, role=role, scale="block")  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed)
        tokenizers.append(tokenizer.fit([0.05 * torch.randn(8, tokenizer.layout.numel, generator=generator)]))
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 2}
    torch.manual_seed(seed)
    return GradTransformer.from_backbone(T5Config(**sizes, dropout_rate=0.0), *tokenizers).eval()


def client_adapter(root: Root, *, seed: int = 1) -> LoraAdapter:
    adapter = moved(root, seed=seed)
    adapter.metadata = {
        "format_version": 1,
        "mapper": {"repo_id": "acme/mapper", "revision": "v1.0", "sha": "0" * 40},
        "root": {"fingerprint": root.fingerprint},
        "differential_privacy": None,
    }
    return adapter


def delta_dataset(folder: Path, roots: tuple[Root, Root], *, runs: int = 6) -> Path:
    """The folder that `build` writes, with random deltas."""
    from grad_transformer.hub.hashes import file_sha256

    sides = dict(zip(("source", "target"), roots, strict=True))
    features = datasets.Features(
        {
            "shadow_id": datasets.Value("string"),
            "task": datasets.Value("string"),
            "step": datasets.Value("int32"),
            **{
                f"{role}_blocks": datasets.List(datasets.Value("float32"), length=root.layout.numel)
                for role, root in sides.items()
            },
        }
    )
    (folder / "data").mkdir(parents=True)
    files, counts = {}, {}
    for number, split in enumerate(("train", "validation", "test")):
        count = runs if split == "train" else 2
        generator = torch.Generator().manual_seed(number)
        rows = {
            "shadow_id": [f"{split}-{index}" for index in range(count)],
            "task": ["copy"] * count,
            "step": [1] * count,
            **{
                f"{role}_blocks": (0.05 * torch.randn(count, root.layout.numel, generator=generator)).numpy()
                for role, root in sides.items()
            },
        }
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
        files[path.relative_to(folder).as_posix()] = file_sha256(path)
        counts[split] = {"runs": count, "pairs": count}
    for role, root in sides.items():
        root.save_pretrained(folder / f"{role}_root")
    write_json_atomic(folder / "plan.json", {**manifests.PLAN, "data": {"path": "/data/private/rows.jsonl"}})
    manifest = {
        "format_version": 1,
        "plan_fingerprint": "p" * 64,
        "roots": {role: root.facts() for role, root in sides.items()},
        "recipes": {"source": {}, "target": {}},
        "layouts": {role: root.layout.to_dict() for role, root in sides.items()},
        "data": {"path": "/data/private/rows.jsonl"},
        "splits": counts,
        "missing_runs": [],
        "files": files,
    }
    write_json_atomic(folder / "delta_dataset.json", manifest)
    return folder
