"""Say what a folder or a Hub repository holds, and its facts.

    grad-transformer inspect path/to/adapter
    grad-transformer inspect acme/qwen2.5-3b-to-7b --revision v1.0 --json

It knows PEFT adapters (block by block), roots, shadow plans and their runs, delta datasets, mappers, delta tokenizers
and reports, each by its manifest. Adapters and roots are read and checked in full; of the others the manifest is read.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..constants import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_METADATA_NAME,
    ADAPTER_WEIGHTS_NAME,
    DELTA_DATASET_NAME,
    PLAN_NAME,
    REPORT_NAME,
    ROOT_FOLDER,
    ROOT_NAME,
    RUNS_FOLDER,
    SOURCE_FOLDER,
    TARGET_FOLDER,
    TOKENIZER_NAME,
)
from ..errors import IncompleteArtifactError
from ._common import CommandParser, CommandResult, format_table


if TYPE_CHECKING:
    from ..adapters import LoraAdapter


CONFIG_NAME = "config.json"
MODEL_TYPE = "grad_transformer"

# Each kind of folder by the manifest that says that it is whole; the first that is there decides.
MANIFESTS = {
    ROOT_NAME: "root",
    ADAPTER_CONFIG_NAME: "adapter",
    DELTA_DATASET_NAME: "delta dataset",
    CONFIG_NAME: "mapper",
    TOKENIZER_NAME: "delta tokenizer",
    PLAN_NAME: "shadow plan",
    REPORT_NAME: "report",
}


@dataclass(frozen=True)
class InspectArguments:
    """Arguments of `grad-transformer inspect`."""

    path: str = field(metadata={"help": "Folder, or id of a repository on the Hub.", "positional": True})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the repository."})


def make_parser() -> CommandParser:
    return CommandParser(InspectArguments, command="inspect", description=__doc__)


def main(args: InspectArguments) -> CommandResult:
    from ..adapters import LoraAdapter, Root
    from ..adapters.io import read_record, resolve_folder
    from ..schemas import FILES

    wanted = (*MANIFESTS, ADAPTER_WEIGHTS_NAME, ADAPTER_METADATA_NAME)
    folder = resolve_folder(args.path, allow_patterns=wanted, revision=args.revision)
    kind, manifest_name = find_kind(folder)
    manifest = read_record(folder / manifest_name, FILES[manifest_name]) if manifest_name else {}
    if kind == "mapper" and manifest.get("model_type") != MODEL_TYPE:
        raise IncompleteArtifactError(
            "The folder holds a model that is not a mapper.",
            path=folder / manifest_name,
            expected=f"model_type {MODEL_TYPE}",
            found=manifest.get("model_type"),
            remedy="transformers and its Auto classes read it",
        )
    if kind == "root":
        root = Root.from_pretrained(folder)
        facts = {**root.facts(), "seed": root.seed, **adapter_facts(root.adapter)}
    elif kind == "adapter":
        facts = adapter_facts(LoraAdapter.from_pretrained(folder))
    else:
        facts = {**manifest_facts(manifest), **folder_facts(folder)}
    data = {"kind": kind, "path": args.path, **facts}
    return CommandResult(data, render(data))


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
    inside = sorted(path.name for path in folder.iterdir())
    raise IncompleteArtifactError(
        "The folder holds none of the artifacts that this library writes.",
        path=folder,
        expected=f"one of {', '.join(MANIFESTS)}",
        found=", ".join(inside[:8]) + (", ..." if len(inside) > 8 else "") if inside else "an empty folder",
        remedy="manifests are written last: if a command was killed before its end, run it again",
    )


def adapter_facts(adapter: LoraAdapter) -> dict[str, Any]:
    """Facts of an adapter, with one entry per block."""
    blocks = []
    for block in adapter.layout.blocks:
        tensors = [adapter.tensors[spec.key] for spec in block.tensors]
        blocks.append(
            {
                "name": block.name,
                "tensors": len(tensors),
                "width": block.width,
                "rank": sorted({spec.shape[0] for spec in block.tensors if spec.side == "A"}),
                "scaling": sorted({spec.scaling for spec in block.tensors}),
                "dtype": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
                "norm": sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5,
            }
        )
    targets = adapter.config.get("target_modules")
    return {
        "base_model": adapter.base_model,
        "target_modules": sorted(targets) if isinstance(targets, list | set) else targets,
        "numel": adapter.layout.numel,
        "norm": sum(block["norm"] ** 2 for block in blocks) ** 0.5,
        "metadata": adapter.metadata,
        "blocks": blocks,
    }


def manifest_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says in single values; of lists and objects inside it, how many entries they have."""
    facts: dict[str, Any] = {}
    for key, value in manifest.items():
        if isinstance(value, list | dict):
            small = len(value) <= 8 and not any(isinstance(item, list | dict) for item in _items(value))
            facts[key] = value if small else f"{len(value)} entries"
        else:
            facts[key] = value
    return facts


def folder_facts(folder: Path) -> dict[str, Any]:
    """Which parts of a larger artifact are there, and how many files of runs."""
    runs_folder = folder / RUNS_FOLDER if (folder / RUNS_FOLDER).is_dir() else folder
    runs = collections.Counter(
        str(path.parent.relative_to(folder)) for path in runs_folder.rglob("*.safetensors") if _is_run(path, folder)
    )
    parts = [name for name in (SOURCE_FOLDER, TARGET_FOLDER, ROOT_FOLDER, RUNS_FOLDER) if (folder / name).is_dir()]
    return {"parts": parts, "runs": dict(sorted(runs.items()))}


def _is_run(path: Path, folder: Path) -> bool:
    """Runs lie in the runs folder, or in a folder that has no manifest; hidden files are not whole."""
    bare = not any((folder / name).is_file() for name in MANIFESTS)
    return not path.name.startswith(".") and (bare or RUNS_FOLDER in path.relative_to(folder).parts)


def _items(value: list[Any] | dict[str, Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def render(data: Mapping[str, Any]) -> str:
    """The facts as lines, and the blocks of an adapter as a table."""
    blocks = data.get("blocks") if data.get("kind") in ("adapter", "root") else None
    lines = {key: value for key, value in data.items() if value is not blocks and value not in (None, [], {})}
    width = max(map(len, lines))
    text = "\n".join(f"{key:<{width}}  {_render_value(value)}" for key, value in lines.items())
    if not blocks:
        return text
    headers = ["block", "tensors", "width", "rank", "scaling", "dtype", "norm"]
    rows = [[block["name"], *(_render_value(block[header]) for header in headers[1:])] for block in blocks]
    return f"{text}\n\n{format_table(headers, rows)}"


def _render_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_render_value(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_render_value(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
