"""Every size of the lab in one place: base models, public data, shadow runs, clients, mapper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


NUM_SHADOW_TASKS = 28


@dataclass(frozen=True)
class BaseModelPreset:
    """One base model: its Qwen2 shape, its pretraining, and how many steps a fine-tune of it takes.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size (`int`):
            as in `Qwen2Config`.
        initializer_range (`float`): standard deviation of the initial weights, about 1 / sqrt(hidden_size): Qwen2's
            0.02 is for wide models, and narrow ones start to learn from it too late.
        rope_theta (`float`): base of the rotary embedding's wavelengths; low, as sequences have 16 tokens.
        pretraining_steps (`int`): optimizer steps from scratch.
        pretraining_batch_size (`int`): sequences per step.
        pretraining_learning_rate (`float`): peak, reached after a linear warm-up and followed by a cosine to 0.
        fine_tuning_steps (`int`): optimizer steps of one LoRA run, of a shadow as of a client.
        fine_tuning_learning_rate (`float`): its peak learning rate.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    initializer_range: float
    rope_theta: float
    pretraining_steps: int
    pretraining_batch_size: int
    pretraining_learning_rate: float
    fine_tuning_steps: int
    fine_tuning_learning_rate: float


@dataclass(frozen=True)
class LabPreset:
    """The sizes of one lab.

    Args:
        name (`str`): the key in `PRESETS`.
        tinylm, llm ([`BaseModelPreset`]): the two base models.
        runs_per_task (`int`): single-task shadow runs for each of the 28 shadow tasks.
        rows_per_subset (`int`): rows of one shadow subset, and of a client that is not `small`.
        seen_clients, small_clients, skewed_clients, mixture_clients, unseen_clients (`int`): clients of each sort.
        small_rows (`int`): training rows of a `small` client.
        test_rows (`int`): test rows of each client.
        lora_rank, lora_alpha, lora_target_modules: the adapter, the same for both base models.
        fine_tuning_adam_epsilon, fine_tuning_batch_size, fine_tuning_warmup_steps: what the recipes of both base
            models share. The large epsilon makes deltas of one task agree.
        mapper_d_model, mapper_layers, mapper_d_ff, mapper_steps, mapper_batch_size, mapper_learning_rate: the mapper
            (`mapper_layers` in the encoder and as many in the decoder) and its training.
    """

    name: str
    tinylm: BaseModelPreset
    llm: BaseModelPreset
    runs_per_task: int
    rows_per_subset: int = 256
    seen_clients: int = 12
    small_clients: int = 2
    skewed_clients: int = 2
    mixture_clients: int = 4
    unseen_clients: int = 8
    small_rows: int = 48
    test_rows: int = 256
    lora_rank: int = 2
    lora_alpha: int = 8
    lora_target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    fine_tuning_adam_epsilon: float = 0.1
    fine_tuning_batch_size: int = 16
    fine_tuning_warmup_steps: int = 10
    mapper_d_model: int = 128
    mapper_layers: int = 2
    mapper_d_ff: int = 256
    mapper_steps: int = 600
    mapper_batch_size: int = 64
    mapper_learning_rate: float = 1e-3

    @property
    def shadow_runs(self) -> int:
        """Shadow runs over all 28 shadow tasks."""
        return self.runs_per_task * NUM_SHADOW_TASKS

    @property
    def public_rows_per_task(self) -> int:
        """Public rows of each task: enough for shadow subsets that do not overlap."""
        return self.runs_per_task * self.rows_per_subset

    def recipe_arguments(self, model: BaseModelPreset) -> dict[str, Any]:
        """Keyword arguments of a `FineTuningRecipe` for one of the two base models."""
        return {
            "learning_rate": model.fine_tuning_learning_rate,
            "adam_epsilon": self.fine_tuning_adam_epsilon,
            "per_device_batch_size": self.fine_tuning_batch_size,
            "warmup_steps": self.fine_tuning_warmup_steps,
            "max_steps": model.fine_tuning_steps,
            "lr_scheduler_type": "linear",
            "max_length": 32,
        }


_TINYLM = BaseModelPreset(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    initializer_range=0.2,
    rope_theta=20.0,
    pretraining_steps=700,
    pretraining_batch_size=256,
    pretraining_learning_rate=1e-2,
    fine_tuning_steps=120,
    fine_tuning_learning_rate=3e-2,
)
_LLM = BaseModelPreset(
    hidden_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=256,
    initializer_range=0.1,
    rope_theta=100.0,
    pretraining_steps=500,
    pretraining_batch_size=256,
    pretraining_learning_rate=3e-3,
    fine_tuning_steps=80,
    fine_tuning_learning_rate=6e-2,
)

PRESETS: dict[str, LabPreset] = {
    "full": LabPreset(name="full", tinylm=_TINYLM, llm=_LLM, runs_per_task=20),
    "quick": LabPreset(
        name="quick",
        tinylm=_TINYLM,
        llm=replace(_LLM, pretraining_batch_size=128),
        runs_per_task=5,
        seen_clients=6,
        small_clients=1,
        skewed_clients=1,
        mixture_clients=2,
        unseen_clients=4,
    ),
}
