"""Work of stages from the clients on: fine-tunes, weak labels, baselines, generated deltas, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import TypedDict

from ..adapters import Root
from ..adapters.io import load_tensors, read_record, save_tensors_atomic, write_json_atomic
from ..client.mechanism import plan_noise
from ..client.private import PrivacyArguments, finetune_client_privately
from ..evaluation.clients import AdapterScorer
from ..evaluation.controls import control_deltas
from ..evaluation.reduced_rank import ReducedRankRegression
from ..evaluation.scoring import completion_nll
from ..evaluation.weak_to_strong import finetune_on_weak_labels, weak_labels
from ..finetuning import FineTuningRecipe, attach_root, check_rows, load_root_base, write_adapter_tensors
from ..refinement import (
    RefinementArguments,
    Student,
    annotator_deltas,
    check_same_tokens,
    complete_clients,
    refine,
)
from ..refinement.candidates import MINIMUM_TASKS
from ..schemas import Object
from ..shadow import FineTuneJob, fine_tune_many
from ..tokenization_lora_delta import LoraDeltaTokenizer
from .partition import reverse_blocks
from .stages import Stage
from .work_models import fit_predictors, load_mapped, load_pairs, load_root
from .worlds import ClientRows, StudyWorld, make_world


DELTAS_NAME = "deltas.safetensors"
SCORES_NAME = "scores.safetensors"
LABELS_NAME = "labels.json"
_PUBLIC_STREAM = 1009


class LabelsRecord(TypedDict):
    """Rows that TinyLMs labelled, client by client."""

    clients: list[list[Object]]


def clients(stage: Stage, study_dir: Path, folder: Path) -> dict[str, Any]:
    """Deltas of one base model fine-tuned on every client's rows, or on all of them (`pooled`)."""
    params, start = stage.params, load_root(stage.inputs["root"], study_dir)
    model, tokenizer = _base(start, stage)
    many = [rows.train for rows in _rows(params, make_world(params["world"], tokenizer))]
    if params["pooled"]:
        many = [[row for rows in many for row in rows]]
    jobs = [FineTuneJob(check_rows(rows), params["seed"], f"client {index}") for index, rows in enumerate(many)]
    how = {name: stage.settings[name] for name in ("engine", "adapters_per_batch")}
    recipe = FineTuningRecipe.from_dict(params["recipe"])
    results = list(fine_tune_many(model, tokenizer, start, jobs, recipe, **how))
    _save_deltas(folder, start, [result.tensors for result in results])
    return {"clients": len(jobs), "seconds_each": [round(result.seconds, 4) for result in results]}


def private_clients(stage: Stage, study_dir: Path, folder: Path) -> dict[str, Any]:
    params, start = stage.params, load_root(stage.inputs["root"], study_dir)
    source = LoraDeltaTokenizer(start, role="source", recipe=params["recipe"])
    _, tokenizer = _base(start, stage)
    settings = dict(params["privacy"])
    epsilon = settings.pop("epsilon")
    recipe = FineTuningRecipe.from_dict(params["recipe"])
    seed = params["world"]["seed"]
    deltas, spent = [], []
    for index, rows in enumerate(_rows(params, make_world(params["world"], tokenizer))):
        # Repeatable, and so not private: whoever runs a study has all rows anyway.
        privacy = PrivacyArguments(epsilon=epsilon, known_seed=1000 * seed + index, **settings)
        adapter, _, _ = finetune_client_privately(
            source,
            rows.train,
            folder / f"client-{index}",
            privacy=privacy,
            physical_batch_size=settings["batch_size"],
            accept_recipe=True,
        )
        deltas.append(adapter.tensors)
        # What the same noise would spend if nobody knew it.
        planned = plan_noise(privacy, len(rows.train), recipe.max_steps).epsilon
        assert planned is not None
        spent.append(planned)
    _save_deltas(folder, start, deltas)
    return {"clients": len(deltas), "epsilon": max(spent)}


