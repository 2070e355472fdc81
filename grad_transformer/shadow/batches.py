"""The rows of many fine-tunes, cut into forward passes.

The loss of an optimizer step is a mean over all its completion tokens, so its rows may be read in any order and in any
number of passes. Rows of like length share a pass: of each adapter the longest first, so that a pass is only as wide
as the longest of its own rows.

Shape legend: K adapters, S rows of one optimizer step of one adapter, B rows of one adapter in one pass, T tokens, M
tokens with a label.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..finetuning import FineTuningRecipe, row_order, tokenize_rows
from ..finetuning.tokens import IGNORED_LABEL


# What starting one more pass costs, in tokens that could be read in the same time.
PASS_OVERHEAD = 768
# Tokens of one pass: enough to fill the processor; more only spills out of a CPU's cache, or fills a GPU's memory.
TOKENS_PER_PASS = {"cpu": 4096}
TOKENS_PER_PASS_ELSEWHERE = 32768


@dataclass(frozen=True)
class FineTuneJob:
    """One adapter to train from the root.

    Args:
        rows (`datasets.Dataset`): `prompt` and `completion`, or `input_ids` and `labels` (see `tokenize_rows`).
        seed (`int`): decides the order of the rows, and LoRA dropout.
        name (`str`, *optional*): what errors call it.
    """

    rows: Dataset
    seed: int
    name: str = "the fine-tune"


@dataclass(frozen=True)
class Pass:
    """The rows of one forward pass, adapter after adapter, padded on the right.

    Padding needs no mask: a causal model's tokens never see what is to their right, and padding has no label.
    """

    input_ids: torch.Tensor  # (K * B, T)
    positions: tuple[torch.Tensor, torch.Tensor]  # row and position whose next token has a label, (M,) each
    targets_M: torch.Tensor
    adapters_M: torch.Tensor
    lengths_K: list[int]  # tokens of each adapter's own longest row, the last one included


class Batches:
    """The jobs' rows, each adapter in its own order.

    Args:
        jobs (`Sequence[FineTuneJob]`): K of them.
        tokenizer (`PreTrainedTokenizerBase`), recipe ([`FineTuningRecipe`]): as for [`run_batched`].
        device (`torch.device`): where passes go.
        tokens_per_pass (`int`): passes are not wider, unless one row of each adapter is.
        in_order (`bool`): one pass for each micro-batch of the recipe, rows in order. Dropout masks, which are drawn
            row after row, need it.
    """

    def __init__(
        self,
        jobs: Sequence[FineTuneJob],
        tokenizer: PreTrainedTokenizerBase,
        recipe: FineTuningRecipe,
        *,
        device: torch.device,
        tokens_per_pass: int,
        in_order: bool,
    ):
        # Any token will do to pad.
        self._pad_id, self._device = tokenizer.pad_token_id or 0, device
        self._tokens_per_pass = tokens_per_pass
        self._rows_in_order = recipe.per_device_batch_size if in_order else None
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
        counts = nn.functional.pad((self._labels != IGNORED_LABEL).cumsum(0), (1, 0))
        self._num_labels = counts[self._starts + self._lengths] - counts[self._starts]
        self._order = torch.stack(orders).view(len(jobs), recipe.max_steps, recipe.rows_per_step)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self._lengths.max())

    @property
    def mean_length(self) -> float:
        """Tokens of a row, the mean."""
        return float(self._lengths.double().mean())

    def keep(self, indices: Sequence[int]) -> None:
        """Go on with these adapters alone."""
        self._order = self._order[list(indices)]

    def of_step(self, step: int) -> Iterator[Pass]:
        """The passes of an optimizer step, counted from 1."""
        rows_KS = self._order[:, step - 1]
        if self._rows_in_order is not None:
            yield from map(self._pass, rows_KS.split(self._rows_in_order, dim=1))
            return
        lengths_KS = self._lengths[rows_KS]
        if int(lengths_KS.min()) < int(lengths_KS.max()):
            lengths_KS, by_length = lengths_KS.sort(dim=1, descending=True, stable=True)
            rows_KS = rows_KS.gather(1, by_length)
        widths_S = (lengths_KS.max(dim=0).values - 1).tolist()
        sizes = cut_into_passes(widths_S, len(rows_KS), self._tokens_per_pass)
        yield from map(self._pass, rows_KS.split(sizes, dim=1))

    def num_labels(self, step: int) -> torch.Tensor:
        """Tokens with a label that each adapter reads in an optimizer step, (K,)."""
        return self._num_labels[self._order[:, step - 1]].sum(dim=1).to(self._device)

    def _pass(self, rows_KB: torch.Tensor) -> Pass:
        rows = rows_KB.reshape(-1)
        lengths = self._lengths[rows]
        # The last token of a row predicts nothing, so it is not read: T is the longest row's length without it.
        positions_T = torch.arange(int(lengths.max()) - 1)
        mask = positions_T < lengths[:, None] - 1
        index = (self._starts[rows, None] + positions_T).where(mask, 0)
        input_ids = self._ids[index].where(mask, self._pad_id)
        next_labels = self._labels[(index + 1).where(mask, 0)].where(mask, IGNORED_LABEL)
        row_M, position_M = (next_labels != IGNORED_LABEL).nonzero(as_tuple=True)
        return Pass(
            input_ids=input_ids.to(self._device),
            positions=(row_M.to(self._device), position_M.to(self._device)),
            targets_M=next_labels[row_M, position_M].to(self._device),
            adapters_M=(row_M // rows_KB.shape[1]).to(self._device),
            lengths_K=lengths.view(rows_KB.shape).max(dim=1).values.tolist(),
        )


def default_tokens_per_pass(device: torch.device) -> int:
    """What a processor of this kind is filled by."""
    return TOKENS_PER_PASS.get(device.type, TOKENS_PER_PASS_ELSEWHERE)


def cut_into_passes(widths: Sequence[int], num_adapters: int, tokens_per_pass: int) -> list[int]:
    """How many rows of each adapter each pass takes, so that all passes together cost least.

    A pass costs `PASS_OVERHEAD` and its tokens, padding included.

    Args:
        widths (`Sequence[int]`): tokens of the widest i-th row among the adapters, never rising.
        num_adapters (`int`): rows of a pass are this many times those of one adapter.
        tokens_per_pass (`int`): the most that a pass may hold, unless one row of each adapter is more.
    """
    count = len(widths)
    # best[i]: least cost of the rows from i on, and how many of them the first pass takes.
    best: list[tuple[int, int]] = [(0, 0)] * (count + 1)
    for start in reversed(range(count)):
        width = num_adapters * max(widths[start], 1)
        most = min(max(1, tokens_per_pass // width), count - start)
        best[start] = min((PASS_OVERHEAD + size * width + best[start + size][0], -size) for size in range(1, most + 1))
    sizes, start = [], 0
    while start < count:
        sizes.append(-best[start][1])
        start += sizes[-1]
    return sizes


def _flat(lists: Iterable[list[int]]) -> torch.Tensor:
    return torch.tensor(list(itertools.chain.from_iterable(lists)), dtype=torch.int64)
