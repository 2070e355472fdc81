"""What a study will cost: floating-point operations, disk and memory of its stages, from shapes alone.

Upper bounds in the number of tokens, since every row counts with the recipe's `max_length`; estimates in speed. No
weights are loaded: models are built on the meta device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from ..adapters.bases import load_config, make_backbone, make_causal_lm
from ..errors import GradTransformerError, UsageError
from ..evaluation.tasks import TASKS
from ..files import parse_record
from ..finetuning import FineTuningRecipe
from ..refinement import RefinementArguments
from ..refinement.annotators import MOST_TOGETHER
from ..refinement.arguments import CANDIDATES
from ..shadow.estimate import DEFAULT_MFU, DEVICES
from ..training import MapperArguments
from ..training.backbone import backbone_or_config
from ..wording import describe_error
from .builders import lab_model
from .schema import ModelShapeRecord
from .spec import StudySpec
from .stages import Stage


# Bytes a second that a device reads from its memory, as its maker states them: what generation waits for.
BANDWIDTHS = {"A100": 2.0e12, "H100": 3.35e12, "H200": 4.8e12, "L40S": 0.86e12, "RTX4090": 1.0e12}
# One core: the lab's small models reach 40 GFLOP/s of it (measured), which is the share assumed everywhere.
CPU, CPU_FLOPS, CPU_BANDWIDTH = "cpu", 115e9, 20e9
# That share when an accelerator trains the mapper, whose sequences are short: what the paper's hours amount to.
MAPPER_UTILISATION = 0.06
_GENERATION_BATCH = 32
_LAB_TOKENS = 16


@dataclass(frozen=True)
class StageCost:
    """All stages of one kind and base model: how many, how many are finished, and the cost of the others.

    Args:
        hours (`float`): on one device. disk_gib (`float`): written. memory_gib (`float`): of the device, at most.
    """

    kind: str
    number: int
    finished: int
    hours: float
    disk_gib: float
    memory_gib: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a base model and its adapter, and what activations need."""

    parameters: int
    adapter: int
    layers: int
    hidden: int
    vocabulary: int
    bytes_per_weight: int

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.bytes_per_weight


def estimate(spec: StudySpec, stages: Sequence[Stage], study_dir: str | Path, *, gpu: str = "cpu") -> list[StageCost]:
    """Cost by kind of stage and base model.

    Args:
        spec ([`StudySpec`]): filled.
        stages (`Sequence[Stage]`): as [`in_order`] gives them.
        study_dir (`str` or `Path`): finished stages in it cost nothing.
        gpu (`str`, *optional*, defaults to `"cpu"`): `cpu`, or one of `BANDWIDTHS`.

    Raises:
        [`UsageError`]: no such device, or a base model whose shapes are neither in `configs` nor on the Hub.
    """
    if gpu != CPU and gpu not in BANDWIDTHS:
        known = ", ".join([CPU, *BANDWIDTHS])
        raise UsageError("There is no such device to estimate for.", expected=known, found=gpu)
    peak, bandwidth = (CPU_FLOPS, CPU_BANDWIDTH) if gpu == CPU else (DEVICES[gpu].flops, BANDWIDTHS[gpu])
    sizes = _Sizes(spec)
    grouped: dict[str, list[Stage]] = defaultdict(list)
    for stage in stages:
        base = _base_of(stage)
        grouped[stage.kind if base is None else f"{stage.kind} {sizes.label(base)}"].append(stage)
    costs = []
    for name, members in grouped.items():
        open_stages = [stage for stage in members if not stage.is_finished(study_dir)]
        parts = [_cost(stage, sizes, peak, bandwidth) for stage in open_stages]
        seconds, disk, memory = (list(values) for values in zip(*parts, strict=True)) if parts else ([0.0],) * 3
        costs.append(
            StageCost(
                kind=name,
                number=len(members),
                finished=len(members) - len(open_stages),
                hours=sum(seconds) / 3600,
                disk_gib=sum(disk) / 2**30,
                memory_gib=max(memory) / 2**30,
            )
        )
    return costs