def labels(stage: Stage, study_dir: Path, folder: Path) -> dict[str, Any]:
    """What every client's TinyLM says to its extra rows, or to as many public ones."""
    fine_tuned, start = stage.inputs["clients"], load_root(stage.inputs["root"], study_dir)
    scorer = _scorer(start, stage)
    world = make_world(stage.params["world"], scorer.tokenizer)
    public = world.public_rows(stage.params["public_rows"]) if stage.params["public"] else []
    labelled, right = [], []
    deltas_CP = load_deltas(fine_tuned, study_dir)["client"]
    for index, (rows, delta_P) in enumerate(zip(_rows(fine_tuned.params, world), deltas_CP, strict=True)):
        asked = rows.extra
        if stage.params["public"]:
            order = np.random.default_rng([stage.params["world"]["seed"], _PUBLIC_STREAM, index])
            asked = [public[row] for row in order.choice(len(public), len(rows.extra), replace=False)]
        adapter = start.adapter.with_values(start.adapter.flat() + delta_P)
        found = weak_labels(scorer, adapter, asked, max_new_tokens=world.max_new_tokens)
        labelled.append(found)
        same = [_text(a["completion"]) == _text(b["completion"]) for a, b in zip(found, asked, strict=True)]
        right.append(float(np.mean(same)))
    write_json_atomic(folder / LABELS_NAME, {"clients": labelled}, indent=None)
    # Public rows of other tasks have other answers: there agreement with them means nothing.
    return {"clients": len(labelled)} if stage.params["public"] else {"clients": len(labelled), "right": right}


def baseline(stage: Stage, study_dir: Path, folder: Path) -> dict[str, Any]:
    """Deltas of the LLM fine-tuned on weak labels."""
    params, start = stage.params, load_root(stage.inputs["root"], study_dir)
    many = read_record(stage.inputs["labels"].folder(study_dir) / LABELS_NAME, LabelsRecord)["clients"]
    if params["pooled"]:
        many = [[row for rows in many for row in rows]]
    scorer = _scorer(start, stage)
    target = LoraDeltaTokenizer(start, role="target")
    recipe = FineTuningRecipe.from_dict(params["recipe"])
    results = [
        finetune_on_weak_labels(params["method"], scorer, target, rows, recipe=recipe, seed=params["seed"])
        for rows in many
    ]
    _save_deltas(folder, start, [result.tensors for result in results])
    return {"clients": len(many)}


def generated(stage: Stage, study_dir: Path, folder: Path) -> dict[str, Any]:
    """LLM deltas of mapper and controls for every client, or for the mean of the clients."""
    inputs, params = stage.inputs, stage.params
    source_root, target_root = (load_root(inputs[side].inputs["root"], study_dir) for side in ("source", "target"))
    deltas_CX = load_deltas(inputs["clients"], study_dir)["client"]
    tasks: list[Any] = [set(client["tasks"]) for client in inputs["clients"].params["clients"]]
    if params["mode"] == "mean":
        deltas_CX, tasks = deltas_CX.mean(dim=0, keepdim=True), [set.union(*tasks)]
    asked = reverse_blocks(deltas_CX, source_root.layout) if params["reversed_at_use"] else deltas_CX
    generated_CY = load_mapped(inputs["mapper"], study_dir, asked, source_root=source_root, target_root=target_root)
    if params["reversed_at_use"]:
        generated_CY = reverse_blocks(generated_CY, target_root.layout)
    mapper = inputs["mapper"].params
    pairs = load_pairs(
        inputs["source"],
        inputs["target"],
        study_dir,
        train_runs=mapper["train_runs"],
        checkpoints=mapper["checkpoints"],
    )
    controls = control_deltas(
        generated_CY,
        deltas_CX,
        tasks,
        fit_predictors(pairs, source_root),
        target_widths=target_root.layout.widths,
        seed=params["seed"],
    )
    # Without another client of another task there is no such control.
    names = set.intersection(*(set(found) for found in controls))
    tensors = {name: torch.stack([found[name] for found in controls]) for name in sorted(names)}
    save_tensors_atomic(folder / DELTAS_NAME, {"generated": generated_CY, **tensors})
    return {"clients": len(generated_CY)}


