"""Mappers, delta datasets, plans, runs and studies that were damaged or made to harm: typed errors, and no bombs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.fuzz import artifacts
from benchmarks.fuzz.kinds import KINDS
from benchmarks.fuzz.runner import run_inputs
from grad_transformer import GradTransformer, LoraDeltaTokenizer
from grad_transformer.adapters import ShiftReference
from grad_transformer.errors import (
    AdapterFormatError,
    DeltaDatasetError,
    GradTransformerError,
    IncompleteArtifactError,
    PlanError,
    RecipeError,
    UsageError,
)
from grad_transformer.finetuning import FineTuningRecipe
from grad_transformer.modeling_weights import read_weight_shapes
from grad_transformer.shadow import ShadowPlan, load_delta_dataset, read_run
from grad_transformer.shadow.run import load_plan_root
from grad_transformer.study.experiments import EXPERIMENTS
from grad_transformer.study.schema import check_study
from grad_transformer.study.spec import StudySpec


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mapper, a client, a plan with its runs, and a delta dataset."""
    folder = tmp_path_factory.mktemp("valid")
    artifacts.write_mapper(folder / "mapper")
    artifacts.write_client(folder / "client", artifacts.make_tokenizer())
    artifacts.write_delta_dataset(folder / "deltas", folder / "plan")
    return folder


@pytest.fixture
def mapper(places: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(places / "mapper", tmp_path / "mapper"))


@pytest.fixture
def deltas(places: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(places / "deltas", tmp_path / "deltas"))


