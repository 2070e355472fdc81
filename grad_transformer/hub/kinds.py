"""The four kinds of repositories: their manifest, and every file that belongs to them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ..constants import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_METADATA_NAME,
    ADAPTER_WEIGHTS_NAME,
    CARD_NAME,
    DELTA_DATASET_NAME,
    HELDOUT_NAME,
    ORIGIN_NAME,
    PLAN_NAME,
    REPORT_FOLDER,
    REPORT_NAME,
    ROOT_FOLDER,
    ROOT_NAME,
    SHIFT_NAME,
    SHIFT_TENSORS_NAME,
    SOURCE_FOLDER,
    TARGET_FOLDER,
    TOKENIZER_NAME,
    TOKENIZER_STATISTICS_NAME,
    TRAINING_LOG_NAME,
)
from ..errors import IncompleteArtifactError, UsageError
from ..files import read_record
from ..schemas import AdapterMetadataRecord, ModelConfigRecord
from .repos import check_allowed


ADAPTER_FILES = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, ADAPTER_METADATA_NAME)
ROOT_FILES = (*ADAPTER_FILES, ROOT_NAME)
TOKENIZER_FILES = (
    TOKENIZER_NAME,
    TOKENIZER_STATISTICS_NAME,
    *(f"{ROOT_FOLDER}/{name}" for name in ROOT_FILES),
)
EVAL_RESULTS_NAME = ".eval_results/grad_transformer.yaml"


def _below(folder: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


@dataclass(frozen=True)
class RepoKind:
    """What a repository of one kind holds.

    Args:
        name (`str`): as the command line calls it.
        repo_type (`str`): `model` or `dataset`.
        manifest (`str`): the file that carries the format version and says that the rest is whole.
        patterns (`tuple[str, ...]`): every public file.
        private (`bool`): whether a new repository is private unless it is said otherwise.
    """

    name: str
    repo_type: str
    manifest: str
    patterns: tuple[str, ...]
    private: bool = False

    def owns(self, name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in self.patterns)


KINDS = {
    kind.name: kind
    for kind in (
        RepoKind(
            "delta_dataset",
            "dataset",
            DELTA_DATASET_NAME,
            (
                CARD_NAME,
                DELTA_DATASET_NAME,
                PLAN_NAME,
                "data/*-*-of-*.parquet",
                *_below("source_root", ROOT_FILES),
                *_below("target_root", ROOT_FILES),
            ),
        ),
        RepoKind(
            "mapper",
            "model",
            "config.json",
            (
                CARD_NAME,
                "config.json",
                "model.safetensors",
                "model-*-of-*.safetensors",
                "model.safetensors.index.json",
                *_below(SOURCE_FOLDER, TOKENIZER_FILES),
                *_below(TARGET_FOLDER, TOKENIZER_FILES),
                HELDOUT_NAME,
                TRAINING_LOG_NAME,
                SHIFT_NAME,
                SHIFT_TENSORS_NAME,
                f"{REPORT_FOLDER}/{REPORT_NAME}",
                f"{REPORT_FOLDER}/*.png",
                EVAL_RESULTS_NAME,
            ),
        ),
        RepoKind("client_adapter", "model", ADAPTER_METADATA_NAME, (CARD_NAME, *ADAPTER_FILES), private=True),
        RepoKind("generated_adapter", "model", ADAPTER_METADATA_NAME, (CARD_NAME, *ADAPTER_FILES)),
    )
}
# What training leaves beside a mapper to go on from: never part of it.
_WORKING_STATE = re.compile(r"(^|/)(\.|checkpoint-\d+(/|$)|runs(/|$)|training_(args|identity)\.json$|report\.md$)")


def find_kind(folder: Path) -> RepoKind:
    """The kind of a folder, by its manifest.

    Raises:
        [`IncompleteArtifactError`]: nothing in it is a manifest of something that is published.
    """
    if (folder / DELTA_DATASET_NAME).is_file():
        return KINDS["delta_dataset"]
    if (folder / ROOT_NAME).is_file():
        raise UsageError(
            "A root is published with its mapper or its delta dataset, not alone.", path=folder, found=ROOT_NAME
        )
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        path = folder / ADAPTER_METADATA_NAME
        generated = path.is_file() and "generated" in read_record(path, AdapterMetadataRecord)
        return KINDS["generated_adapter" if generated else "client_adapter"]
    config = folder / "config.json"
    if config.is_file() and read_record(config, ModelConfigRecord).get("model_type") == "grad_transformer":
        return KINDS["mapper"]
    raise IncompleteArtifactError(
        "The folder holds nothing that is published.",
        path=folder,
        expected=", ".join(f"a {kind.name.replace('_', ' ')} ({kind.manifest})" for kind in KINDS.values()),
        remedy="manifests are written last: if a command was killed before its end, run it again",
    )


def files_of(folder: Path, kind: RepoKind) -> dict[str, Path]:
    """The files of a folder that belong to its kind; checkpoints and hidden files stay behind.

    Raises:
        [`UsageError`]: a file that is never uploaded lies among them.
    """
    files, others = {}, []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name == ORIGIN_NAME:
            continue
        if kind.owns(name):
            files[name] = path
        elif not _WORKING_STATE.search(name):
            others.append(name)
    check_allowed(others, path=folder)
    if kind.manifest not in files:
        raise IncompleteArtifactError("The folder is not whole.", path=folder, expected=kind.manifest, found="no file")
    return files
