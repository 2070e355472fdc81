"""`FineTuningRecipe`: how an adapter is trained. Both shadow engines and every client read the same object."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import SchedulerType
from trl import SFTConfig

from ..constants import FORMAT_VERSION
from ..documents import describe
from ..errors import FormatVersionError, RecipeError


# transformers 5.23 renamed the field, and warns where the old name is set.
_CHECKPOINTING = next(
    field.name
    for field in sorted(dataclasses.fields(SFTConfig), key=lambda field: field.name)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)
# Schedules that follow from the number of steps alone. The others need the loss, or arguments of their own.
LR_SCHEDULER_TYPES = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclass(frozen=True, kw_only=True)
class FineTuningRecipe:
    """Everything that decides a fine-tune beside base model, root, rows and seed.

    Args:
        learning_rate (`float`, *optional*, defaults to 3e-4): peak learning rate of AdamW.
        max_steps (`int`, *optional*, defaults to 200): optimizer steps.
        per_device_batch_size (`int`, *optional*, defaults to 16): rows of one forward pass.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1): forward passes of one optimizer step. The loss
            is the mean over all completion tokens of the optimizer step, however it is cut.
        adam_beta1, adam_beta2 (`float`, *optional*, default to 0.9 and 0.999): decay of AdamW's two moments.
        adam_epsilon (`float`, *optional*, defaults to 1e-8): AdamW's epsilon. A large one (0.1) makes the deltas of
            one task agree far better, at equal accuracy.
        weight_decay (`float`, *optional*, defaults to 0.0): decoupled weight decay of A and B.
        max_grad_norm (`float`, *optional*, defaults to 1.0): norm to which the adapter's gradient is clipped; 0
            switches clipping off.
        warmup_steps (`int`, *optional*, defaults to 10): steps of linear warm-up.
        lr_scheduler_type (`str`, *optional*, defaults to `"linear"`): `"linear"`, `"cosine"`, `"constant"` or
            `"constant_with_warmup"`.
        max_length (`int`, *optional*, defaults to 512): tokens of prompt and completion; longer rows lose their end.
        snapshot_last (`int`, *optional*, defaults to 1): the adapter is recorded after each of the last so many
            optimizer steps.
        snapshot_every (`int`, *optional*): the adapter is also recorded after every so many optimizer steps.
        early_stopping_window (`int`, *optional*): the fine-tune ends before `max_steps` once the mean training loss
            of so many steps is hardly below that of as many steps before; warm-up steps do not count. Not with
            `snapshot_every`, and at least `snapshot_last`. Private fine-tunes ignore it: when one stops would tell of
            its rows.
        early_stopping_threshold (`float`, *optional*, defaults to 0.01): the fall of the mean loss, relative to the
            earlier one, that counts as progress.

    Raises:
        [`RecipeError`]: a value out of its range.
    """

    learning_rate: float = 3e-4
    max_steps: int = 200
    per_device_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 10
    lr_scheduler_type: str = "linear"
    max_length: int = 512
    snapshot_last: int = 1
    snapshot_every: int | None = None
    early_stopping_window: int | None = None
    early_stopping_threshold: float = 0.01

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field, getattr(self, field.name)))
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            self._check(name, value is None or low <= value <= high, f"from {low} to {high:,}")
        self._check("learning_rate", self.learning_rate > 0, "more than 0")
        for name in ("adam_beta1", "adam_beta2"):
            self._check(name, getattr(self, name) < 1, "below 1")
        self._check("lr_scheduler_type", self.lr_scheduler_type in LR_SCHEDULER_TYPES, ", ".join(LR_SCHEDULER_TYPES))
        # The first step of a warm-up has learning rate 0: without a later step nothing would be trained.
        self._check(
            "warmup_steps", self.warmup_steps < self.max_steps, f"less than the {self.max_steps} steps of `max_steps`"
        )
        self._check("snapshot_last", self.snapshot_last <= self.max_steps, f"at most max_steps={self.max_steps}")
        if self.snapshot_every is not None:
            self._check(
                "snapshot_every", 1 <= self.snapshot_every <= self.max_steps, f"1 to {self.max_steps}, or null"
            )
        self._check(
            "gradient_accumulation_steps",
            self.rows_per_step <= _MAX_ROWS_PER_STEP,
            f"at most {_MAX_ROWS_PER_STEP:,} rows of one optimizer step",
        )
        every = self.snapshot_every
        snapshots = self.snapshot_last + (0 if every is None else self.max_steps // every)
        self._check("snapshot_every", snapshots <= _MAX_SNAPSHOTS, f"at most {_MAX_SNAPSHOTS:,} snapshots of a run")
        self._check("early_stopping_threshold", 0 <= self.early_stopping_threshold < 1, "0 or more, below 1")
        if self.early_stopping_window is not None:
            low = self.snapshot_last
            self._check("early_stopping_window", self.early_stopping_window >= low, f"at least snapshot_last={low}")
            # TinyLM and LLM stop at steps of their own: only the last snapshots of each can be paired.
            self._check("snapshot_every", self.snapshot_every is None, "null where `early_stopping_window` is set")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise RecipeError(
                f"`{name}` of the fine-tuning recipe is out of range.",
                expected=expected,
                found=getattr(self, name),
                remedy=f"set `{name}` to {expected}",
            )

    @property
    def rows_per_step(self) -> int:
        """Rows that one optimizer step reads."""
        return self.per_device_batch_size * self.gradient_accumulation_steps

    @property
    def num_examples(self) -> int:
        """Rows that the whole fine-tune reads, repetitions counted."""
        return self.max_steps * self.rows_per_step

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the recipe as canonical JSON."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def snapshot_steps(self) -> list[int]:
        """The optimizer steps, counted from 1, after which the adapter is recorded; the last step is one of them."""
        last = range(self.max_steps - self.snapshot_last + 1, self.max_steps + 1)
        every = range(self.snapshot_every, self.max_steps + 1, self.snapshot_every) if self.snapshot_every else ()
        return sorted({*last, *every})

    def replace(self, **changes: Any) -> FineTuningRecipe:
        """A recipe with some fields changed."""
        _refuse_unknown(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        data = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        # Left out, so that recipes and plans from before there was early stopping keep their fingerprints.
        for name in ("early_stopping_window", "early_stopping_threshold"):
            if data[name] == getattr(FineTuningRecipe, name):
                del data[name]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, path: str | Path | None = None) -> FineTuningRecipe:
        """The inverse of [`~FineTuningRecipe.to_dict`]; fields that are not there keep their defaults.

        Raises:
            [`FormatVersionError`]: written by a newer version of this library.
            [`RecipeError`]: an unknown field, or a value out of its range.
        """
        fields = dict(data)
        version = fields.pop("format_version", FORMAT_VERSION)
        if isinstance(version, bool) or not isinstance(version, int) or version > FORMAT_VERSION:
            raise FormatVersionError(
                "The fine-tuning recipe was written by a newer version of grad_transformer.",
                path=path,
                expected=f"format version up to {FORMAT_VERSION}",
                found=version,
                remedy="pip install --upgrade grad-transformer",
            )
        _refuse_unknown(fields, path=path)
        return cls(**fields)

    def to_sft_config(
        self, output_dir: str | Path, *, seed: int, gradient_checkpointing: bool = False, **overrides: Any
    ) -> SFTConfig:
        """The recipe as arguments of TRL's `SFTTrainer`, which then writes no file and reports nowhere.

        Args:
            output_dir (`str` or `Path`): a folder that the trainer wants to have.
            seed (`int`): seed of what the trainer draws itself (LoRA dropout).
            gradient_checkpointing (`bool`, *optional*, defaults to `False`): less memory for more time, same result.
            overrides: other fields of `SFTConfig`.
        """
        settings: dict[str, Any] = {
            "output_dir": str(output_dir),
            "seed": int(seed),
            "data_seed": int(seed),
            "learning_rate": self.learning_rate,
            "max_steps": self.max_steps,
            "per_device_train_batch_size": self.per_device_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "optim": "adamw_torch",
            "adam_beta1": self.adam_beta1,
            "adam_beta2": self.adam_beta2,
            "adam_epsilon": self.adam_epsilon,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "warmup_steps": self.warmup_steps,
            "lr_scheduler_type": SchedulerType(self.lr_scheduler_type),
            "max_length": self.max_length,
            # Rows come tokenised and in the order of `row_order`: the same for both engines and both base models.
            "train_sampling_strategy": "sequential",
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "packing": False,
            "loss_type": "nll",
            # Weights decide the precision: TRL's default would switch on bfloat16 autocast.
            "bf16": False,
            "fp16": False,
            _CHECKPOINTING: gradient_checkpointing,
            "save_strategy": "no",
            "eval_strategy": "no",
            "logging_strategy": "no",
            "logging_nan_inf_filter": False,
            "report_to": "none",
            "push_to_hub": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        return SFTConfig(**{**settings, **overrides})


# From and to: what lies above asks for more time or memory than any fine-tune of an adapter has use for.
_RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (0, 100),
    "max_steps": (1, 1_000_000),
    "per_device_batch_size": (1, 65_536),
    "gradient_accumulation_steps": (1, 65_536),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, 1_000),
    "weight_decay": (0, 1_000),
    "max_grad_norm": (0, 1e9),
    "warmup_steps": (0, 1_000_000),
    "max_length": (2, 1_048_576),
    "snapshot_last": (1, 10_000),
    "snapshot_every": (1, 1_000_000),
    "early_stopping_window": (1, 1_000_000),
}
_MAX_ROWS_PER_STEP = 1_048_576
_MAX_SNAPSHOTS = 10_000


def _typed(field: dataclasses.Field[Any], value: Any) -> Any:
    """The value as the field's type, so that 1 and 1.0 have one fingerprint; anything else is refused."""
    kind = str(field.type).removesuffix(" | None")
    if value is None and str(field.type).endswith("| None"):
        return None
    if kind == "str" and isinstance(value, str):
        # Also unwraps transformers' SchedulerType, whose members are strings.
        return str(getattr(value, "value", value))
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    # An integer of Python may be larger than any float.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "float" and is_number and abs(value) <= sys.float_info.max:
        return float(value)
    raise RecipeError(
        f"`{field.name}` of the fine-tuning recipe has the wrong type.",
        expected=f"a finite {field.type}" if kind == "float" else field.type,
        found=describe(value),
        remedy="YAML reads `3e-4` as text: write `3.0e-4`" if isinstance(value, str) else None,
    )


def _refuse_unknown(fields: Mapping[str, Any], *, path: str | Path | None = None) -> None:
    known = [field.name for field in dataclasses.fields(FineTuningRecipe)]
    unknown = sorted(fields.keys() - set(known))
    if unknown:
        raise RecipeError(
            f"A fine-tuning recipe has no field `{unknown[0]}`.",
            path=path,
            expected=", ".join(known),
            found=", ".join(unknown),
            remedy="remove or rename it",
        )
