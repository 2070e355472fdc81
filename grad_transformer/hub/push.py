"""Push a folder as a version of a repository, with its card; pull a version into a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..constants import CARD_NAME, ORIGIN_NAME, REPORT_FOLDER, REPORT_NAME
from ..errors import IncompleteArtifactError, UsageError
from ..files import atomic_write, read_record, write_json_atomic
from ..schemas import ReportRecord
from .cards import card_files
from .kinds import KINDS, RepoKind, files_of, find_kind
from .public import public_files
from .repos import Published, publish
from .revisions import fetch, read_origin, split_revision


logger = logging.get_logger(__name__)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    kind: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    license: str | None = None,
    report_dir: str | Path | None = None,
    commit_message: str | None = None,
) -> Published:
    """Publish a delta dataset, a mapper, a client adapter or a generated adapter, as one commit with one tag.

    Args:
        folder (`str` or `Path`): what `build`, `train`, `client` or `generate` wrote.
        repo_id (`str`): created if needed; also as `org/name@v1.0`.
        kind (`str`, *optional*): one of `KINDS`, checked; default: what the folder holds.
        revision (`str`, *optional*): tag of the version. Default: `v1.0`, then `v1.1`, ...
        private (`bool`, *optional*): of a new repository. Default: client adapters are private, the rest as the
            account's settings say.
        token (`str`, *optional*): default: `HF_TOKEN`, or that of `hf auth login`.
        license (`str`, *optional*): for the card, for instance `apache-2.0`.
        report_dir (`str` or `Path`, *optional*): for a mapper: folder of its `report.json` and pictures.
        commit_message (`str`, *optional*)

    Returns:
        [`Published`]

    Raises:
        [`IncompleteArtifactError`]: the folder holds no such artifact, or not all of it.
        [`UsageError`]: a file that is never uploaded; a tag of another version; a token or local path in a file.
        [`HubError`]: no permission, or no answer.
    """
    folder = Path(folder)
    repo_id, named = split_revision(repo_id)
    found = find_kind(folder)
    if kind is not None and kind != found.name:
        raise UsageError("The folder holds something else.", path=folder, expected=kind, found=found.name)
    local: dict[str, Path] = files_of(folder, found)
    if report_dir is not None:
        local.update(_report_files(Path(report_dir), found))
    facts = public_files({name: path for name, path in local.items() if name != CARD_NAME})

    def make_files(previous: str | None) -> dict[str, Path | bytes]:
        return {**facts, **card_files(found, facts, repo_id=repo_id, license=license, previous=previous)}

    published = publish(
        repo_id,
        make_files,
        owned=found.owns,
        repo_type=found.repo_type,
        revision=revision or named,
        private=found.private or None if private is None else private,
        token=token,
        message=commit_message or f"Upload {found.name.replace('_', ' ')}",
    )
    logger.info("%s: version %s", found.name.replace("_", " "), published.revision)
    return published


def push_delta_dataset(folder: str | Path, repo_id: str, **kwargs: Any) -> Published:
    """Publish the folder that `build_delta_dataset` wrote; arguments as in [`push_folder`].

    Raises:
        [`IncompleteArtifactError`], [`UsageError`], [`HubError`]: as [`push_folder`].
    """
    return push_folder(folder, repo_id, kind="delta_dataset", **kwargs)


def pull_folder(
    repo_id: str,
    output_dir: str | Path,
    *,
    kind: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Copy a version of a repository into a folder, where `hub_origin.json` tells what it is.

    Args:
        repo_id (`str`): also as `org/name@v1.0`.
        output_dir (`str` or `Path`): a new or empty folder, or an earlier pull of the same repository.
        kind (`str`): one of `KINDS`.
        revision, token, cache_dir, local_files_only: as in [`fetch`].

    Returns:
        the folder, and the origin: `repo_id`, `revision`, `sha`.

    Raises:
        [`UsageError`]: the folder holds something else.
        [`IncompleteArtifactError`]: the repository is not of this kind.
        [`HubError`]: as [`fetch`].
    """
    wanted = KINDS[kind]
    fetched = fetch(
        repo_id,
        allow_patterns=wanted.patterns,
        repo_type=wanted.repo_type,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    assert fetched.origin is not None or fetched.folder.is_dir()
    if fetched.origin is None:
        raise UsageError("This is a folder, not a repository.", path=repo_id, expected="an id such as org/name")
    if not (fetched.folder / wanted.manifest).is_file():
        raise IncompleteArtifactError(
            f"The repository is no {kind.replace('_', ' ')}.", path=repo_id, expected=wanted.manifest, found="no file"
        )
    output = Path(output_dir)
    if output.is_dir() and any(output.iterdir()):
        known = read_origin(output)
        if known is None or known.repo_id != fetched.origin.repo_id:
            raise UsageError("The folder holds something else.", path=output, expected="a new folder")
        (output / ORIGIN_NAME).unlink()
    names = [path.relative_to(fetched.folder) for path in sorted(fetched.folder.rglob("*")) if path.is_file()]
    for name in names:
        if wanted.owns(name.as_posix()):
            with atomic_write(output / name) as temporary:
                shutil.copyfile(fetched.folder / name, temporary)
    origin = fetched.origin.to_dict()
    write_json_atomic(output / ORIGIN_NAME, {**origin, "private": fetched.origin.private})
    return output, origin


def _report_files(report_dir: Path, kind: RepoKind) -> dict[str, Path]:
    if kind.name != "mapper":
        raise UsageError("Only a mapper is published with a report.", path=report_dir, found=kind.name)
    read_record(report_dir / REPORT_NAME, ReportRecord)
    paths = [report_dir / REPORT_NAME, *sorted(report_dir.glob("*.png"))]
    return {f"{REPORT_FOLDER}/{path.name}": path for path in paths}
