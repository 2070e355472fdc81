"""Work of stages up to the mapper: base models, roots, shadow runs, mappers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from peft import LoraConfig

from ..adapters import Root, create_root
from ..adapters.io import read_record, write_text_atomic
from ..adapters.statistics import delta_reproducibility
from ..evaluation.clients import score_heldout
from ..evaluation.controls import ShadowPredictor, fit_controls
from ..files import parse_record
from ..finetuning import FineTuningRecipe, check_rows, load_base
from ..lab import LabWorld, pretrain_base_models
from ..modeling_grad_transformer import GradTransformer
from ..schemas import LabBaseRecord, Object
from ..shadow import ShadowPlan, plan_shadows, run_shadows
from ..shadow.dataset import DeltaPairs
from ..shadow.plan import SPLITS
from ..shadow.records import read_run
from ..shadow.run import load_plan_root, root_folder
from ..training import GradTransformerTrainingArguments, MapperArguments, build_mapper, train_mapper
from .builders import LAB_PRESET, lab_model
from .partition import parts_of, put_together, take
from .stages import Stage
from .worlds import make_world


Pairs = dict[str, DeltaPairs]


def lab_base(stage: Stage, study_dir: Path, folder: Path) -> dict[str, Any]:
    role, model = stage.params["role"], lab_model(stage.params["role"], stage.params["sizes"])
    preset = replace(LAB_PRESET, tinylm=model) if role == "tinylm" else replace(LAB_PRESET, llm=model)
    (path,) = pretrain_base_models(LabWorld(stage.params["seed"], preset), folder, names=[role])
    facts = read_record(path / "base.json", LabBaseRecord)
    return {"model": role, "skill_accuracy": facts.get("skill_accuracy"), "parameters": facts.get("num_parameters")}


def hub_base(stage: Stage, study_dir: Path, folder: Path) -> dict[str, Any]:
    return dict(stage.params)


def root(stage: Stage, study_dir: Path, folder: Path) -> dict[str, Any]:
    base = stage.inputs["base"]
    found = base.result(study_dir)
    name: str | Path = found["model"] if base.kind == "hub_base" else base.folder(study_dir) / found["model"]
    lora = LoraConfig(**stage.params["lora"], task_type="CAUSAL_LM")
    made = create_root(
        name, lora, output_dir=folder / "root", seed=stage.params["seed"], revision=found.get("revision")
    )
    return {"blocks": made.layout.num_blocks, "numel": made.layout.numel}


def load_root(stage: Stage, study_dir: Path) -> Root:
    """The root that a stage of kind `root` made."""
    return Root.from_pretrained(stage.folder(study_dir) / "root")


def shadows(stage: Stage, study_dir: Path, folder: Path) -> dict[str, Any]:
    """A plan for one model: the same numbers give the same subsets for every other."""
    params, start = stage.params, load_root(stage.inputs["root"], study_dir)
    loading = stage.settings["loading"]
    public = folder / "public.jsonl"
    if not public.is_file():
        _, tokenizer = load_base(start.base_model, revision=start.base_revision, **loading)
        rows = make_world(params["world"], tokenizer).public_rows(params["public_rows"])
        columns = ("prompt", "completion", "task")
        text = "".join(json.dumps({name: row[name] for name in columns}) + "\n" for row in rows)
        write_text_atomic(public, text)
    data = check_rows(parse_record(line, Object, path=public) for line in public.read_text("utf-8").splitlines())
    start.save_pretrained(root_folder(folder, "source"))
    recipe = FineTuningRecipe.from_dict(params["recipe"])
    plan = plan_shadows(
        data,
        num_runs=params["num_runs"],
        rows_per_run=params["rows_per_run"],
        source_root=start,
        target_root=start,
        source_recipe=recipe,
        target_recipe=recipe,
        data={"path": public.name},
        seed=params["world"]["seed"],
        strategy=params["strategy"],
        validation_fraction=params["validation_fraction"],
        test_fraction=params["test_fraction"],
    )
    plan.save(folder)
    how = {name: stage.settings[name] for name in ("engine", "adapters_per_batch")}
    run_shadows(folder, roles=["source"], rows=data, **how, **loading)
    pairs = _deltas(stage, study_dir, checkpoints=1)
    train = [index for index, split in enumerate(pairs["splits"]) if split == "train"]
    agreement = delta_reproducibility(pairs["deltas"][train], [pairs["tasks"][index] for index in train])
    return {"runs": len(plan.runs), "leave_one_out_r2": agreement.leave_one_out_r2}


def load_pairs(
    source: Stage, target: Stage, study_dir: Path, *, train_runs: int | None = None, checkpoints: int = 1
) -> Pairs:
    """Pairs by split, from the last checkpoints of the shadow runs of two models.

    Args:
        train_runs (`int`, *optional*): only the first so many runs of the training split.
        checkpoints (`int`, *optional*, defaults to 1): pairs of each training run; held-out runs give their last.
    """
    sides = [_deltas(stage, study_dir, checkpoints=checkpoints) for stage in (source, target)]
    assert sides[0]["subsets"] == sides[1]["subsets"], "both models were fine-tuned on the same rows"
    chosen: dict[str, list[int]] = {split: [] for split in SPLITS}
    runs: list[str] = []
    for index, (split, run_id) in enumerate(zip(sides[0]["splits"], sides[0]["ids"], strict=True)):
        if split == "train":
            runs.extend([run_id] if run_id not in runs else [])
            if train_runs is None or len(runs) <= train_runs:
                chosen[split].append(index)
        elif index % checkpoints == checkpoints - 1:
            chosen[split].append(index)
    return {
        split: DeltaPairs(
            source=sides[0]["deltas"][indices],
            target=sides[1]["deltas"][indices],
            shadow_ids=[sides[0]["ids"][index] for index in indices],
            tasks=[sides[0]["tasks"][index] for index in indices],
        )
        for split, indices in chosen.items()
    }


def _deltas(stage: Stage, study_dir: Path, *, checkpoints: int) -> dict[str, Any]:
    folder = stage.folder(study_dir)
    plan, start = ShadowPlan.load(folder), load_plan_root(ShadowPlan.load(folder), folder, "source")
    root_P = start.adapter.flat()
    found: dict[str, Any] = {"ids": [], "splits": [], "tasks": [], "subsets": []}
    deltas = []
    for run in plan.runs:
        record = read_run(plan, folder, "source", run.shadow_id, layout=start.layout)
        deltas.append(start.layout.flatten(record.snapshots)[-checkpoints:] - root_P)
        found["ids"] += [run.shadow_id] * checkpoints
        found["splits"] += [run.split] * checkpoints
        found["tasks"] += [run.task] * checkpoints
        found["subsets"].append((run.seed, run.row_indices))
    return {**found, "deltas": torch.cat(deltas)}


def fit_predictors(pairs: Pairs, source_root: Root) -> dict[str, ShadowPredictor]:
    """The controls that learn from the mapper's training pairs."""
    return fit_controls(
        pairs["train"].source,
        pairs["train"].target,
        validation=(pairs["validation"].source, pairs["validation"].target),
        source_widths=source_root.layout.widths,
    )