@pytest.fixture
def plan_dir(places: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(places / "plan", tmp_path / "plan"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# Mappers


def test_a_whole_mapper_is_loaded_in_one_file_or_in_shards(mapper: Path, places: Path, tmp_path: Path) -> None:
    whole = GradTransformer.from_pretrained(mapper)
    assert whole.generate_adapter(places / "client").flat().isfinite().all()
    whole.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    again = GradTransformer.from_pretrained(tmp_path / "shards")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    shard = sorted((tmp_path / "shards").glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(IncompleteArtifactError):
        GradTransformer.from_pretrained(tmp_path / "shards")


def without(word: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {key: value for key, value in tensors.items() if word not in key}


@pytest.mark.parametrize(
    "change",
    [
        without("readout"),
        without("decoder"),
        lambda tensors: {},
        lambda tensors: {**tensors, "extra": torch.zeros(2)},
        lambda tensors: {**tensors, "start_block": torch.zeros(3)},
        lambda tensors: {**tensors, "start_block": torch.full_like(tensors["start_block"], float("nan"))},
        lambda tensors: {**tensors, "start_block": torch.full_like(tensors["start_block"], float("inf"))},
    ],
    ids=["readout", "decoder", "nothing", "extra", "shape", "nan", "inf"],
)
def test_weights_that_are_not_the_mappers_are_refused(mapper: Path, change: Any) -> None:
    path = mapper / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    with pytest.raises(IncompleteArtifactError):
        GradTransformer.from_pretrained(mapper)


def test_a_pickle_alone_is_no_mapper(mapper: Path) -> None:
    (mapper / "model.safetensors").unlink()
    (mapper / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(IncompleteArtifactError, match="pytorch_model.bin"):
        GradTransformer.from_pretrained(mapper)


def backbone(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["backbone_config"].update(fields)


@pytest.mark.parametrize(
    "change",
    [
        backbone(d_model=1_000_000, d_ff=1_000_000),
        backbone(d_model=10**12),
        backbone(num_layers=5000, num_decoder_layers=5000),
        backbone(num_heads=0),
        backbone(d_model="16"),
        backbone(model_type="evil", auto_map={"AutoModel": "evil--x.Y"}),
        backbone(model_type="qwen2"),
        backbone(_attn_implementation="evil/kernels"),
        lambda config: config.update(auto_map={"AutoModel": "evil.X"}),
        lambda config: config.update(target_type_widths=[40_000_000]),
        lambda config: config.update(target_block_types=[0] * 90_000),
        lambda config: config.update(source_block_types="0"),
        lambda config: config.update(decoding="backwards"),
        lambda config: config.update(backbone_config=[1]),
        lambda config: config.update(initializer_range="x"),
        lambda config: config.update(delta_dataset={"repo_id": "a/b", "sha": "<script>"}),
    ],
)
def test_a_config_cannot_ask_for_more_than_its_weights(mapper: Path, change: Any) -> None:
    edit(mapper / "config.json", change)
    started = time.process_time()
    with pytest.raises(GradTransformerError):
        GradTransformer.from_pretrained(mapper)
    assert time.process_time() - started < 3


def test_headers_alone_give_the_shapes(mapper: Path) -> None:
    shapes = read_weight_shapes(mapper)
    assert shapes["start_block"] == (16,)
    with open(mapper / "model.safetensors", "r+b") as file:
        file.truncate(2**32)
    with pytest.raises(IncompleteArtifactError):
        read_weight_shapes(mapper)


@pytest.mark.parametrize(
    ("name", "value"), [("mean", float("nan")), ("scale", 0.0), ("scale", -1.0), ("scale", float("inf"))]
)
def test_statistics_that_cannot_be_are_refused(mapper: Path, name: str, value: float) -> None:
    path = mapper / "source" / "statistics.safetensors"
    tensors = load_file(path)
    save_file({**tensors, name: torch.full_like(tensors[name], value)}, path)
    with pytest.raises(IncompleteArtifactError):
        LoraDeltaTokenizer.from_pretrained(mapper, subfolder="source")


@pytest.mark.parametrize("change", [{"center": "no"}, {"role": "both"}, {"scale": 3}, {"fitted": None}])
def test_a_tokenizers_config_is_strict(mapper: Path, change: dict[str, Any]) -> None:
    edit(mapper / "source" / "lora_delta_tokenizer.json", lambda data: data.update(change))
    with pytest.raises(IncompleteArtifactError) as caught:
        LoraDeltaTokenizer.from_pretrained(mapper, subfolder="source")
    assert next(iter(change)) in str(caught.value.expected)


def test_a_shift_reference_fits_together(mapper: Path) -> None:
    layout = LoraDeltaTokenizer.from_pretrained(mapper, subfolder="source").layout
    assert ShiftReference.from_folder(mapper, layout) is not None
    path = mapper / "shift.safetensors"
    tensors = load_file(path)
    for name, value in (
        ("mean", tensors["mean"][:3]),
        ("deviations", torch.zeros_like(tensors["deviations"])),
        ("heldout", tensors["heldout"][:0]),
        ("shadows", tensors["shadows"] * float("nan")),
    ):
        save_file({**tensors, name: value.contiguous()}, path)
        with pytest.raises(IncompleteArtifactError):
            ShiftReference.from_folder(mapper, layout)


def test_an_adapter_that_is_not_finite_is_never_made() -> None:
    tokenizer = artifacts.make_tokenizer("target")
    delta_P = torch.zeros(tokenizer.layout.numel)
    delta_P[3] = float("nan")
    with pytest.raises(AdapterFormatError, match="not finite"):
        tokenizer.decode_delta(delta_P)


# Delta datasets


def rewrite(folder: Path, change: Callable[[pa.Table], pa.Table], split: str = "train") -> None:
    """Another table for a split, with the checksum that belongs to it."""
    name = f"data/{split}-00000-of-00001.parquet"
    pq.write_table(change(pq.read_table(folder / name)), folder / name)
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()

    def renew(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = digest
        manifest.pop("fingerprint", None)

    edit(folder / "delta_dataset.json", renew)


def with_column(name: str, make: Callable[[pa.ChunkedArray], Any]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        column = make(table.column(name))
        return table.set_column(table.column_names.index(name), name, column)

    return change


def first_value(value: float | None) -> Callable[[pa.ChunkedArray], pa.Array]:
    def make(column: pa.ChunkedArray) -> pa.Array:
        rows = column.to_pylist()
        rows[0][0] = value
        return pa.array(rows, column.type)

    return make


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["step"]),
        lambda table: table.slice(0, 1),
        lambda table: pa.concat_tables([table] * 2),
        with_column("step", lambda column: pa.array([-1] * len(column), pa.int32())),
        with_column("step", lambda column: pa.array(["x"] * len(column))),
        with_column("shadow_id", lambda column: pa.array([None] * len(column), pa.string())),
        with_column("source_blocks", lambda column: pa.array([[0.0]] * len(column), pa.list_(pa.float32(), 1))),
        with_column("source_blocks", lambda column: column.cast(pa.list_(pa.float64(), column.type.list_size))),
        with_column("source_blocks", first_value(float("nan"))),
        with_column("source_blocks", first_value(float("inf"))),
        with_column("target_blocks", first_value(None)),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_that_are_not_whole_are_refused(deltas: Path, change: Any, streaming: bool) -> None:
    rewrite(deltas, change)
    with pytest.raises(DeltaDatasetError):
        found = load_delta_dataset(deltas, streaming=streaming)
        if streaming:
            list(found.splits["train"])
        else:
            found.pairs("train")


def test_a_parquet_file_cannot_hold_more_than_its_size(deltas: Path) -> None:
    rows = 40_000

    def bomb(table: pa.Table) -> pa.Table:
        columns = {name: pa.repeat(table.column(name)[0], rows) for name in ("shadow_id", "task", "step")}
        for name in ("source_blocks", "target_blocks"):
            size = table.column(name).type.list_size
            zeros = pa.repeat(pa.scalar(0.0, pa.float32()), rows * size)
            columns[name] = pa.FixedSizeListArray.from_arrays(zeros, size)
        return pa.table(columns)

    rewrite(deltas, bomb)
    edit(deltas / "delta_dataset.json", lambda data: data["splits"]["train"].update(pairs=rows))
    with pytest.raises(DeltaDatasetError, match="more rows than it can hold"):
        load_delta_dataset(deltas)


@pytest.mark.parametrize("part", ["roots", "recipes", "layouts"])
def test_a_dataset_speaks_of_both_models(deltas: Path, part: str) -> None:
    edit(deltas / "delta_dataset.json", lambda data: data[part].pop("source"))
    with pytest.raises(GradTransformerError, match="not as expected"):
        load_delta_dataset(deltas)


@pytest.mark.parametrize("name", ["../other.parquet", "/etc/passwd", "data/../x.parquet", "data/later-0.parquet"])
def test_a_manifest_names_files_of_its_own_splits_alone(deltas: Path, name: str) -> None:
    edit(deltas / "delta_dataset.json", lambda data: data["files"].update({name: "0" * 64}))
    with pytest.raises(GradTransformerError):
        load_delta_dataset(deltas)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pipe_in_the_place_of_pairs_is_not_waited_for(deltas: Path, streaming: bool) -> None:
    path = next((deltas / "data").glob("test-*.parquet"))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DeltaDatasetError):
        load_delta_dataset(deltas, streaming=streaming)


def test_a_file_that_the_manifest_does_not_name_is_not_read(deltas: Path) -> None:
    pairs = len(load_delta_dataset(deltas).splits["train"])
    shutil.copy(deltas / "data" / "train-00000-of-00001.parquet", deltas / "data" / "train-00001-of-00002.parquet")
    assert len(load_delta_dataset(deltas).splits["train"]) == pairs


# Plans, runs, recipes and studies


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["runs"][0].update(shadow_id="../../x"),
        lambda plan: plan["runs"][0].update(row_indices=[-1]),
        lambda plan: plan["runs"][0].update(row_indices=[10**6]),
        lambda plan: plan["runs"][0].update(row_indices=[True]),
        lambda plan: plan["runs"][0].update(split="later"),
        lambda plan: plan["runs"].append(plan["runs"][0]),
        lambda plan: plan.update(runs=[]),
        lambda plan: plan.update(source=3),
        lambda plan: plan["source"]["root"].pop("fingerprint"),
        lambda plan: plan.pop("with_overlap"),
    ],
)
def test_a_plan_is_checked(plan_dir: Path, change: Any) -> None:
    edit(plan_dir / "plan.json", change)
    with pytest.raises(PlanError) as caught:
        ShadowPlan.load(plan_dir)
    assert caught.value.path == str(plan_dir / "plan.json")


def test_a_run_is_checked(plan_dir: Path) -> None:
    plan = ShadowPlan.load(plan_dir)
    layout = load_plan_root(plan, plan_dir, "source").layout
    name = plan.runs[0].shadow_id
    path = plan_dir / "runs" / "source" / f"{name}.safetensors"
    header = path.read_bytes()
    size = int.from_bytes(header[:8], "little")
    facts = json.loads(json.loads(header[8 : 8 + size])["__metadata__"]["run"])
    tensors = load_file(path)

    def refused(**changes: Any) -> None:
        metadata = {"run": json.dumps({**facts, **changes.pop("facts", {})})}
        save_file({**tensors, **changes}, path, changes.pop("metadata", metadata))
        with pytest.raises(GradTransformerError):
            read_run(plan, plan_dir, "source", name, layout=layout)

    refused(facts={"format_version": "x"})
    refused(facts={"plan": None})
    refused(facts={"role": []})
    refused(steps=torch.tensor([4, 3]))
    refused(steps=torch.tensor([-1, 4]))
    refused(steps=torch.tensor([[3, 4]]))
    refused(losses=torch.tensor(float("nan")))
    for text in ("", "[]", '{"format_version": 1}', "[" * 5000):
        save_file(tensors, path, {"run": text})
        with pytest.raises(DeltaDatasetError):
            read_run(plan, plan_dir, "source", name, layout=layout)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_steps": 10**7},
        {"max_steps": 10**12},
        {"per_device_batch_size": 10**7},
        {"gradient_accumulation_steps": 10**6},
        {"per_device_batch_size": 60_000, "gradient_accumulation_steps": 60_000},
        {"max_length": 2**62},
        {"learning_rate": 1e300},
        {"learning_rate": 10**400},
        {"max_steps": 100_000, "snapshot_last": 50_000},
        {"max_steps": 100_000, "snapshot_every": 1},
        {"adam_epsilon": 1e30},
        {"weight_decay": -1.0},
        {"format_version": True},
    ],
)
def test_recipes_have_ranges(fields: dict[str, Any]) -> None:
    with pytest.raises((RecipeError, GradTransformerError)):
        FineTuningRecipe.from_dict(fields)


def test_the_studys_own_examples_pass() -> None:
    for text in (artifacts.STUDY, artifacts.TEXT_STUDY):
        check_study(StudySpec(**yaml.safe_load(text.replace("1.10", "'1.10'"))).filled(list(EXPERIMENTS)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seeds", list(range(10_000))),
        ("seeds", [-1]),
        ("clients", {"single": 10**6}),
        ("clients", {"mixtures": 10**9}),
        ("clients", {"rows": "8"}),
        ("shadows", {"num_runs": 10**9}),
        ("shadows", {"checkpoints": 10**8}),
        ("shadows", {"validation_fraction": float("nan")}),
        ("shadows", {"validation_fraction": 0.6, "test_fraction": 0.6}),
        ("shadows", []),
        ("ablations", {"epsilons": [1.0] * 10_000}),
        ("ablations", {"train_runs": 3}),
        ("tinylms", {"M": {"hidden_size": 10**9}}),
        ("tinylms", {"M": {"colour": 1}}),
        ("tinylms", {"M": 3}),
        ("mapper", {"d_model": 10**9}),
        ("mapper", {"colour": 1}),
        ("mapper", {"num_layers": "2"}),
        ("refinement", {"num_prompts": 10**12}),
        ("recipe", {"max_length": 10**9}),
        ("llm_recipe", {"max_steps": 10**9}),
        ("recipe", {"colour": 1}),
        ("training", {"max_steps": -3}),
        ("privacy", {"delta": 2.0}),
        ("lora", {"r": 0}),
        ("data", {"gsm8k": "x"}),
    ],
)
def test_a_study_has_types_and_ranges(name: str, value: Any) -> None:
    with pytest.raises((UsageError, RecipeError)):
        check_study(StudySpec(**{name: value}).filled(list(EXPERIMENTS)))


# A slice of the fuzzer; `python -m benchmarks.fuzz` runs more.


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("adapters", 80),
        ("mappers", 20),
        ("delta_datasets", 15),
        ("plans", 60),
        ("reports", 60),
        ("command_yaml", 40),
        ("study_yaml", 15),
        ("client_data", 25),
    ],
)
# What datasets leaves open where a file is damaged.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_fuzzed_files_give_typed_errors_in_bounded_time_and_memory(tmp_path: Path, name: str, inputs: int) -> None:
    kind = KINDS[name]()
    kind.make(tmp_path / "valid")
    tally = run_inputs(kind, tmp_path / "valid", seed=1, numbers=range(inputs))
    assert tally.found == []
    assert tally.slowest_seconds < 5 and tally.inputs == inputs
