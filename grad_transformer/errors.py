"""Typed errors. Each names where it happened, what was expected, what was found, and how to mend it."""

from __future__ import annotations

from pathlib import Path

from .wording import printable


_INDENT = 12


class GradTransformerError(ValueError):
    """Base class of every error that a user of this library can cause and mend.

    Args:
        message (`str`): one sentence that says what is wrong.
        path (`str` or `Path`, *optional*): the file, folder or repository concerned.
        expected, found (`object`, *optional*): what the library needs and what it met.
        remedy (`str`, *optional*): what to do about it.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ):
        self.message = message
        self.path = None if path is None else str(path)
        self.expected = expected
        self.found = found
        self.remedy = remedy
        super().__init__(self._render())

    def _render(self) -> str:
        fields = (("path", self.path), ("expected", self.expected), ("found", self.found), ("remedy", self.remedy))
        lines = [("", self.message), *((f"  {name + ':':<10}", value) for name, value in fields if value is not None)]
        # A line break in foreign text must not begin what looks like another field.
        return "\n".join(label + printable(value).replace("\n", "\n" + " " * _INDENT) for label, value in lines)

    def to_dict(self) -> dict[str, str | None]:
        """The same facts for machines (`--json`)."""
        return {
            "error": type(self).__name__,
            "message": self.message,
            "path": self.path,
            "expected": None if self.expected is None else str(self.expected),
            "found": None if self.found is None else str(self.found),
            "remedy": self.remedy,
        }


class AdapterFormatError(GradTransformerError):
    """An adapter folder is unreadable, unsafe, or holds something that a block sequence cannot represent."""


class LayoutMismatchError(GradTransformerError):
    """An adapter, or a block sequence, does not have the layout that it must have."""


class RootMismatchError(GradTransformerError):
    """An adapter was not fine-tuned from the root that its delta is measured against."""


class BaseModelMismatchError(GradTransformerError):
    """An adapter, root or recipe belongs to another base model."""


class FormatVersionError(GradTransformerError):
    """An artifact was written in a newer format than this version reads."""


class IncompleteArtifactError(GradTransformerError):
    """A folder lacks the manifest that says that it is whole."""


class PlanError(GradTransformerError):
    """A shadow plan cannot be made from, or run on, what was given."""


class DeltaDatasetError(GradTransformerError):
    """A delta dataset cannot be built or read."""


class RecipeError(GradTransformerError):
    """A fine-tuning recipe is inconsistent, or asks for what the chosen engine cannot do."""


class DataError(GradTransformerError):
    """Rows of text are missing, empty, or lack the columns they need."""


class UsageError(GradTransformerError):
    """A command or function was called with arguments that do not fit together."""


class OutputError(UsageError):
    """A result cannot be written where it was asked for, or not now."""


class WorkerLostError(GradTransformerError):
    """Processes or machines that do shadow runs were lost again and again on the same runs."""


class HubError(UsageError):
    """A repository on the Hub cannot be found, reached, read or written as asked."""
