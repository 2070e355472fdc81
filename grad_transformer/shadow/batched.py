"""Many fine-tunes at once on one frozen base model, each as TRL would run it alone.

A small base model leaves a processor mostly idle. Here K adapters share every forward pass (see `stacked.py`). The
loss is the sum of the adapters' own token means, so each adapter's gradient is that of its own fine-tune; clipping is
per adapter, AdamW is elementwise, and each adapter reads its own rows in its own order.

Shape legend: K adapters, P values of an adapter, B rows of one micro-batch, T tokens, M tokens with a label.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from ..adapters import Root
from ..errors import RecipeError
from ..finetuning import FineTuningRecipe, SftResult, row_order, tokenize_rows
from ..finetuning.data import IGNORED_LABEL
from ..finetuning.sft import check_result, check_supported
from .stacked import REMEDY, StackedAdapters


Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class FineTuneJob:
    """One adapter to train from the root.

    Args:
        rows (`datasets.Dataset`): `prompt` and `completion`, or `input_ids` and `labels` (see `tokenize_rows`).
        seed (`int`): decides the order of the rows.
        name (`str`, *optional*): what errors call it.
    """

    rows: Dataset
    seed: int
    name: str = "the fine-tune"


def run_batched(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    root: Root,
    jobs: Sequence[FineTuneJob],
    recipe: FineTuningRecipe,
    *,
    progress: Progress | None = None,
) -> list[SftResult]:
    """Fine-tune K adapters at once, each from the root, each on its own rows. The base model is left as it was.

    Args:
        model (`PreTrainedModel`): the base model, without an adapter.
        tokenizer (`PreTrainedTokenizerBase`): the base model's.
        root ([`Root`]): where every adapter starts.
        jobs (`Sequence[FineTuneJob]`): K of them, as many as fit in memory together.
        recipe ([`FineTuningRecipe`]): how to train; each adapter reads `per_device_batch_size` rows at a time.
        progress (`Callable`, *optional*): called after each optimizer step with `(step, mean loss)`.

    Returns:
        `list[SftResult]` in the order of the jobs.

    Raises:
        [`BaseModelMismatchError`]: not the base model that the root was made for.
        [`DataError`]: rows that cannot be tokenised.
        [`RecipeError`]: the engine cannot do what adapter or base model ask for, or a fine-tune diverged.
    """
    if not jobs:
        return []
    started = time.perf_counter()
    root.check_base(model)
    check_supported(model, root)
    adapters = StackedAdapters(model, root, len(jobs))
    batches = _Batches(jobs, tokenizer, recipe, device=model.device)
    values_KP = adapters.values_KP
    optimizer = torch.optim.AdamW(
        [values_KP],
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
    )
    scheduler = get_scheduler(recipe.lr_scheduler_type, optimizer, recipe.warmup_steps, recipe.max_steps)
    wanted = recipe.snapshot_steps()
    losses: list[torch.Tensor] = []
    snapshots: list[torch.Tensor] = []
    with _frozen(model), adapters, _LabelledHead(model) as head:
        for step in range(1, recipe.max_steps + 1):
            micro_batches = batches.of_step(step)
            num_labels_K = torch.stack([batch.num_labels_K for batch in micro_batches]).sum(dim=0)
            loss_K = torch.zeros(len(jobs), dtype=values_KP.dtype, device=model.device)
            for batch in micro_batches:
                adapters.prepare()
                loss_K += _backward(model, head, batch, num_labels_K)
            if recipe.max_grad_norm > 0:
                _clip_each(values_KP, recipe.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss_K)
            if step in wanted:
                snapshots.append(values_KP.detach().cpu().clone())
            if progress is not None:
                progress(step, float(loss_K.mean()))
    seconds = (time.perf_counter() - started) / len(jobs)
    losses_KT = torch.stack(losses, dim=1).double().cpu().tolist()
    values_KSP = torch.stack(snapshots, dim=1)
    results = []
    for index, job in enumerate(jobs):
        result = SftResult(losses_KT[index], root.layout.unflatten(values_KSP[index]), wanted, seconds)
        check_result(result, root, name=job.name)
        results.append(result)
    return results


def _backward(model: PreTrainedModel, head: _LabelledHead, batch: _Batch, num_labels_K: torch.Tensor) -> torch.Tensor:
    """Backward pass of one micro-batch; returns its part of each adapter's loss, (K,)."""
    head.positions = batch.positions
    logits_MV = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    if logits_MV.dim() != 2 or len(logits_MV) != len(batch.targets_M):
        raise RecipeError(
            "The base model's head is not called once on the last hidden states.",
            expected=f"logits of {len(batch.targets_M)} tokens",
            found=tuple(logits_MV.shape),
            remedy=REMEDY,
        )
    # Half-precision logits are summed in float32, as TRL's loss does.
    logits_MV = logits_MV if logits_MV.dtype == torch.float64 else logits_MV.float()
    losses_M = nn.functional.cross_entropy(logits_MV, batch.targets_M, reduction="none")
    losses_M = losses_M / num_labels_K[batch.adapters_M]
    losses_M.sum().backward()
    loss_K = torch.zeros(len(num_labels_K), dtype=losses_M.dtype, device=losses_M.device)
    return loss_K.index_add_(0, batch.adapters_M, losses_M.detach())


