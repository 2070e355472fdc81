"""Weak-to-strong baselines: the LLM fine-tuned on what the client's fine-tuned TinyLM says.

W2S, Conf and VisSup need the client's own inputs; the mapper does not. A provider, who never sees these, can label
*public* inputs with the adapter that the client sent: the same functions, with other rows.

The weak labels f_w are the TinyLM's greedy completions, so that in every token position f_w is one label, and f the
LLM's distribution there. Shape legend: M tokens that have a label, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn.functional import cross_entropy

from ..adapters import LoraAdapter
from ..adapters.io import read_record, write_json_atomic
from ..constants import FORMAT_VERSION
from ..finetuning import FineTuningRecipe, SftResult, SftTrainer, check_rows, run_sft, write_adapter_tensors
from ..finetuning.tokens import IGNORED_LABEL
from ..schemas import WeakLabelsRecord
from ..tokenization_lora_delta import LoraDeltaTokenizer
from .clients import AdapterScorer
from .scoring import generate_completions


def conf_loss(logits_MV: torch.Tensor, weak_M: torch.Tensor, weight: float) -> torch.Tensor:
    """Conf: (1 - a) CE(f, f_w) + a CE(f, hard_t(f)), each token's loss `(M,)`.

    The threshold t is such that exactly half of the batch's tokens lie above it: there hard_t(f) is the LLM's own most
    probable token. For the other half, of which the LLM is less sure, it is the weak label.

    Args:
        logits_MV (`torch.Tensor` of shape `(M, V)`): the LLM's logits.
        weak_M (`torch.Tensor` of shape `(M,)`, int64): the weak labels.
        weight (`float`): a, from 0 (W2S) to 1.
    """
    confidence_M, own_M = logits_MV.detach().softmax(dim=-1).max(dim=-1)
    sure = confidence_M.topk(len(confidence_M) // 2).indices
    hard_M = weak_M.index_copy(0, sure, own_M[sure])
    weak_loss_M = cross_entropy(logits_MV, weak_M, reduction="none")
    return (1 - weight) * weak_loss_M + weight * cross_entropy(logits_MV, hard_M, reduction="none")


def vissup_loss(logits_MV: torch.Tensor, weak_M: torch.Tensor, temperature: float) -> torch.Tensor:
    """VisSup: (1 - b) CE(f, f_w) + b CE(f, hard(f)), each token's loss `(M,)`.

    b = exp(CE(f, hard(f)) / T) / (exp(CE(f, hard(f)) / T) + exp(CE(f, hard(f_w)) / T)), without a gradient: half where
    LLM and weak label agree, near 0 where the LLM finds the weak label improbable and T is small.

    Args:
        logits_MV, weak_M: as in [`conf_loss`].
        temperature (`float`): T, positive. Large: b is one half everywhere.
    """
    own_loss_M = cross_entropy(logits_MV, logits_MV.detach().argmax(dim=-1), reduction="none")
    weak_loss_M = cross_entropy(logits_MV, weak_M, reduction="none")
    b_M = ((own_loss_M - weak_loss_M).detach() / temperature).sigmoid()
    return (1 - b_M) * weak_loss_M + b_M * own_loss_M


class ConfTrainer(SftTrainer):
    """TRL's trainer with [`conf_loss`], whose weight grows linearly from 0 over the first part of the training."""

    max_weight: ClassVar[float] = 0.5
    warmup_fraction: ClassVar[float] = 0.2

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        progress = self.state.global_step / (self.warmup_fraction * self.state.max_steps)
        logits_MV, weak_M, outputs = _labelled_logits(model, inputs)
        loss = _mean(conf_loss(logits_MV, weak_M, self.max_weight * min(1.0, progress)), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class VisSupTrainer(SftTrainer):
    """TRL's trainer with [`vissup_loss`]."""

    temperature: ClassVar[float] = 1.0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        logits_MV, weak_M, outputs = _labelled_logits(model, inputs)
        loss = _mean(vissup_loss(logits_MV, weak_M, self.temperature), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


# W2S is ordinary fine-tuning; what is weak are its labels.
METHODS: dict[str, type[SftTrainer]] = {"w2s": SftTrainer, "conf": ConfTrainer, "vissup": VisSupTrainer}


def weak_labels(
    tinylm: AdapterScorer,
    adapter: LoraAdapter,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    cache: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Rows whose completions are what the TinyLM says to their prompts; their own completions are not read.

    Args:
        tinylm ([`AdapterScorer`]): the TinyLM.
        adapter ([`LoraAdapter`]): the client's.
        rows (`Sequence[Mapping]`): with `prompt`, text or messages.
        max_new_tokens (`int`): room for a completion.
        cache (`str` or `Path`, *optional*): JSON file. Labels that it holds of this adapter and these prompts are
            taken; others are generated and written to it.
    """
    prompts = [row["prompt"] for row in rows]
    facts = {"prompts": prompts, "adapter": adapter.sha256(), "max_new_tokens": max_new_tokens}
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = None if cache is None else Path(cache)
    found = read_record(path, WeakLabelsRecord) if path is not None and path.is_file() else {}
    if found.get("fingerprint") == fingerprint and len(found.get("labels", ())) == len(prompts):
        labels = found["labels"]
    else:
        write_adapter_tensors(tinylm.model, adapter.tensors)
        labels = generate_completions(
            tinylm.model, tinylm.tokenizer, rows, max_new_tokens=max_new_tokens, batch_size=tinylm.batch_size
        )
        if path is not None:
            data = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "labels": labels}
            write_json_atomic(path, data, indent=None)
    return [
        {"prompt": prompt, "completion": label if isinstance(prompt, str) else _message(label)}
        for prompt, label in zip(prompts, labels, strict=True)
    ]


def finetune_on_weak_labels(
    method: str,
    llm: AdapterScorer,
    target: LoraDeltaTokenizer,
    rows: Sequence[Mapping[str, Any]],
    *,
    recipe: FineTuningRecipe,
    seed: int = 0,
    **sft_config: Any,
) -> SftResult:
    """Fine-tune the LLM from the mapper's target root on weak labels.

    Args:
        method (`str`): `"w2s"`, `"conf"` or `"vissup"`.
        llm ([`AdapterScorer`]): the LLM; its adapter is overwritten.
        target ([`LoraDeltaTokenizer`]): the mapper's, whose root is where it starts.
        rows (`Sequence[Mapping]`): as [`weak_labels`] gives them.
        recipe ([`FineTuningRecipe`]): how the LLM is fine-tuned, the same as for its ceiling.
        seed, sft_config: see [`run_sft`].

    Raises:
        [`RecipeError`]: the fine-tune diverged, or changed nothing.
    """
    return run_sft(
        llm.model,
        llm.tokenizer,
        check_rows(rows, allow_empty=True),
        recipe,
        root=target.root,
        seed=seed,
        name=method,
        trainer_class=METHODS[method],
        **sft_config,
    )


def _labelled_logits(
    model: torch.nn.Module, inputs: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, Mapping[str, Any]]:
    """Logits `(M, V)` and labels `(M,)` of the positions whose next token has a label, and the model's outputs."""
    outputs = model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False)
    labels_BT = inputs["labels"][:, 1:]
    labelled_BT = labels_BT != IGNORED_LABEL
    logits_MV = outputs.logits[:, :-1][labelled_BT]
    return logits_MV if logits_MV.dtype == torch.float64 else logits_MV.float(), labels_BT[labelled_BT], outputs


def _mean(losses_M: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    # The tokens of the whole optimizer step, of which this may be one micro-batch.
    return losses_M.sum() / (len(losses_M) if num_items is None else num_items)


def _message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
