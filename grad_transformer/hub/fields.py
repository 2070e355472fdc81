"""JSON whose fields are read by type, and text from elsewhere on a page of ours: as letters, never as markup."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..wording import in_ascii
from .origins import Origin


_WORD = re.compile(r"[A-Za-z0-9_][\w.+-]{0,63}", re.ASCII)
# What markdown, HTML, YAML, a table or a terminal would take for more than a letter; marks that turn text around.
_NO_LETTER = re.compile(r"[^\w .,:;+=@/()%-]")
MAX_SHOWN = 100


@dataclass(frozen=True)
class Fields:
    """A JSON object from a file, each of whose fields is asked for by its type; a field that is missing is `None`.

    Args:
        data (`Mapping[str, Any]`): the object.
        where (`str`): file and place in it, for messages.
    """

    data: Mapping[str, Any]
    where: str

    def has(self, name: str) -> bool:
        return self.data.get(name) is not None

    def child(self, name: str) -> Fields:
        """An object; an empty one where there is none."""
        value = self._typed(name, Mapping, "an object")
        return Fields({} if value is None else value, self._below(name))

    def children(self, name: str) -> list[Fields]:
        """A list of objects."""
        where = self._below(name)
        items = self._typed(name, list, "a list of objects") or []
        for item in items:
            if not isinstance(item, Mapping):
                raise self._wrong(name, "a list of objects", item)
        return [Fields(item, f"{where}[{number}]") for number, item in enumerate(items)]

    def items(self, name: str) -> list[Any]:
        """A list of anything."""
        return self._typed(name, list, "a list") or []

    def numbers(self, name: str) -> list[float]:
        """A list of finite numbers."""
        listed = Fields({str(number): value for number, value in enumerate(self.items(name))}, self._below(name))
        found = [listed.number(key) for key in listed.data]
        return [value for value in found if value is not None]

    def number(self, name: str) -> float | None:
        """A finite number of a size that can be shown."""
        value = self.data.get(name)
        if value is None:
            return None
        # Also refuses NaN, and integers beyond float's range.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e15:
            raise self._wrong(name, "a finite number", value)
        return float(value)

    def count(self, name: str) -> int | None:
        """A whole number, not below 0."""
        value = self.number(name)
        if value is not None and (value < 0 or value != int(value)):
            raise self._wrong(name, "a whole number, not below 0", value)
        return None if value is None else int(value)

    def text(self, name: str) -> str | None:
        """Any text: to be shown with [`code`] alone."""
        return self._typed(name, str, "text")

    def word(self, name: str) -> str | None:
        """One word of letters, digits and `_ . + -`."""
        value = self.text(name)
        if value is not None and not _WORD.fullmatch(value):
            raise self._wrong(name, "one word", value)
        return value

    def words(self) -> list[str]:
        """The names of all fields, each of them one word."""
        for name in self.data:
            if not isinstance(name, str) or not _WORD.fullmatch(name):
                raise self._wrong("", "names of one word", name)
        return list(self.data)

    def origin(self) -> Origin | None:
        """The object as an origin on the Hub, `None` where it names no repository."""
        return Origin.from_dict(self.data) if self.has("repo_id") else None

    def _typed(self, name: str, kind: Any, expected: str) -> Any:
        value = self.data.get(name)
        if value is not None and not isinstance(value, kind):
            raise self._wrong(name, expected, value)
        return value

    def _below(self, name: str) -> str:
        return f"{self.where}: {name}" if ": " not in self.where else f"{self.where}.{name}"

    def _wrong(self, name: str, expected: str, value: object) -> UsageError:
        shown = in_ascii(value, 80) if isinstance(value, str | int | float) else type(value).__name__
        return UsageError(
            "A field of a file that would be published is malformed.",
            path=self._below(name) if name else self.where,
            expected=expected,
            found=shown,
            remedy="write the file again with this library",
        )


def code(value: object, *, limit: int = MAX_SHOWN) -> str:
    """Text from elsewhere as a code span: one line, no markup, nothing invisible, of limited length."""
    text = _NO_LETTER.sub("_", " ".join(str(value).split()))
    return f"`{text if len(text) <= limit else text[: limit - 1] + '…'}`" if text else "`_`"
