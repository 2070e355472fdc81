"""From a row as people keep it to a prompt and a completion, both text or both chat messages.

| columns | prompt | completion |
|---|---|---|
| `prompt`, `completion` (or others that are named) | as it is | as it is |
| `messages` | all before the last turn of the assistant | that turn: the assistant's messages that end the list |
| `instruction`, `input` (may be missing), `output` | Alpaca's headings without its preamble | `output` |

`task` and `tools` stand beside any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Integral
from reprlib import Repr
from typing import Any

from ..documents import DocumentError, parse_json
from ..errors import DataError
from .reading import SourceRow, has_surrogate


PROMPT, COMPLETION, TASK, TOOLS = "prompt", "completion", "task", "tools"
MESSAGES, ALPACA = "messages", ("instruction", "input", "output")
MAX_DEPTH = 64
MAX_CHARACTERS = 2**24
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True)
class Example:
    """One row: text, or lists of messages (`{"role": ..., "content": ...}`), of which each content is text or None."""

    prompt: str | list[dict[str, Any]]
    completion: str | list[dict[str, Any]]
    task: str | None = None
    tools: list[dict[str, Any]] | None = None
    kept: str | None = None

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


@dataclass(frozen=True)
class RowShape:
    """Which columns hold a row, and how they become prompt and completion.

    Args:
        required (`tuple[str, ...]`): columns that every row has.
        optional (`tuple[str, ...]`): columns that are read where they are there.
        convert (`Callable`): a row to its prompt and completion.
        kept (`str`, *optional*): a further column, kept as text.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[SourceRow], tuple[Any, Any]]
    kept: str | None = None

    def read(self, row: SourceRow, *, allow_empty: bool = False) -> Example:
        """The row, checked.

        Args:
            allow_empty (`bool`, *optional*, defaults to `False`): whether a completion may be empty.

        Raises:
            [`DataError`]: something is missing, of the wrong kind, or empty.
        """
        for name in self.required:
            if row.values.get(name) is None:
                raise _refused(row, f"`{name}` of {row.place} is missing.", "text or messages in every row")
        prompt, completion = self.convert(row)
        example = Example(
            _value(row, PROMPT, prompt),
            _value(row, COMPLETION, completion),
            _task(row, row.values.get(TASK)),
            _tools(row, row.values.get(TOOLS)),
            _kept(row, self.kept),
        )
        if example.conversational == isinstance(example.completion, str):
            raise _refused(
                row,
                f"`{COMPLETION}` of {row.place} is not {'a list of messages' if example.conversational else 'text'}.",
                "prompt and completion both strings, or both lists of messages, in all rows",
                completion,
            )
        if is_blank(example.prompt) or (is_blank(example.completion) and not allow_empty):
            name = PROMPT if is_blank(example.prompt) else COMPLETION
            raise _refused(
                row,
                f"`{name}` of {row.place} is empty.",
                "text that is more than white space, in every row",
                remedy="drop the row" + ("" if name == PROMPT else ": there is nothing to learn from it"),
            )
        if example.tools is not None and not example.conversational:
            raise _refused(
                row,
                f"`{TOOLS}` of {row.place} has no place in a prompt that is text.",
                "tools only beside chat messages, whose template shows them",
                remedy="remove the column, or write the rows as messages",
            )
        return example


