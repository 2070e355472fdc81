"""Plans are frozen and refuse what cannot work; delta datasets load with plain `datasets`, split by run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from grad_transformer import create_root
from grad_transformer.adapters.io import write_text_atomic
from grad_transformer.errors import (
    DeltaDatasetError,
    FormatVersionError,
    IncompleteArtifactError,
    OutputError,
    PlanError,
)
from grad_transformer.finetuning import FineTuningRecipe, RowSource, check_rows, load_rows
from grad_transformer.lab import make_lab_tokenizer
from grad_transformer.shadow import (
    ShadowPlan,
    build_delta_dataset,
    load_delta_dataset,
    plan_shadows,
    read_run,
    run_shadows,
    shadow_summary,
)
from tests.worlds import lora, tiny_qwen2


RECIPE = FineTuningRecipe(
    learning_rate=1e-2, max_steps=6, per_device_batch_size=4, warmup_steps=1, max_length=16, snapshot_last=2
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two base models, their roots, and public rows of three tasks."""
    path = tmp_path_factory.mktemp("world")
    roots = {}
    for role, layers in (("source", 2), ("target", 3)):
        base = tiny_qwen2(path / role, layers=layers)
        make_lab_tokenizer().save_pretrained(base)
        roots[role] = create_root(base, lora(), output_dir=path / f"{role}_root")
    rows = [
        {"prompt": f"?1 ?2 {row:04d} >", "completion": f"{(row * 7 + task) % 10000:04d}", "task": f"task-{task}"}
        for task in range(3)
        for row in range(40)
    ]
    write_text_atomic(path / "public.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return {"path": path, "roots": roots, "rows": load_rows(path / "public.jsonl")}


def make_plan(world: dict[str, Any], **overrides: Any) -> ShadowPlan:
    settings = {
        "num_runs": 12,
        "rows_per_run": 8,
        "source_root": world["roots"]["source"],
        "target_root": world["roots"]["target"],
        "source_recipe": RECIPE,
        "target_recipe": RECIPE.replace(max_steps=4),
        "data": {"path": str(world["path"] / "public.jsonl")},
        "strategy": "per_task",
        "validation_fraction": 0.25,
        "test_fraction": 0.25,
    }
    return plan_shadows(world["rows"], **{**settings, **overrides})


@pytest.fixture(scope="module")
def finished(world: dict[str, Any]) -> Path:
    """A plan whose runs are done."""
    plan_dir = world["path"] / "shadows"
    make_plan(world).save(plan_dir)
    for role, root in world["roots"].items():
        root.save_pretrained(plan_dir / f"{role}_root")
    run_shadows(plan_dir, adapters_per_batch=5)
    return plan_dir


def test_per_task_subsets_hold_one_task_and_spread_over_splits(world: dict[str, Any]) -> None:
    plan = make_plan(world)
    tasks = world["rows"]["task"]
    for run in plan.runs:
        assert {tasks[index] for index in run.row_indices} == {run.task}
        assert len(set(run.row_indices)) == 8
    for split, count in (("train", 6), ("validation", 3), ("test", 3)):
        found = [run.task for run in plan.runs if run.split == split]
        assert len(found) == count
        assert len(set(found)) == 3


def test_rows_decide_the_strategy_where_it_is_not_given(world: dict[str, Any]) -> None:
    assert make_plan(world, strategy=None).strategy == "per_task"
    plain = world["rows"].select_columns(["prompt", "completion"])
    some = check_rows([*plain.select(range(30)), *world["rows"].select(range(30))])
    for rows in (plain, some):
        assert make_plan({**world, "rows": rows}, strategy=None).strategy == "mixed"


def test_the_rows_are_found_again_from_any_folder_and_after_a_move(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = tmp_path / "project" / "public.jsonl"
    public.parent.mkdir()
    public.write_bytes((world["path"] / "public.jsonl").read_bytes())
    monkeypatch.chdir(public.parent)
    plan = make_plan(world, data=RowSource.of("public.jsonl").pinned().to_dict())
    monkeypatch.chdir(tmp_path)
    assert plan.load_rows("project/shadows").to_list() == world["rows"].to_list()
    public.parent.rename(tmp_path / "moved")
    assert plan.load_rows("moved/shadows").to_list() == world["rows"].to_list()
    (tmp_path / "moved" / "public.jsonl").write_bytes(b'{"prompt": "1", "completion": "2"}')
    with pytest.raises(PlanError, match="not those that the plan was made from"):
        plan.load_rows("moved/shadows")
    (tmp_path / "moved" / "public.jsonl").unlink()
    with pytest.raises(PlanError, match="no longer where"):
        plan.load_rows("moved/shadows")


def test_the_same_seed_gives_the_same_plan_and_another_seed_another(world: dict[str, Any]) -> None:
    assert make_plan(world).fingerprint == make_plan(world).fingerprint
    assert make_plan(world, seed=1).fingerprint != make_plan(world).fingerprint


def test_without_overlap_no_row_is_used_twice(world: dict[str, Any]) -> None:
    plan = make_plan(world, with_overlap=False)
    used = [index for run in plan.runs for index in run.row_indices]
    assert len(used) == len(set(used))
    mixed = make_plan(world, strategy="mixed", with_overlap=False)
    assert {run.task for run in mixed.runs} == {None}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rows_per_run": 41}, "not enough rows of task"),
        ({"with_overlap": False, "num_runs": 60}, "not enough rows"),
        ({"validation_fraction": 0.6, "test_fraction": 0.5}, "No run is left to train on"),
        ({"num_runs": 2, "validation_fraction": 0.5, "test_fraction": 0.4}, "No run is left to train on"),
        ({"validation_fraction": float("nan")}, "`validation_fraction`"),
        ({"validation_fraction": -0.5, "test_fraction": 0.6}, "`validation_fraction`"),
        ({"num_runs": 0}, "`num_runs`"),
        ({"num_runs": 10**7}, "`num_runs`"),
        ({"num_runs": 10**5, "rows_per_run": 100}, "`num_runs x rows_per_run`"),
        ({"seed": -1}, "`seed`"),
        ({"tasks": ["absent"]}, "not in the data"),
        ({"strategy": "sideways"}, "task by task"),
        ({"target_recipe": RECIPE.replace(snapshot_last=1)}, "cannot be paired"),
    ],
)
def test_plans_that_cannot_work_are_refused(world: dict[str, Any], overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(world, **overrides)


def test_a_plan_is_never_overwritten_by_another(world: dict[str, Any], tmp_path: Path) -> None:
    make_plan(world).save(tmp_path)
    make_plan(world).save(tmp_path)
    assert ShadowPlan.load(tmp_path) == make_plan(world)
    with pytest.raises(PlanError, match="holds another plan"):
        make_plan(world, seed=1).save(tmp_path)
    data = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**data, "format_version": 99}))
    with pytest.raises(FormatVersionError):
        ShadowPlan.load(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(PlanError, match="format_version"):
        ShadowPlan.load(tmp_path)


def test_data_that_changed_since_the_plan_are_refused(world: dict[str, Any], tmp_path: Path) -> None:
    make_plan(world).save(tmp_path)
    with pytest.raises(PlanError, match="not those that the plan was made from"):
        run_shadows(tmp_path, rows=world["rows"].select(range(100)))


def test_describe_says_what_will_run_and_what_it_costs(world: dict[str, Any]) -> None:
    text = make_plan(world).describe()
    assert "12 shadow runs (6 train, 3 validation, 3 test) of 8 rows each, 3 tasks" in text
    assert "72 optimizer steps, 288 rows read" in text


def test_finished_runs_are_kept_and_hold_snapshots_of_both_models(world: dict[str, Any], finished: Path) -> None:
    plan = ShadowPlan.load(finished)
    assert run_shadows(finished) == {"source": 0, "target": 0}
    for role, last in (("source", 6), ("target", 4)):
        layout = world["roots"][role].layout
        record = read_run(plan, finished, role, "shadow-00003", layout=layout)
        assert record.steps == [last - 1, last]
        assert len(record.losses) == last
        assert all(values.shape[0] == 2 for values in record.snapshots.values())
    assert set(shadow_summary(finished)) == {"source", "target"}


def test_a_run_of_another_plan_is_refused(world: dict[str, Any], finished: Path) -> None:
    other = make_plan(world, seed=5)
    with pytest.raises(DeltaDatasetError, match="belongs to another plan"):
        read_run(other, finished, "source", "shadow-00000", layout=world["roots"]["source"].layout)


def test_the_dataset_loads_with_plain_datasets_and_holds_adapter_minus_root(
    world: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    manifest = build_delta_dataset(finished, tmp_path / "deltas")
    assert manifest["splits"]["train"] == {"runs": 6, "pairs": 12}
    plain = datasets.load_dataset(str(tmp_path / "deltas"))
    assert set(plain) == {"train", "validation", "test"}
    sizes = {role: root.layout.numel for role, root in world["roots"].items()}
    assert plain["train"].features == datasets.Features(
        {
            "shadow_id": datasets.Value("string"),
            "task": datasets.Value("string"),
            "step": datasets.Value("int32"),
            "source_blocks": datasets.List(datasets.Value("float32"), length=sizes["source"]),
            "target_blocks": datasets.List(datasets.Value("float32"), length=sizes["target"]),
        }
    )
    runs = [set(plain[split]["shadow_id"]) for split in plain]
    assert len(set.union(*runs)) == sum(map(len, runs)) == 12
    deltas = load_delta_dataset(tmp_path / "deltas")
    pairs = deltas.pairs("test")
    plan = ShadowPlan.load(finished)
    root = world["roots"]["target"]
    record = read_run(plan, finished, "target", pairs.shadow_ids[1], layout=root.layout)
    assert pairs.shadow_ids[0] == pairs.shadow_ids[1]
    expected = root.layout.flatten({key: values[1] for key, values in record.snapshots.items()}) - root.adapter.flat()
    torch.testing.assert_close(pairs.target[1], expected)
    assert torch.equal(pairs.target[1], torch.tensor(plain["test"][1]["target_blocks"]))
    assert deltas.source_root.fingerprint == world["roots"]["source"].fingerprint


def test_how_well_deltas_agree_is_said_of_training_runs_alone(finished: Path) -> None:
    """As in the report of a mapper: held-out runs say nothing of what it could learn from."""
    summary = shadow_summary(finished)
    assert {found.num_deltas for found in summary.values() if found is not None} == {6}


def test_a_delta_dataset_is_no_plan_and_takes_no_other_plan(
    world: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "deltas"
    build_delta_dataset(finished, folder)
    for interrupted in (False, True):
        if interrupted:
            (folder / "delta_dataset.json").unlink()
        for use in (run_shadows, shadow_summary, lambda plan_dir: build_delta_dataset(plan_dir, tmp_path / "x")):
            with pytest.raises(PlanError, match="not that of a shadow plan"):
                use(folder)
        assert not (folder / "runs").exists()
    build_delta_dataset(finished, folder)
    with pytest.raises(OutputError, match="made from"):
        build_delta_dataset(finished, finished / "deltas")
    with pytest.raises(OutputError, match="something else"):
        build_delta_dataset(finished, world["path"] / "source_root")
    manifest = json.loads((folder / "delta_dataset.json").read_text())
    (folder / "delta_dataset.json").write_text(json.dumps({**manifest, "plan_fingerprint": "another"}))
    with pytest.raises(DeltaDatasetError, match="another plan"):
        build_delta_dataset(finished, folder)


def test_a_changed_manifest_or_root_of_a_dataset_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deltas"
    manifest = build_delta_dataset(finished, folder)
    assert load_delta_dataset(folder).fingerprint == manifest["fingerprint"]
    # Datasets from before had no fingerprint, and have the same now.
    older = {name: value for name, value in manifest.items() if name != "fingerprint"}
    (folder / "delta_dataset.json").write_text(json.dumps(older))
    assert load_delta_dataset(folder).fingerprint == manifest["fingerprint"]
    recipes = {**manifest["recipes"], "source": {**manifest["recipes"]["source"], "max_steps": 99}}
    (folder / "delta_dataset.json").write_text(json.dumps({**manifest, "recipes": recipes}))
    with pytest.raises(DeltaDatasetError, match="manifest"):
        load_delta_dataset(folder)
    (folder / "delta_dataset.json").write_text(json.dumps(manifest))
    shutil.copytree(folder / "source_root", folder / "target_root", dirs_exist_ok=True)
    with pytest.raises(IncompleteArtifactError, match="not the one"):
        _ = load_delta_dataset(folder).target_root


def test_missing_runs_are_named_or_left_out(world: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    shutil.copytree(finished, partial)
    (partial / "runs" / "target" / "shadow-00001.safetensors").unlink()
    with pytest.raises(DeltaDatasetError, match="shadow-00001"):
        build_delta_dataset(partial, tmp_path / "deltas")
    manifest = build_delta_dataset(partial, tmp_path / "deltas", allow_missing=True)
    assert manifest["missing_runs"] == ["shadow-00001"]


def test_an_unfinished_or_changed_dataset_is_refused(world: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deltas"
    build_delta_dataset(finished, folder)
    path = next((folder / "data").glob("train-*.parquet"))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DeltaDatasetError, match="missing or was changed"):
        load_delta_dataset(folder)
    (folder / "delta_dataset.json").unlink()
    with pytest.raises(IncompleteArtifactError):
        load_delta_dataset(folder)
