"""Prompts and rows as token ids: what is trained on, asked and scored goes through the same functions.

A tokenizer may put an end token after every text (`add_eos_token`): no prompt is asked after it, and a completion ends
in one of them. Chat templates run in transformers' sandbox alone; what one refuses is an error that names the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import DataError
from ..wording import describe_error
from .columns import COMPLETION, PROMPT, TOOLS


logger = logging.get_logger(__name__)

IGNORED_LABEL = -100
_ROWS_AT_ONCE = 1_000
# What a template can raise: by itself, by what it does with the row, and by the sandbox's limits.
_TEMPLATE_ERRORS = (
    *(TemplateError, ArithmeticError, AttributeError, ImportError, LookupError, MemoryError),
    *(NotImplementedError, RecursionError, TypeError, ValueError),
)


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as text, and whether a chat template made it, which then holds its special tokens already."""

    text: str
    templated: bool


@dataclass
class TokenCounts:
    """What tokenised rows are like.

    Args:
        rows (`int`): how many there are.
        truncated (`int`): how many lose their end to `max_length`.
        longest (`int`): tokens of the longest, before that.
        largest_id, row_of_largest_id (`int`): the largest of all token ids, and the first row that has it.
    """

    rows: int = 0
    truncated: int = 0
    longest: int = 0
    largest_id: int = -1
    row_of_largest_id: int = -1


