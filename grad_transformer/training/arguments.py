"""Arguments of mapper and training, with the help texts that `grad-transformer train --help` shows.

transformers' own are added in `trainer_arguments`: its import takes seconds, and this file is what `--help` needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class MapperArguments:
    """What the mapper is built from."""

    # Backbone
    backbone: str | None = field(
        default=None,
        metadata={
            "help": "Name or path of a pretrained encoder-decoder (the paper uses google/flan-t5-large). Without it a "
            "T5 of the sizes below starts from random weights."
        },
    )
    d_model: int = field(default=128, metadata={"help": "Hidden size of the random backbone."})
    d_ff: int = field(default=256, metadata={"help": "Feed-forward size of the random backbone."})
    num_layers: int = field(default=2, metadata={"help": "Encoder layers, and as many decoder layers."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads of the random backbone."})
    dropout_rate: float = field(default=0.0, metadata={"help": "Dropout of the random backbone."})
    decoding: str = field(
        default="autoregressive",
        metadata={
            "help": "autoregressive (paper) or parallel (all blocks in one pass).",
            "choices": ["autoregressive", "parallel"],
        },
    )
    position_embeddings: bool = field(
        default=True, metadata={"help": "Learned embedding of the block index; false is the paper's model."}
    )

    # Standardisation
    source_center: bool = field(default=False, metadata={"help": "Subtract the mean source delta."})
    source_scale: str = field(
        default="block",
        metadata={
            "help": "Divide source blocks by their RMS over training pairs.",
            "choices": ["none", "global", "block"],
        },
    )
    target_center: bool = field(
        default=True, metadata={"help": "Subtract the mean target delta; false with scale none is the paper's loss."}
    )
    target_scale: str = field(
        default="global",
        metadata={
            "help": "Divide target blocks by their RMS over training pairs.",
            "choices": ["none", "global", "block"],
        },
    )


@dataclass
class TrainingOptions:
    """Where training departs from transformers' `TrainingArguments`, and what most trainings set of them."""

    output_dir: str = field(metadata={"help": "Folder for mapper and checkpoints."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps, in place of num_train_epochs; -1: epochs."})
    seed: int = field(default=42, metadata={"help": "Seed of weights and data order."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16, on devices that have it."})
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU although there is another device."})
    warmup_steps: float = field(
        default=0, metadata={"help": "Steps over which the learning rate rises; below 1, their share of all."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches of an optimizer step."})
    eval_steps: float | None = field(default=None, metadata={"help": "Steps between evaluations by `steps`."})
    save_steps: float = field(default=500, metadata={"help": "Steps between checkpoints by `steps`."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate (paper: 2e-5 to 8e-5)."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    num_train_epochs: float = field(default=30.0, metadata={"help": "Passes over the training pairs (paper: 30)."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Pairs per step (paper: 32)."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Pairs per evaluation batch."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate on the validation runs."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint; as eval_strategy."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(
        default="r2", metadata={"help": "Best by the R² around the mean shadow on validation runs, free-running."}
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether larger is better."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between logged losses."})
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Experiment trackers, none by default."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Pairs keep their columns."})

    # Pairs of deltas
    mixup_alpha: float = field(
        default=0.2,
        metadata={
            "help": "Train on mixtures of two pairs, weights from Beta(alpha, alpha); 0 (paper) switches it off. In "
            "the lab (seed 0, one draw of five tasks left out of the shadows) it lifts their R² from 0.08 to 0.41."
        },
    )
    source_noise: float = field(
        default=0.0,
        metadata={"help": "Add Gaussian noise of up to this many times the input's RMS to each source delta."},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better validation R²."}
    )
