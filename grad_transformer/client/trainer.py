"""`PrivateSFTTrainer`: DP-SGD inside TRL's trainer.

A step of the trainer is one noisy step of the mechanism. Its batch is a Poisson sample of any size, which
`training_step` cuts into physical batches; Opacus clips the gradient of every example (or group of rows) and sums them
over all physical batches, noise is added once, and the optimizer steps. Nothing of the trainer's loop is copied.

Shape legend: B rows of one physical batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from opacus.optimizers import DPOptimizer
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from ..adapters.privacy import PrivacyStatement
from ..errors import UsageError
from ..finetuning.tokens import IGNORED_LABEL
from .arguments import PrivacyArguments
from .checkpoints import read_history, write_manifest
from .groups import Units, physical_batches
from .mechanism import History, PerExampleClipping, PoissonBatchSampler, check_rows_apart, epsilon_of, plan_noise
from .progress import show_steps
from .secure_random import SecureRandom


__all__ = ["PrivacyArguments", "PrivateSFTTrainer", "example_losses"]


class PrivateSFTTrainer(SFTTrainer):
    """`SFTTrainer` with DP-SGD on the adapter's parameters.

    Args:
        model (`PeftModel`): only its LoRA weights, on linear layers, are trainable.
        args (`SFTConfig`): `per_device_train_batch_size` is the physical batch, which changes speed and memory alone;
            `max_steps` the number of noisy steps. `max_grad_norm` must be 0: clipping is per example.
        train_dataset (`datasets.Dataset`): `input_ids` and `labels`, see [`tokenize_rows`]. One row is one example.
        privacy ([`PrivacyArguments`]): the budget.
        groups (`Sequence[Sequence[int]]`, *optional*): numbers of each group's rows, where a group and not a row is
            what the bound is about.
        eval_dataset (`datasets.Dataset`, *optional*): rows for evaluation; private ones may not decide when to stop.
        trainer_kwargs: other arguments of `SFTTrainer`.

    The loss of an example is the mean over its own completion tokens. `train(resume_from_checkpoint=...)` goes on with
    the steps that the checkpoint's accounting has, and with fresh random numbers; steps that were lost with a crash
    were seen by nobody.

    Raises:
        [`UsageError`]: arguments that DP-SGD does not allow, or early stopping on private rows without being told so.
        [`RecipeError`]: parameters whose per-example gradients cannot be computed, or a model in which one row of a
            batch changes the others.
    """

    def __init__(
        self,
        model: PeftModel,
        args: SFTConfig,
        *,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        privacy: PrivacyArguments,
        groups: Sequence[Sequence[int]] | None = None,
        eval_dataset: Dataset | None = None,
        **trainer_kwargs: Any,
    ):
        if privacy.batch_size is None:
            privacy = dataclasses.replace(privacy, batch_size=args.per_device_train_batch_size)
        self.privacy = privacy
        # In no checkpoint: a run that goes on takes another.
        self._random = SecureRandom(known_seed=privacy.known_seed)
        assert (groups is None) == (privacy.group_column is None)
        self._check_arguments(args, trainer_kwargs.get("callbacks") or ())
        check_rows_apart(model, args.max_length)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **trainer_kwargs,
        )
        if self.args.world_size > 1:
            raise UsageError("DP-SGD runs on one process.", expected="one process", found=self.args.world_size)
        show_steps(self)
        rows = self.train_dataset.select_columns(["input_ids", "labels"])
        self._units = Units(rows, groups, max_rows=privacy.max_rows_per_group, random=self._random)
        self.noise = plan_noise(privacy, len(self._units), args.max_steps)
        self.history: History = []
        self.step_losses: list[float] = []
        self._clipping: PerExampleClipping | None = None

    def _check_arguments(self, args: SFTConfig, callbacks: Sequence[Any]) -> None:
        wrong = {
            "max_steps": args.max_steps < 1,
            "gradient_accumulation_steps": args.gradient_accumulation_steps != 1,
            "max_grad_norm": bool(args.max_grad_norm),
            "gradient_checkpointing": bool(args.gradient_checkpointing),
            "packing": bool(args.packing),
            "bf16": bool(args.bf16),
            "fp16": bool(args.fp16),
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise UsageError(
                    f"`{name}` does not fit DP-SGD.",
                    expected="max_steps >= 1; max_grad_norm=0 and gradient_accumulation_steps=1, since examples are "
                    "clipped one by one and batches cut here; no gradient checkpointing, no packing, and no mixed "
                    "precision, in which clipped gradients are rounded by more than one example changes them",
                    found=getattr(args, name),
                )
        self.selects_on_private_rows = bool(args.load_best_model_at_end)
        for callback in callbacks:
            self.selects_on_private_rows |= _is_early_stopping(callback)
        self._check_selection()

    def _check_selection(self) -> None:
        if self.selects_on_private_rows and not self.privacy.allow_early_stopping:
            raise UsageError(
                "Early stopping on private rows is not covered by the privacy bound.",
                expected="a number of steps that is fixed beforehand",
                found="early stopping, or the choice of the best checkpoint",
                remedy="use public rows for that choice, or say allow_early_stopping: the adapter will then state it",
            )

    def add_callback(self, callback: Any) -> None:
        if _is_early_stopping(callback):
            self.selects_on_private_rows = True
            self._check_selection()
        super().add_callback(callback)

    # Hooks of the trainer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; hooks are on the model only while it runs."""
        self.history, self.step_losses = [], []
        self._clipping = PerExampleClipping(
            self.model, mode=self.privacy.gradients, max_grad_norm=self.privacy.max_grad_norm
        )
        # Backward hooks on the first layer need an input that requires a gradient.
        self.model.enable_input_require_grads()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.model.disable_input_require_grads()
            self._clipping.remove()
            self._clipping = None

    def get_train_dataloader(self) -> DataLoader:
        sampler = PoissonBatchSampler(len(self._units), self.noise.sample_rate, self.args.max_steps, self._random)
        return DataLoader(self._units, batch_sampler=sampler, collate_fn=self._collate)

    def _collate(self, units: Sequence[Sequence[Mapping[str, list[int]]]]) -> dict[str, torch.Tensor]:
        rows = [row for unit in units for row in unit]
        longest = max((len(row["input_ids"]) for row in rows), default=1)
        pad = self.processing_class.pad_token_id or 0
        batch = {
            "input_ids": torch.full((len(rows), longest), pad, dtype=torch.int64),
            "attention_mask": torch.zeros(len(rows), longest, dtype=torch.int64),
            "labels": torch.full((len(rows), longest), IGNORED_LABEL, dtype=torch.int64),
            "unit": torch.tensor([index for index, unit in enumerate(units) for _ in unit], dtype=torch.int64),
        }
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][index, :length] = torch.tensor(row["input_ids"])
            batch["attention_mask"][index, :length] = 1
            batch["labels"][index, :length] = torch.tensor(row["labels"])
        return batch

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        assert self._clipping is not None and not isinstance(optimizer, DPOptimizer)
        self.optimizer = self._clipping.wrap(
            optimizer,
            noise_multiplier=self.noise.noise_multiplier,
            max_grad_norm=self.privacy.max_grad_norm,
            expected_batch_size=self.noise.expected_batch_size,
            random=self._random,
        )
        self.optimizer.attach_step_hook(self._count_step)
        self._private_optimizer = self.optimizer
        return self.optimizer

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The clipped gradients of one Poisson batch, physical batch after physical batch."""
        assert self._clipping is not None
        self._clipping.set_training()
        inputs = self._prepare_inputs(inputs)
        optimizer, unit_of_row_B = self._private_optimizer, inputs.pop("unit")
        optimizer.zero_grad()
        parts = physical_batches(unit_of_row_B, self.args.per_device_train_batch_size)
        loss = torch.zeros((), device=self.args.device)
        if not parts:
            self._clipping.no_examples()
        for start, end in parts:
            losses_B = example_losses(model, {name: value[start:end] for name, value in inputs.items()})
            loss += losses_B.detach().sum().to(loss)
            if self.privacy.group_column is None:
                self._clipping.backward(losses_B, optimizer)
            else:
                unit_B = unit_of_row_B[start:end] - unit_of_row_B[start]
                rows_of_unit_B = torch.bincount(unit_B)[unit_B]
                self._clipping.backward(losses_B / rows_of_unit_B, optimizer, unit_of_row_B=unit_B)
            if end < len(unit_of_row_B):
                # Clip and add up; the trainer's own step, after the last physical batch, adds the noise.
                optimizer.signal_skip_step(True)
                optimizer.step()
                optimizer.zero_grad()
        loss = loss / max(len(unit_of_row_B), 1)
        self.step_losses.append(float(loss))
        return loss

    def _count_step(self, optimizer: DPOptimizer) -> None:
        entry = (float(optimizer.noise_multiplier), self.noise.sample_rate)
        if self.history and self.history[-1][:2] == entry:
            self.history[-1] = (*entry, self.history[-1][2] + 1)
        else:
            self.history.append((*entry, 1))

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter alone: the trainer would write its arguments as a pickle."""
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        write_manifest(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}", self.history)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.history = read_history(resume_from_checkpoint)

    # The bound

    def privacy_statement(self) -> PrivacyStatement:
        """The bound for the steps that were taken.

        Raises:
            [`UsageError`]: no step was taken, there was no noise, or it is known: there is no bound.
        """
        if not self._random.is_secret:
            raise UsageError("There is no privacy bound.", expected="noise that nobody knows", found="a known seed")
        if not self.history or min(noise for noise, _, _ in self.history) <= 0:
            raise UsageError("There is no privacy bound.", expected="noisy steps", found=self.history or "no steps")
        return PrivacyStatement(
            epsilon=epsilon_of(self.history, self.privacy.delta, self.noise.accountant),
            epsilon_rdp=epsilon_of(self.history, self.privacy.delta, "rdp"),
            delta=self.privacy.delta,
            accountant=self.noise.accountant,
            noise_multiplier=self.noise.noise_multiplier,
            max_grad_norm=self.privacy.max_grad_norm,
            sample_rate=self.noise.sample_rate,
            expected_batch_size=self.noise.expected_batch_size,
            steps=sum(steps for _, _, steps in self.history),
            planned_steps=self.args.max_steps,
            target_epsilon=self.privacy.epsilon,
            gradients=self.privacy.gradients,
            early_stopping_on_private_data=self.selects_on_private_rows,
            adjacency=f"add_or_remove_one_{self.privacy.unit}",
            max_rows_per_group=None if self.privacy.group_column is None else self.privacy.max_rows_per_group,
            random_generator=SecureRandom.NAME,
        )


def example_losses(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Loss of each example, `(B,)`: the mean over its own completion tokens, whatever else is in the batch."""
    logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[
        :, :-1
    ]
    labels_BT = batch["labels"][:, 1:]
    if logits_BTV.dtype != torch.float64:
        logits_BTV = logits_BTV.float()
    losses_BT = torch.nn.functional.cross_entropy(
        logits_BTV.transpose(1, 2), labels_BT, ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses_BT.sum(dim=1) / (labels_BT != IGNORED_LABEL).sum(dim=1).clamp(min=1)


def _is_early_stopping(callback: Any) -> bool:
    return isinstance(callback, EarlyStoppingCallback) or (
        isinstance(callback, type) and issubclass(callback, EarlyStoppingCallback)
    )
