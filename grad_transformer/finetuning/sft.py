"""One fine-tune from the root with TRL's `SFTTrainer`, recorded after optimizer steps."""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTTrainer

from ..adapters import Root
from ..errors import RecipeError
from .data import row_order
from .early_stopping import dropout_seed, has_converged
from .models import check_finite, check_moved, read_adapter_tensors, write_adapter_tensors
from .recipe import FineTuningRecipe
from .tokens import IGNORED_LABEL, tokenize_rows


Recorder = Callable[[int, Mapping[str, torch.Tensor]], None]


@dataclass(frozen=True)
class SftResult:
    """What a fine-tune leaves. T optimizer steps, K snapshots.

    Args:
        losses (`list[float]`): T losses, each the mean over the completion tokens of one optimizer step, before it.
        snapshots (`dict[str, torch.Tensor]`): for each tensor of the adapter its K recorded values, (K, *shape), on
            the CPU and in the adapter's dtype.
        steps (`list[int]`): the K optimizer steps, from 1, after which they were recorded.
        seconds (`float`): wall time; in a batch of adapters, each one's share.
    """

    losses: list[float]
    snapshots: dict[str, torch.Tensor]
    steps: list[int]
    seconds: float

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter after the last step."""
        return {key: value[-1] for key, value in self.snapshots.items()}


def run_sft(
    peft_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    recipe: FineTuningRecipe,
    *,
    root: Root,
    seed: int,
    recorder: Recorder | None = None,
    name: str = "the fine-tune",
    trainer_class: type[SftTrainer] | None = None,
    **sft_config: Any,
) -> SftResult:
    """Fine-tune an adapter from the root with TRL. The model can be used again for the next run.

    Args:
        peft_model (`PeftModel`): from [`attach_root`]; its adapter is set back to the root first, and holds the
            fine-tuned values afterwards.
        tokenizer (`PreTrainedTokenizerBase`): the base model's.
        rows (`datasets.Dataset`): columns `prompt` and `completion`, or `input_ids` and `labels` (see
            [`tokenize_rows`]).
        recipe ([`FineTuningRecipe`]): how to train.
        root ([`Root`]): where to start.
        seed (`int`): decides the order of the rows, and LoRA dropout.
        recorder (`Callable`, *optional*): called with each snapshot, `(step, tensors)`; where the fine-tune may end
            early, after every step.
        name (`str`, *optional*): what errors call this run.
        trainer_class (`type`, *optional*): a subclass of [`SftTrainer`] with another loss.
        sft_config: `gradient_checkpointing=True`, or fields of TRL's `SFTConfig` such as `disable_tqdm=False`.

    Returns:
        [`SftResult`]

    Raises:
        [`DataError`]: rows that cannot be tokenised.
        [`RecipeError`]: the recipe does not fit the adapter, or the fine-tune diverged, or changed nothing.
    """
    started = time.perf_counter()
    check_supported(peft_model.get_base_model(), root)
    tokenized = rows if "input_ids" in rows.column_names else tokenize_rows(rows, tokenizer, recipe.max_length)
    ordered = tokenized.select(row_order(len(tokenized), recipe.num_examples, seed))
    write_adapter_tensors(peft_model, root.adapter.tensors)
    recording = _SnapshotCallback(peft_model, root, recipe, recorder)
    with tempfile.TemporaryDirectory() as folder, _forward_restored(peft_model.get_base_model()):
        trainer = (trainer_class or SftTrainer)(
            model=peft_model,
            args=recipe.to_sft_config(folder, seed=seed, **sft_config),
            train_dataset=ordered,
            processing_class=tokenizer,
            callbacks=[recording],
        )
        if root.adapter.config.get("lora_dropout"):
            trainer.add_callback(_DropoutCallback(seed))
        if recipe.early_stopping_window is not None:
            trainer.add_callback(_EarlyStoppingCallback(recipe, trainer.step_losses))
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
        trainer.train()
        losses = trainer.step_losses()
    peft_model.eval()
    peft_model.zero_grad(set_to_none=True)
    result = SftResult(losses, recording.stacked(), recording.steps, time.perf_counter() - started)
    assert recipe.early_stopping_window or result.steps == recipe.snapshot_steps(), result.steps
    check_result(result, root, name=name)
    return result


def check_supported(model: PreTrainedModel, root: Root) -> None:
    """Refuse an adapter on the output head: TRL reads the head's weight alone, so its adapter would never be trained.

    Raises:
        [`RecipeError`]
    """
    head = model.get_output_embeddings()
    names = {name for name, module in model.named_modules() if module is head}
    adapted = sorted(names & {spec.module for spec in root.layout.tensor_specs()})
    if adapted:
        raise RecipeError(
            "An adapter on the output head cannot be fine-tuned here.",
            expected="target modules without the output head",
            found=adapted[0],
            remedy="make a root whose target_modules leave the head out",
        )


def check_result(result: SftResult, root: Root, *, name: str) -> None:
    """What every run must have done, whatever the engine: stayed finite, and moved."""
    check_finite(result.snapshots, name=name)
    check_moved(result.tensors, root, name=name)


class SftTrainer(SFTTrainer):
    """`SFTTrainer` whose losses can be read at full precision and are computed in float64 for float64 models."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        # Models whose forward takes no **kwargs would average each micro-batch by itself.
        self.model_accepts_loss_kwargs = True
        self._micro_losses: list[torch.Tensor] = []

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._micro_losses.append(loss)
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        # TRL's fused head keeps its sums in float32 whatever the weights are; a float64 model is there for precision.
        if return_outputs or self.model.dtype != torch.float64:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )
        return losses / (num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED_LABEL).sum())

    def step_losses(self) -> list[float]:
        """One loss per optimizer step: the micro-batches' parts of it added up."""
        parts = torch.stack(self._micro_losses).double().cpu()
        return parts.view(-1, self.args.gradient_accumulation_steps).sum(dim=1).tolist()


