"""One calm line while a mapper trains, in place of a dictionary for every logged step."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from ..wording import BAR_FORMAT


class TrainingProgress(ProgressCallback):
    """transformers' bar with the last loss and validation R² behind it."""

    def __init__(self) -> None:
        super().__init__()
        self._figures: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="mapper",
                dynamic_ncols=True,
                bar_format=BAR_FORMAT,
            )

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluations take moments: no bar of their own."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, label in (("loss", "loss"), ("eval_r2", "validation R²")):
            if logs and name in logs:
                self._figures[label] = f"{label} {float(logs[name]):.3f}"
        if self.training_bar is not None and self._figures:
            figures = [f"step {state.global_step} of {state.max_steps}", *self._figures.values()]
            self.training_bar.set_postfix_str(", ".join(figures))
