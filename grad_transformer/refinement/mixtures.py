"""Clients whose TinyLM learned several of the shadows' tasks at once: a mixture of shadows, row by row.

Such a TinyLM hedges: at each token it spreads its probability over what the tasks would say. Shadows of these tasks,
each with a weight of its own, say the same more sharply, for each of them answers a whole row: the tokens before tell
which of them is speaking. The weights are those under which the mixture says what the TinyLM says.

Shape legend: K clients, A annotators, P values of an LLM adapter, M tokens of one client's completions, T tokens kept
of a distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .annotators import Panel, Screening
from .completions import Completions
from .student import SoftTarget


# Share of an annotator's words that may be any of the TinyLM's.
_SLIP = 0.02
_EM_STEPS = 100
# Annotators of less weight are left out, and all beyond so many.
_LEAST_WEIGHT, _MOST = 0.02, 6


def mixture_targets(screenings: Sequence[Screening], panel: Panel) -> list[SoftTarget]:
    """What the tokens of K hedging clients are trained towards: the mean of TinyLM and mixture, every token alike."""
    completions = [screening.teacher for screening in screenings]
    chosen: list[list[str]] = []
    for screening in screenings:
        weights_A = mixture_weights(screening.few, [said.float() for said in screening.heard.values()])
        best = weights_A.topk(min(_MOST, len(weights_A)))
        numbers = best.indices[best.values > _LEAST_WEIGHT].tolist() or [int(best.indices[0])]
        chosen.append([list(screening.heard)[number] for number in numbers])
    heard: list[list[torch.Tensor]] = [[] for _ in completions]
    most = max(map(len, chosen), default=0)
    for place in range(most):
        panel.say(f"shadows of mixtures speak, {place + 1} of {most}")
        read = panel.read([names[min(place, len(names) - 1)] for names in chosen], completions)
        for index, said in enumerate(read):
            if place < len(chosen[index]):
                heard[index].append(said.probabilities_of(completions[index].tokens.ids_MT))
    targets = []
    for teacher, speakers in zip(completions, heard, strict=True):
        mixed_MT = mixture(teacher, speakers, mixture_weights(teacher, speakers))
        target_MT = (_slipping(teacher.tokens.log_probs_MT.exp()) + mixed_MT) / 2
        targets.append(SoftTarget.by_confidence(teacher.tokens.ids_MT, target_MT.log(), 0.0))
    return targets


def mixture_weights(teacher: Completions, heard: Sequence[torch.Tensor]) -> torch.Tensor:
    """Weights `(A,)` under which annotators together say what the TinyLM says, by expectation maximisation.

    Args:
        teacher ([`Completions`]): what the TinyLM says.
        heard (`Sequence[torch.Tensor]`): each annotator's probabilities `(M, T)` of the TinyLM's tokens.
    """
    p_AMT, before_AM = _annotators(teacher, heard)
    q_MT = _slipping(teacher.tokens.log_probs_MT.exp())
    weights_A = torch.full((len(heard),), 1 / len(heard))
    for _ in range(_EM_STEPS):
        speaking_AM = _speaking(weights_A, before_AM)
        mixed_MT = (speaking_AM[:, :, None] * p_AMT).sum(0)
        share_AM = speaking_AM * (p_AMT * (q_MT / mixed_MT)).sum(2)
        weights_A = share_AM[:, teacher.counted_M].sum(1)
        weights_A = weights_A / weights_A.sum()
    return weights_A


def mixture(teacher: Completions, heard: Sequence[torch.Tensor], weights_A: torch.Tensor) -> torch.Tensor:
    """What the mixture says at each place, `(M, T)`, on the tokens that the TinyLM names there."""
    p_AMT, before_AM = _annotators(teacher, heard)
    return (_speaking(weights_A, before_AM)[:, :, None] * p_AMT).sum(0)


def _speaking(weights_A: torch.Tensor, before_AM: torch.Tensor) -> torch.Tensor:
    """How likely it is, at each place, that an annotator is the one that speaks."""
    return (weights_A.clamp(min=1e-12).log()[:, None] + before_AM).softmax(0)


def _annotators(teacher: Completions, heard: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each one's probabilities of the TinyLM's tokens `(A, M, T)`, and log probability of the row's words before."""
    p_AMT = torch.stack([_slipping(said_MT) for said_MT in heard])
    spoken_AM = p_AMT[:, :, 0].log()
    sizes = [len(row) - start for row, start in zip(teacher.rows, teacher.starts, strict=True)]
    return p_AMT, torch.cat([row.cumsum(1) - row for row in spoken_AM.split(sizes, dim=1)], dim=1)


def _slipping(p_MT: torch.Tensor) -> torch.Tensor:
    p_MT = (1 - _SLIP) * p_MT + _SLIP / p_MT.shape[1]
    return p_MT / p_MT.sum(1, keepdim=True)
