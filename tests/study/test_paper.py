"""`examples/paper/*.yaml`: every object of theirs, built from real shapes on the meta device, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from grad_transformer import GradTransformer, GradTransformerConfig, LoraLayout
from grad_transformer.evaluation.tasks import TASKS
from grad_transformer.finetuning import FineTuningRecipe
from grad_transformer.study.builders import StudyBuilder
from grad_transformer.study.experiments import EXPERIMENTS, experiments_of
from grad_transformer.study.spec import StudySpec
from grad_transformer.study.stages import in_order
from grad_transformer.training import GradTransformerTrainingArguments, MapperArguments


PAPER = sorted((Path(__file__).parents[2] / "examples" / "paper").glob("*.yaml"))
SHAPES = {"0.5B": (24, 5632), "1.5B": (28, 9728), "3B": (36, 12800), "7B": (28, 22528), "14B": (48, 32768)}
every_file = pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)


def load(path: Path) -> StudySpec:
    return StudySpec(**yaml.safe_load(path.read_text())).filled(list(EXPERIMENTS))


def layout_of(config: dict[str, Any], lora: dict[str, Any]) -> LoraLayout:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        adapted = get_peft_model(model, LoraConfig(**lora, task_type="CAUSAL_LM"))
    shapes = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(adapted).items()}
    return LoraLayout.from_adapter_config({"peft_type": "LORA", **lora}, shapes)


@pytest.fixture(scope="module")
def layouts() -> dict[str, LoraLayout]:
    spec = load(next(path for path in PAPER if path.stem == "scales"))
    models = {**spec.tinylms, **spec.llms}
    return {name: layout_of(spec.configs[settings["model"]], spec.lora) for name, settings in models.items()}


def test_blocks_have_the_papers_shapes(layouts: dict[str, LoraLayout]) -> None:
    for name, layout in layouts.items():
        assert (layout.num_blocks, {*layout.widths}) == (SHAPES[name][0], {SHAPES[name][1]}), name


@every_file
def test_recipes_and_trainings_can_be_built(path: Path, tmp_path: Path) -> None:
    spec = load(path)
    stages = in_order(
        stage
        for experiment in experiments_of(spec.experiments)
        for line in experiment.build(StudyBuilder(spec, 0))
        for stage in line.stages
    )
    assert set(spec.tasks) <= TASKS.keys()
    for name in (*spec.tinylms, *spec.llms):
        assert {**spec.tinylms, **spec.llms}[name]["model"] == f"Qwen/Qwen2.5-{name}-Instruct"
    for stage in stages:
        if "recipe" in stage.params:
            recipe = FineTuningRecipe.from_dict(stage.params["recipe"])
            assert (recipe.learning_rate, recipe.rows_per_step) == (1e-5, 16)
        if stage.kind == "mapper":
            assert MapperArguments(**stage.params["mapper"]).backbone == "google/flan-t5-large"
            training = GradTransformerTrainingArguments(output_dir=str(tmp_path), **stage.params["training"])
            assert (training.num_train_epochs, training.per_device_train_batch_size) == (30, 32)
            assert 2e-5 <= training.learning_rate <= 8e-5


def test_the_mapper_can_be_built(layouts: dict[str, LoraLayout]) -> None:
    spec = load(next(path for path in PAPER if path.stem == "aqua_rat"))
    backbone = AutoConfig.for_model(**spec.configs[spec.mapper["backbone"]])
    source, target = layouts["3B"], layouts["7B"]
    with torch.device("meta"):
        mapper = GradTransformer(
            GradTransformerConfig(
                backbone_config=backbone,
                source_block_types=list(source.block_types),
                source_type_widths=list(source.type_widths),
                target_block_types=list(target.block_types),
                target_type_widths=list(target.type_widths),
            )
        )
        blocks = torch.empty(2, source.num_blocks, source.widths[0])
        labels = torch.empty(2, target.num_blocks, target.widths[0])
        assert mapper(blocks, labels=labels).blocks.shape == labels.shape
    assert mapper.backbone.config.num_layers == mapper.backbone.config.num_decoder_layers == 24


def test_the_files_cover_every_experiment() -> None:
    assert {name for path in PAPER for name in load(path).experiments} == EXPERIMENTS.keys()


@every_file
def test_a_dry_run_says_hours_disk_and_memory(path: Path, run_cli, tmp_path: Path) -> None:
    outcome = run_cli("study", "--config", path, "--output_dir", tmp_path, "--dry_run", "--gpu", "H100")
    assert outcome.code == 0, outcome.stderr
    for part in (" of one H100", "GiB of disk", "GiB of memory", "shadows Qwen/Qwen2.5-7B-Instruct"):
        assert part in outcome.stdout


def test_the_cost_of_3b_to_7b_is_of_the_right_size(run_cli, tmp_path: Path) -> None:
    path = next(path for path in PAPER if path.stem == "gsm8k")
    arguments = ("study", "--config", path, "--output_dir", tmp_path, "--dry_run", "--json", "--gpu", "A100")
    costs = {cost["kind"]: cost for cost in run_cli(*arguments).json["costs"]}
    # The paper: 300 pairs of shadow models in 9.7 to 31.8 minutes each. Ours is a bound, by its longest rows.
    hours = sum(costs[f"shadows Qwen/Qwen2.5-{name}-Instruct"]["hours"] for name in ("3B", "7B"))
    assert 300 * 9.7 / 60 < hours < 8 * 300 * 9.7 / 60
    weights = 7.6e9 * 2 / 2**30
    assert costs["hub_base Qwen/Qwen2.5-7B-Instruct"]["disk_gib"] == pytest.approx(weights, rel=0.01)
    assert weights < costs["shadows Qwen/Qwen2.5-7B-Instruct"]["memory_gib"] < 1.5 * weights
