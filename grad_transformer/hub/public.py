"""What may be said in public: no token, no path of this machine, no name of a client."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..constants import REPORT_FOLDER, REPORT_NAME
from ..errors import UsageError
from ..files import parse_record, read_json
from ..schemas import FILES, Object
from .fields import Fields
from .scan import find_private, find_private_in_file, texts_in


# A text that is a path as a whole: of it the last part stays.
_WHOLE_PATH = re.compile(r"(?:/|~[/\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|file:)[^\n]*")
# Relative paths look like ids of the Hub, but for their depth; these fields hold one or the other.
_PLACE = re.compile(r"(?:path|model|file|dir|folder|data)$")
_DEEP_PATH = re.compile(r"[\w.+@ -]+(?:[/\\][\w.+@ -]+){2,}")
# What clients are called in a report that may be published.
_NAMELESS = re.compile(r"(?:seen|mixture|unseen|other)-\d+")


def public_files(files: Mapping[str, Path | bytes]) -> dict[str, Path | bytes]:
    """The same files, with local paths in JSON cut to their last part.

    Raises:
        [`UsageError`]: a token, a signed address or a local path is left in one of them; a report names clients; a
            file cannot be read.
    """
    public: dict[str, Path | bytes] = dict(files)
    for name, content in files.items():
        if name.endswith(".json"):
            data = read_public_json(name, content)
            shown = without_paths(data)
            found = next((found for text in texts_in(shown) if (found := find_private(text))), None)
            if shown != data:
                public[name] = (json.dumps(shown, indent=2, allow_nan=False) + "\n").encode()
            if name == f"{REPORT_FOLDER}/{REPORT_NAME}":
                _check_nameless(shown, name)
        else:
            found = find_private_in_file(name, content)
        if found is not None:
            raise UsageError(
                f"{name} would publish {found}.",
                expected="files without tokens, signed addresses and paths of this machine",
                remedy=f"take it out of {name}, and revoke a token that was written down",
            )
    return public


def read_public_json(name: str, content: Path | bytes) -> dict[str, Any]:
    """A JSON file of a repository as the schema of its name asks.

    Raises:
        [`UsageError`]: it is damaged.
    """
    if isinstance(content, Path):
        return read_json(content, error=UsageError)
    schema = FILES.get(name.rsplit("/", 1)[-1], Object)
    return dict(parse_record(content, schema, path=name, error=UsageError))


def without_paths(value: Any, *, is_place: bool = False) -> Any:
    """JSON with every local path cut to its last part: a base model keeps its name, the machine's folders go."""
    if isinstance(value, dict):
        return {key: without_paths(item, is_place=_PLACE.search(key) is not None) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, is_place=is_place) for item in value]
    if isinstance(value, str) and (_WHOLE_PATH.fullmatch(value) or (is_place and _DEEP_PATH.fullmatch(value))):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _check_nameless(report: Any, name: str) -> None:
    """The pictures beside it were drawn from the same report."""
    for client in Fields(report if isinstance(report, dict) else {}, name).children("clients"):
        if not _NAMELESS.fullmatch(client.text("id") or ""):
            raise UsageError(
                "The report names its clients.",
                path=name,
                expected="clients by kind and number",
                remedy="publish what `grad_transformer.evaluation.public.public_report` makes of it",
            )
