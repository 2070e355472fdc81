"""Refinement for somebody with a mapper, clients' adapters and public prompts: all steps in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..adapters import LoraAdapter
from ..evaluation.controls import ShadowPredictor
from ..evaluation.scoring import Rows
from ..finetuning import FineTuningRecipe, attach_root, load_root_base
from ..modeling_grad_transformer import GradTransformer
from .arguments import RefinementArguments
from .candidates import candidate_deltas
from .refinement import Refinement, check_same_tokens, complete_clients, public_weak_to_strong, refine
from .student import Student


def refine_clients(
    mapper: GradTransformer,
    predictors: Mapping[str, ShadowPredictor],
    clients: Sequence[LoraAdapter],
    prompts: Rows,
    arguments: RefinementArguments,
    *,
    annotators: Mapping[str, torch.Tensor] | None = None,
    candidates: Sequence[str] | None = None,
    source_model: str | None = None,
    target_model: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    baseline: bool = False,
) -> tuple[list[Refinement], list[Refinement]]:
    """Candidates for every client, the best of them, refined on public prompts. The base models are loaded for it.

    Args:
        mapper ([`GradTransformer`]): with its tokenizers.
        predictors (`Mapping[str, ShadowPredictor]`): other ways beside the mapper, as from [`fit_candidates`]; may be
            empty.
        clients (`Sequence[LoraAdapter]`): their TinyLM adapters.
        prompts (`Dataset` or `Sequence[Mapping]`): public rows; only their column `prompt` is read.
        arguments ([`RefinementArguments`]).
        annotators (`Mapping[str, torch.Tensor]`, *optional*): shadows to ask, as from [`shadow_annotators`].
        candidates (`Sequence[str]`, *optional*): names to choose among; default: the mapper and all predictors.
        source_model, target_model (`str`, *optional*): other places of the base models; checked.
        dtype, device: see [`load_base`].
        baseline (`bool`, *optional*, defaults to `False`): also train the LLM from its root, see
            [`public_weak_to_strong`].

    Returns:
        refinements of the clients, and those of the baseline (empty without it).

    Raises:
        errors of [`LoraDeltaTokenizer.delta`], [`complete_clients`] and [`refine`].
    """
    source, target = mapper.tokenizers()
    assert target.recipe is not None
    loaded = [
        load_root_base(tokenizer.root, base_model=name, dtype=dtype, device=device)
        for tokenizer, name in ((source, source_model), (target, target_model))
    ]
    check_same_tokens(loaded[0][1], loaded[1][1], prompts)
    student = Student(*loaded[1], target.root, FineTuningRecipe.from_dict(target.recipe))
    deltas = candidate_deltas(mapper, predictors, torch.stack([source.delta(client) for client in clients]))
    deltas = {name: values for name, values in deltas.items() if candidates is None or name in candidates}
    with tqdm(desc="refinement on public prompts", bar_format="{desc}{postfix} [{elapsed}]") as bar:
        tinylm = (attach_root(loaded[0][0], source.root), loaded[0][1])
        completions = complete_clients(clients, prompts, tinylm, arguments, progress=bar.set_postfix_str)
        refined = refine(completions, deltas, student, arguments, annotators=annotators, progress=bar.set_postfix_str)
        others = (
            public_weak_to_strong(completions, student, arguments, progress=bar.set_postfix_str) if baseline else []
        )
    return refined, others


def refinement_metadata(refinement: Refinement, arguments: RefinementArguments) -> dict[str, Any]:
    """What a refined adapter says of how it was made, as JSON has it."""
    return {**refinement.facts(), "arguments": vars(arguments)}
