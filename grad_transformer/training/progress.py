"""One calm line while a mapper trains, in place of a dictionary for every logged step."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..wording import BAR_FORMAT


class TrainingProgress(ProgressCallback):
    """transformers' bar with the last loss and validation R² behind it."""

    def __init__(self) -> None:
        super().__init__()
        self._figures: dict[str, str] = {}
        self._other_bars = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current_step = state.global_step
        # transformers shows one of its own for each checkpoint that is written.
        self._other_bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="mapper",
                dynamic_ncols=True,
                bar_format=BAR_FORMAT,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training_bar is not None:
            figures = [f"step {state.global_step} of {state.max_steps}", *self._figures.values()]
            self.training_bar.set_postfix_str(", ".join(figures), refresh=False)
        super().on_step_end(args, state, control, **kwargs)

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

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if self._other_bars:
            logging.enable_progress_bar()