def _clip_each(values_KP: nn.Parameter, max_norm: float) -> None:
    """`torch.nn.utils.clip_grad_norm_` for each adapter by itself."""
    assert values_KP.grad is not None
    coefficients_K = (max_norm / (values_KP.grad.norm(dim=1) + 1e-6)).clamp(max=1.0)
    values_KP.grad.mul_(coefficients_K[:, None])


@dataclass(frozen=True)
class _Batch:
    """One micro-batch of all adapters, adapter after adapter, padded on the right."""

    input_ids: torch.Tensor  # (K * B, T)
    attention_mask: torch.Tensor | None  # (K * B, T), None where nothing is padded
    positions: tuple[torch.Tensor, torch.Tensor]  # row and position whose next token has a label, (M,) each
    targets_M: torch.Tensor
    adapters_M: torch.Tensor
    num_labels_K: torch.Tensor


class _Batches:
    """The jobs' rows, each adapter in its own order."""

    def __init__(
        self,
        jobs: Sequence[FineTuneJob],
        tokenizer: PreTrainedTokenizerBase,
        recipe: FineTuningRecipe,
        *,
        device: torch.device,
    ):
        # Any token will do to pad: padded positions are masked, and have no label.
        self._pad_id, self._device = tokenizer.pad_token_id or 0, device
        lengths: list[int] = []
        ids: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        orders: list[torch.Tensor] = []
        for job in jobs:
            tokens = job.rows
            if "input_ids" not in tokens.column_names:
                tokens = tokenize_rows(tokens, tokenizer, recipe.max_length)
            columns = tokens[:]
            orders.append(torch.tensor(row_order(len(tokens), recipe.num_examples, job.seed)) + len(lengths))
            lengths += [len(row) for row in columns["input_ids"]]
            ids.append(_flat(columns["input_ids"]))
            labels.append(_flat(columns["labels"]))
        self._lengths, self._ids, self._labels = torch.tensor(lengths), torch.cat(ids), torch.cat(labels)
        self._starts = self._lengths.cumsum(0) - self._lengths
        shape = (len(jobs), recipe.max_steps, recipe.gradient_accumulation_steps, recipe.per_device_batch_size)
        self._order = torch.stack(orders).view(shape)

    def of_step(self, step: int) -> list[_Batch]:
        """The micro-batches of an optimizer step, counted from 1."""
        return [self._batch(rows_KB) for rows_KB in self._order[:, step - 1].unbind(dim=1)]

    def _batch(self, rows_KB: torch.Tensor) -> _Batch:
        rows = rows_KB.reshape(-1)
        # The last token of a row predicts nothing, so it is not read: T is the longest row's length without it.
        positions_T = torch.arange(int(self._lengths[rows].max()) - 1)
        mask = positions_T < self._lengths[rows, None] - 1
        index = (self._starts[rows, None] + positions_T).where(mask, 0)
        input_ids = self._ids[index].where(mask, self._pad_id)
        next_labels = self._labels[(index + 1).where(mask, 0)].where(mask, IGNORED_LABEL)
        row_M, position_M = (next_labels != IGNORED_LABEL).nonzero(as_tuple=True)
        adapters_M = row_M // rows_KB.shape[1]
        return _Batch(
            input_ids=input_ids.to(self._device),
            attention_mask=None if bool(mask.all()) else mask.long().to(self._device),
            positions=(row_M.to(self._device), position_M.to(self._device)),
            targets_M=next_labels[row_M, position_M].to(self._device),
            adapters_M=adapters_M.to(self._device),
            num_labels_K=torch.bincount(adapters_M, minlength=len(rows_KB)).to(self._device),
        )


class _LabelledHead:
    """While entered, the output head sees only the hidden states of positions whose next token has a label."""

    def __init__(self, model: PreTrainedModel):
        self._head = model.get_output_embeddings()
        self.positions: tuple[torch.Tensor, torch.Tensor] | None = None

    def __enter__(self) -> _LabelledHead:
        self._hook = self._head.register_forward_pre_hook(lambda _, inputs: (inputs[0][self.positions], *inputs[1:]))
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and no gradient for the base model's own weights."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.train(training)


def _flat(lists: Iterable[list[int]]) -> torch.Tensor:
    return torch.tensor(list(itertools.chain.from_iterable(lists)), dtype=torch.int64)