def refined(stage: Stage, study_dir: Path, folder: Path) -> dict[str, Any]:
    """LLM deltas refined on public prompts, and the best candidates that they start from."""
    inputs, params = stage.inputs, stage.params
    source_root, target_root = load_root(inputs["source_root"], study_dir), load_root(inputs["root"], study_dir)
    tinylm = _scorer(source_root, stage)
    world = make_world(params["world"], tinylm.tokenizer)
    deltas_CX = load_deltas(inputs["clients"], study_dir)["client"]
    made = load_deltas(inputs["generated"], study_dir)
    candidates = {"mapper": made["generated"], **{name: made[name] for name in ("nearest_shadow", "ridge")}}
    train = load_pairs(inputs["source"], inputs["target"], study_dir)["train"]
    tasks = [task for task in train.tasks if task is not None]
    if len(tasks) == len(train.tasks) and len(set(tasks)) >= MINIMUM_TASKS:
        reduced = ReducedRankRegression(source_widths=source_root.layout.widths)
        candidates["reduced_rank"] = reduced.fit_tasks(train.source, train.target, tasks).predict(deltas_CX)
    model, tokenizer = _base(target_root, stage)
    check_same_tokens(tinylm.tokenizer, tokenizer)
    arguments = RefinementArguments(max_new_tokens=world.max_new_tokens, seed=params["seed"], **params["arguments"])
    root_X = source_root.adapter.flat()
    completions = complete_clients(
        [source_root.adapter.with_values(root_X + delta_X) for delta_X in deltas_CX],
        world.public_rows(params["public_rows"]),
        (tinylm.model, tinylm.tokenizer),
        arguments,
    )
    student = Student(model, tokenizer, target_root, FineTuningRecipe.from_dict(params["recipe"]))
    annotators = annotator_deltas(train.target, train.tasks, arguments.annotators)
    found = refine(completions, candidates, student, arguments, annotators=annotators)
    tensors = {
        "refined": torch.stack([client.delta_P for client in found]),
        "candidate": torch.stack([client.candidate_delta_P for client in found]),
    }
    save_tensors_atomic(folder / DELTAS_NAME, tensors)
    return {"clients": len(found), "candidates": [client.candidate for client in found]}


def scores(stage: Stage, study_dir: Path, folder: Path) -> dict[str, Any]:
    """Scores `(C, R)` of every client's test rows, by name of the delta; a single delta serves all clients."""
    params, start = stage.params, load_root(stage.inputs["root"], study_dir)
    scorer = _scorer(start, stage)
    world = make_world(params["world"], scorer.tokenizer)
    root_P = start.adapter.flat()
    by_name = {"base": torch.zeros(1, len(root_P))}
    if "deltas" in stage.inputs:
        by_name = load_deltas(stage.inputs["deltas"], study_dir)
    tests = [rows.test for rows in _rows(params, world)]
    tensors, means = {}, {}
    for name in params["names"] or sorted(by_name):
        deltas_CP = by_name[name]
        deltas_CP = deltas_CP.expand(len(tests), -1) if len(deltas_CP) == 1 else deltas_CP
        per_client, nll = [], []
        for delta_P, rows in zip(deltas_CP, tests, strict=True):
            write_adapter_tensors(scorer.model, start.adapter.with_values(root_P + delta_P).tensors)
            per_client.append(torch.from_numpy(world.score(scorer.model, scorer.tokenizer, rows)))
            if params["nll"]:
                nll.append(float(completion_nll(scorer.model, scorer.tokenizer, rows, batch_size=256).mean()))
        for index, values in enumerate(per_client):
            tensors[f"{name}.{index}"] = values
        means[name] = [float(values.mean()) for values in per_client]
        if nll:
            means[f"{name}.nll"] = nll
    save_tensors_atomic(folder / SCORES_NAME, tensors)
    return means


def load_deltas(stage: Stage, study_dir: Path) -> dict[str, torch.Tensor]:
    """Deltas `(C, numel)` that a stage left, by name."""
    return load_tensors(stage.folder(study_dir) / DELTAS_NAME)


def load_scores(stage: Stage, study_dir: Path, name: str) -> list[np.ndarray]:
    """Scores of every client's test rows."""
    found = load_tensors(stage.folder(study_dir) / SCORES_NAME)
    return [found[f"{name}.{index}"].numpy() for index in range(len(stage.params["clients"]))]


def _rows(params: Mapping[str, Any], world: StudyWorld) -> list[ClientRows]:
    return [world.client_rows(client) for client in params["clients"]]


def _base(start: Root, stage: Stage) -> tuple[Any, Any]:
    return load_root_base(start, **stage.settings["loading"])


def _scorer(start: Root, stage: Stage) -> AdapterScorer:
    model, tokenizer = _base(start, stage)
    return AdapterScorer(attach_root(model, start), tokenizer)


def _save_deltas(folder: Path, start: Root, adapters: Sequence[Mapping[str, torch.Tensor]]) -> None:
    root_P = start.adapter.flat()
    values_CP = torch.stack([start.layout.flatten({key: v.cpu() for key, v in found.items()}) for found in adapters])
    save_tensors_atomic(folder / DELTAS_NAME, {"client": values_CP - root_P})


def _text(completion: Any) -> str:
    return (completion if isinstance(completion, str) else completion[-1]["content"]).strip()
