"""A client's fine-tune with differential privacy: the adapter that leaves carries a bound on what it tells of a row.

Needs Opacus: `pip install "grad-transformer[dp]"`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..adapters import LoraAdapter, PrivacyStatement
from ..adapters.io import write_text_atomic
from ..constants import SOURCE_FOLDER
from ..errors import UsageError
from ..finetuning import FineTuningRecipe, SftResult, check_rows, read_adapter_tensors, tokenize_rows
from ..finetuning.sft import check_result, check_supported
from ..tokenization_lora_delta import LoraDeltaTokenizer
from .finetune import ClientTask, prepare_client
from .trainer import PrivacyArguments, PrivateSFTTrainer


logger = logging.get_logger(__name__)

CARD_NAME = "README.md"


def finetune_client_privately(
    mapper: str | Path | LoraDeltaTokenizer,
    rows: datasets.Dataset | Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    *,
    privacy: PrivacyArguments,
    role: Literal["source", "target"] = SOURCE_FOLDER,
    base_model: str | None = None,
    recipe: FineTuningRecipe | None = None,
    physical_batch_size: int | None = None,
    checkpoint_dir: str | Path | None = None,
    eval_rows: datasets.Dataset | Sequence[Mapping[str, Any]] | None = None,
    early_stopping_patience: int | None = None,
    state_num_examples: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    hub_kwargs: Mapping[str, Any] | None = None,
    **sft_config: Any,
) -> tuple[LoraAdapter, SftResult, PrivacyStatement]:
    """Fine-tune the TinyLM on the client's rows with DP-SGD, from the mapper's root, on LoRA parameters only.

    Mapping the adapter to the LLM is post-processing: what is generated from it alone has the same bound.

    Args:
        mapper, rows, role, base_model, recipe, state_num_examples, dtype, device, hub_kwargs: as in
            [`finetune_client`]. Of the recipe, `max_grad_norm` is replaced by the clipping of each example.
        output_dir (`str` or `Path`): receives the adapter, its bound in `grad_transformer.json`, and a card,
            `README.md`, with the statement in words.
        privacy ([`PrivacyArguments`]): budget, clipping, noise.
        physical_batch_size (`int`, *optional*): rows of one forward pass; default: the recipe's. The mechanism, and
            the result but for rounding, do not depend on it.
        checkpoint_dir (`str` or `Path`, *optional*): keeps a checkpoint after each tenth of the steps, from which the
            same call goes on after an interruption. Checkpoints stay with the client.
        eval_rows, early_stopping_patience (*optional*): stop when the loss on `eval_rows` has not fallen for that many
            tenths. Only with `privacy.allow_early_stopping`: the library cannot know whether they are public.
        sft_config: other fields of TRL's `SFTConfig`.

    Returns:
        the adapter; losses and tensors of the run (losses are private, and stay with the client); the bound.

    Raises:
        [`UsageError`]: arguments out of range, or early stopping without being told so.
        errors of [`finetune_client`].
    """
    if (eval_rows is None) != (early_stopping_patience is None):
        raise UsageError(
            "Early stopping needs rows and patience.",
            expected="eval_rows and early_stopping_patience, or neither",
            found=f"early_stopping_patience={early_stopping_patience}",
        )
    started = time.perf_counter()
    task = prepare_client(
        mapper,
        rows,
        role=role,
        base_model=base_model,
        recipe=recipe,
        dtype=dtype,
        device=device,
        hub_kwargs=hub_kwargs,
    )
    check_supported(task.model.get_base_model(), task.root)
    with tempfile.TemporaryDirectory() if checkpoint_dir is None else nullcontext(str(checkpoint_dir)) as folder:
        settings = _settings(task.recipe, privacy, physical_batch_size, checkpoint_dir is not None)
        if early_stopping_patience is not None:
            interval = max(1, task.recipe.max_steps // 10)
            settings |= {"eval_strategy": "steps", "eval_steps": interval, "metric_for_best_model": "eval_loss"}
        trainer = PrivateSFTTrainer(
            task.model,
            task.recipe.to_sft_config(folder, seed=0, **{**settings, **sft_config}),
            train_dataset=tokenize_rows(task.rows, task.text_tokenizer, task.recipe.max_length),
            eval_dataset=None if eval_rows is None else _tokenized(eval_rows, task),
            processing_class=task.text_tokenizer,
            privacy=privacy if privacy.batch_size else _with_batch_size(privacy, task.recipe.rows_per_step),
            callbacks=None if early_stopping_patience is None else [EarlyStoppingCallback(early_stopping_patience)],
        )
        last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        trainer.train(resume_from_checkpoint=last)
        tensors = read_adapter_tensors(task.model, root=task.root)
        trainer.accelerator.free_memory()
    task.model.eval()
    snapshots = {key: value.cpu()[None] for key, value in tensors.items()}
    seconds = time.perf_counter() - started
    result = SftResult(trainer.step_losses, snapshots, [trainer.state.global_step], seconds)
    check_result(result, task.root, name="the client")
    statement = trainer.privacy_statement()
    logger.info(statement.statement())
    adapter = task.save(output_dir, result, state_num_examples=state_num_examples, privacy=statement)
    write_text_atomic(Path(output_dir) / CARD_NAME, privacy_card(statement))
    return adapter, result, statement


def privacy_card(statement: PrivacyStatement) -> str:
    """A model card that says what the adapter is, and its bound."""
    return (
        "---\nlibrary_name: peft\ntags:\n- grad-transformer\n- differential-privacy\n---\n\n"
        "# A client's adapter, fine-tuned with differential privacy\n\n"
        "A LoRA adapter of a small model, made from a mapper's root to be mapped to a large one.\n\n"
        f"{statement.to_markdown()}"
    )


def _settings(
    recipe: FineTuningRecipe, privacy: PrivacyArguments, physical_batch_size: int | None, keep: bool
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": physical_batch_size or recipe.per_device_batch_size,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 0.0,
    }
    if keep:
        settings |= {"save_strategy": "steps", "save_steps": max(1, recipe.max_steps // 10), "save_total_limit": 2}
    return settings


def _with_batch_size(privacy: PrivacyArguments, batch_size: int) -> PrivacyArguments:
    return PrivacyArguments(**{**vars(privacy), "batch_size": batch_size})


def _tokenized(rows: datasets.Dataset | Sequence[Mapping[str, Any]], task: ClientTask) -> datasets.Dataset:
    return tokenize_rows(check_rows(rows), task.text_tokenizer, task.recipe.max_length)
