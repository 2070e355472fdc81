"""Say what a folder or a Hub repository holds, how good it is, and what to do with it.

    grad-transformer inspect path/to/adapter
    grad-transformer inspect acme/qwen2.5-3b-to-7b --revision v1.0 --json

It knows PEFT adapters (block by block), roots, shadow plans and their runs, delta datasets, mappers, delta tokenizers,
reports, demos, studies and base models, each by its manifest. Adapters and roots are read and checked in full; of the
others the manifest is read.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..constants import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_METADATA_NAME,
    ADAPTER_WEIGHTS_NAME,
    DELTA_DATASET_NAME,
    DEMO_NAME,
    HELDOUT_NAME,
    PLAN_NAME,
    REPORT_NAME,
    ROOT_FOLDER,
    ROOT_NAME,
    RUNS_FOLDER,
    SOURCE_FOLDER,
    STUDY_NAME,
    TARGET_FOLDER,
    TOKENIZER_NAME,
)
from ..errors import IncompleteArtifactError
from ..registration import MODEL_TYPE
from ..wording import one_line
from ._common import CommandParser, CommandResult, format_table


if TYPE_CHECKING:
    from ._inspection import Inspection

CONFIG_NAME = "config.json"
WIDTH = 100

# Each kind of folder by the manifest that says that it is whole; the first that is there decides.
MANIFESTS = {
    ROOT_NAME: "root",
    ADAPTER_CONFIG_NAME: "adapter",
    DELTA_DATASET_NAME: "delta dataset",
    CONFIG_NAME: "mapper",
    TOKENIZER_NAME: "delta tokenizer",
    PLAN_NAME: "shadow plan",
    STUDY_NAME: "study",
    REPORT_NAME: "report",
    DEMO_NAME: "demo",
}


@dataclass(frozen=True)
class InspectArguments:
    """Arguments of `grad-transformer inspect`."""

    path: str = field(metadata={"help": "Folder, or id of a repository on the Hub.", "positional": True})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the repository."})


def make_parser() -> CommandParser:
    return CommandParser(InspectArguments, command="inspect", description=__doc__)


def main(args: InspectArguments) -> CommandResult:
    from ..adapters.io import read_record, resolve_folder
    from ..schemas import FILES
    from ._inspection import inspect_folder

    roots = [f"{role}/{ROOT_FOLDER}/{ROOT_NAME}" for role in (SOURCE_FOLDER, TARGET_FOLDER)]
    wanted = (*MANIFESTS, ADAPTER_WEIGHTS_NAME, ADAPTER_METADATA_NAME, HELDOUT_NAME, *roots)
    folder = resolve_folder(args.path, allow_patterns=wanted, revision=args.revision)
    kind, manifest_name = find_kind(folder)
    manifest = read_record(folder / manifest_name, FILES[manifest_name]) if manifest_name else {}
    if kind == "mapper" and manifest.get("model_type") != MODEL_TYPE:
        kind = "base model"
    found = inspect_folder(kind, folder, manifest, args.path)
    # What the folder says comes first, so that it cannot pass for what we found.
    data = {**found.facts, "kind": kind, "path": args.path, "next": found.next_step}
    return CommandResult(data, render(args.path, kind, found))


def find_kind(folder: Path) -> tuple[str, str]:
    """The kind of a folder and the name of its manifest, which is empty for a bare folder of shadow runs.

    Raises:
        [`IncompleteArtifactError`]: nothing in it is a manifest.
    """
    for name, kind in MANIFESTS.items():
        if (folder / name).is_file():
            return kind, name
    if list(folder.glob("*.safetensors")) or (folder / RUNS_FOLDER).is_dir():
        return "shadow runs", ""
    inside = sorted(one_line(path.name, 40) for path in folder.iterdir())
    raise IncompleteArtifactError(
        "The folder holds none of the artifacts that this library writes.",
        path=folder,
        expected=f"one of {', '.join(MANIFESTS)}",
        found=", ".join(inside[:8]) + (", ..." if len(inside) > 8 else "") if inside else "an empty folder",
        remedy="name the folder that plan, build, train, client, generate or evaluate wrote; manifests are written "
        "last: if a command was killed before its end, run it again",
    )


def render(path: str, kind: str, found: Inspection) -> str:
    """Sentences, the blocks of an adapter as a table, and what to do next."""
    parts = [f"{one_line(path)}: {kind}", "\n".join(_wrapped(sentence) for sentence in found.sentences)]
    blocks: list[Mapping[str, Any]] = found.facts["blocks"] if kind in ("adapter", "root") else []
    if blocks:
        headers = ["block", "tensors", "width", "rank", "scaling", "dtype", "norm"]
        rows = [[one_line(block["name"], 40), *(_cell(block[header]) for header in headers[1:])] for block in blocks]
        parts += ["", format_table(headers, rows), ""]
    if found.next_step is not None:
        parts.append(f"Next: {found.next_step}")
    return "\n".join(parts)


def _wrapped(text: str) -> str:
    """A sentence in lines; what has lines already stays as it is."""
    if "\n" in text:
        return text
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
