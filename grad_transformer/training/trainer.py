"""`GradTransformerTrainer`: transformers' `Trainer` on pairs of deltas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..adapters import Root
from ..adapters.io import write_json_atomic
from ..adapters.rows import DeltaRows, text_column
from ..adapters.statistics import task_mean_ceiling
from ..checkpoints import last_whole_checkpoint
from ..errors import DeltaDatasetError, UsageError
from ..modeling_grad_transformer import GradTransformer
from ..tokenization_lora_delta import LoraDeltaTokenizer
from .arguments import MapperArguments
from .backbone import backbone_or_config
from .checkpoints import is_whole
from .heldout import HeldoutMetrics, evaluate_heldout
from .pairs import DeltaPairCollator, DeltaPairRows
from .progress import TrainingProgress
from .trainer_arguments import GradTransformerTrainingArguments


logger = logging.get_logger(__name__)


class GradTransformerTrainer(Trainer):
    """Trains a mapper on the MSE of standardised target blocks, evaluates it teacher-forced and free-running.

    Args:
        model ([`GradTransformer`]): with both tokenizers.
        args ([`GradTransformerTrainingArguments`]).
        train_dataset, eval_dataset (`datasets.Dataset`): pairs with columns `source_blocks`, `target_blocks`,
            `shadow_id` and `task`, as a delta dataset's splits have them. `eval_dataset` holds runs that are not in
            `train_dataset`.
        trainer_kwargs: other arguments of `Trainer`.

    Evaluation adds to `eval_loss` (teacher-forced): `eval_r2`, `eval_r2_teacher_forced`, `eval_r2_permuted_inputs`,
    `eval_r2_ceiling` and `eval_block_mse_<j>`, see [`HeldoutMetrics`].
    """

    def __init__(
        self,
        model: GradTransformer,
        args: GradTransformerTrainingArguments,
        *,
        train_dataset: datasets.Dataset,
        eval_dataset: datasets.Dataset | None = None,
        **trainer_kwargs: Any,
    ):
        sides = [set(text_column(side, "shadow_id")) for side in (train_dataset, eval_dataset) if side is not None]
        overlap = set.intersection(*sides) if len(sides) == 2 else set()
        if overlap:
            raise DeltaDatasetError(
                "A shadow run is on both sides of the split, so held-out figures would lie.",
                expected="splits by shadow run",
                found=f"{len(overlap)} runs in both, among them {sorted(overlap)[0]}",
                remedy="build the dataset with `grad-transformer build`, which splits by run",
            )
        source_tokenizer, target_tokenizer = model.tokenizers()
        if args.device.type in ("cpu", "mps"):
            # Nothing is copied to a device that pinned memory would help; torch warns of it.
            args.dataloader_pin_memory = False
        callbacks = trainer_kwargs.pop("callbacks", None) or []
        if args.early_stopping_patience is not None:
            callbacks = [*callbacks, EarlyStoppingCallback(early_stopping_patience=args.early_stopping_patience)]
        super().__init__(
            model=model,
            args=args,
            train_dataset=DeltaPairRows(train_dataset),
            eval_dataset=None if eval_dataset is None else DeltaPairRows(eval_dataset),
            data_collator=DeltaPairCollator(source_tokenizer, target_tokenizer),
            callbacks=callbacks,
            **trainer_kwargs,
        )
        self.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TrainingProgress())
        self.heldout: HeldoutMetrics | None = None
        # Pairs and their ceiling, which no step of training changes.
        self._ceilings: list[tuple[DeltaPairRows, float | None]] = []

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            inputs = self._augment(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _augment(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Mixup of pairs, then noise on the source. Standardisation is affine, so blocks mix as deltas do."""
        source, labels = inputs["source_blocks"], inputs["labels"]
        ones = (len(source), 1, 1)
        if self.args.mixup_alpha > 0:
            share = torch.distributions.Beta(self.args.mixup_alpha, self.args.mixup_alpha).sample(ones)
            share = share.to(source.device)
            other = torch.randperm(len(source), device=source.device)
            source = share * source + (1 - share) * source[other]
            labels = share * labels + (1 - share) * labels[other]
        if self.args.source_noise > 0:
            rms = source.square().mean(dim=(1, 2), keepdim=True).sqrt()
            strength = torch.rand(ones, device=source.device) * self.args.source_noise
            source = source + strength * rms * torch.randn_like(source)
        return {**inputs, "source_blocks": source, "labels": labels}

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        # Inside the loop, so that callbacks (early stopping) and the choice of the best checkpoint see the figures.
        kwargs["prediction_loss_only"] = True
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.heldout = self.measure(dataloader.dataset)
        figures = self.heldout.to_dict()
        blocks = figures.pop("block_mse")
        figures.update({f"block_mse_{index}": value for index, value in enumerate(blocks)})
        for name, value in figures.items():
            if value is not None:
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def measure(self, dataset: datasets.Dataset | DeltaPairRows) -> HeldoutMetrics:
        """Held-out figures on pairs of runs that are not in the training set; these are read batch by batch."""
        pairs = dataset if isinstance(dataset, DeltaPairRows) else DeltaPairRows(dataset)
        heldout = evaluate_heldout(
            self.accelerator.unwrap_model(self.model),
            pairs.source,
            pairs.target,
            pairs.shadow_ids,
            batch_size=self.args.per_device_eval_batch_size,
            # What FSDP has sharded is gathered when the wrapper is called, not the model inside it.
            forward=self.model if self.is_fsdp_enabled else None,
        )
        return replace(heldout, r2_ceiling=self._ceiling(pairs))

    def _ceiling(self, pairs: DeltaPairRows) -> float | None:
        for known, ceiling in self._ceilings:
            if known is pairs:
                return ceiling
        mean_P = self.data_collator.target_tokenizer.mean_P
        train = self.train_dataset
        ceiling = task_mean_ceiling(pairs.target, pairs.tasks, train.target, train.tasks, mean_P)
        self._ceilings.append((pairs, ceiling))
        return ceiling

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As Trainer's, with the arguments as JSON instead of a pickle."""
        output_dir = output_dir or self.args.output_dir
        if self.args.should_save:
            self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict=state_dict)
            write_json_atomic(Path(output_dir) / "training_args.json", self.args.to_dict())


