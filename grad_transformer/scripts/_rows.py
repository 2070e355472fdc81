"""Flags of the commands that read rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class RowFlags:
    """Names of the columns that hold prompt and completion, as `load_rows` takes them."""

    _argument_group_name = "columns of the rows"

    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the prompts; default: prompt, messages, or instruction and input."}
    )
    completion_column: str | None = field(
        default=None, metadata={"help": "Column of the completions; default: completion, messages, or output."}
    )

    def arguments(self) -> dict[str, Any]:
        """As `load_rows` and `RowSource` take them."""
        return asdict(self)
