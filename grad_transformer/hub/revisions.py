"""From a name to files: a folder as it is, or a repository's version, resolved to its commit once and checked by hash.

A version may be part of the name: `acme/mapper@v1.0`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..constants import ORIGIN_NAME
from ..errors import HubError, UsageError
from ..files import read_record, write_text_atomic
from ..schemas import OriginRecord
from .transfer import call_hub, cannot_connect, hub_error


logger = logging.get_logger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
# What `publish` names versions. A branch may move, these may not.
VERSION_TAG = re.compile(r"v\d+(\.\d+)*")


@dataclass(frozen=True)
class Origin:
    """Where on the Hub something came from.

    Args:
        repo_id (`str`): repository.
        revision (`str` or `None`): the tag or branch that was asked for; `None`: the default branch.
        sha (`str`): the commit that it was at.
        private (`bool` or `None`): whether the repository was private; `None` where it was not asked (offline).
    """

    repo_id: str
    revision: str | None
    sha: str
    private: bool | None = None

    def to_dict(self) -> dict[str, str | None]:
        """What is written into everything that is made from it."""
        return {"repo_id": self.repo_id, "revision": self.revision, "sha": self.sha}


@dataclass(frozen=True)
class Fetched:
    """Files on this machine, and where on the Hub they came from (`None`: a local folder that nobody pulled)."""

    folder: Path
    origin: Origin | None


def split_revision(name: str | Path) -> tuple[str, str | None]:
    """`"org/a@v1"` to `("org/a", "v1")`; a name without `@`, or an existing folder, has no revision."""
    text = str(name)
    if "@" not in text or Path(text).exists():
        return text, None
    repo_id, _, revision = text.partition("@")
    return repo_id, revision or None


def fetch(
    name_or_path: str | Path,
    *,
    allow_patterns: Sequence[str],
    subfolder: str | None = None,
    revision: str | None = None,
    repo_type: str = "model",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Fetched:
    """A local folder as it is, or the snapshot of a Hub repository (only files that match `allow_patterns`).

    The revision is resolved to a commit once; every file comes from that commit and is checked against the hash that
    the Hub names it by, also when it comes from the cache.

    Args:
        name_or_path (`str` or `Path`): a folder, or a repository id, also as `org/name@revision`.
        allow_patterns (`Sequence[str]`): file names below `subfolder` that may be downloaded.
        subfolder (`str`, *optional*): folder below it.
        revision (`str`, *optional*): tag, branch or commit.
        repo_type (`str`, *optional*, defaults to `"model"`): or `"dataset"`.
        token, cache_dir, local_files_only: as in `huggingface_hub.snapshot_download`; without `token` the one from
            `HF_TOKEN` or `hf auth login` is used.

    Raises:
        [`HubError`]: no such repository or version, no access, no answer; a file or a version tag that changed.
        [`UsageError`]: two revisions, or no such folder in it.
    """
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    if ".." in Path(prefix).parts:
        raise UsageError("`subfolder` leads out of the repository.", expected="a folder below it", found=subfolder)
    folder, origin = Path(name_or_path), None
    if folder.is_dir():
        origin = read_origin(folder)
    else:
        repo_id, named = split_revision(name_or_path)
        if named is not None and revision is not None and named != revision:
            raise UsageError("Two revisions are given.", path=repo_id, expected="one", found=f"{named} and {revision}")
        _check_repo_id(repo_id)
        patterns = [prefix + pattern for pattern in allow_patterns]
        cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        origin = resolve(
            repo_id,
            revision=revision or named,
            repo_type=repo_type,
            token=token,
            cache_dir=cache,
            local_files_only=local_files_only,
        )
        folder = Path(
            call_hub(
                snapshot_download,
                repo_id,
                repo_type=repo_type,
                revision=origin.sha,
                token=token,
                cache_dir=cache,
                local_files_only=local_files_only,
                allow_patterns=patterns,
                about=repo_id,
            )
        )
        _check_hashes(folder, patterns, repo_id)
    folder = folder / prefix if prefix else folder
    if not folder.is_dir():
        raise UsageError(
            "There is no such folder in it.", path=name_or_path, found=subfolder, remedy="check `subfolder`"
        )
    return Fetched(folder, origin)


def _check_repo_id(repo_id: str) -> None:
    """Refuse what is plainly a path before the Hub is asked for it."""
    path = Path(repo_id)
    beside = str(path.parent) != "." and path.parent.is_dir()
    if path.is_file() or beside:
        raise UsageError(
            "Neither a folder nor a Hub repository that can be reached.",
            path=repo_id,
            expected="an existing folder, or the id of a repository on the Hub",
            found="a file" if path.is_file() else f"no such entry in {path.parent}",
            remedy="check the spelling",
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise hub_error(error, repo_id) from error


def resolve_folder(name_or_path: str | Path, *, allow_patterns: Sequence[str], **kwargs: Any) -> Path:
    """The folder of [`fetch`], for those who need not know where it came from."""
    return fetch(name_or_path, allow_patterns=allow_patterns, **kwargs).folder


def resolve(
    repo_id: str,
    *,
    revision: str | None = None,
    repo_type: str = "model",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Origin:
    """The commit that a tag or branch names; offline, the one that it named when it was last resolved.

    Raises:
        [`HubError`]: it cannot be found or reached, or a version tag was moved since it was last resolved here.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return Origin(repo_id, revision, revision)
    api = HfApi(token=token)
    known = None
    # An id that is none must not become a path in the cache.
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id) and ".." not in (revision or ""):
        cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        folder = cache / repo_folder_name(repo_id=repo_id, repo_type=repo_type)
        reference = folder / "refs" / (revision or constants.DEFAULT_REVISION)
        known = reference.read_text().strip() if reference.is_file() else None
    if known is not None and (local_files_only or is_offline_mode()):
        return Origin(repo_id, revision, known)
    if local_files_only:
        raise HubError(
            "The repository's version is not in the cache.",
            path=repo_id,
            expected=f"a download of {revision or 'the default branch'}",
            found="local_files_only",
            remedy="load it once with the network",
        )
    try:
        info = call_hub(api.repo_info, repo_id, repo_type=repo_type, revision=revision, about=repo_id)
    except HubError as error:
        if known is None or error.__cause__ is None or not cannot_connect(error.__cause__):
            raise
        logger.warning("The Hub cannot be reached: the version that was cached last is used.")
        return Origin(repo_id, revision, known)
    sha = str(info.sha)
    if known not in (None, sha) and revision is not None and VERSION_TAG.fullmatch(revision):
        raise HubError(
            "A version changed: its tag was moved since it was loaded here.",
            path=f"{repo_id}@{revision}",
            expected=known,
            found=sha,
            remedy="ask its owner; load either commit by its sha, or accept the new one by deleting the cached "
            "repository (`hf cache rm`)",
        )
    if known != sha:
        write_text_atomic(reference, sha)
    return Origin(repo_id, revision, sha, private=bool(info.private or info.gated))


