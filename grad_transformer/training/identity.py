"""What a folder is trained with: dataset and arguments are written before the first step, and checked ever after."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..adapters.io import read_record, write_json_atomic
from ..constants import (
    FORMAT_VERSION,
    HELDOUT_NAME,
    SHIFT_NAME,
    SHIFT_TENSORS_NAME,
    SOURCE_FOLDER,
    TARGET_FOLDER,
    TRAINING_IDENTITY_NAME,
    TRAINING_LOG_NAME,
)
from ..documents import parse_json
from ..errors import OutputError
from ..schemas import TrainingIdentityRecord
from .arguments import MapperArguments
from .trainer_arguments import GradTransformerTrainingArguments


# What a training leaves: config.json, which says that a mapper is whole, goes first.
_LEFT = (
    *("config.json", "model*.safetensors", "model.safetensors.index.json", SOURCE_FOLDER, TARGET_FOLDER),
    *("checkpoint-*", "training_args.json", TRAINING_LOG_NAME, HELDOUT_NAME, SHIFT_NAME, SHIFT_TENSORS_NAME),
)
# Arguments that change how a training is run, logged or kept, not what comes out. All others do.
_HOW = (
    *("output_dir", "log_*", "logging_*", "disable_tqdm", "report_to", "run_name", "project", "trackio_*", "hub_*"),
    *("push_to_hub", "save_total_limit", "save_only_model", "save_on_each_node", "enable_jit_checkpoint", "debug"),
    *("dataloader_*workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_multiprocessing_*"),
    *("ddp_*", "fsdp*", "deepspeed", "accelerator_config", "parallelism_config", "local_rank", "use_cpu", "do_*"),
    *("*_checkpointing", "*_checkpointing_kwargs", "torch_compile*", "torch_empty_cache_steps", "include_*"),
    *("per_device_*", "gradient_accumulation_steps", "eval_accumulation_steps", "eval_use_gather_object"),
    *("eval_do_concat_batches", "batch_eval_metrics", "prediction_loss_only", "skip_memory_metrics"),
    *("resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
)


@dataclass(frozen=True)
class TrainingIdentity:
    """What decides a mapper.

    Args:
        dataset (`dict[str, str]`): `fingerprint` and `plan_fingerprint` of the delta dataset.
        mapper (`dict`), training (`dict`): arguments that change the result; `pairs_per_step` counts all processes.
    """

    dataset: dict[str, str]
    mapper: dict[str, Any]
    training: dict[str, Any]

    @classmethod
    def of(
        cls, dataset: Mapping[str, str], mapper: MapperArguments, training: GradTransformerTrainingArguments
    ) -> TrainingIdentity:
        decisive = {
            name: value
            for name, value in training.to_dict().items()
            if not any(fnmatch(name, pattern) for pattern in _HOW)
        }
        decisive["pairs_per_step"] = (
            training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
        )
        # As JSON gives it back, so that what was read can be compared.
        return cls(dict(dataset), asdict(mapper), parse_json(json.dumps(decisive, default=str)))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def check(self, folder: str | Path) -> dict[str, Any] | None:
        """Refuse a folder of another training.

        Returns:
            what was told at the end of this same training (`finish`); None where it has not come to its end.

        Raises:
            [`OutputError`]: trained on another dataset, with other arguments, or it is not known with what.
        """
        if not any(any(Path(folder).glob(pattern)) for pattern in _LEFT):
            return None  # at most the identity of a training that left nothing
        path = Path(folder) / TRAINING_IDENTITY_NAME
        remedy = "choose another --output_dir, or train anew with --overwrite_output_dir, which removes what is there"
        if not path.is_file():
            raise OutputError(
                "The folder holds a mapper that does not say what it was trained with.",
                path=folder,
                expected=f"a new folder, or one with {TRAINING_IDENTITY_NAME}",
                found="a mapper, or checkpoints of one",
                remedy=remedy,
            )
        known = read_record(path, TrainingIdentityRecord)
        differing = self._differing(known)
        if differing:
            raise OutputError(
                "The folder holds a mapper of another training.",
                path=folder,
                expected=", ".join(f"{name} {expected}" for name, _, expected in differing),
                found=", ".join(f"{name} {found}" for name, found, _ in differing),
                remedy=remedy,
            )
        return known.get("result")

    def _differing(self, known: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """Name, there, and here. Arguments that one side has never heard of are passed over."""
        found = []
        for part, mine in asdict(self).items():
            theirs = known.get(part)
            if not isinstance(theirs, dict):
                return [(part, "not recorded", "recorded")]
            if part != "dataset":
                names = [name for name in mine if name in theirs and theirs[name] != mine[name]]
                found += [(name, theirs[name], mine[name]) for name in names]
            elif theirs != mine:
                found.append((part, str(theirs.get("fingerprint"))[:12], mine["fingerprint"][:12]))
        return found

    def write(self, folder: str | Path, result: Mapping[str, Any] | None = None) -> None:
        """Write it down: before the first step, and with `result` once all else is written."""
        data = {"format_version": FORMAT_VERSION, **asdict(self), "result": result}
        write_json_atomic(Path(folder) / TRAINING_IDENTITY_NAME, data)


def remove_training(folder: str | Path) -> None:
    """Remove what a training leaves in its folder; what others have put there stays."""
    for pattern in (*_LEFT, TRAINING_IDENTITY_NAME):
        for path in sorted(Path(folder).glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
