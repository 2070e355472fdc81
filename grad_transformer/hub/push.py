"""Push a folder as a version of a repository, with its card; pull a version into a folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..constants import CARD_NAME, FIGURES, ORIGIN_NAME, REPORT_FOLDER, REPORT_NAME
from ..errors import IncompleteArtifactError, UsageError
from ..files import atomic_write, read_record, write_json_atomic
from ..schemas import OriginRecord
from .cards import card_files
from .hashes import file_sha256
from .kinds import KINDS, files_of, find_kind
from .names import split_revision
from .origins import pull_record, record_pull
from .public import public_files
from .repos import Published, publish
from .revisions import fetch


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
    report: Mapping[str, bytes] | None = None,
    commit_message: str | None = None,
) -> Published:
    """Publish a delta dataset, a mapper, a client adapter or a generated adapter, as one commit with one tag.

    Args:
        folder (`str` or `Path`): what `build`, `train`, `client` or `generate` wrote.
        repo_id (`str`): created if needed; also as `org/name@v1.0`, or as the address of its page.
        kind (`str`, *optional*): one of `KINDS`, checked; default: what the folder holds.
        revision (`str`, *optional*): tag of the version. Default: `v1.0`, then `v1.1`, ...
        private (`bool`, *optional*): whether the repository must be private. Default: client adapters only go into
            private ones, the rest as the account's settings say. With `False` a new repository is public.
        token (`str`, *optional*): default: `HF_TOKEN`, or that of `hf auth login`.
        license (`str`, *optional*): for the card, for instance `apache-2.0`.
        report (`Mapping[str, bytes]`, *optional*): for a mapper: `report.json` and pictures without names of clients,
            as `grad_transformer.evaluation.public` makes them. What lies in a folder is never taken.
        commit_message (`str`, *optional*)

    Returns:
        [`Published`]

    Raises:
        [`IncompleteArtifactError`]: the folder holds no such artifact, or not all of it.
        [`UsageError`]: a file that is never uploaded; a tag of another version; a token or local path in a file; a
            repository that everybody can see where it must be private.
        [`HubError`]: no permission, or no answer.
    """
    folder = Path(folder)
    found = find_kind(folder)
    repo_id, named = split_revision(repo_id, repo_type=found.repo_type)
    if kind is not None and kind != found.name:
        raise UsageError("The folder holds something else.", path=folder, expected=kind, found=found.name)
    local = files_of(folder, found)
    if report is not None:
        if found.name != "mapper":
            raise UsageError(
                "Only a mapper is published with a report.",
                path=folder,
                found=found.name,
                remedy="leave the report out",
            )
        if not set(report) <= {REPORT_NAME, *FIGURES}:
            raise UsageError(
                "The report has other files.",
                expected=(REPORT_NAME, *FIGURES),
                found=sorted(report),
                remedy="make it with grad_transformer.evaluation.public.public_report",
            )
        local |= {f"{REPORT_FOLDER}/{name}": content for name, content in report.items()}
    facts = public_files({name: content for name, content in local.items() if name != CARD_NAME})

    def make_files(previous: bytes | None) -> dict[str, Path | bytes]:
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
    """Copy a version of a repository into a folder, where `hub_origin.json` tells people what it is.

    This machine remembers it too, as long as the files stay as they are, and what is made from the folder names the
    version.

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
    if fetched.origin is None:
        raise UsageError("This is a folder, not a repository.", path=repo_id, expected="an id such as org/name")
    if not (fetched.folder / wanted.manifest).is_file():
        raise IncompleteArtifactError(
            f"The repository is no {kind.replace('_', ' ')}.", path=repo_id, expected=wanted.manifest, found="no file"
        )
    output = Path(output_dir)
    if output.is_dir() and any(output.iterdir()):
        known = pull_record(output)
        if not known and (output / ORIGIN_NAME).is_file():
            known = dict(read_record(output / ORIGIN_NAME, OriginRecord))
        if known.get("repo_id") != fetched.origin.repo_id:
            raise UsageError("The folder holds something else.", path=output, expected="a new folder")
        for name in (ORIGIN_NAME, *pull_record(output).get("files", {})):
            (output / name).unlink(missing_ok=True)
    names = [path.relative_to(fetched.folder).as_posix() for path in fetched.folder.rglob("*") if path.is_file()]
    names = sorted(name for name in names if wanted.owns(name))
    # First, so that a pull that was killed is taken up; until every file is there, none of it has an origin.
    record_pull(output, fetched.origin, {name: file_sha256(fetched.folder / name) for name in names})
    for name in names:
        with atomic_write(output / name) as temporary:
            shutil.copyfile(fetched.folder / name, temporary)
    origin = fetched.origin.to_dict()
    write_json_atomic(output / ORIGIN_NAME, origin)
    return output, origin