def _cost(stage: Stage, sizes: _Sizes, peak: float, bandwidth: float) -> tuple[float, float, float]:
    """Seconds, bytes of disk, bytes of memory."""
    base = _base_of(stage)
    if stage.kind == "mapper":
        return _mapper_cost(stage, sizes, peak * (DEFAULT_MFU if peak == CPU_FLOPS else MAPPER_UTILISATION))
    if stage.kind == "hub_base":
        # Downloaded.
        return 0.0, sizes.of(base or stage).weight_bytes, sizes.of(base or stage).weight_bytes
    if base is None or stage.kind in ("root", "generated"):
        size = None if base is None or stage.kind == "generated" else sizes.of(base)
        return 0.0, 0.0 if size is None else 4.0 * size.adapter, 0.0 if size is None else size.weight_bytes
    size, params = sizes.of(base), stage.params
    speed = peak * DEFAULT_MFU
    if stage.kind == "lab_base":
        model = params["sizes"]
        tokens = model["pretraining_steps"] * model["pretraining_batch_size"] * _LAB_TOKENS
        return 6 * size.parameters * tokens / speed, size.weight_bytes, 4 * size.weight_bytes
    if stage.kind in ("shadows", "clients", "private_clients", "baseline"):
        recipe = FineTuningRecipe.from_dict(params["recipe"])
        runs = params["num_runs"] if stage.kind == "shadows" else _fine_tunes(stage)
        # Forward and backward through frozen weights: no gradients of these.
        seconds = runs * 4 * size.parameters * recipe.num_examples * recipe.max_length / speed
        snapshots = len(recipe.snapshot_steps()) if stage.kind == "shadows" else 1
        return seconds, 4.0 * runs * snapshots * size.adapter, _training_memory(size, recipe)
    if stage.kind == "refined":
        arguments = RefinementArguments(**params["arguments"])
        recipe = FineTuningRecipe.from_dict(params["recipe"])
        trained = arguments.rounds * arguments.steps * recipe.rows_per_step
        read = (len(CANDIDATES) + arguments.rounds) * arguments.num_prompts
        if arguments.annotators:
            read += arguments.annotators * arguments.screening_prompts + MOST_TOGETHER * arguments.num_prompts
        tokens = len(_clients_of(stage)) * recipe.max_length * (4 * trained + 2 * read)
        return size.parameters * tokens / speed, 4.0 * size.adapter, _training_memory(size, recipe)
    # Labels and scores: prompts are read at once, answers come token by token.
    rows = sum(client["test_rows"] for client in _clients_of(stage)) * len(params.get("names") or [None])
    length = sizes.max_length
    answers = sizes.answer_tokens
    reading = 2 * size.parameters * rows * length / speed
    writing = answers * rows / _GENERATION_BATCH * size.weight_bytes / bandwidth
    return reading + writing, 8.0 * rows, 1.2 * size.weight_bytes