def read_origin(folder: Path) -> Origin | None:
    """Where a pulled folder came from."""
    path = folder / ORIGIN_NAME
    if not path.is_file():
        return None
    data = read_record(path, OriginRecord)
    return Origin(data["repo_id"], data.get("revision"), data["sha"], data.get("private"))


def git_blob_sha(content: bytes) -> str:
    """The name that git, and so the Hub, gives to a small file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def git_file_sha(path: Path) -> str:
    return _digest(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False))


def file_sha256(path: Path) -> str:
    return _digest(path, hashlib.sha256())


def _digest(path: Path, digest: Any) -> str:
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(2**20), b""):
            digest.update(chunk)
    return str(digest.hexdigest())


def _check_hashes(folder: Path, patterns: Sequence[str], repo_id: str) -> None:
    """Files of the cache are links to blobs named by their hash (where the system has no links: not checked)."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_symlink() or not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        expected = os.path.basename(os.readlink(path))
        if len(expected) not in (40, 64) or not path.is_file():
            continue
        found = git_file_sha(path) if len(expected) == 40 else file_sha256(path)
        if found != expected:
            raise HubError(
                f"{name} is not the file that the Hub names at this version.",
                path=repo_id,
                expected=expected,
                found=found,
                remedy="delete the cached repository (`hf cache rm`) and load it again",
            )
