"""What the tokens of a client's completions are trained towards, from what TinyLM, shadows and LLM say.

Shape legend: M tokens of one client's completions, T tokens kept of each predicted distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .arguments import RefinementArguments
from .completions import LEAST_PROBABILITY, Completions, TopTokens
from .student import SoftTarget


def soft_target(
    teacher: Completions,
    readings: Sequence[TopTokens],
    agreement: float,
    arguments: RefinementArguments,
) -> SoftTarget:
    """What a client's tokens are trained towards: the posterior of TinyLM and LLM.

    With q what the TinyLM says and p what the LLM says (the geometric mean of what it said before each round, so that
    what it has just been taught does not count twice), tokens are likely by p q. How likely it is that the LLM knows
    at all is judged from its agreement r with the TinyLM, at most what an LLM without errors would reach, and at each
    token from z = sum(p q) against k, what z is for tokens of two different places:

        w = r z / (r z + (1 - r) k)        target = w p q / z + (1 - w) q

    A token counts by the target's highest probability, to `certainty_power`.
    """
    ids_MT, q_MT = teacher.tokens.ids_MT, teacher.tokens.log_probs_MT.exp()
    target_MT = q_MT
    if arguments.second_witness:
        p_MT = _mean_log_said(readings, ids_MT).exp()
        reliability = min(agreement, teacher.expected_agreement(arguments.certainty_power))
        coincidence_M = (p_MT * q_MT).sum(dim=1)
        knows_M = reliability * coincidence_M
        weight_M = knows_M / (knows_M + (1 - reliability) * _chance_coincidence(ids_MT, p_MT, q_MT))
        target_MT = q_MT * torch.lerp(torch.ones_like(p_MT), p_MT / coincidence_M[:, None], weight_M[:, None])
    return SoftTarget.by_confidence(ids_MT, target_MT.log(), arguments.certainty_power)


def target_of_testimony(teacher: Completions, readings: Sequence[TopTokens], power: float) -> SoftTarget:
    """What a client's tokens are trained towards where shadows told its skill.

    The geometric mean of what they testified, which is the first reading, and of what the LLM has said since; times
    the square root of what the TinyLM says at each place, whose words the testimony has already counted.
    """
    ids_MT = readings[0].ids_MT
    said_MT = _mean_log_said(readings, ids_MT) + 0.5 * _mean_log_said([teacher.tokens], ids_MT)
    return SoftTarget.by_confidence(ids_MT, said_MT.log_softmax(dim=1), power)


def _mean_log_said(readings: Sequence[TopTokens], ids_MT: torch.Tensor) -> torch.Tensor:
    said = [reading.probabilities_of(ids_MT).clamp(min=LEAST_PROBABILITY).log() for reading in readings]
    return torch.stack(said).mean(dim=0)


def _chance_coincidence(ids_MT: torch.Tensor, p_MT: torch.Tensor, q_MT: torch.Tensor) -> float:
    """How likely two models name the same token where they look at different places."""
    names, places = ids_MT.flatten().unique(return_inverse=True)
    mean_p, mean_q = (
        torch.zeros(len(names)).index_add_(0, places, said_MT.flatten()) / len(said_MT) for said_MT in (p_MT, q_MT)
    )
    return float((mean_p * mean_q).sum())