def _mapper_cost(stage: Stage, sizes: _Sizes, speed: float) -> tuple[float, float, float]:
    source, target = (sizes.of(_needed_base(stage.inputs[side])) for side in ("source", "target"))
    arguments = MapperArguments(**stage.params["mapper"])
    backbone = sizes.backbone_parameters(backbone_or_config(arguments))
    width = sizes.backbone_width(backbone_or_config(arguments))
    # phi of the TinyLM, phi and psi of the LLM: blocks to hidden states and back.
    parameters = backbone + width * (source.adapter // source.layers + 2 * target.adapter // target.layers)
    shadows, training = stage.inputs["source"].params, stage.params["training"]
    held_out = shadows["validation_fraction"] + shadows["test_fraction"]
    runs = stage.params["train_runs"] or round(shadows["num_runs"] * (1 - held_out))
    pairs = runs * stage.params["checkpoints"]
    batch = training.get("per_device_train_batch_size", 32)
    seen = training["max_steps"] * batch if "max_steps" in training else pairs * training.get("num_train_epochs", 30)
    blocks = source.layers + target.layers
    seconds = 6 * parameters * blocks * seen / speed
    values = 4 * batch * (source.adapter + 3 * target.adapter)
    # Weights, gradients, two moments; a checkpoint holds weights and moments.
    return seconds, 4.0 * parameters * (1 + 3 * training.get("save_total_limit", 2)), 16.0 * parameters + values


def _training_memory(size: ModelSize, recipe: FineTuningRecipe) -> float:
    """Frozen weights, activations kept at layer boundaries, one layer's own, logits with their gradient in float32."""
    tokens = recipe.per_device_batch_size * recipe.max_length
    kept = tokens * size.hidden * size.bytes_per_weight * (size.layers + 34)
    return size.weight_bytes + 16 * size.adapter + kept + 8 * tokens * size.vocabulary


def _fine_tunes(stage: Stage) -> int:
    return 1 if stage.params.get("pooled") else len(_clients_of(stage))


def _clients_of(stage: Stage) -> list[dict[str, Any]]:
    if "clients" in stage.params:
        return stage.params["clients"]
    needed = stage.inputs.get("clients") or stage.inputs["labels"]
    return _clients_of(needed)


def _base_of(stage: Stage) -> Stage | None:
    """The base model that a stage works with."""
    if stage.kind.endswith("_base"):
        return stage
    if "base" in stage.inputs:
        return stage.inputs["base"]
    return _base_of(stage.inputs["root"]) if "root" in stage.inputs else None


def _needed_base(stage: Stage) -> Stage:
    base = _base_of(stage)
    assert base is not None
    return base


class _Sizes:
    """Sizes of the models that a spec names."""

    def __init__(self, spec: StudySpec):
        self.spec = spec
        self.max_length = FineTuningRecipe(**{**spec.recipe, **spec.llm_recipe}).max_length
        tokens = [TASKS[name].max_new_tokens for name in spec.tasks if name in TASKS]
        self.answer_tokens = max(tokens, default=7)
        self._found: dict[str, ModelSize] = {}

    def label(self, base: Stage) -> str:
        if base.kind == "hub_base":
            return base.params["model"]
        sizes = base.params["sizes"]
        return f"{base.params['role']} {sizes['num_hidden_layers']} × {sizes['hidden_size']}"

    def of(self, base: Stage) -> ModelSize:
        if base.key not in self._found:
            lab = base.kind == "lab_base"
            config = _lab_config(base.params) if lab else self._config(base.params["model"])
            with _shapes_of(self.label(base)):
                self._found[base.key] = measure(config, self.spec.lora, bytes_per_weight=4 if lab else 2)
        return self._found[base.key]

    def backbone_parameters(self, backbone: str | PreTrainedConfig) -> int:
        config = self._config(backbone) if isinstance(backbone, str) else backbone
        with _shapes_of(str(backbone)):
            model = _meta_model(config.to_json_string(), make_backbone)
            # Without token embeddings, which a mapper has none of.
            return sum(parameter.numel() for parameter in model.parameters()) - config.vocab_size * config.hidden_size

    def backbone_width(self, backbone: str | PreTrainedConfig) -> int:
        config = self._config(backbone) if isinstance(backbone, str) else backbone
        with _shapes_of(str(backbone)):
            return int(config.hidden_size)

    def _config(self, name: str) -> PreTrainedConfig:
        given = self.spec.configs.get(name)
        if given is not None:
            return _known_config(given, name)
        try:
            return load_config(name)
        except UsageError as cause:
            raise UsageError(
                "The shapes of a model are not known.",
                path=name,
                expected="an entry in `configs` of the study, or a config on the Hub",
                found=cause.message,
                remedy=cause.remedy,
            ) from cause


def measure(config: PreTrainedConfig, lora: Mapping[str, Any], *, bytes_per_weight: int) -> ModelSize:
    """Size of a causal language model and of a LoRA adapter on it."""
    model = _meta_model(config.to_json_string(), make_causal_lm)
    ends = tuple(lora["target_modules"])
    adapter = sum(
        lora["r"] * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in ends
    )
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        adapter=adapter,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        bytes_per_weight=bytes_per_weight,
    )


def _known_config(given: Mapping[str, Any], name: str) -> PreTrainedConfig:
    """The config that a study gives, of sizes that can be built without weights in a moment."""
    for key, value in given.items():
        if isinstance(value, int) and abs(value) > (512 if "layers" in key or "experts" in key else 2**24):
            raise UsageError(f"`{key}` of a model's config is out of range.", path=name, found=value)
    with _shapes_of(name):
        return AutoConfig.for_model(**given)


@contextmanager
def _shapes_of(name: str) -> Iterator[None]:
    """Whatever transformers says of a config that describes no model, as an error that names it."""
    try:
        yield
    except GradTransformerError:
        raise
    except Exception as cause:
        raise UsageError(
            "The shapes of a model cannot be found.",
            path=name,
            expected="a config that transformers can build",
            found=describe_error(cause),
            remedy="mend the model's entry in `configs` of the study",
        ) from cause


@cache
def _meta_model(config: str, make: Callable[[PreTrainedConfig], PreTrainedModel]) -> PreTrainedModel:
    with torch.device("meta"):
        found = parse_record(config, ModelShapeRecord, path="config.json", error=UsageError)
        return make(AutoConfig.for_model(**found))


def _lab_config(params: Mapping[str, Any]) -> PreTrainedConfig:
    model = lab_model(params["role"], params["sizes"])
    return Qwen2Config(
        vocab_size=32,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        intermediate_size=model.intermediate_size,
        tie_word_embeddings=True,
    )