def build_mapper(
    train_dataset: datasets.Dataset,
    source_root: Root,
    target_root: Root,
    arguments: MapperArguments,
    *,
    source_recipe: dict[str, Any] | None = None,
    target_recipe: dict[str, Any] | None = None,
    seed: int = 0,
) -> GradTransformer:
    """A fresh mapper whose tokenizers are fitted on the training pairs.

    Args:
        train_dataset (`datasets.Dataset`): the training split of a delta dataset.
        source_root, target_root ([`Root`]): what its deltas are measured from.
        arguments ([`MapperArguments`]): backbone, decoding, standardisation.
        source_recipe, target_recipe (`dict`, *optional*): how its adapters were fine-tuned; shipped with the mapper.
        seed (`int`, *optional*, defaults to 0): of the random weights.
    """
    sides = {
        "source": (source_root, arguments.source_center, arguments.source_scale, source_recipe),
        "target": (target_root, arguments.target_center, arguments.target_scale, target_recipe),
    }
    tokenizers = {}
    for role, (root, center, scale, recipe) in sides.items():
        tokenizer = LoraDeltaTokenizer(root, role=role, center=center, scale=scale, recipe=recipe)  # type: ignore[arg-type]
        tokenizers[role] = tokenizer.fit(_chunks(train_dataset, f"{role}_blocks"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GradTransformer.from_backbone(
            backbone_or_config(arguments),
            tokenizers["source"],
            tokenizers["target"],
            decoding=arguments.decoding,
            position_embeddings=arguments.position_embeddings,
        )


def train_mapper(
    model: GradTransformer,
    splits: dict[str, datasets.Dataset],
    args: GradTransformerTrainingArguments,
    *,
    resume: bool = True,
) -> tuple[GradTransformerTrainer, HeldoutMetrics | None]:
    """Train, keep the best checkpoint by validation R², save the mapper, and measure it on the test runs.

    Args:
        model ([`GradTransformer`]): as [`build_mapper`] gives it.
        splits (`dict[str, datasets.Dataset]`): `train`, and `validation` and `test` where there are such runs.
        args ([`GradTransformerTrainingArguments`]): `output_dir` receives the mapper and its checkpoints.
        resume (`bool`, *optional*, defaults to `True`): go on from the last whole checkpoint in `output_dir`, which
            must be of the same pairs and arguments (see [`TrainingIdentity`]); half-written ones are removed.

    Returns:
        the trainer, and the figures on the test runs (None without test runs).

    Raises:
        [`UsageError`]: early stopping without a best checkpoint to stop at.
    """
    validation, test = splits.get("validation"), splits.get("test")
    if validation is None or len(validation) == 0:
        logger.warning(
            "There are no validation runs: the last checkpoint is kept, not the best one, and nothing stops early."
        )
        validation, args.eval_strategy, args.load_best_model_at_end = None, "no", False
        args.early_stopping_patience = None
    if args.early_stopping_patience is not None and not args.load_best_model_at_end:
        raise UsageError(
            "Early stopping waits for a better checkpoint, and none is kept.",
            expected="load_best_model_at_end with early_stopping_patience",
            found=f"early_stopping_patience={args.early_stopping_patience}, load_best_model_at_end=False",
            remedy="leave --early_stopping_patience out, or keep the best checkpoint",
        )
    trainer = GradTransformerTrainer(model, args, train_dataset=splits["train"], eval_dataset=validation)
    checkpoint = last_whole_checkpoint(args.output_dir, is_whole, remove_others=args.should_save) if resume else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    heldout = trainer.measure(test) if test is not None and len(test) else None
    return trainer, heldout


def _chunks(dataset: datasets.Dataset, column: str) -> Iterator[torch.Tensor]:
    rows = DeltaRows(dataset, column)
    for start in range(0, len(rows), rows.chunk_rows):
        yield rows[start : start + rows.chunk_rows]