class _SnapshotCallback(TrainerCallback):
    """Records the adapter after optimizer steps; transformers calls `on_step_end` after those alone."""

    def __init__(self, model: PeftModel, root: Root, recipe: FineTuningRecipe, recorder: Recorder | None):
        self._model, self._root, self._recorder = model, root, recorder
        # Where a fine-tune may end early, any step may be among the last.
        early = recipe.early_stopping_window is not None
        self._wanted = range(1, recipe.max_steps + 1) if early else recipe.snapshot_steps()
        self._snapshots: deque[tuple[int, dict[str, torch.Tensor]]] = deque(
            maxlen=recipe.snapshot_last if early else None
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step in self._wanted:
            tensors = read_adapter_tensors(self._model, root=self._root)
            tensors = {key: value.cpu() for key, value in tensors.items()}
            self._snapshots.append((state.global_step, tensors))
            if self._recorder is not None:
                self._recorder(state.global_step, tensors)
        return control

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self._snapshots]

    def stacked(self) -> dict[str, torch.Tensor]:
        first = self._snapshots[0][1]
        return {key: torch.stack([tensors[key] for _, tensors in self._snapshots]) for key in first}


class _EarlyStoppingCallback(TrainerCallback):
    """Ends the fine-tune once it has converged."""

    def __init__(self, recipe: FineTuningRecipe, step_losses: Callable[[], list[float]]):
        self._recipe, self._step_losses = recipe, step_losses

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_training_stop |= has_converged(self._step_losses(), self._recipe)
        return control


class _DropoutCallback(TrainerCallback):
    """Makes the dropout masks of a step depend on the run's seed and that step alone, whatever else draws."""

    def __init__(self, seed: int):
        self._seed = seed

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        torch.manual_seed(dropout_seed(self._seed, state.global_step + 1))


@contextmanager
def _forward_restored(model: PreTrainedModel) -> Iterator[None]:
    """Undo TRL's patch of `model.forward`, which would otherwise wrap the one of the run before, run after run."""
    before = model.__dict__.get("forward")
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        if before is not None:
            model.__dict__["forward"] = before