def mapper(stage: Stage, study_dir: Path, folder: Path) -> dict[str, Any]:
    params, partition = stage.params, stage.params["partition"]
    source, target = stage.inputs["source"], stage.inputs["target"]
    roots = [load_root(side.inputs["root"], study_dir) for side in (source, target)]
    pairs = load_pairs(source, target, study_dir, train_runs=params["train_runs"], checkpoints=params["checkpoints"])
    figures: dict[str, Any] = {"pairs": len(pairs["train"].source), "runs": len(set(pairs["train"].shadow_ids))}
    sources, targets = (parts_of(side, partition) for side in roots)
    parameters = 0
    for number, (source_part, target_part) in enumerate(zip(sources, targets, strict=True)):
        splits = {
            split: _dataset(
                found,
                take(found.source, roots[0], source_part, partition),
                take(found.target, roots[1], target_part, partition),
            )
            for split, found in pairs.items()
        }
        model = build_mapper(
            splits["train"],
            source_part,
            target_part,
            MapperArguments(**params["mapper"]),
            source_recipe=source.params["recipe"],
            target_recipe=target.params["recipe"],
            seed=params["seed"],
        )
        arguments = GradTransformerTrainingArguments(
            output_dir=str(folder / f"part-{number}"),
            seed=params["seed"],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            **params["training"],
        )
        _, heldout = train_mapper(model, splits, arguments)
        parameters += sum(parameter.numel() for parameter in model.parameters())
    figures["parameters"] = parameters
    if partition == "block":
        mean_P = model.tokenizers()[1].mean_P
        assert mean_P is not None and heldout is not None
        test = pairs["test"]
        scores = score_heldout(heldout, fit_predictors(pairs, roots[0]), test.source, test.target, mean_P)
        figures.update(heldout.to_dict(), controls=scores.controls)
    return figures


def load_mapped(
    stage: Stage, study_dir: Path, deltas_NP: torch.Tensor, *, source_root: Root, target_root: Root
) -> torch.Tensor:
    """LLM deltas `(N, numel)` that a mapper stage's mappers give for TinyLM deltas."""
    partition = stage.params["partition"]
    sources, targets = parts_of(source_root, partition), parts_of(target_root, partition)
    mapped = []
    for number, part in enumerate(sources):
        model = GradTransformer.from_pretrained(stage.folder(study_dir) / f"part-{number}")
        mapped.append(model.generate_deltas(take(deltas_NP, source_root, part, partition)))
    return put_together(mapped, target_root, targets, partition)


def _dataset(pairs: DeltaPairs, source_NP: torch.Tensor, target_NP: torch.Tensor) -> datasets.Dataset:
    columns: dict[str, pa.Array] = {
        "shadow_id": pa.array(pairs.shadow_ids, pa.string()),
        "task": pa.array(pairs.tasks, pa.string()),
    }
    for name, values_NP in (("source_blocks", source_NP), ("target_blocks", target_NP)):
        values = pa.array(values_NP.reshape(-1).float().numpy())
        columns[name] = pa.FixedSizeListArray.from_arrays(values, values_NP.shape[1])
    return datasets.Dataset(pa.table(columns))
