"""A bar of steps for a client's fine-tune, on stderr."""

from __future__ import annotations

from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class StepsBar(TrainerCallback):
    """Shows how far a fine-tune has come; no loss, which would be private."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="the client's fine-tune",
            unit="step",
            disable=are_progress_bars_disabled(),
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()


def show_steps(trainer: Trainer) -> None:
    """Replace what transformers prints, dictionaries on stdout among it, by a bar where bars are wanted."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(StepsBar())
