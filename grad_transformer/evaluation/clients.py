"""Clients scored: their TinyLM, the generated LLM, both references, and every control, on the same test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..adapters import LoraAdapter
from ..adapters.statistics import RunningR2
from ..finetuning import write_adapter_tensors
from ..modeling_grad_transformer import GradTransformer
from .controls import ShadowPredictor, control_deltas
from .metrics import exact_match
from .records import ClientReport, HeldoutScores
from .scoring import Metric, completion_nll, score_rows


# Held-out deltas that a control predicts at a time.
_ROWS = 256


@dataclass(frozen=True)
class ClientCase:
    """What is known of one client.

    Args:
        id (`str`): unique.
        adapter ([`LoraAdapter`]): the TinyLM adapter that the client sent.
        test_rows (`Sequence[Mapping]`): rows with `prompt` and `completion` to score on.
        llm_adapter ([`LoraAdapter`], *optional*): the LLM fine-tuned on the client's rows, the ceiling.
        kind (`str`): one of `KINDS`; `"other"` where it is not known whether shadows showed its task.
        task (`str`): for people.
        tasks (`frozenset[str]`): its tasks; another client's delta is taken from one that shares none.
    """

    id: str
    adapter: LoraAdapter
    test_rows: Sequence[Mapping[str, Any]]
    llm_adapter: LoraAdapter | None = None
    kind: str = "other"
    task: str = ""
    tasks: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class AdapterScorer:
    """A base model with the root attached, whose adapter is overwritten to score one set of values after another.

    Args:
        model (`PeftModel`), tokenizer (`PreTrainedTokenizerBase`): as [`attach_root`] and [`load_base`] give them.
        batch_size (`int`, *optional*, defaults to 256): prompts at once.
        metric (`Callable`, *optional*): see [`score_rows`].
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 256
    metric: Metric = exact_match

    def score(self, adapter: LoraAdapter, rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, float]:
        """Score of each row `(N,)`, and the mean negative log-likelihood of the completions."""
        write_adapter_tensors(self.model, adapter.tensors)
        per_row = score_rows(self.model, self.tokenizer, rows, batch_size=self.batch_size, metric=self.metric).per_row
        nll = completion_nll(self.model, self.tokenizer, rows, batch_size=self.batch_size)
        return per_row, float(nll.mean())


def evaluate_clients(
    mapper: GradTransformer,
    cases: Sequence[ClientCase],
    predictors: Mapping[str, ShadowPredictor],
    *,
    tinylm: AdapterScorer,
    llm: AdapterScorer,
    methods: Mapping[str, Sequence[LoraAdapter]] | None = None,
    seed: int = 0,
) -> tuple[list[ClientReport], list[LoraAdapter]]:
    """Generate an LLM adapter for every client and score it beside references and controls.

    Args:
        mapper ([`GradTransformer`]): with its tokenizers.
        cases (`Sequence[ClientCase]`): the clients.
        predictors (`Mapping[str, ShadowPredictor]`): controls fitted on the mapper's training pairs, see
            [`fit_controls`].
        tinylm, llm ([`AdapterScorer`]): the two base models.
        methods (`Mapping[str, Sequence[LoraAdapter]]`, *optional*): adapters of the LLM that were made for the clients
            in other ways, in their order, by their name in `METHODS`.
        seed (`int`, *optional*, defaults to 0): of random deltas and bootstrap.

    Returns:
        a report and the generated adapter for each client, in order.

    Raises:
        errors of [`LoraDeltaTokenizer.delta`]: a client's adapter is refused.
    """
    source_tokenizer, target_tokenizer = mapper.tokenizers()
    source_CX = torch.stack([source_tokenizer.delta(case.adapter) for case in cases])
    generated_CY = mapper.generate_deltas(source_CX)
    tasks = [case.tasks or None for case in cases]
    controls = control_deltas(
        generated_CY, source_CX, tasks, predictors, target_widths=target_tokenizer.layout.widths, seed=seed
    )
    reports, adapters = [], []
    methods = methods or {}
    for number, (case, generated_Y, deltas) in enumerate(
        tqdm(list(zip(cases, generated_CY, controls, strict=True)), desc="clients", unit="client")
    ):
        generated = target_tokenizer.decode_delta(generated_Y)
        scores: dict[str, np.ndarray] = {}
        nll: dict[str, float] = {}
        scores["tinylm"], nll["tinylm"] = tinylm.score(case.adapter, case.test_rows)
        candidates = {"llm_base": target_tokenizer.root.adapter, "generated": generated}
        candidates |= {name: target_tokenizer.decode_delta(delta_Y) for name, delta_Y in deltas.items()}
        candidates |= {name: made[number] for name, made in methods.items()}
        if case.llm_adapter is not None:
            candidates["llm_finetuned"] = case.llm_adapter
        for name, adapter in candidates.items():
            scores[name], nll[name] = llm.score(adapter, case.test_rows)
        reports.append(
            ClientReport.from_rows(
                case.id,
                kind=case.kind,
                task=case.task,
                tinylm=scores["tinylm"],
                llm_base=scores["llm_base"],
                llm_finetuned=scores.get("llm_finetuned"),
                generated=scores["generated"],
                controls={name: scores[name] for name in deltas},
                methods={name: scores[name] for name in methods},
                nll=nll,
                seed=seed,
            )
        )
        adapters.append(generated)
    return reports, adapters


def score_heldout(
    heldout: Any,
    predictors: Mapping[str, ShadowPredictor],
    source_NX: torch.Tensor,
    target_NY: torch.Tensor,
    mean_Y: torch.Tensor,
) -> HeldoutScores:
    """The mapper's held-out figures with the R² of ridge and nearest shadow on the same runs beside them.

    Args:
        heldout (`HeldoutMetrics`): as `evaluate_heldout` measured them.
        predictors (`Mapping[str, ShadowPredictor]`): see [`fit_controls`].
        source_NX, target_NY (`torch.Tensor`): the held-out pairs.
        mean_Y (`torch.Tensor`): mean training delta of the LLM.
    """
    return HeldoutScores(
        r2=heldout.r2,
        r2_teacher_forced=heldout.r2_teacher_forced,
        r2_permuted_inputs=heldout.r2_permuted_inputs,
        r2_ceiling=heldout.r2_ceiling,
        controls={
            name: _r2_of(predictor, source_NX, target_NY, mean_Y)
            for name, predictor in predictors.items()
            if name != "mean_shadow"
        },
    )


def _r2_of(
    predictor: ShadowPredictor, source_NX: torch.Tensor, target_NY: torch.Tensor, mean_Y: torch.Tensor
) -> float:
    running = RunningR2(mean_Y)
    for some_BX, true_BY in zip(source_NX.split(_ROWS), target_NY.split(_ROWS), strict=True):
        running.add(predictor.predict(some_BX), true_BY)
    return running.value()
