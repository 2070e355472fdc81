"""Scores of a causal language model on rows of `prompt` and `completion`.

Generation is greedy whatever the model's own generation config asks for. Neither tokenizer nor model is changed:
prompts are padded here, and the model's generation config and training mode are put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DataError
from ..finetuning.columns import message_text
from ..finetuning.tokens import RenderedPrompt, encode, render_prompt
from .answers import best_over_references
from .metrics import exact_match


Rows: TypeAlias = Dataset | Sequence[Mapping[str, Any]]
Metric: TypeAlias = Callable[[Sequence[str], Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class RowScores:
    """Scores of N rows: `per_row` float64 (N,) in the order of the rows, and what was generated for each."""

    per_row: np.ndarray
    predictions: list[str]

    @property
    def mean(self) -> float:
        return float(self.per_row.mean())


def score_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    metric: Metric = exact_match,
) -> RowScores:
    """Generate a completion for every row, greedily, and score it against the row's own.

    Args:
        model (`PreTrainedModel` or `PeftModel`): a causal language model, on its device.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        rows (`Dataset` or `Sequence[Mapping]`): `prompt` and `completion`, both strings or both lists of messages (the
            chat template is applied then). Where rows have `references`, a list of accepted answers, the best score
            over these counts.
        batch_size (`int`, *optional*, defaults to 64): prompts generated for at once, left-padded.
        max_new_tokens (`int`, *optional*): default: the tokens of the longest completion, and one more for the end
            token where there is one.
        metric (`Callable`, *optional*): `(predictions, references) -> scores (N,)`; default [`exact_match`].

    Returns:
        [`RowScores`].

    Raises:
        [`DataError`]: no rows, a missing column, or neither text nor messages.
    """
    references = [completion for _, completion in _texts(rows, tokenizer)]
    if max_new_tokens is None:
        longest = max(map(len, encode(tokenizer, references, special=False)))
        max_new_tokens = longest + bool(end_token_ids(model, tokenizer))
    generated = generate_completions(model, tokenizer, rows, max_new_tokens=max_new_tokens, batch_size=batch_size)
    predictions = [text.strip() for text in generated]
    accepted = [row.get("references") or [text] for row, text in zip(_mappings(rows), references, strict=True)]
    if all(len(answers) == 1 for answers in accepted):
        per_row = metric(predictions, [answers[0] for answers in accepted])
    else:
        per_row = np.array(best_over_references(metric, predictions, accepted))
    return RowScores(np.asarray(per_row, dtype=np.float64), predictions)


def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[str]:
    """What the model says to every prompt, greedily, without special tokens. Only the column `prompt` is read.

    Args:
        model, tokenizer, rows, batch_size: as in [`score_rows`].
        max_new_tokens (`int`): most tokens of a completion.

    Raises:
        [`DataError`]: no rows, or no column `prompt`.
    """
    tokens = generate_tokens(model, tokenizer, rows, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return tokenizer.batch_decode([completion for _, completion in tokens], skip_special_tokens=True)


def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[tuple[list[int], list[int]]]:
    """Token ids of every prompt and of its greedy completion, which ends with the end token if there was one.

    Args:
        model, tokenizer, rows, max_new_tokens, batch_size: as in [`generate_completions`].

    Raises:
        [`DataError`]: no rows, or no column `prompt`.
    """
    prompts = [_prompt(row, index, tokenizer) for index, row in enumerate(_mappings(rows))]
    if not prompts:
        raise DataError("There are no prompts.", expected="at least one row", found=0)
    prompt_ids = _ids(tokenizer, prompts)
    if not all(prompt_ids):
        raise DataError(
            f"The prompt of row {prompt_ids.index([])} has no tokens.",
            expected="a prompt that the tokenizer does not drop",
            found=repr(prompts[prompt_ids.index([])].text[:80]),
            remedy="drop the row",
        )
    # Prompts of like length share a batch, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda row: len(prompt_ids[row]))
    completions: list[list[int]] = [[] for _ in prompts]
    ends = set(end_token_ids(model, tokenizer))
    with _evaluation_mode(model), _greedy(model, tokenizer, max_new_tokens) as pad_id:
        for batch in _batches(order, batch_size):
            input_ids, mask = _pad([prompt_ids[row] for row in batch], pad_id, left=True, device=model.device)
            sequences = model.generate(input_ids=input_ids, attention_mask=mask)
            for row, sequence in zip(batch, sequences[:, input_ids.shape[1] :].tolist(), strict=True):
                end = next((place for place, token in enumerate(sequence) if token in ends), len(sequence))
                completions[row] = sequence[: end + 1]
    return list(zip(prompt_ids, completions, strict=True))


def completion_nll(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, *, batch_size: int = 64
) -> np.ndarray:
    """Negative log-likelihood of each row's own completion, in nats per token; shape (N,), float64.

    The completion's tokens are those of prompt and completion together, after the ones they share with the prompt
    alone; an end-of-text token is not counted. Average with `.mean()`.

    Args:
        model, tokenizer, rows, batch_size: as in [`score_rows`].

    Raises:
        [`DataError`]: as in [`score_rows`], or a completion without tokens.
    """
    sequences: list[list[int]] = []
    starts: list[int] = []
    texts = _texts(rows, tokenizer)
    prompts = [prompt for prompt, _ in texts]
    whole = [replace(prompt, text=prompt.text + completion) for prompt, completion in texts]
    for prompt_ids, whole_ids in zip(_ids(tokenizer, prompts), _ids(tokenizer, whole), strict=True):
        start = next(
            (i for i, (a, b) in enumerate(zip(prompt_ids, whole_ids, strict=False)) if a != b),
            min(len(prompt_ids), len(whole_ids)),
        )
        if not 0 < start < len(whole_ids):
            raise DataError(
                f"Row {len(starts)} has no tokens before, or none in, its completion.",
                found=f"{start} of {len(whole_ids)} tokens before the completion",
                remedy="give every row a prompt and a completion that the tokenizer does not drop",
            )
        sequences.append(whole_ids)
        starts.append(start)
    losses = np.empty(len(sequences), dtype=np.float64)
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
    with _evaluation_mode(model), torch.no_grad():
        for batch in _batches(order, batch_size):
            input_ids, mask = _pad([sequences[row] for row in batch], 0, left=False, device=model.device)
            logits = model(input_ids=input_ids, attention_mask=mask).logits
            for index, row in enumerate(batch):
                first, last = starts[row], len(sequences[row])
                log_probs = logits[index, first - 1 : last - 1].float().log_softmax(-1)
                chosen = log_probs.gather(1, input_ids[index, first:last, None])
                losses[row] = -float(chosen.double().mean())
    return losses


def check_scorable(tokenizer: PreTrainedTokenizerBase, rows: Rows, *, path: str | None = None) -> None:
    """Whether rows can be scored, before a model is loaded: prompts are rendered, and completions looked at.

    Args:
        tokenizer (`PreTrainedTokenizerBase`), rows (`Dataset` or `Sequence[Mapping]`): as in [`score_rows`].
        path (`str`, *optional*): named in errors.

    Raises:
        [`DataError`]: as in [`score_rows`], or a completion that is empty.
    """
    try:
        texts = _texts(rows, tokenizer)
    except DataError as cause:
        raise DataError(
            cause.message, path=cause.path or path, expected=cause.expected, found=cause.found, remedy=cause.remedy
        ) from cause
    for number, (_, completion) in enumerate(texts):
        if not completion:
            raise DataError(
                f"The completion of row {number} is empty.",
                path=path,
                expected="text to compare with",
                found="none",
                remedy="drop the row, or give it an answer",
            )


def _texts(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[tuple[RenderedPrompt, str]]:
    texts = []
    for index, row in enumerate(_mappings(rows)):
        prompt, completion = _prompt(row, index, tokenizer), _column(row, index, "completion")
        if not isinstance(completion, str):
            completion = "".join(message_text(message) for message in completion)
        # Stripped for the metric only: its leading space may belong to the completion's first token.
        texts.append((prompt, completion))
    if not texts:
        raise DataError("There are no rows to score.", expected="at least one row", found=0)
    return texts


def _prompt(row: Mapping[str, Any], index: int, tokenizer: PreTrainedTokenizerBase) -> RenderedPrompt:
    _column(row, index, "prompt")
    return render_prompt(tokenizer, row, index=index)


def _column(row: Mapping[str, Any], index: int, name: str) -> Any:
    if name not in row:
        raise DataError(f"Row {index} has no `{name}`.", expected=["prompt", "completion"], found=list(row))
    return row[name]


def _mappings(rows: Rows) -> Iterable[Mapping[str, Any]]:
    return cast(Iterable[Mapping[str, Any]], rows)


def _ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[RenderedPrompt]) -> list[list[int]]:
    texts = {kind: [prompt.text for prompt in prompts if prompt.templated == kind] for kind in (False, True)}
    # A rendered chat template holds its special tokens already.
    ids = {kind: iter(encode(tokenizer, texts[kind], special=not kind)) for kind in texts}
    return [next(ids[prompt.templated]) for prompt in prompts]


def _batches(order: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _pad(
    sequences: Sequence[Sequence[int]], pad_id: int, *, left: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for index, ids in enumerate(sequences):
        columns = slice(longest - len(ids), longest) if left else slice(0, len(ids))
        input_ids[index, columns] = torch.tensor(ids, dtype=torch.int64)
        mask[index, columns] = 1
    return input_ids.to(device), mask.to(device)


@contextlib.contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Iterator[int]:
    """Put a plain greedy generation config in the model's place for it, and give the token id to pad with.

    A config that is only passed to `generate` would be filled up from the model's own: temperatures, penalties.
    """
    own = model.generation_config
    ends = end_token_ids(model, tokenizer)
    pads = [*_as_ids(tokenizer.pad_token_id), *ends, 0]
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pads[0],
        bos_token_id=own.bos_token_id,
        use_cache=True,
    )
    # A PeftModel hands its own config, where it has one, to the base model in it.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    holders = [(holder, vars(holder)["generation_config"]) for holder in (model, base) if _holds_config(holder)]
    try:
        for holder, _ in holders:
            holder.generation_config = config
        yield pads[0]
    finally:
        for holder, previous in holders:
            holder.generation_config = previous


def _holds_config(model: torch.nn.Module) -> bool:
    return "generation_config" in vars(model)


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a completion."""
    return sorted({*_as_ids(model.generation_config.eos_token_id), *_as_ids(tokenizer.eos_token_id)})


def _as_ids(token_id: int | Iterable[int] | None) -> list[int]:
    if token_id is None:
        return []
    return [token_id] if isinstance(token_id, int) else list(token_id)