@dataclass(frozen=True)
class ColumnNames:
    """Names of the columns that hold prompt and completion, where they are not called so, and of one that is kept."""

    prompt: str | None = None
    completion: str | None = None
    keep: str | None = None

    def shape(self, names: Iterable[str]) -> RowShape:
        """The shape of rows with columns of these names.

        Raises:
            [`DataError`]: columns are missing.
        """
        known = list(names)
        shape = self._shape(known)
        if self.keep is None or self.keep not in known:
            return shape
        return replace(shape, optional=(*shape.optional, self.keep), kept=self.keep)

    def _shape(self, known: Sequence[str]) -> RowShape:
        if self.prompt is None and self.completion is None and not {PROMPT, COMPLETION} <= set(known):
            if MESSAGES in known:
                return RowShape((MESSAGES,), (TASK, TOOLS), _split_messages)
            if {ALPACA[0], ALPACA[2]} <= set(known):
                return RowShape((ALPACA[0], ALPACA[2]), (ALPACA[1], TASK, TOOLS), _alpaca)
        pair = (self.prompt or PROMPT, self.completion or COMPLETION)
        missing = [name for name in pair if name not in known]
        if missing:
            raise DataError(
                f"The rows have no column `{'` and no column `'.join(missing)}`.",
                expected="prompt and completion, or messages, or instruction and output; optional task and tools",
                found=", ".join(map(str, known))[:200] or "no columns",
                remedy="name them with --prompt_column and --completion_column, or rename them",
            )
        return RowShape(pair, (TASK, TOOLS), lambda row: (row.values[pair[0]], row.values[pair[1]]))

    def choose(self, names: Sequence[str]) -> list[str]:
        """Those of a table's columns that are read."""
        shape = self.shape(names)
        return [name for name in names if name in shape.required or name in shape.optional]


def is_blank(value: str | Sequence[Mapping[str, Any]]) -> bool:
    """Whether a prompt or a completion says nothing: no text but white space, and no call of a tool."""
    if isinstance(value, str):
        return not value.strip()
    return not any((message.get("content") or "").strip() or message.get("tool_calls") for message in value)


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message: its content, or the text of its parts.

    Raises:
        [`DataError`]: it is neither.
    """
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, Mapping) and _is_text_part(part) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(
            "The content of a message is no text.",
            expected='text, or parts {"type": "text", "text": ...}',
            found=f"{_SHORT.repr(content)} ({type(content).__name__})",
        )
    return "".join(map(str, texts))


def _is_text_part(part: Mapping[str, Any]) -> bool:
    return part.get("type", "text") == "text"


def _split_messages(row: SourceRow) -> tuple[Any, Any]:
    messages = _plain(row.values[MESSAGES])
    if not _are_messages(messages):
        raise _refused(row, f"`{MESSAGES}` of {row.place} is not a list of messages.", _MESSAGES, messages)
    start = len(messages)
    while start and messages[start - 1]["role"] == "assistant":
        start -= 1
    if start in (0, len(messages)):
        raise _refused(
            row,
            f"`{MESSAGES}` of {row.place} "
            + ("do not end with the assistant's turn." if start else "have nothing before the assistant's turn."),
            "messages of others, and then the assistant's, which is what is learned",
            [message["role"] for message in messages][-6:],
        )
    return messages[:start], messages[start:]


def _alpaca(row: SourceRow) -> tuple[Any, Any]:
    instruction, text, output = (row.values.get(name) for name in ALPACA)
    for name, value in zip(ALPACA, (instruction, text or "", output), strict=True):
        if not isinstance(value, str):
            raise _refused(row, f"`{name}` of {row.place} is not text.", "text", value)
    given = f"### Input:\n{text}\n\n" if text and text.strip() else ""
    return f"### Instruction:\n{instruction}\n\n{given}### Response:\n", output


_MESSAGES = 'a list of {"role": ..., "content": ...}'


def _plain(value: Any) -> Any:
    """Lists that pandas gives as numpy arrays."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, str) else value


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(item, Mapping) and isinstance(item.get("role"), str) for item in value)
        and all("content" in item for item in value)
    )


def _value(row: SourceRow, name: str, value: Any) -> Any:
    if isinstance(value, str):
        if len(value) > MAX_CHARACTERS:
            raise _refused(row, f"`{name}` of {row.place} is too long.", f"at most {MAX_CHARACTERS:,} characters")
        if has_surrogate(value):
            raise _refused(row, f"`{name}` of {row.place} holds half of a surrogate pair.", "valid Unicode", value)
        return str(value)
    value = _plain(value)
    if not _are_messages(value):
        raise _refused(
            row,
            f"`{name}` of {row.place} is neither text nor a list of messages.",
            f"text, or {_MESSAGES}",
            value,
            remedy="convert the column; digits must be quoted in JSON",
        )
    return [_message(row, name, message) for message in value]


