"""Arguments of mapper and training, with the help texts that `grad-transformer train --help` shows."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedConfig, T5Config, TrainingArguments

from ..errors import UsageError


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

    def backbone_or_config(self) -> str | PreTrainedConfig:
        """The name of the pretrained backbone, or the config of a random one.

        Raises:
            [`UsageError`]: the heads do not divide the hidden size.
        """
        if self.backbone is not None:
            return self.backbone
        if self.d_model % self.num_heads:
            raise UsageError(
                "The attention heads do not divide the hidden size.",
                expected="d_model a multiple of num_heads",
                found=f"d_model={self.d_model}, num_heads={self.num_heads}",
            )
        return T5Config(
            vocab_size=1,
            d_model=self.d_model,
            d_kv=self.d_model // self.num_heads,
            d_ff=self.d_ff,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            dropout_rate=self.dropout_rate,
            feed_forward_proj="gated-gelu",
            pad_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
        )


@dataclass
class GradTransformerTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with defaults for mappers, and what is particular to pairs of deltas."""

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
