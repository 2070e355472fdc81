"""`PrivateSFTTrainer`: DP-SGD inside TRL's trainer.

A step of the trainer is one noisy step of the mechanism. Its batch is a Poisson sample of any size, which
`training_step` cuts into physical batches; Opacus clips the gradient of every example, sums them over all physical
batches, adds noise once and steps. Nothing of the trainer's loop is copied.

Shape legend: B examples of one physical batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from opacus.optimizers import DPOptimizer
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from ..adapters.io import read_json, write_json_atomic
from ..adapters.privacy import PrivacyStatement
from ..constants import FORMAT_VERSION
from ..errors import IncompleteArtifactError, UsageError
from ..finetuning.tokens import IGNORED_LABEL
from .mechanism import (
    AccountantName,
    Gradients,
    History,
    PerExampleClipping,
    PoissonBatchSampler,
    epsilon_of,
    noise_multiplier_for,
    secret_generator,
)


ACCOUNTING_NAME = "privacy_accounting.json"


@dataclass(frozen=True, kw_only=True)
class PrivacyArguments:
    """The budget of a fine-tune, and how it is spent.

    Args:
        epsilon (`float`, *optional*), delta (`float`): the budget; the noise is chosen for it.
        noise_multiplier (`float`, *optional*): the noise itself, instead of epsilon.
        max_grad_norm (`float`, *optional*, defaults to 1.0): clipping norm of one example's gradient.
        batch_size (`int`, *optional*): expected size of a batch; default: the recipe's rows per step.
        gradients (`str`, *optional*, defaults to `"hooks"`): `"hooks"` or `"ghost"`; the same mechanism.
        accountant (`str`, *optional*, defaults to `"prv"`): `"prv"` or `"rdp"`.
        allow_early_stopping (`bool`, *optional*, defaults to `False`): let private rows, without noise, decide when to
            stop. The bound does not cover those rows, and the adapter says so.
        known_seed (`int`, *optional*): makes noise and batches repeatable, and the result *not private*: for tests.

    Raises:
        [`UsageError`]: neither or both of epsilon and noise, or a value out of range.
    """

    delta: float
    epsilon: float | None = None
    noise_multiplier: float | None = None
    max_grad_norm: float = 1.0
    batch_size: int | None = None
    gradients: Gradients = "hooks"
    accountant: AccountantName = "prv"
    allow_early_stopping: bool = False
    known_seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "epsilon": (self.epsilon is None) != (self.noise_multiplier is None)
            and (self.epsilon is None or 0 < self.epsilon < float("inf")),
            "delta": 0 < self.delta < 1,
            "noise_multiplier": self.noise_multiplier is None or 0 <= self.noise_multiplier < float("inf"),
            "max_grad_norm": 0 < self.max_grad_norm < float("inf"),
            "batch_size": self.batch_size is None or self.batch_size >= 1,
            "gradients": self.gradients in ("hooks", "ghost"),
            "accountant": self.accountant in ("prv", "rdp"),
        }
        for name, holds in checks.items():
            if not holds:
                raise UsageError(
                    f"`{name}` of the privacy arguments is out of range.",
                    expected="epsilon > 0 or a noise_multiplier >= 0 but not both, 0 < delta < 1, max_grad_norm > 0, "
                    "batch_size >= 1, gradients hooks or ghost, accountant prv or rdp",
                    found=getattr(self, name),
                )


class PrivateSFTTrainer(SFTTrainer):
    """`SFTTrainer` with DP-SGD on the adapter's parameters.

    Args:
        model (`PeftModel`): only its LoRA weights, on linear layers, are trainable.
        args (`SFTConfig`): `per_device_train_batch_size` is the physical batch, which changes speed and memory alone;
            `max_steps` the number of noisy steps. `max_grad_norm` must be 0: clipping is per example.
        train_dataset (`datasets.Dataset`): `input_ids` and `labels`, see [`tokenize_rows`]. One row is one example.
        privacy ([`PrivacyArguments`]): the budget.
        eval_dataset (`datasets.Dataset`, *optional*): rows for evaluation; private ones may not decide when to stop.
        trainer_kwargs: other arguments of `SFTTrainer`.

    The loss of an example is the mean over its own completion tokens. `train(resume_from_checkpoint=...)` goes on with
    the steps that the checkpoint's accounting has; steps that were lost with a crash were seen by nobody.

    Raises:
        [`UsageError`]: arguments that DP-SGD does not allow, or early stopping on private rows without being told so.
        [`RecipeError`]: parameters whose per-example gradients cannot be computed.
    """

    def __init__(
        self,
        model: PeftModel,
        args: SFTConfig,
        *,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        privacy: PrivacyArguments,
        eval_dataset: Dataset | None = None,
        **trainer_kwargs: Any,
    ):
        self.privacy = privacy
        self._check_arguments(args, trainer_kwargs.get("callbacks") or ())
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
        self.expected_batch_size = min(privacy.batch_size or args.per_device_train_batch_size, len(train_dataset))
        self.sample_rate = self.expected_batch_size / len(train_dataset)
        if privacy.noise_multiplier is not None:
            self.noise_multiplier = privacy.noise_multiplier
        else:
            assert privacy.epsilon is not None
            self.noise_multiplier = noise_multiplier_for(
                privacy.epsilon,
                privacy.delta,
                sample_rate=self.sample_rate,
                steps=args.max_steps,
                accountant=privacy.accountant,
            )
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
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise UsageError(
                    f"`{name}` does not fit DP-SGD.",
                    expected="max_steps >= 1; max_grad_norm=0 and gradient_accumulation_steps=1, since examples are "
                    "clipped one by one and batches cut here; no gradient checkpointing, no packing",
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
        sampler = PoissonBatchSampler(
            len(self.train_dataset),
            self.sample_rate,
            self.args.max_steps,
            secret_generator(seed=self.privacy.known_seed),
        )
        rows = _Rows(self.train_dataset.select_columns(["input_ids", "labels"]))
        return DataLoader(rows, batch_sampler=sampler, collate_fn=self._collate)

    def _collate(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max((len(row["input_ids"]) for row in rows), default=1)
        pad = self.processing_class.pad_token_id or 0
        batch = {
            "input_ids": torch.full((len(rows), longest), pad, dtype=torch.int64),
            "attention_mask": torch.zeros(len(rows), longest, dtype=torch.int64),
            "labels": torch.full((len(rows), longest), IGNORED_LABEL, dtype=torch.int64),
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
        seed = None if self.privacy.known_seed is None else self.privacy.known_seed + 1
        self.optimizer = self._clipping.wrap(
            optimizer,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.privacy.max_grad_norm,
            expected_batch_size=self.expected_batch_size,
            generator=secret_generator(self.args.device, seed=seed),
        )
        self.optimizer.attach_step_hook(self._count_step)
        self._private_optimizer = self.optimizer
        return self.optimizer

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The clipped gradients of one Poisson batch, physical batch after physical batch."""
        assert self._clipping is not None
        model.train()
        inputs = self._prepare_inputs(inputs)
        optimizer, size = self._private_optimizer, self.args.per_device_train_batch_size
        optimizer.zero_grad()
        num_examples = len(inputs["input_ids"])
        loss = torch.zeros((), device=self.args.device)
        if num_examples == 0:
            self._clipping.no_examples()
        for start in range(0, num_examples, size):
            physical = {name: value[start : start + size] for name, value in inputs.items()}
            losses_B = example_losses(model, physical)
            self._clipping.backward(losses_B, optimizer)
            loss += losses_B.detach().sum().to(loss)
            if start + size < num_examples:
                # Clip and add up; the trainer's own step, after the last physical batch, adds the noise.
                optimizer.signal_skip_step(True)
                optimizer.step()
                optimizer.zero_grad()
        self.step_losses.append(float(loss) / max(num_examples, 1))
        return loss / max(num_examples, 1)

    def _count_step(self, optimizer: DPOptimizer) -> None:
        entry = (float(optimizer.noise_multiplier), self.sample_rate)
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
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        accounting = {"format_version": FORMAT_VERSION, "history": [list(entry) for entry in self.history]}
        write_json_atomic(folder / ACCOUNTING_NAME, accounting)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / ACCOUNTING_NAME
        history = read_json(path).get("history")
        if not isinstance(history, list):
            raise IncompleteArtifactError("The checkpoint does not say what was spent.", path=path, found=history)
        self.history = [(float(noise), float(rate), int(steps)) for noise, rate, steps in history]

    # The bound

    def privacy_statement(self) -> PrivacyStatement:
        """The bound for the steps that were taken.

        Raises:
            [`UsageError`]: no step was taken, or there was no noise: there is no bound.
        """
        if not self.history or min(noise for noise, _, _ in self.history) <= 0:
            raise UsageError("There is no privacy bound.", expected="noisy steps", found=self.history or "no steps")
        return PrivacyStatement(
            epsilon=epsilon_of(self.history, self.privacy.delta, self.privacy.accountant),
            epsilon_rdp=epsilon_of(self.history, self.privacy.delta, "rdp"),
            delta=self.privacy.delta,
            accountant=self.privacy.accountant,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.privacy.max_grad_norm,
            sample_rate=self.sample_rate,
            expected_batch_size=self.expected_batch_size,
            steps=sum(steps for _, _, steps in self.history),
            planned_steps=self.args.max_steps,
            target_epsilon=self.privacy.epsilon,
            gradients=self.privacy.gradients,
            early_stopping_on_private_data=self.selects_on_private_rows,
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


class _Rows(torch.utils.data.Dataset):
    """Rows one by one: `datasets` cannot fetch the empty list that an empty Poisson batch is."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def _is_early_stopping(callback: Any) -> bool:
    return isinstance(callback, EarlyStoppingCallback) or (
        isinstance(callback, type) and issubclass(callback, EarlyStoppingCallback)
    )
