"""The LLM as a student: what K of its adapters say to their clients' completions, and how they are trained on them.

Shape legend: K adapters, P values of an adapter in layout order, M tokens of one client's completions, T tokens kept
of each predicted distribution, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters import Root
from ..finetuning import FineTuningRecipe
from ..finetuning.tokens import IGNORED_LABEL
from ..shadow.batched import LabelledHead, run_batched
from ..shadow.batches import Batches, FineTuneJob, default_tokens_per_pass
from ..shadow.stacked import StackedAdapters
from .completions import Completions, TopTokens


_ROWS_PER_PASS = 64


@dataclass(frozen=True)
class SoftTarget:
    """What the M tokens of a client's completions are trained towards.

    Args:
        tokens ([`TopTokens`]): the distribution.
        weights_M (`torch.Tensor`): how much each token counts, 0 or more.
    """

    tokens: TopTokens
    weights_M: torch.Tensor

    @classmethod
    def by_confidence(cls, ids_MT: torch.Tensor, log_probs_MT: torch.Tensor, power: float) -> SoftTarget:
        """A token counts by the highest probability of its target, to a power; with 0 all count alike."""
        order_MT = log_probs_MT.argsort(dim=1, descending=True, stable=True)
        tokens = TopTokens(ids_MT.gather(1, order_MT), log_probs_MT.gather(1, order_MT))
        return cls(tokens, tokens.confidence_M**power)


class Student:
    """The LLM, many of whose adapters are read and trained at once.

    Args:
        model (`PreTrainedModel`): the LLM, without an adapter.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        root ([`Root`]): its root.
        recipe ([`FineTuningRecipe`]): how its shadow adapters were trained.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, root: Root, recipe: FineTuningRecipe
    ):
        root.check_base(model)
        self.model, self.tokenizer, self.root, self.recipe = model, tokenizer, root, recipe

    @torch.no_grad()
    def read(self, values_KP: torch.Tensor, completions: Sequence[Completions], *, top_tokens: int) -> list[TopTokens]:
        """What each adapter says at each token of its client's completions.

        Args:
            values_KP (`torch.Tensor`): adapters, root included.
            completions (`Sequence[Completions]`): K of them.
            top_tokens (`int`): see [`RefinementArguments`].
        """
        rows = min(_ROWS_PER_PASS, max(len(each.rows) for each in completions))
        recipe = self.recipe.replace(
            per_device_batch_size=rows,
            gradient_accumulation_steps=1,
            max_steps=math.ceil(max(len(each.rows) for each in completions) / rows),
            warmup_steps=0,
            snapshot_last=1,
            snapshot_every=None,
            early_stopping_window=None,
        )
        batches = Batches(
            _jobs(completions, seed=0),
            self.tokenizer,
            recipe,
            device=self.model.device,
            tokens_per_pass=default_tokens_per_pass(self.model.device),
            in_order=False,
        )
        total = sum(len(each.tokens.best_M) for each in completions)
        ids: torch.Tensor | None = None
        adapters = StackedAdapters(self.model, self.root, [0] * len(values_KP))
        adapters.values_KP.data.copy_(values_KP)
        self.model.eval()
        with adapters, LabelledHead(self.model) as head:
            for step in range(1, recipe.max_steps + 1):
                for part in batches.of_step(step):
                    adapters.prepare(part.lengths_K)
                    best = TopTokens.of_logits(head.logits(part), top_tokens)
                    if ids is None:
                        ids = torch.zeros(total, best.ids_MT.shape[1], dtype=torch.int64)
                        log_probs = torch.zeros(ids.shape)
                    places = part.targets_M.cpu()
                    ids[places], log_probs[places] = best.ids_MT, best.log_probs_MT
        assert ids is not None
        sizes = [len(each.tokens.best_M) for each in completions]
        return [TopTokens(*both) for both in zip(ids.split(sizes), log_probs.split(sizes), strict=True)]

    def train(
        self,
        values_KP: torch.Tensor,
        completions: Sequence[Completions],
        targets: Sequence[SoftTarget],
        *,
        steps: int,
        learning_rate: float,
        seed: int,
    ) -> torch.Tensor:
        """Train each adapter towards its own soft targets, with the optimizer of the shadow recipe.

        Args:
            values_KP (`torch.Tensor`): where the adapters start, root included.
            completions (`Sequence[Completions]`): K of them.
            targets (`Sequence[SoftTarget]`): of each client.
            steps (`int`), learning_rate (`float`): linear decay, no warm-up.
            seed (`int`): of the order of the rows.

        Returns:
            `torch.Tensor` of shape `(K, P)`: the trained values.
        """
        recipe = self.recipe.replace(
            max_steps=steps,
            learning_rate=learning_rate,
            warmup_steps=0,
            lr_scheduler_type="linear",
            snapshot_last=1,
            snapshot_every=None,
            early_stopping_window=None,
        )
        results = run_batched(
            self.model,
            self.tokenizer,
            self.root,
            _jobs(completions, seed=seed),
            recipe,
            start_KP=values_KP,
            token_loss=_soft_loss(targets, self.model.device),
        )
        return torch.stack([self.root.layout.flatten(result.tensors) for result in results])


def _jobs(completions: Sequence[Completions], *, seed: int) -> list[FineTuneJob]:
    """Rows whose labels are places in the table of all clients' tokens, not tokens."""
    jobs, place = [], 0
    for number, each in enumerate(completions):
        labels = []
        for row, start in zip(each.rows, each.starts, strict=True):
            labels.append([IGNORED_LABEL] * start + list(range(place, place + len(row) - start)))
            place += len(row) - start
        rows = datasets.Dataset.from_dict({"input_ids": each.rows, "labels": labels})
        jobs.append(FineTuneJob(rows, seed, f"refinement of client {number}"))
    return jobs


def _soft_loss(
    targets: Sequence[SoftTarget], device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Cross-entropy against soft targets, for labels that are places in the table of all clients' tokens.

    A client's weights are scaled to a mean of 1, so that an unsure client is trained as much as a sure one.
    """
    tokens = TopTokens.cat([target.tokens for target in targets])
    weights_M = torch.cat([target.weights_M / target.weights_M.mean().clamp(min=1e-6) for target in targets])
    ids_MT, wanted_MT = tokens.ids_MT.to(device), (tokens.log_probs_MT.exp() * weights_M[:, None]).to(device)

    def loss(logits_MV: torch.Tensor, places_M: torch.Tensor) -> torch.Tensor:
        log_probs_MT = logits_MV.log_softmax(dim=-1).gather(1, ids_MT[places_M])
        return -(wanted_MT[places_M] * log_probs_MT).sum(dim=1)

    return loss
