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
    FORMAT_VERSION,
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
from .names import did_you_mean
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
        private (`bool`): whether the repository must be private unless it is said otherwise.
        required (`tuple[str, ...]`): what it is not whole without, beside the manifest.
    """

    name: str
    repo_type: str
    manifest: str
    patterns: tuple[str, ...]
    private: bool = False
    required: tuple[str, ...] = ()

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
        RepoKind(
            "client_adapter",
            "model",
            ADAPTER_METADATA_NAME,
            (CARD_NAME, *ADAPTER_FILES),
            private=True,
            required=(ADAPTER_WEIGHTS_NAME,),
        ),
        RepoKind(
            "generated_adapter",
            "model",
            ADAPTER_METADATA_NAME,
            (CARD_NAME, *ADAPTER_FILES),
            required=(ADAPTER_WEIGHTS_NAME,),
        ),
    )
}
# What training leaves beside a mapper to go on from: never part of it.
_WORKING_STATE = re.compile(r"(^|/)(\.|checkpoint-\d+(/|$)|runs(/|$)|training_(args|identity)\.json$|report\.md$)")


def find_kind(folder: Path) -> RepoKind:
    """The kind of a folder, by its manifest.

    Raises:
        [`IncompleteArtifactError`]: nothing in it is a manifest of something that is published.
        [`UsageError`]: there is no such folder, or a root in it.
    """
    if not folder.is_dir():
        raise UsageError(
            "There is no such folder.",
            path=folder,
            expected="a folder with what is to be published",
            found="a file" if folder.exists() else "nothing",
            remedy=did_you_mean(folder),
        )
    if (folder / DELTA_DATASET_NAME).is_file():
        return KINDS["delta_dataset"]
    if (folder / ROOT_NAME).is_file():
        raise UsageError(
            "A root is published with its mapper or its delta dataset, not alone.", path=folder, found=ROOT_NAME
        )
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        path = folder / ADAPTER_METADATA_NAME
        generated = path.is_file() and bool(read_record(path, AdapterMetadataRecord).get("generated"))
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


def files_of(folder: Path, kind: RepoKind) -> dict[str, Path | bytes]:
    """The files of a folder that belong to its kind; checkpoints and hidden files stay behind.

    A report is left out: what may be published of it is drawn anew, see [`push_folder`]. A PEFT adapter without this
    library's metadata gets some that says no more than the format version, and what peft or a trainer left beside it
    stays behind.

    Raises:
        [`UsageError`]: a file that is never uploaded lies among them, or a link that leads out of the folder.
        [`IncompleteArtifactError`]: the manifest, or a file that must be there, is missing.
    """
    files: dict[str, Path | bytes] = {}
    others = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name == ORIGIN_NAME:
            continue
        if not kind.owns(name):
            others += [] if _WORKING_STATE.search(name) else [name]
        elif not name.startswith(f"{REPORT_FOLDER}/"):
            _check_inside(path, folder)
            files[name] = path
    if ADAPTER_CONFIG_NAME in files and kind.manifest == ADAPTER_METADATA_NAME and kind.manifest not in files:
        files[kind.manifest] = f'{{"format_version": {FORMAT_VERSION}}}\n'.encode()
        others = []
    check_allowed(others, path=folder)
    for name in (kind.manifest, *kind.required):
        if name not in files:
            pickles = sorted(path.name for path in folder.glob("adapter_model*.bin"))
            raise IncompleteArtifactError(
                "The folder is not whole.",
                path=folder,
                expected=name,
                found=", ".join(pickles[:3]) or "no file",
                remedy="save it again with safe_serialization=True: pickles are never uploaded" if pickles else None,
            )
    return files


def _check_inside(path: Path, folder: Path) -> None:
    """A snapshot of the Hub's cache has links to the blobs beside it; any other link leads to what was not meant."""
    homes = [folder.resolve()]
    homes += [above.parent.resolve() / "blobs" for above in (folder, *folder.parents) if above.name == "snapshots"]
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise UsageError(
            "A file of the folder is a link that leads out of it.",
            path=path,
            expected="files of the folder",
            found="a link",
            remedy="copy the file into the folder, if it is to be published",
        )
