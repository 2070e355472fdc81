"""What may be said in public: no token, no path of this machine, no name of a client."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from ..constants import REPORT_FOLDER, REPORT_NAME
from ..errors import UsageError
from ..files import parse_record, read_record
from ..schemas import FILES, Object


TOKEN = re.compile(rb"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")
_ABSOLUTE = re.compile(r"^(?:/|~[/\\]|[A-Za-z]:[/\\]|\\\\|file:)")
# Enough for the header of a safetensors file and the footer of a Parquet file, where text can hide.
_ENDS = 2**20
# Ids that the lab and these reports themselves give.
_NAMELESS = re.compile(r"(seen|mixture|unseen|other|client)[-_]\d+")
_FIGURE_WITH_NAMES = f"{REPORT_FOLDER}/pgr.png"


def public_files(files: Mapping[str, Path | bytes]) -> dict[str, Path | bytes]:
    """The same files, with local paths in JSON cut to their last part and clients of the report without names.

    Raises:
        [`UsageError`]: a token or a path of this machine is left in one of them.
    """
    public: dict[str, Path | bytes] = dict(files)
    nameless = True
    for name, content in files.items():
        if not name.endswith(".json"):
            continue
        data = read_public_json(name, content)
        shown = without_paths(data)
        if name == f"{REPORT_FOLDER}/{REPORT_NAME}":
            shown, nameless = without_client_names(shown)
        if shown != data:
            public[name] = (json.dumps(shown, indent=2) + "\n").encode()
    if not nameless:
        # The picture names each client at its line.
        public.pop(_FIGURE_WITH_NAMES, None)
    check_public(public)
    return public


def read_public_json(name: str, content: Path | bytes) -> dict[str, Any]:
    """A JSON file of a repository as the schema of its name asks.

    Raises:
        [`UsageError`]: it is damaged.
    """
    schema = FILES.get(name.rsplit("/", 1)[-1], Object)
    if isinstance(content, Path):
        return dict(read_record(content, schema, error=UsageError))
    return dict(parse_record(content, schema, path=name, error=UsageError))


def without_paths(value: Any) -> Any:
    """JSON with every absolute path cut to its last part: a base model keeps its name, the machine's folders go."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and _ABSOLUTE.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def without_client_names(report: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """A report whose clients are called by kind and number, and whether they already were."""
    clients = report.get("clients", [])
    if all(_NAMELESS.fullmatch(str(client["id"])) for client in clients):
        return report, True
    renamed = [
        {**client, "id": f"{client['kind']}-{number}", **({"task": "other"} if client["kind"] == "other" else {})}
        for number, client in enumerate(clients)
    ]
    return {**report, "clients": renamed}, False


def check_public(files: Mapping[str, Path | bytes]) -> None:
    """Raises [`UsageError`] where a file holds a token, or the home or temporary folder of this machine."""
    token = get_token()
    places = {str(Path.home()), tempfile.gettempdir()} - {"/", ""}
    machine = re.compile(b"|".join(rb"(?<![\w.-])" + re.escape(f"{place}/".encode()) for place in sorted(places)))
    for name, content in files.items():
        ends = _both_ends(content)
        found = "a path of this machine" if machine.search(ends) else None
        if TOKEN.search(ends) or (token and token.encode() in ends):
            found = "an access token"
        if found is not None:
            raise UsageError(
                f"{name} would publish {found}.",
                expected="files without tokens and without paths of this machine",
                remedy=f"take it out of {name}, and revoke a token that was written down",
            )


def _both_ends(content: Path | bytes) -> bytes:
    if isinstance(content, bytes):
        return content
    with open(content, "rb") as file:
        start = file.read(_ENDS)
        file.seek(max(len(start), content.stat().st_size - _ENDS))
        return start + b"\0" + file.read()
