"""Clients that hedge among the tasks of several shadows: weights, targets, and who is taken for such a client."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from grad_transformer.refinement import Completions, TopTokens
from grad_transformer.refinement.annotators import Panel, Screening
from grad_transformer.refinement.mixtures import mixture, mixture_targets, mixture_weights
from tests.refinement.test_annotators import FIRST_WORD, LENGTH, NUMBERS, ROWS, WORDS, Readings, heard_from, said


def words(seed: int) -> torch.Tensor:
    return torch.randint(0, WORDS, (ROWS * LENGTH,), generator=torch.Generator().manual_seed(seed))


SHADOWS = [said(words(seed), 0.99) for seed in (1, 2, 3)]


def on_tokens_of(teacher: Completions, shadows: Sequence[TopTokens] = SHADOWS) -> list[torch.Tensor]:
    return [shadow.probabilities_of(teacher.tokens.ids_MT) for shadow in shadows]


def hedging(weights: tuple[float, ...]) -> Completions:
    """A TinyLM that says at each place, whatever came before, what the shadows say, with these weights."""
    probabilities = torch.zeros(ROWS * LENGTH, WORDS)
    for shadow, weight in zip(SHADOWS, weights, strict=True):
        probabilities += weight * torch.zeros_like(probabilities).scatter_(
            1, shadow.ids_MT - FIRST_WORD, shadow.log_probs_MT.exp()
        )
    best = probabilities.topk(WORDS, dim=1)
    return heard_from(TopTokens(best.indices + FIRST_WORD, best.values.log()))


def test_the_weights_are_those_of_the_tasks() -> None:
    # Rows of one word: with more, the words before would tell more than this TinyLM knows.
    teacher = hedging((0.7, 0.0, 0.3))
    firsts = torch.arange(0, ROWS * LENGTH, LENGTH)
    single = Completions([[1, 1, 1]] * ROWS, [2] * ROWS, teacher.tokens.where(firsts), torch.ones(ROWS).bool())
    weights_A = mixture_weights(single, on_tokens_of(single, [shadow.where(firsts) for shadow in SHADOWS]))
    assert weights_A.tolist() == pytest.approx([0.7, 0.0, 0.3], abs=0.03)


def test_the_words_before_tell_which_shadow_speaks() -> None:
    teacher = hedging((0.6, 0.4, 0.0))
    mixed_MT = mixture(teacher, on_tokens_of(teacher, SHADOWS[:2]), torch.tensor([0.6, 0.4])).view(ROWS, LENGTH, WORDS)
    first, last = mixed_MT[:, 0], mixed_MT[:, -1]
    torch.testing.assert_close(mixed_MT.sum(2), torch.ones(ROWS, LENGTH))
    # The likeliest words are the first shadow's: after two of them, the second is no longer expected to speak,
    # except where both say the same.
    assert 0.55 < float(first.max(1).values.median()) < 0.65
    assert float(last.max(1).values.median()) > 0.95


def test_a_target_is_the_mean_of_tinylm_and_mixture() -> None:
    teacher = hedging((0.6, 0.4, 0.0))
    few = teacher.some(60)
    student = Readings(SHADOWS)
    heard = on_tokens_of(few, [Readings._of(shadow, few) for shadow in SHADOWS])
    panel = Panel({name: NUMBERS[name] for name in "012"}, student, 16, lambda _: None)  # type: ignore[arg-type]
    screening = Screening(teacher, few, dict(zip("012", heard, strict=True)), {})
    (target,) = mixture_targets([screening], panel)
    assert {number for number, _ in student.asked} == {0, 1}
    assert target.weights_M.tolist() == [1.0] * (ROWS * LENGTH)
    torch.testing.assert_close(target.tokens.log_probs_MT.exp().sum(1), torch.ones(ROWS * LENGTH))
    sure = target.tokens.confidence_M.view(ROWS, LENGTH)
    assert 0.7 < float(sure[:, -1].median()) < 0.9
