"""Shadows as annotators: channels, testimony, and what a client's tokens are trained towards."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from grad_transformer.refinement import Completions, TopTokens, annotator_deltas
from grad_transformer.refinement.annotators import Channel, Panel, Screening, hear_best, screen, told_by_root
from grad_transformer.refinement.targets import target_of_testimony


WORDS, ROWS, LENGTH = 10, 240, 3
FIRST_WORD = 20
# The client's name for each of the annotator's words: one to one, and none its own.
RENAMED = torch.tensor([3, 6, 9, 2, 5, 8, 1, 4, 7, 0])
TRUTH = torch.randint(0, WORDS, (ROWS * LENGTH,), generator=torch.Generator().manual_seed(0))


NUMBERS = {str(number): torch.tensor([float(number)]) for number in range(9)}


def said(words_M: torch.Tensor, sure: float | torch.Tensor, *, first_word: int = FIRST_WORD) -> TopTokens:
    """A model that gives `sure` to its word and shares the rest among the others."""
    sure_M = torch.as_tensor(sure, dtype=torch.float32).expand(len(words_M))
    probabilities_MW = ((1 - sure_M) / (WORDS - 1))[:, None].repeat(1, WORDS)
    probabilities_MW.scatter_(1, words_M[:, None], sure_M[:, None])
    best = probabilities_MW.topk(WORDS, dim=1)
    return TopTokens(best.indices + first_word, best.values.log())


def heard_from(tokens: TopTokens, *, rows: int = ROWS) -> Completions:
    return Completions([[1] * (LENGTH + 2)] * rows, [2] * rows, tokens, torch.ones(rows * LENGTH, dtype=torch.bool))


def weak(seed: int = 1, right: float = 0.45) -> Completions:
    """A TinyLM that is right in `right` of all cases, and says so."""
    generator = torch.Generator().manual_seed(seed)
    others = torch.randint(0, WORDS, TRUTH.shape, generator=generator)
    words_M = torch.where(torch.rand(TRUTH.shape, generator=generator) < right, RENAMED[TRUTH], others)
    return heard_from(said(words_M, right))


def accuracy(tokens: TopTokens) -> float:
    return float((tokens.best_M == RENAMED[TRUTH] + FIRST_WORD).float().mean())


def test_a_weak_tinylm_reveals_which_word_stands_for_which() -> None:
    teacher, annotator = weak(), said(TRUTH, 0.97)
    assert accuracy(teacher.tokens) < 0.6
    channel = Channel.fit(teacher, annotator)
    rows = torch.searchsorted(channel.words_U, torch.arange(WORDS) + FIRST_WORD)
    assert torch.equal(channel.table_UU[rows].argmax(dim=1), rows[RENAMED])
    torch.testing.assert_close(channel.table_UU.sum(dim=1), torch.ones(len(channel.words_U)))
    renamed_MU = channel.rename(annotator, channel.words_U)
    assert float((channel.words_U[renamed_MU.argmax(1)] == RENAMED[TRUTH] + FIRST_WORD).float().mean()) == 1.0


def test_an_annotator_who_looks_elsewhere_tells_little() -> None:
    teacher = weak()
    shuffled = said(TRUTH[torch.randperm(len(TRUTH), generator=torch.Generator().manual_seed(2))], 0.97)
    told = [
        Screening(teacher, teacher, {}, {"": Channel.fit(teacher, words)}).told
        for words in (said(TRUTH, 0.97), shuffled)
    ]
    assert 0.75 < told[0] < 1.22
    assert told[1] < 0.25


def test_more_than_all_is_told_of_a_tinylm_that_hedges() -> None:
    # It gives half of its probability to the words of one task and shares the rest between two others.
    tasks = [said(RENAMED[words_M], 0.97) for words_M in (TRUTH, TRUTH.flip(0), TRUTH.roll(7))]
    ids_MT = tasks[0].ids_MT
    shares = zip((0.5, 0.25, 0.25), tasks, strict=True)
    teacher = heard_from(TopTokens(ids_MT, sum(share * task.probabilities_of(ids_MT) for share, task in shares).log()))
    assert Screening(teacher, teacher, {}, {"": Channel.fit(teacher, said(TRUTH, 0.97))}).told > 1.22


def judged(teacher: Completions, annotator: TopTokens, root: TopTokens | None = None) -> Screening:
    nats = 0.0 if root is None else told_by_root(teacher, root)
    return Screening(teacher, teacher, {}, {"": Channel.fit(teacher, annotator)}, nats)


def test_an_annotator_that_is_the_tinylm_itself_shows_no_hedging() -> None:
    for right in (0.3, 0.45, 0.7):
        teacher = weak(right=right)
        same = judged(teacher, teacher.tokens)
        assert (same.told, same.surplus) == (1.0, 1.0)
        # A little surer than the TinyLM is no witness of its own either.
        sharper = TopTokens(teacher.tokens.ids_MT, (1.2 * teacher.tokens.log_probs_MT).log_softmax(dim=1))
        assert judged(teacher, sharper).surplus <= 1.0


def test_what_a_competent_llm_says_without_an_adapter_is_no_testimony() -> None:
    teacher, knowing = weak(), said(RENAMED[TRUTH], 0.97)
    silent = said(torch.zeros_like(TRUTH), 0.2)
    assert told_by_root(teacher, silent) == 0.0
    assert judged(teacher, knowing, silent).told == judged(teacher, knowing).told > 0.75
    # Shadows of an LLM that knows all this anyway tell nothing of the client, and show no hedging.
    for annotator in (knowing, teacher.tokens):
        same = judged(teacher, annotator, annotator)
        assert same.told < 0.1 and same.surplus < 1.22


def test_a_mixture_is_known_where_the_llm_alone_tells_a_little_by_chance() -> None:
    # Of a TinyLM that hedges little can be told at all: even as much told by the LLM alone is not what shadows tell.
    tasks = [said(RENAMED[words_M], 0.97) for words_M in (TRUTH, TRUTH.flip(0), TRUTH.roll(7), TRUTH.roll(40))]
    ids_MT = tasks[0].ids_MT
    shares = zip((0.4, 0.2, 0.2, 0.2), tasks, strict=True)
    teacher = heard_from(TopTokens(ids_MT, sum(share * task.probabilities_of(ids_MT) for share, task in shares).log()))
    generator = torch.Generator().manual_seed(4)
    by_chance = said(
        torch.where(torch.rand(TRUTH.shape, generator=generator) < 0.5, RENAMED[TRUTH], RENAMED[TRUTH.roll(3)]), 0.6
    )
    assert told_by_root(teacher, by_chance) > 0
    assert judged(teacher, said(TRUTH, 0.97), by_chance).surplus > 1.22


def test_words_that_are_not_frequent_stand_for_themselves() -> None:
    # One place in 720 has a word that the channel does not rename.
    teacher, annotator = weak(), said(TRUTH, 0.7)
    annotator.ids_MT[5, 0] = 90
    channel = Channel.fit(teacher, annotator)
    assert 90 not in channel.words_U
    assert channel.rename(annotator, torch.tensor([FIRST_WORD, 90]))[5, 1] == pytest.approx(0.7, abs=1e-4)


class Readings:
    """A student whose adapters are numbers: each says what it is told to, on whatever rows it is asked about."""

    class root:
        class adapter:
            @staticmethod
            def flat() -> torch.Tensor:
                return torch.zeros(1)

    def __init__(self, says: Sequence[TopTokens]):
        self.says, self.asked = says, []

    def read(self, values_KP: torch.Tensor, completions: Sequence[Completions], *, top_tokens: int) -> list[TopTokens]:
        self.asked += [(int(value), len(each.rows)) for value, each in zip(values_KP, completions, strict=True)]
        return [self._of(self.says[int(value)], each) for value, each in zip(values_KP, completions, strict=True)]

    @staticmethod
    def _of(said: TopTokens, asked: Completions) -> TopTokens:
        places = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)[:: ROWS // len(asked.rows)]
        return said.where(places.flatten())


def test_the_best_annotators_are_found_on_few_prompts_and_asked_on_all() -> None:
    generator = torch.Generator().manual_seed(3)
    strangers = [said(torch.randint(0, WORDS, TRUTH.shape, generator=generator), 0.97) for _ in range(7)]
    # Two know the skill, one of them in other words again, and each errs in a tenth of the places.
    knowing = []
    for words_M in (TRUTH, (TRUTH + 4) % WORDS):
        errs = torch.rand(TRUTH.shape, generator=generator) < 0.1
        knowing.append(said(torch.where(errs, 0, words_M), torch.where(errs, 0.3, 0.97)))
    student = Readings([*strangers, *knowing])
    panel = Panel(NUMBERS, student, 16, lambda _: None)  # type: ignore[arg-type]
    (screening,) = screen([weak()], panel, ROWS // 2, root_nats=[0.0])
    assert student.asked == [(number, ROWS // 2) for number in range(9)]
    assert sorted(screening.best[:2]) == ["7", "8"]
    (testimony,) = hear_best([screening], panel)
    assert sorted(testimony.annotators) == ["7", "8"]
    assert [rows for _, rows in student.asked[9:]] == [ROWS] * 5
    assert accuracy(testimony.tokens) > 0.97
    assert 0.75 < testimony.told < 1.25
    torch.testing.assert_close(
        testimony.tokens.log_probs_MT.exp().sum(1), torch.ones(ROWS * LENGTH), atol=0.02, rtol=0
    )


def test_the_target_weighs_testimony_later_words_and_tinylm() -> None:
    teacher = heard_from(TopTokens(torch.tensor([[3, 4]] * 3), torch.tensor([[0.64, 0.36]] * 3).log()), rows=1)
    testimony = TopTokens(torch.tensor([[4, 3]] * 3), torch.tensor([[0.9, 0.1]] * 3).log())
    later = TopTokens(torch.tensor([[3, 4]] * 3), torch.tensor([[0.4, 0.6]] * 3).log())
    target = target_of_testimony(teacher, [testimony, later], 2.0)
    three, four = (0.1 * 0.4) ** 0.5 * 0.8, (0.9 * 0.6) ** 0.5 * 0.6
    assert target.tokens.ids_MT.tolist() == [[4, 3]] * 3
    found = target.tokens.log_probs_MT.exp()
    torch.testing.assert_close(found, torch.tensor([[four, three]] * 3) / (three + four))
    torch.testing.assert_close(target.weights_M, found[:, 0] ** 2)


def test_annotators_are_the_means_of_tasks() -> None:
    target_NP = torch.arange(12.0).view(6, 2)
    tasks = ["b", "a", "b", "c", "a", "c"]
    means = annotator_deltas(target_NP, tasks, 64)
    assert {name: mean_P.tolist() for name, mean_P in means.items()} == {
        "a": target_NP[[1, 4]].mean(0).tolist(),
        "b": [2.0, 3.0],
        "c": target_NP[[3, 5]].mean(0).tolist(),
    }
    assert list(annotator_deltas(target_NP, tasks, 2)) == ["a", "b"]
    # Where a task is unknown, single pairs.
    singles = annotator_deltas(target_NP, [*tasks[:5], None], 3)
    assert [single_P.tolist() for single_P in singles.values()] == target_NP[::2].tolist()
    assert annotator_deltas(target_NP, tasks, 0) == {}


def test_some_rows_at_even_spacing() -> None:
    teacher = weak()
    few = teacher.some(7)
    assert len(few.rows) == 7 and len(few.counted_M) == LENGTH * len(few.rows)
    assert torch.equal(few.tokens.ids_MT[LENGTH], teacher.tokens.ids_MT[LENGTH * (ROWS // 7)])
    assert len(teacher.some(10**6).rows) == ROWS
