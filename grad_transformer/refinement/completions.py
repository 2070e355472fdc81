"""What a client's TinyLM says to public prompts, and how sure it is of each token.

Shape legend: N prompts, M tokens of all completions together, T tokens kept of each predicted distribution, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..evaluation.scoring import Rows, end_token_ids, generate_tokens


# Values of a pass's logits: 0.5 GB in float32.
_LOGITS_PER_PASS = 2**27
# What a model did not name is not impossible.
LEAST_PROBABILITY = 1e-4


def spread(count: int, most: int) -> list[int]:
    """`most` places among `count`, at even spacing, or all of fewer."""
    kept = min(count, most)
    return [place * count // kept for place in range(kept)]


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens at each of M places, the best first.

    TinyLMs are well calibrated token by token: a token of probability p is right in a share p of cases, or nearly.

    Args:
        ids_MT (`torch.Tensor`), log_probs_MT (`torch.Tensor`): int64 and float32, on the CPU.
    """

    ids_MT: torch.Tensor
    log_probs_MT: torch.Tensor

    @classmethod
    def of_logits(cls, logits_MV: torch.Tensor, top_tokens: int) -> TopTokens:
        best = logits_MV.float().log_softmax(dim=-1).topk(min(top_tokens, logits_MV.shape[-1]), dim=-1)
        return cls(best.indices.cpu(), best.values.cpu())

    @classmethod
    def cat(cls, parts: Sequence[TopTokens]) -> TopTokens:
        return cls(torch.cat([part.ids_MT for part in parts]), torch.cat([part.log_probs_MT for part in parts]))

    @property
    def best_M(self) -> torch.Tensor:
        return self.ids_MT[:, 0]

    @property
    def confidence_M(self) -> torch.Tensor:
        """Probability of the likeliest token."""
        return self.log_probs_MT[:, 0].exp()

    def where(self, chosen_M: torch.Tensor) -> TopTokens:
        """Some of the places, by number or by a boolean mask."""
        return TopTokens(self.ids_MT[chosen_M], self.log_probs_MT[chosen_M])

    def frequent(self, most: int, rare: float) -> torch.Tensor:
        """Ids, ascending, of the `most` tokens that are named most; beside the first none below `rare` of all."""
        names, places = self.ids_MT.unique(return_inverse=True)
        share = torch.zeros(len(names)).index_add_(0, places.flatten(), self.log_probs_MT.exp().flatten())
        best = share.topk(min(most, len(names)))
        kept = best.values > rare * len(self.ids_MT)
        kept[:1] = True
        return names[best.indices[kept]].sort().values

    def of_words(self, words_U: torch.Tensor) -> torch.Tensor:
        """Probabilities `(M, U)` of tokens in ascending order; 0 for what is not among a place's likeliest."""
        places_MT = torch.searchsorted(words_U, self.ids_MT).clamp(max=len(words_U) - 1)
        known_MT = torch.where(words_U[places_MT] == self.ids_MT, self.log_probs_MT.exp(), 0.0)
        return torch.zeros(len(places_MT), len(words_U)).scatter_add_(1, places_MT, known_MT)

    def probabilities_of(self, ids_MT: torch.Tensor) -> torch.Tensor:
        """Probabilities of other tokens than its own, `(M, any number)`; 0 for what is not among its likeliest."""
        found_MTT = ids_MT[:, :, None] == self.ids_MT[:, None, :]
        return torch.where(found_MTT, self.log_probs_MT.exp()[:, None, :], 0.0).sum(dim=2)


@dataclass(frozen=True)
class Completions:
    """Completions of N public prompts by one client's TinyLM.

    Args:
        rows (`list[list[int]]`): token ids of each prompt and its completion.
        starts (`list[int]`): where in its row each completion begins.
        tokens ([`TopTokens`]): what the TinyLM says at each of the M completion tokens, row after row.
        counted_M (`torch.Tensor`): bool; false at end tokens, on which everybody agrees.
    """

    rows: list[list[int]]
    starts: list[int]
    tokens: TopTokens
    counted_M: torch.Tensor

    def some(self, count: int) -> Completions:
        """`count` of the rows at even spacing, or all of fewer."""
        sizes = [len(row) - start for row, start in zip(self.rows, self.starts, strict=True)]
        chosen = spread(len(self.rows), count)
        places = torch.arange(sum(sizes)).split(sizes)
        tokens = torch.cat([places[row] for row in chosen])
        return Completions(
            [self.rows[row] for row in chosen],
            [self.starts[row] for row in chosen],
            self.tokens.where(tokens),
            self.counted_M[tokens],
        )

    def expected_agreement(self, power: float) -> float:
        """The agreement of a student without errors, if the TinyLM is right as often as its probabilities say."""
        weights_M = self.tokens.confidence_M**power * self.counted_M
        return float((weights_M * self.tokens.confidence_M).sum() / weights_M.sum().clamp(min=1e-12))

    def agreement(self, student: TopTokens, power: float) -> float:
        """Share of the tokens, weighted by certainty, at which another model's likeliest token is the TinyLM's."""
        weights_M = self.tokens.confidence_M**power * self.counted_M
        same_M = student.best_M == self.tokens.best_M
        total = float(weights_M.sum())
        return float((weights_M * same_M).sum()) / total if total > 0 else 0.0


@torch.no_grad()
def complete_prompts(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Rows,
    *,
    max_new_tokens: int,
    batch_size: int,
    top_tokens: int,
) -> Completions:
    """Greedy completions of public prompts by the model as it is, with its distribution at each token.

    Args:
        model (`PeftModel`): the TinyLM with the client's adapter on it.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompts (`Dataset` or `Sequence[Mapping]`): rows with a column `prompt`; completions in them are not read.
        max_new_tokens, batch_size, top_tokens (`int`): see [`RefinementArguments`].

    Raises:
        [`DataError`]: no rows, or no column `prompt`.
    """
    generated = generate_tokens(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    rows = [prompt + completion for prompt, completion in generated]
    starts = [len(prompt) for prompt, _ in generated]
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    parts: dict[int, TopTokens] = {}
    while order:
        longest = len(rows[order[-1]])
        count = max(1, min(batch_size, _LOGITS_PER_PASS // (longest * model.config.get_text_config().vocab_size)))
        batch, order = order[-count:], order[:-count]
        input_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        for index, row in enumerate(batch):
            input_ids[index, : len(rows[row])] = torch.tensor(rows[row])
        # Padded on the right: a causal model's tokens never see it.
        logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits
        for index, row in enumerate(batch):
            parts[row] = TopTokens.of_logits(logits[index, starts[row] - 1 : len(rows[row]) - 1], top_tokens)
    tokens = TopTokens.cat([parts[row] for row in range(len(rows))])
    ends = torch.tensor(end_token_ids(model, tokenizer), dtype=torch.int64)
    spoken_M = torch.tensor([token for _, completion in generated for token in completion], dtype=torch.int64)
    return Completions(rows, starts, tokens, ~torch.isin(spoken_M, ends))