def tokenize_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Token ids and labels as TRL's `SFTTrainer` makes them: loss on the completion alone.

    A string completion ends in the tokenizer's end token, once; messages go through the chat template, with the row's
    `tools`. The completion begins where the tokens of the prompt and those of prompt plus completion part. The first
    token never has a label, since nothing predicts it.

    Args:
        rows (`datasets.Dataset`): columns `prompt`, `completion`, optionally `tools`; see [`load_rows`].
        tokenizer (`PreTrainedTokenizerBase`): the base model's.
        max_length (`int`): longer sequences lose their end.

    Returns:
        `datasets.Dataset` of the same length and order: `input_ids`, `labels` (-100 where there is no loss).

    Raises:
        [`DataError`]: a row that the chat template refuses, or whose prompt alone fills `max_length`; a tokenizer
            without end token or chat template.
    """
    kind = pa.list_(pa.int32())
    batches = [
        pa.RecordBatch.from_pydict({"input_ids": pa.array(ids, kind), "labels": pa.array(labels, kind)})
        for ids, labels in _batches(rows, tokenizer, max_length, TokenCounts())
    ]
    return Dataset(pa.Table.from_batches(batches), fingerprint=generate_random_fingerprint())


def count_tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenCounts:
    """Check all rows as [`tokenize_rows`] does, and keep no more than counts; arguments and errors as there."""
    counts = TokenCounts()
    for _ in _batches(rows, tokenizer, max_length, counts):
        pass
    return counts


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """Token ids of texts that are to go on: with what the tokenizer puts before a text, without what it puts after it.

    Args:
        special (`bool`, *optional*, defaults to `True`): false for text that holds its special tokens.
    """
    if not texts:
        return []
    rows = tokenizer(list(texts), add_special_tokens=special)["input_ids"]
    end = _appended(tokenizer) if special else 0
    return [ids[: len(ids) - end] for ids in rows] if end else rows


def render_prompt(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], *, index: int) -> RenderedPrompt:
    """The prompt of a row: its text, or its messages by the chat template, up to where the assistant speaks.

    Args:
        index (`int`): the row's number, for messages.

    Raises:
        [`DataError`]: no chat template, or one that refuses the row.
    """
    prompt = row[PROMPT]
    if isinstance(prompt, str):
        return RenderedPrompt(prompt, templated=False)
    return RenderedPrompt(
        _render(tokenizer, prompt, row.get(TOOLS), index, add_generation_prompt=True), templated=True
    )


def _batches(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, counts: TokenCounts
) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
    """Token ids and labels, some rows at a time; `counts` grows with them."""
    columns = [name for name in (PROMPT, COMPLETION, TOOLS) if name in rows.column_names]
    for batch in rows.select_columns(columns).iter(batch_size=_ROWS_AT_ONCE):
        first = counts.rows
        tools = batch.get(TOOLS) or [None] * len(batch[PROMPT])
        if isinstance(batch[PROMPT][0], str):
            prompt_ids, full_ids = _tokenize_texts(batch[PROMPT], batch[COMPLETION], tokenizer)
        else:
            prompt_ids, full_ids = _tokenize_conversations(batch[PROMPT], batch[COMPLETION], tools, tokenizer, first)
        labels = []
        for index, (prompt, full) in enumerate(zip(prompt_ids, full_ids, strict=True), start=first):
            labels.append(_labels(prompt, full, max_length, index))
            counts.truncated += len(full) > max_length
            counts.longest = max(counts.longest, len(full))
            if max(full) > counts.largest_id:
                counts.largest_id, counts.row_of_largest_id = max(full), index
        counts.rows += len(labels)
        yield [ids[:max_length] for ids in full_ids], labels


def _labels(prompt: Sequence[int], full: Sequence[int], max_length: int, index: int) -> list[int]:
    start = _common_prefix(prompt, full)
    if start < len(prompt):
        logger.warning_once(
            "The tokens of a prompt are not the first tokens of prompt and completion together; its completion is "
            "taken to begin where they part. End prompts where a token ends. (This is said once.)"
        )
    ids = full[:max_length]
    labels = ([IGNORED_LABEL] * max(start, 1) + list(ids[max(start, 1) :]))[: len(ids)]
    if all(label == IGNORED_LABEL for label in labels):
        raise DataError(
            f"Row {index} has no token to learn from within `max_length`.",
            expected=f"a prompt shorter than {max_length} tokens, and a completion",
            found=f"a prompt of {start} tokens, {len(full) - start} tokens of completion",
            remedy="raise max_length in the recipe, shorten the prompt, or drop the row",
        )
    return labels


def _tokenize_texts(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[list[int]]]:
    end = tokenizer.eos_token
    if not end:
        raise DataError(
            "The tokenizer has no end token, so a model could not learn where completions end.",
            path=tokenizer.name_or_path,
            expected="an eos_token",
            remedy="set tokenizer.eos_token and save the tokenizer beside the base model",
        )
    texts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        while completion.endswith(end):
            completion = completion.removesuffix(end)
        texts.append(prompt + completion + end)
    full_ids = [
        ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
        for ids in encode(tokenizer, texts)
    ]
    return encode(tokenizer, prompts), full_ids


def _tokenize_conversations(
    prompts: Sequence[list[Any]],
    completions: Sequence[list[Any]],
    tools: Sequence[list[Any] | None],
    tokenizer: PreTrainedTokenizerBase,
    first_index: int,
) -> tuple[list[list[int]], list[list[int]]]:
    rendered: list[tuple[str, str]] = []
    for index, (prompt, completion, offered) in enumerate(zip(prompts, completions, tools, strict=True), first_index):
        asked = _render(tokenizer, prompt, offered, index, add_generation_prompt=True)
        full = _render(tokenizer, prompt + completion, offered, index)
        _check_shown(tokenizer, prompt + completion, offered, index, full)
        rendered.append((asked, full))
    return (
        encode(tokenizer, [prompt for prompt, _ in rendered], special=False),
        encode(tokenizer, [full for _, full in rendered], special=False),
    )


def _check_shown(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    index: int,
    rendered: str,
) -> None:
    """Refuse tools, and calls of them, that the chat template drops without a word."""
    without_calls = [{key: value for key, value in m.items() if key != "tool_calls"} for m in messages]
    calls = any(message.get("tool_calls") for message in messages)
    lost = None
    if tools and rendered == _render(tokenizer, messages, None, index):
        lost = TOOLS
    elif calls and rendered == _render(tokenizer, without_calls, tools, index):
        lost = "tool_calls"
    if lost is not None:
        raise DataError(
            f"The chat template does not show the `{lost}` of row {index}.",
            path=tokenizer.name_or_path,
            expected=f"a chat template with a place for `{lost}`",
            found="the same text with and without them",
            remedy=f"remove `{lost}` from the rows, or use a base model whose template shows them",
        )


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    index: int,
    *,
    add_generation_prompt: bool = False,
) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            "The rows are conversations, but the tokenizer has no chat template.",
            path=tokenizer.name_or_path,
            expected="a tokenizer with a chat_template",
            remedy="use an instruction-tuned base model, or rows of plain text",
        )
    template: Callable[..., str] = tokenizer.apply_chat_template
    try:
        return template(
            list(messages), tools=tools or None, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except _TEMPLATE_ERRORS as cause:
        raise DataError(
            f"The chat template of the base model refuses row {index}.",
            path=tokenizer.name_or_path,
            expected=f"messages that it can render (roles here: {', '.join(str(m.get('role')) for m in messages)})",
            found=describe_error(cause),
            remedy="change or drop the row, or use another base model",
        ) from cause


def _appended(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the tokenizer puts after every text."""
    for text in ("a", "1", "?"):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(text)["input_ids"]
        for start in range(len(whole) - len(plain) + 1 if plain else 0):
            if whole[start : start + len(plain)] == plain:
                return len(whole) - start - len(plain)
    return 0


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    length = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        length += 1
    return length