def _message(row: SourceRow, name: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is text, or None beside calls of tools."""
    try:
        text = message_text(message)
    except DataError as error:
        raise _refused(row, f"A message in `{name}` of {row.place} is no text.", error.expected, message) from error
    content = None if message["content"] is None else text
    kept = {**_without_null({**message, "content": ""}), "content": content}
    if content is None and not kept.get("tool_calls"):
        raise _refused(row, f"A message in `{name}` of {row.place} has no content.", "text, or tool_calls", message)
    _check_json(row, name, kept)
    return kept


def _task(row: SourceRow, value: Any) -> str | None:
    if value is None or (isinstance(value, str) and not has_surrogate(value)):
        return None if value is None else str(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value))
    raise _refused(row, f"`{TASK}` of {row.place} is not text.", "text or a whole number, one task a row", value)


def _kept(row: SourceRow, name: str | None) -> str | None:
    value = None if name is None else row.values.get(name)
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, bool | int):
        return str(value)
    raise _refused(row, f"`{name}` of {row.place} is no name.", "text or a whole number", value)


def _tools(row: SourceRow, value: Any) -> list[dict[str, Any]] | None:
    """Schemas of tools, also as JSON text; an empty list is none."""
    if isinstance(value, str):
        with suppress(DocumentError):
            value = parse_json(value) if value.strip() else None
    value = _plain(value)
    if value is None or (isinstance(value, list) and not value):
        return None
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise _refused(row, f"`{TOOLS}` of {row.place} is not a list of tools.", "a list of JSON schemas", value)
    tools = [_without_null(item) for item in value]
    _check_json(row, TOOLS, tools)
    return tools


def _without_null(value: Any, depth: int = 0) -> Any:
    """Without keys that are null, which tables add where other rows have them; TRL drops them too."""
    if depth > MAX_DEPTH:
        return value
    if isinstance(value, Mapping):
        return {key: _without_null(item, depth + 1) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_null(item, depth + 1) for item in value]
    return value


def _check_json(row: SourceRow, name: str, value: Any, depth: int = 0) -> None:
    """Refuse what JSON text cannot hold as it is."""
    if isinstance(value, Mapping) and depth < MAX_DEPTH:
        for key, item in value.items():
            _check_json(row, name, key if isinstance(key, str) else object(), depth + 1)
            _check_json(row, name, item, depth + 1)
    elif isinstance(value, list) and depth < MAX_DEPTH:
        for item in value:
            _check_json(row, name, item, depth + 1)
    elif not (
        value is None
        or isinstance(value, bool)
        or (isinstance(value, str) and not has_surrogate(value))
        or (isinstance(value, int) and abs(value) < 2**63)
        or (isinstance(value, float) and abs(value) < float("inf"))
    ):
        raise _refused(
            row,
            f"`{name}` of {row.place} holds what JSON cannot hold.",
            f"text, finite numbers of 64 bits, true, false, null, lists and objects up to {MAX_DEPTH} deep",
            value,
        )


def _refused(
    row: SourceRow, message: str, expected: object, value: Any = None, *, remedy: str | None = None
) -> DataError:
    found = None if value is None else f"{_SHORT.repr(value)} ({type(value).__name__})"
    return DataError(message, path=row.path, expected=expected, found=found, remedy=remedy)


def check_same_kind(row: SourceRow, example: Example, first: Example) -> None:
    """Refuse a row of text among conversations, or the reverse.

    Raises:
        [`DataError`]
    """
    if example.conversational != first.conversational:
        raise _refused(
            row,
            f"`{PROMPT}` of {row.place} is not {'a list of messages' if first.conversational else 'text'}.",
            "prompt and completion both strings, or both lists of messages, in all rows",
            example.prompt,
        )
