"""A client's fine-tune with differential privacy: the adapter that leaves carries a bound on what it tells of a row.

Needs Opacus: `pip install "grad-transformer[dp]"`.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import EarlyStoppingCallback
from transformers.utils import logging

from ..adapters import LoraAdapter, PrivacyStatement
from ..constants import CARD_NAME, SOURCE_FOLDER
from ..errors import UsageError
from ..files import write_text_atomic
from ..finetuning import FineTuningRecipe, SftResult, check_rows, check_tokens, read_adapter_tensors, tokenize_rows
from ..finetuning.sft import check_result, check_supported
from ..outputs import prepare_output
from ..tokenization_lora_delta import LoraDeltaTokenizer
from .arguments import PrivacyArguments
from .checkpoints import claim_folder, last_whole, record_delivery, rows_digest
from .finetune import ClientTask, prepare_client
from .groups import rows_by_group
from .mechanism import plan_noise
from .output import Spent, check_outside, disk_errors, spent_before, spent_by
from .terms import ClientTerms, agree
from .trainer import PrivateSFTTrainer


logger = logging.get_logger(__name__)

__all__ = ["PrivacyArguments", "finetune_client_privately", "privacy_card"]


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
    accept_recipe: bool | Callable[[ClientTerms], bool] = False,
    state_num_examples: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    hub_kwargs: Mapping[str, Any] | None = None,
    **sft_config: Any,
) -> tuple[LoraAdapter, SftResult, PrivacyStatement | None]:
    """Fine-tune the TinyLM on the client's rows with DP-SGD, from the mapper's root, on LoRA parameters only.

    Mapping the adapter to the LLM is post-processing: what is generated from it alone has the same bound.

    Args:
        mapper, rows, role, base_model, recipe, accept_recipe, dtype, device, hub_kwargs: as in
            [`finetune_client`]. Of the recipe, `max_grad_norm` is replaced by the clipping of each example. Unusual
            terms are also few steps, batches of half of the rows, and a folder where budget was spent before: that is
            added to the new bound.
        output_dir (`str` or `Path`): receives the adapter, its bound in `grad_transformer.json`, and a card,
            `README.md`, with the statement in words.
        privacy ([`PrivacyArguments`]): budget, clipping, noise.
        physical_batch_size (`int`, *optional*): rows of one forward pass; default: the recipe's. The mechanism, and
            the result but for rounding, do not depend on it.
        checkpoint_dir (`str` or `Path`, *optional*): keeps a checkpoint after each tenth of the steps, from which the
            same call goes on after an interruption. Checkpoints stay with the client, and are taken up only with the
            same rows, recipe and budget.
        eval_rows, early_stopping_patience (*optional*): stop when the loss on `eval_rows` has not fallen for that many
            tenths. Only with `privacy.allow_early_stopping`: the library cannot know whether they are public.
        state_num_examples (`bool`, *optional*): refused where it is set: the exact number of rows tells whether one
            was added or removed.
        sft_config: other fields of TRL's `SFTConfig`.

    Returns:
        the adapter; losses and tensors of the run (losses are private, and stay with the client); the bound, `None`
        where `privacy.known_seed` is set.

    Raises:
        [`UsageError`]: arguments out of range, among them a delta of one over the number of rows or more; early
            stopping without being told so; checkpoints of another run.
        errors of [`finetune_client`].
    """
    if (eval_rows is None) != (early_stopping_patience is None):
        raise UsageError(
            "Early stopping needs rows and patience.",
            expected="eval_rows and early_stopping_patience, or neither",
            found=f"early_stopping_patience={early_stopping_patience}",
        )
    if state_num_examples:
        raise UsageError(
            "A private adapter does not say how many rows it was fine-tuned on.",
            expected="no exact number of rows beside a bound for adding or removing one of them",
            found="state_num_examples",
            remedy="leave it out; the statement gives the sampling rate, rounded",
        )
    started = time.perf_counter()
    task = prepare_client(
        mapper,
        rows,
        role=role,
        recipe=recipe,
        hub_kwargs=hub_kwargs,
    )
    groups = None if privacy.group_column is None else rows_by_group(rows, privacy.group_column)
    assert groups is None or sum(map(len, groups)) == len(task.rows)
    privacy = dataclasses.replace(privacy, batch_size=privacy.batch_size or task.recipe.rows_per_step)
    prepare_output(output_dir, "client_adapter")
    num_units = len(task.rows) if groups is None else len(groups)
    noise = plan_noise(privacy, num_units, task.recipe.max_steps)
    earlier = spent_before(output_dir)
    if checkpoint_dir is not None:
        identity = _identity(task, privacy, groups)
        check_outside(checkpoint_dir, output_dir)
        with disk_errors():
            earlier = claim_folder(checkpoint_dir, identity, output_dir=output_dir, spent=earlier)
    terms = task.terms(base_model=base_model, privacy=privacy, noise=noise, num_units=num_units, earlier=earlier)
    agree(terms, accept_recipe)
    model, text_tokenizer = task.load(base_model=base_model, dtype=dtype, device=device)
    check_supported(model.get_base_model(), task.root)
    with tempfile.TemporaryDirectory() if checkpoint_dir is None else nullcontext(str(checkpoint_dir)) as folder:
        settings = _settings(task.recipe, physical_batch_size, checkpoint_dir is not None)
        if early_stopping_patience is not None:
            interval = max(1, task.recipe.max_steps // 10)
            settings |= {"eval_strategy": "steps", "eval_steps": interval, "metric_for_best_model": "eval_loss"}
        max_length = task.recipe.max_length
        tokens = tokenize_rows(task.rows, text_tokenizer, max_length)
        deciding = None if eval_rows is None else tokenize_rows(check_rows(eval_rows), text_tokenizer, max_length)
        for tokenized in (tokens, deciding):
            if tokenized is not None:
                check_tokens(tokenized, model.get_base_model())
        trainer = PrivateSFTTrainer(
            model,
            task.recipe.to_sft_config(folder, seed=0, **{**settings, **sft_config}),
            train_dataset=tokens,
            eval_dataset=deciding,
            processing_class=text_tokenizer,
            privacy=privacy,
            groups=groups,
            callbacks=None if early_stopping_patience is None else [EarlyStoppingCallback(early_stopping_patience)],
        )
        with disk_errors():
            checkpoint = last_whole(folder)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        tensors = read_adapter_tensors(model, root=task.root)
        trainer.accelerator.free_memory()
    model.eval()
    snapshots = {key: value.cpu()[None] for key, value in tensors.items()}
    seconds = time.perf_counter() - started
    result = SftResult(trainer.step_losses, snapshots, [trainer.state.global_step], seconds)
    check_result(result, task.root, name="the client")
    statement = None
    if privacy.known_seed is None:
        statement = dataclasses.replace(trainer.privacy_statement(), unusual_terms=terms.unusual)
        statement = _with_earlier(statement, earlier)
    if checkpoint_dir is not None:
        with disk_errors():
            stated = Spent(unbounded=True) if statement is None else spent_by(statement)
            record_delivery(checkpoint_dir, trainer.state.global_step, output_dir=output_dir, stated=stated)
    adapter = task.save(output_dir, result, state_num_examples=False, privacy=statement, accepted=terms.unusual)
    if statement is None:
        logger.warning("The noise was drawn from a known seed: the adapter is not private, and states no bound.")
    else:
        with disk_errors():
            write_text_atomic(Path(output_dir) / CARD_NAME, privacy_card(statement))
    return adapter, result, statement


def _identity(task: ClientTask, privacy: PrivacyArguments, groups: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    """All that decides a run, except what changes its speed alone."""
    budget = {name: value for name, value in vars(privacy).items() if name != "gradients"}
    return {
        "rows": [rows_digest(task.rows), None if groups is None else rows_digest(groups)],
        "recipe": task.recipe.fingerprint,
        "privacy budget": budget,
        "root": task.root.fingerprint,
        "base model": task.root.base_fingerprint,
    }


def _with_earlier(statement: PrivacyStatement, earlier: Spent) -> PrivacyStatement:
    """The bound for both: budgets of fine-tunes one after the other add up."""
    if not earlier.epsilon:
        return statement
    return dataclasses.replace(
        statement,
        epsilon=statement.epsilon + earlier.epsilon,
        delta=statement.delta + earlier.delta,
        epsilon_rdp=None,
        earlier_epsilon=earlier.epsilon,
        earlier_delta=earlier.delta,
    )


def privacy_card(statement: PrivacyStatement) -> str:
    """A model card that says what the adapter is, and its bound."""
    return (
        "---\nlibrary_name: peft\ntags:\n- grad-transformer\n- differential-privacy\n---\n\n"
        "# A client's adapter, fine-tuned with differential privacy\n\n"
        "A LoRA adapter of a small model, made from a mapper's root to be mapped to a large one.\n\n"
        f"{statement.to_markdown()}"
    )


def _settings(recipe: FineTuningRecipe, physical_batch_size: int | None, keep: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": physical_batch_size or recipe.per_device_batch_size,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 0.0,
    }
    if keep:
        settings |= {"save_strategy": "steps", "save_steps": max(1, recipe.max_steps // 10), "save_total_limit": 2}
    return settings
