"""Refinement of generated adapters on public prompts, where TinyLM, shadows and LLM are witnesses.

The provider holds the client's TinyLM adapter, so it can ask it what it would say to any public prompt. Shadows are
asked too: one of them may know the client's skill in other words (see `annotators.py`), and what it says then is the
target. Where none does, the LLM with its generated adapter is the other witness. Their errors differ, so the posterior
of both at each token, by Bayes' rule, is a better target than either. The LLM is trained towards the target, and asked
again. No row of a client is seen, and what a private fine-tune guarantees is kept: this is post-processing of the
adapter that the client sent.

Shape legend: K clients, P values of an LLM adapter in layout order, M tokens of one client's completions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..adapters import LoraAdapter
from ..errors import UsageError
from ..evaluation.scoring import Rows
from ..finetuning import write_adapter_tensors
from .annotators import Screening, hear_best, screen
from .arguments import RefinementArguments
from .completions import Completions, TopTokens, complete_prompts
from .mixtures import mixture_targets
from .student import SoftTarget, Student


# A TinyLM that is right more often than it expects hedges: it learned several tasks, and an LLM that does one of them
# agrees with its likeliest words far beyond its own probabilities.
HEDGING = 1.12
# Shadows that tell less than this share of what is known have not shown the client's skill in any words.
_TELLING = 0.75
# Beyond this share the TinyLM hedges, see [`Testimony`].
_HEDGING_TOLD = 1.22
# What a model did not name is not impossible.
_LEAST_PROBABILITY = 1e-4

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Refinement:
    """What became of one client's adapter.

    Args:
        delta_P (`torch.Tensor`): the LLM's delta.
        candidate (`str`): the candidate that agreed best with the TinyLM.
        candidate_delta_P (`torch.Tensor`): its delta, before refinement.
        agreement (`dict[str, float]`): of each candidate with the TinyLM, from 0 to 1.
        expected_agreement (`float`): of an LLM without errors, by the TinyLM's own probabilities.
        annotators (`list[str]`): the shadows whose testimony it was refined towards, the best first; empty for none.
        told (`float`, *optional*): what the best shadow tells of the TinyLM's words, see [`Testimony`].
        agreement_by_round (`list[float]`): of the adapter before each round that refined it, and at the end.
        seconds (`float`): the client's share of the time.
    """

    delta_P: torch.Tensor
    candidate: str
    candidate_delta_P: torch.Tensor
    agreement: dict[str, float]
    expected_agreement: float
    annotators: list[str]
    told: float | None
    agreement_by_round: list[float]
    seconds: float

    def facts(self) -> dict[str, Any]:
        """All but the tensors, for metadata and reports."""
        return {name: value for name, value in vars(self).items() if not name.endswith("_P")}


def complete_clients(
    clients: Sequence[LoraAdapter],
    prompts: Rows,
    tinylm: tuple[PeftModel, PreTrainedTokenizerBase],
    arguments: RefinementArguments,
    *,
    progress: Progress | None = None,
) -> list[Completions]:
    """What each client's TinyLM says to the public prompts.

    Args:
        clients (`Sequence[LoraAdapter]`): TinyLM adapters as the clients sent them, checked.
        prompts (`Dataset` or `Sequence[Mapping]`): public rows; only their column `prompt` is read, and of many rows
            `num_prompts`.
        tinylm (`tuple`): the TinyLM with its root attached, and its tokenizer.
        arguments ([`RefinementArguments`]).
        progress (`Callable`, *optional*): called with a few words as the work goes on.

    Raises:
        [`DataError`]: no prompts.
    """
    drawn = draw_prompts(prompts, arguments)
    model, tokenizer = tinylm
    completions = []
    for number, client in enumerate(clients):
        if progress is not None:
            progress(f"TinyLM {number + 1} of {len(clients)} completes {len(drawn)} prompts")
        write_adapter_tensors(model, client.tensors)
        completions.append(
            complete_prompts(
                model,
                tokenizer,
                drawn,
                max_new_tokens=arguments.max_new_tokens,
                batch_size=arguments.batch_size,
                top_tokens=arguments.top_tokens,
            )
        )
    return completions


def refine(
    completions: Sequence[Completions],
    candidates: Mapping[str, torch.Tensor],
    student: Student,
    arguments: RefinementArguments,
    *,
    annotators: Mapping[str, torch.Tensor] | None = None,
    clients_at_once: int = 16,
    progress: Progress | None = None,
) -> list[Refinement]:
    """Choose the best of several generated deltas for each client, and refine it on public prompts.

    Args:
        completions (`Sequence[Completions]`): of K clients, as from [`complete_clients`].
        candidates (`Mapping[str, torch.Tensor]`): by name, LLM deltas `(K, P)` that were generated for them.
        student ([`Student`]): the LLM, whose tokenizer is the TinyLM's: see [`check_same_tokens`].
        arguments ([`RefinementArguments`]).
        annotators (`Mapping[str, torch.Tensor]`, *optional*): LLM deltas `(P,)` of shadow tasks by name, as from
            [`shadow_annotators`]. Without them the generated delta is the TinyLM's only fellow witness.
        clients_at_once (`int`, *optional*, defaults to 16): adapters of the LLM that are trained together.
        progress (`Callable`, *optional*): called with a few words as the work goes on.

    Returns:
        `list[Refinement]`, in the order of the clients.

    Raises:
        [`UsageError`]: there is nothing to choose from.
        [`RecipeError`]: the LLM is one that cannot carry many adapters at once, or training diverged.
    """
    if not candidates:
        raise UsageError("There is nothing to refine.", expected="at least one candidate", found="none")
    results: list[Refinement] = []
    for start in range(0, len(completions), clients_at_once):
        group = slice(start, start + clients_at_once)
        deltas = {name: deltas_KP[group] for name, deltas_KP in candidates.items()}
        results += _refine_group(
            completions[group], deltas, annotators or {}, student, arguments, progress or (lambda _: None)
        )
    return results


def public_weak_to_strong(
    completions: Sequence[Completions], student: Student, arguments: RefinementArguments, **refine_kwargs: Any
) -> list[Refinement]:
    """The baseline without a mapper: the LLM from its root, with the whole shadow recipe, on what the TinyLM says."""
    alone = replace(
        arguments,
        rounds=1,
        steps=student.recipe.max_steps,
        learning_rate=student.recipe.learning_rate,
        second_witness=False,
    )
    root_KP = torch.zeros(len(completions), student.root.layout.numel)
    return refine(completions, {"root": root_KP}, student, alone, **refine_kwargs)


def check_same_tokens(tinylm: PreTrainedTokenizerBase, llm: PreTrainedTokenizerBase) -> None:
    """The TinyLM's words are given to the LLM token by token, so both must cut text alike.

    Raises:
        [`UsageError`]
    """
    if tinylm.get_vocab() != llm.get_vocab():
        raise UsageError(
            "TinyLM and LLM have different tokenizers, so one cannot be a witness for the other's tokens.",
            expected=f"one vocabulary, here of {len(tinylm)} tokens",
            found=f"another one, of {len(llm)}",
            remedy="generate without refinement, or use base models of one family",
        )


def draw_prompts(prompts: Rows, arguments: RefinementArguments) -> list[Mapping[str, Any]]:
    """As many of the public rows as are asked for, the same ones for a seed."""
    count = min(len(prompts), arguments.num_prompts)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(arguments.seed))[:count]
    return [prompts[index] for index in sorted(order.tolist())]


def _refine_group(
    completions: Sequence[Completions],
    candidates: Mapping[str, torch.Tensor],
    annotators: Mapping[str, torch.Tensor],
    student: Student,
    arguments: RefinementArguments,
    say: Progress,
) -> list[Refinement]:
    started = time.perf_counter()
    power = arguments.certainty_power
    root_P = student.root.adapter.flat()
    read: dict[str, list[TopTokens]] = {}
    for name, deltas_KP in candidates.items():
        say(f"agreement of candidate {name}")
        read[name] = student.read(root_P + deltas_KP, completions, top_tokens=arguments.top_tokens)
    agreements = [
        {name: each.agreement(heard[index], power) for name, heard in read.items()}
        for index, each in enumerate(completions)
    ]
    names = [max(agreement, key=lambda name: agreement[name]) for agreement in agreements]
    start_KP = torch.stack([candidates[name][index] for index, name in enumerate(names)])
    readings = [[read[name][index]] for index, name in enumerate(names)]
    deltas_KP, histories = start_KP.clone(), [[agreements[index][name]] for index, name in enumerate(names)]
    expected = [each.expected_agreement(power) for each in completions]
    everyone = range(len(completions))
    screenings: dict[int, Screening] = {}
    if annotators and arguments.rounds:
        speaking = [index for index in everyone if completions[index].counted_M.any()]
        screened = screen([completions[index] for index in speaking], annotators, student, arguments, say)
        screenings = dict(zip(speaking, screened, strict=True))
    told: dict[int, float] = {index: screening.told for index, screening in screenings.items()}
    hedging = [
        index
        for index in everyone
        if (told[index] > _HEDGING_TOLD if index in told else histories[index][0] > HEDGING * expected[index])
    ]
    open_clients = [
        index
        for index in everyone
        if index in hedging or not is_covered(agreements[index], expected[index], arguments)
    ]
    asked = [index for index in open_clients if index in screenings and index not in hedging]
    heard = hear_best(
        [completions[index] for index in asked],
        [screenings[index] for index in asked],
        annotators,
        student,
        arguments,
        say,
    )
    testimonies = {
        index: testimony for index, testimony in zip(asked, heard, strict=True) if testimony.told > _TELLING
    }
    for index, testimony in testimonies.items():
        readings[index] = [testimony.tokens]
    hedged = _hedged_targets(hedging, completions, screenings, annotators, student, arguments, say)
    for round_number in range(arguments.rounds if open_clients else 0):
        say(f"round {round_number + 1} of {arguments.rounds}: {len(open_clients)} clients")
        targets = []
        for index in open_clients:
            if index in hedged:
                targets.append(hedged[index])
            elif index in testimonies:
                targets.append(target_of_testimony(completions[index], readings[index], power))
            else:
                targets.append(soft_target(completions[index], readings[index], histories[index][-1], arguments))
        values_KP = student.train(
            root_P + deltas_KP[open_clients],
            [completions[index] for index in open_clients],
            targets,
            steps=arguments.steps,
            learning_rate=arguments.learning_rate or student.recipe.learning_rate / 6,
            seed=arguments.seed + round_number,
        )
        deltas_KP[open_clients] = values_KP - root_P
        said_by = student.read(
            values_KP, [completions[index] for index in open_clients], top_tokens=arguments.top_tokens
        )
        for index, said in zip(open_clients, said_by, strict=True):
            readings[index].append(said)
            histories[index].append(completions[index].agreement(said, power))
    seconds = (time.perf_counter() - started) / len(completions)
    return [
        Refinement(
            delta_P=deltas_KP[index],
            candidate=name,
            candidate_delta_P=start_KP[index],
            agreement=agreements[index],
            expected_agreement=expected[index],
            annotators=testimonies[index].annotators if index in testimonies else [],
            told=told.get(index),
            agreement_by_round=histories[index],
            seconds=seconds,
        )
        for index, name in enumerate(names)
    ]


def _hedged_targets(
    hedging: Sequence[int],
    completions: Sequence[Completions],
    screenings: Mapping[int, Screening],
    annotators: Mapping[str, torch.Tensor],
    student: Student,
    arguments: RefinementArguments,
    say: Progress,
) -> dict[int, SoftTarget]:
    """Targets of clients that hedge. Without shadows to explain it, what the TinyLM says is taken as it is."""
    known = [index for index in hedging if index in screenings]
    mixed = mixture_targets(
        [completions[index] for index in known],
        [screenings[index] for index in known],
        annotators,
        student,
        arguments,
        say,
    )
    targets = dict(zip(known, mixed, strict=True))
    for index in hedging:
        tokens = completions[index].tokens
        targets.setdefault(index, SoftTarget.by_confidence(tokens.ids_MT, tokens.log_probs_MT, 0.0))
    return targets


def is_covered(agreement: Mapping[str, float], expected: float, arguments: RefinementArguments) -> bool:
    """Whether shadows showed the client's task, so that what they know is worth more than what its TinyLM says.

    The nearest one's adapter then agrees with the TinyLM about as well as an LLM without errors would. Where that one
    is no candidate, nobody knows.
    """
    nearest = agreement.get("nearest_shadow", 0.0)
    return nearest >= arguments.covered_agreement * expected


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
    said = [reading.probabilities_of(ids_MT).clamp(min=_LEAST_PROBABILITY).log() for reading in readings]
    return torch.stack(said).mean(dim=0)


def _chance_coincidence(ids_MT: torch.Tensor, p_MT: torch.Tensor, q_MT: torch.Tensor) -> float:
    """How likely two models name the same token where they look at different places."""
    names, places = ids_MT.flatten().unique(return_inverse=True)
    mean_p, mean_q = (
        torch.zeros(len(names)).index_add_(0, places, said_MT.flatten()) / len(said_MT) for said_MT in (p_MT, q_MT)
    )
    return float((mean_p * mean_q).sum())
