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
from .annotators import Panel, Screening, Testimony, hear_best, screen, told_by_root
from .arguments import RefinementArguments
from .completions import Completions, TopTokens, complete_prompts
from .mixtures import mixture_targets
from .student import SoftTarget, Student
from .targets import soft_target, target_of_testimony


# A TinyLM that is right more often than it expects hedges: it learned several tasks, and an LLM that does one of them
# agrees with its likeliest words far beyond its own probabilities.
HEDGING = 1.12
# Shadows that tell less than this share of what is known have not shown the client's skill in any words.
_TELLING = 0.75
# Beyond this surplus the TinyLM hedges, see [`Screening`].
_HEDGING_TOLD = 1.22
# Prompts at which two tokenizers are compared.
_COMPARED_PROMPTS = 64

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
        root_agreement (`float`): of the LLM without an adapter, which knows nothing of the client.
        annotators (`list[str]`): the shadows whose testimony it was refined towards, the best first; empty for none,
            and for a mixture of them.
        told (`float`, *optional*): what the best shadow tells of the TinyLM's words, see [`Testimony`]: on all
            prompts, or on the few of the screening where it was not asked about more.
        agreement_by_round (`list[float]`): of the adapter before each round that refined it, and at the end.
        seconds (`float`): the client's share of the time.
    """

    delta_P: torch.Tensor
    candidate: str
    candidate_delta_P: torch.Tensor
    agreement: dict[str, float]
    expected_agreement: float
    root_agreement: float
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
    say = progress or (lambda _: None)
    panel = Panel(annotators, student, arguments.top_tokens, say) if annotators and arguments.rounds else None
    results: list[Refinement] = []
    for start in range(0, len(completions), clients_at_once):
        group = slice(start, start + clients_at_once)
        deltas = {name: deltas_KP[group] for name, deltas_KP in candidates.items()}
        results += _refine_group(completions[group], deltas, panel, student, arguments, say)
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


def check_same_tokens(tinylm: PreTrainedTokenizerBase, llm: PreTrainedTokenizerBase, prompts: Rows = ()) -> None:
    """The TinyLM's words are given to the LLM token by token, so both must cut text alike.

    Args:
        tinylm, llm (`PreTrainedTokenizerBase`): the tokenizers.
        prompts (`Dataset` or `Sequence[Mapping]`, *optional*): rows that will be completed; some are compared. Where
            they are conversations, so are the chat templates.

    Raises:
        [`UsageError`]
    """

    def refuse(expected: str, found: str) -> None:
        raise UsageError(
            "TinyLM and LLM have different tokenizers, so one cannot be a witness for the other's tokens.",
            expected=expected,
            found=found,
            remedy="generate without refinement, or use base models of one family",
        )

    if tinylm.get_vocab() != llm.get_vocab():
        refuse(f"one vocabulary, here of {len(tinylm)} tokens", f"another one, of {len(llm)}")
    if tinylm.eos_token != llm.eos_token:
        refuse(f"one end token, here {tinylm.eos_token}", f"{llm.eos_token} for the LLM")
    for index in range(min(len(prompts), _COMPARED_PROMPTS)):
        prompt = prompts[index].get("prompt")
        if isinstance(prompt, str):
            if tinylm(prompt)["input_ids"] != llm(prompt)["input_ids"]:
                refuse("the same tokens of every prompt", f"other ones of prompt {index}")
        elif tinylm.chat_template != llm.chat_template:
            refuse("one chat template", "two")


def draw_prompts(prompts: Rows, arguments: RefinementArguments) -> list[Mapping[str, Any]]:
    """As many of the public rows as are asked for, the same ones for a seed."""
    count = min(len(prompts), arguments.num_prompts)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(arguments.seed))[:count]
    return [prompts[index] for index in sorted(order.tolist())]


@dataclass
class _Case:
    """One client on its way through a refinement.

    Args:
        teacher ([`Completions`]): what its TinyLM says.
        agreement (`dict[str, float]`), expected (`float`), root_agreement (`float`): see [`Refinement`].
        root_nats (`float`): see [`told_by_root`].
        candidate (`str`), start_P (`torch.Tensor`): the best one, and its delta.
        delta_P (`torch.Tensor`): what has become of it.
        readings (`list[TopTokens]`): what the LLM or its better, the shadows, said; the last is the latest.
        history (`list[float]`): agreement of the LLM so far.
        screening ([`Screening`], *optional*), testimony ([`Testimony`], *optional*): what shadows say.
        told (`float`, *optional*): see [`Refinement`].
        mixture ([`SoftTarget`], *optional*): what it is trained towards if it hedges among tasks of shadows.
    """

    teacher: Completions
    agreement: dict[str, float]
    expected: float
    root_agreement: float
    root_nats: float
    candidate: str
    start_P: torch.Tensor
    delta_P: torch.Tensor
    readings: list[TopTokens]
    history: list[float]
    screening: Screening | None = None
    told: float | None = None
    testimony: Testimony | None = None
    mixture: SoftTarget | None = None

    @property
    def hedges(self) -> bool:
        if self.screening is not None:
            return self.screening.surplus > _HEDGING_TOLD
        # An LLM that satisfies the TinyLM without knowing the client shows nothing of what the client learned.
        return self.history[0] > HEDGING * max(self.expected, self.root_agreement)

    def target(self, arguments: RefinementArguments) -> SoftTarget:
        """What its tokens are trained towards in the next round."""
        if self.mixture is not None:
            return self.mixture
        if self.hedges:
            # Without shadows to explain it, what the TinyLM says is taken as it is.
            return SoftTarget.by_confidence(self.teacher.tokens.ids_MT, self.teacher.tokens.log_probs_MT, 0.0)
        if self.testimony is not None:
            readings = self.readings if arguments.second_witness else self.readings[:1]
            return target_of_testimony(self.teacher, readings, arguments.certainty_power)
        return soft_target(self.teacher, self.readings, self.history[-1], arguments)


def _refine_group(
    completions: Sequence[Completions],
    candidates: Mapping[str, torch.Tensor],
    panel: Panel | None,
    student: Student,
    arguments: RefinementArguments,
    say: Progress,
) -> list[Refinement]:
    started = time.perf_counter()
    root_P = student.root.adapter.flat()
    cases = _choose(completions, candidates, student, arguments, say)
    if panel is not None:
        speaking = [case for case in cases if case.teacher.some(arguments.screening_prompts).counted_M.any()]
        screenings = screen(
            [case.teacher for case in speaking],
            panel,
            arguments.screening_prompts,
            root_nats=[case.root_nats for case in speaking],
        )
        for case, screening in zip(speaking, screenings, strict=True):
            case.screening, case.told = screening, screening.told
    moving = [
        case
        for case in cases
        if case.hedges or not is_covered(case.agreement, case.expected, arguments, root=case.root_agreement)
    ]
    if panel is not None:
        _ask_shadows(moving, panel)
    for round_number in range(arguments.rounds if moving else 0):
        say(f"round {round_number + 1} of {arguments.rounds}: {len(moving)} clients")
        asked = [case.teacher for case in moving]
        values_KP = student.train(
            root_P + torch.stack([case.delta_P for case in moving]),
            asked,
            [case.target(arguments) for case in moving],
            steps=arguments.steps,
            learning_rate=arguments.learning_rate or student.recipe.learning_rate / 6,
            seed=arguments.seed + round_number,
        )
        read = student.read(values_KP, asked, top_tokens=arguments.top_tokens)
        for case, value_P, said in zip(moving, values_KP, read, strict=True):
            case.delta_P = value_P - root_P
            case.readings.append(said)
            case.history.append(case.teacher.agreement(said, arguments.certainty_power))
    seconds = (time.perf_counter() - started) / len(completions)
    return [
        Refinement(
            delta_P=case.delta_P,
            candidate=case.candidate,
            candidate_delta_P=case.start_P,
            agreement=case.agreement,
            expected_agreement=case.expected,
            root_agreement=case.root_agreement,
            annotators=[] if case.testimony is None else case.testimony.annotators,
            told=case.told,
            agreement_by_round=case.history,
            seconds=seconds,
        )
        for case in cases
    ]


def _choose(
    completions: Sequence[Completions],
    candidates: Mapping[str, torch.Tensor],
    student: Student,
    arguments: RefinementArguments,
    say: Progress,
) -> list[_Case]:
    """The candidate of each client that agrees best with its TinyLM."""
    power, read = arguments.certainty_power, {}
    say("agreement of the LLM without an adapter")
    root_KP = student.root.adapter.flat().repeat(len(completions), 1)
    from_root = student.read(root_KP, completions, top_tokens=arguments.top_tokens)
    for name, deltas_KP in candidates.items():
        say(f"agreement of candidate {name}")
        values_KP = student.root.adapter.flat() + deltas_KP
        read[name] = student.read(values_KP, completions, top_tokens=arguments.top_tokens)
    cases = []
    for index, teacher in enumerate(completions):
        agreement = {name: teacher.agreement(heard[index], power) for name, heard in read.items()}
        best = max(agreement, key=lambda name: agreement[name])
        start_P = candidates[best][index]
        cases.append(
            _Case(
                teacher=teacher,
                agreement=agreement,
                expected=teacher.expected_agreement(power),
                root_agreement=teacher.agreement(from_root[index], power),
                root_nats=told_by_root(teacher, from_root[index]) if teacher.counted_M.any() else 0.0,
                candidate=best,
                start_P=start_P,
                delta_P=start_P,
                readings=[read[best][index]],
                history=[agreement[best]],
            )
        )
    return cases


def _ask_shadows(cases: Sequence[_Case], panel: Panel) -> None:
    """What clients that hedge may be mixtures of, and for the others what the best shadows testify."""
    screened = [(case, case.screening) for case in cases if case.screening is not None]
    hedging = [both for both in screened if both[0].hedges]
    for (case, _), mixture in zip(hedging, mixture_targets([each for _, each in hedging], panel), strict=True):
        case.mixture = mixture
    others = [both for both in screened if not both[0].hedges]
    for (case, _), testimony in zip(others, hear_best([each for _, each in others], panel), strict=True):
        case.told = testimony.told
        if testimony.told > _TELLING:
            case.testimony, case.readings = testimony, [testimony.tokens]


def is_covered(
    agreement: Mapping[str, float], expected: float, arguments: RefinementArguments, *, root: float
) -> bool:
    """Whether shadows showed the client's task, so that what they know is worth more than what its TinyLM says.

    The nearest one's adapter then agrees with the TinyLM about as well as an LLM without errors would, both measured
    from `root`, the agreement of the LLM without an adapter: a competent one agrees with anybody. Where the nearest
    is no candidate, or the LLM alone agrees as well as can be expected, nobody knows.
    """
    nearest = agreement.get("nearest_shadow", 0.0)
    return root < expected and nearest - root >= arguments.covered_agreement * (expected - root)
