"""What a plan will cost, before any weight is loaded: hours, disk and memory from the base models' configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..adapters import LoraAdapter, LoraLayout, Root
from ..adapters.base_files import locate
from ..adapters.bases import outline_causal_lm
from ..adapters.roots import adapter_config, draw_adapter
from ..finetuning import FineTuningRecipe
from ..wording import describe_bytes, describe_count, describe_seconds
from .batches import TOKENS_PER_PASS_ELSEWHERE, Batches, FineTuneJob
from .memory import BatchSize, fit_batch, measure_bytes_per_token


@dataclass(frozen=True)
class Device:
    """An accelerator: dense bfloat16 FLOP/s and memory in bytes, as its maker states them."""

    flops: float
    memory: float


DEVICES = {
    "A100": Device(312e12, 80e9),
    "H100": Device(989e12, 80e9),
    "H200": Device(989e12, 141e9),
    "L40S": Device(362e12, 48e9),
    "RTX4090": Device(165e12, 24e9),
}
# Assumed, not measured: a frozen base in bfloat16 with passes that fill the device.
DEFAULT_MFU = 0.35


@dataclass(frozen=True)
class SideEstimate:
    """What the runs of one model cost.

    Args:
        name (`str`): of the base model.
        parameters (`int`), adapter_values (`int`).
        tokens (`int`): that all runs read.
        flops_per_token (`float`): of forward and backward pass.
        hours (`float`): on one device, of all runs.
        batch ([`BatchSize`], *optional*): adapters at once; None where not one fits.
        memory (`float`): bytes, of weights, adapters and activations together.
        weight_bytes (`int`), run_bytes (`int`): on disk: checkpoint; files of all runs.
    """

    name: str
    parameters: int
    adapter_values: int
    tokens: int
    flops_per_token: float
    hours: float
    batch: BatchSize | None
    memory: float
    weight_bytes: int
    run_bytes: int


def outline_root(
    name_or_path: str | Path, lora_config: LoraConfig, *, revision: str | None = None
) -> tuple[PreTrainedModel, Root]:
    """The root that a plan would draw, without its values: layout and config are right, values are zero.

    Raises:
        [`UsageError`]: no such base model, or target modules that it does not have.
        [`AdapterFormatError`]: the LoRA config cannot be represented as blocks.
    """
    files = locate(name_or_path, revision=revision)
    model = outline_causal_lm(files)
    peft_model = draw_adapter(model, lora_config, name=files.name)
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    tensors = {key: torch.zeros(value.shape) for key, value in state.items()}
    settings = adapter_config(peft_model, files.name, files.revision)
    peft_model.unload()
    layout = LoraLayout.from_adapter_config(settings, {key: tuple(value.shape) for key, value in tensors.items()})
    outline = "not drawn yet"
    root = Root(LoraAdapter(settings, tensors, layout), outline, files.name, files.revision, outline, 0)
    return model, root


def estimate_side(
    model: PreTrainedModel,
    root: Root,
    recipe: FineTuningRecipe,
    *,
    num_runs: int,
    device: Device,
    mfu: float = DEFAULT_MFU,
    completion_share: float = 0.5,
) -> SideEstimate:
    """What all runs of one model cost.

    Args:
        model, root: from [`outline_root`].
        recipe ([`FineTuningRecipe`]): of the runs.
        num_runs (`int`): N.
        device ([`Device`]): that they run on, one after the other batch.
        mfu (`float`, *optional*, defaults to 0.35): share of the device's FLOP/s that is reached.
        completion_share (`float`, *optional*, defaults to 0.5): tokens with a label, which alone go through the head.
    """
    length = recipe.max_length
    labels = [-100] * round(length * (1 - completion_share)) + [0] * round(length * completion_share)
    job = FineTuneJob(Dataset.from_dict({"input_ids": [[0] * len(labels)], "labels": [labels]}), 0)
    one_row = recipe.replace(
        max_steps=1,
        warmup_steps=0,
        per_device_batch_size=1,
        gradient_accumulation_steps=1,
        snapshot_last=1,
        snapshot_every=None,
    )
    batches = Batches([job], _NoPadding(), one_row, device=model.device, tokens_per_pass=length, in_order=True)
    bytes_per_token = measure_bytes_per_token(model, root, batches)
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    batch = fit_batch(
        device.memory - weight_bytes,
        root,
        recipe,
        bytes_per_token=bytes_per_token,
        value_bytes=4,
        longest=length,
        mean_length=length,
        fills=TOKENS_PER_PASS_ELSEWHERE,
    )
    tokens = num_runs * recipe.num_examples * length
    flops_per_token = _flops_per_token(model, length, completion_share)
    memory = float(weight_bytes)
    if batch is not None:
        step = batch.num_adapters * recipe.rows_per_step * length
        memory += batch.num_adapters * batch.bytes_per_adapter + min(batch.tokens_per_pass, step) * bytes_per_token
    return SideEstimate(
        name=root.base_model,
        parameters=sum(tensor.numel() for tensor in model.parameters()),
        adapter_values=root.layout.numel,
        tokens=tokens,
        flops_per_token=flops_per_token,
        hours=tokens * flops_per_token / (device.flops * mfu) / 3600,
        batch=batch,
        memory=memory,
        weight_bytes=weight_bytes,
        run_bytes=4 * root.layout.numel * len(recipe.snapshot_steps()) * num_runs,
    )


class _NoPadding:
    """Stands for a tokenizer where rows are tokens already."""

    pad_token_id = 0


def _flops_per_token(model: PreTrainedModel, length: int, completion_share: float) -> float:
    """Two FLOPs for each weight of a linear layer forward, as many backward (frozen weights get no gradient), and
    causal attention, whose backward pass is twice its forward pass."""
    head = model.get_output_embeddings()
    body = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    )
    config = model.config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 2 * length * width * config.num_hidden_layers
    return 4 * (body + completion_share * head.weight.numel()) + 3 * attention


def assumptions(device_name: str, mfu: float, completion_share: float = 0.5) -> list[tuple[str, str]]:
    """What an estimate rests on, and where each of it is from."""
    device = DEVICES[device_name]
    return [
        (
            "device",
            f"one {device_name}: {device.flops / 1e12:.0f} TFLOP/s bfloat16, {device.memory / 1e9:.0f} GB (maker)",
        ),
        ("share of it reached (MFU)", f"{mfu:.2f} (assumed; --estimate_mfu)"),
        ("tokens of a row", "max_length (upper bound: rows are seldom full)"),
        ("tokens with a label", f"{completion_share:.0%} (assumed)"),
        (
            "FLOPs",
            "4 a weight and token, frozen weights get no gradient; attention 3 x forward (counted from the config)",
        ),
        ("activations", "what a pass over the model's shapes saves, times 1.6 (measured without weights)"),
        ("disk", "float32 in run files and delta dataset (counted, without headers)"),
    ]


def estimate_table(sides: Mapping[str, SideEstimate]) -> list[list[Any]]:
    """Rows of label, TinyLM, LLM."""
    both = list(sides.values())
    return [
        ["base model", *(side.name for side in both)],
        ["parameters", *(describe_count(side.parameters) for side in both)],
        ["values of an adapter", *(f"{side.adapter_values:,}" for side in both)],
        ["tokens of all runs", *(describe_count(side.tokens) for side in both)],
        ["FLOPs a token", *(describe_count(side.flops_per_token) for side in both)],
        ["time of one device, all runs", *(describe_seconds(3600 * side.hours) for side in both)],
        ["adapters at once", *(side.batch.num_adapters if side.batch else "none fits" for side in both)],
        ["memory", *(describe_bytes(side.memory) for side in both)],
        ["disk, checkpoint", *(describe_bytes(side.weight_bytes) for side in both)],
        ["disk, run files", *(describe_bytes(side.run_bytes) for side in both)],
        ["disk, delta dataset", *(describe_bytes(side.run_bytes) for side in both)],
    ]
