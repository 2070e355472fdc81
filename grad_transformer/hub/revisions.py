"""From a name to files: a folder as it is, or a repository's version, resolved to its commit once and checked by hash.

A version may be part of the name: `acme/mapper@v1.0`. The address of a repository's page is a name of it too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetInfo, HfApi, ModelInfo, constants, is_offline_mode, snapshot_download
from huggingface_hub.file_download import repo_folder_name
from transformers.utils import logging

from ..errors import HubError, UsageError
from ..files import MAX_JSON_BYTES, write_text_atomic
from ..outputs import holds
from ..wording import in_ascii
from .hashes import file_sha256, git_file_sha
from .names import (
    check_file_names,
    did_you_mean,
    is_commit,
    is_repo_id,
    is_revision,
    looks_like_path,
    split_revision,
)
from .origins import Origin, pulled_origin
from .transfer import call_hub, cannot_connect


logger = logging.get_logger(__name__)

# What `publish` names versions. A branch may move, these may not.
VERSION_TAG = re.compile(r"v\d+(\.\d+)*")
# What a repository may make this machine download, where the caller knows no better.
MAX_BYTES = {"model": 64 * 2**30, "dataset": 2**40}
MAX_FILES = 100_000
_TEXT_SUFFIXES = (".json", ".md", ".yaml")


@dataclass(frozen=True)
class Fetched:
    """Files on this machine, and where on the Hub they came from (`None`: a local folder that was not pulled here)."""

    folder: Path
    origin: Origin | None


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
    max_bytes: int | None = None,
) -> Fetched:
    """A local folder as it is, or the snapshot of a Hub repository (only files that match `allow_patterns`).

    The revision is resolved to a commit once; every file comes from that commit and is checked against the hash that
    the Hub names it by, also when it comes from the cache. Names and sizes are checked before anything is downloaded.

    Args:
        name_or_path (`str` or `Path`): a folder, or a repository id, also as `org/name@revision` or as the address of
            its page.
        allow_patterns (`Sequence[str]`): file names below `subfolder` that may be downloaded.
        subfolder (`str`, *optional*): folder below it.
        revision (`str`, *optional*): tag, branch or commit.
        repo_type (`str`, *optional*, defaults to `"model"`): or `"dataset"`.
        token, cache_dir, local_files_only: as in `huggingface_hub.snapshot_download`; without `token` the one from
            `HF_TOKEN` or `hf auth login` is used.
        max_bytes (`int`, *optional*): of all files together. Default: 64 GiB of a model, 1 TiB of a dataset.

    Raises:
        [`HubError`]: no such repository or version, no access, no answer; a file or a version tag that changed; files
            with unsafe names, or too large.
        [`UsageError`]: two revisions, or no such folder in it.
    """
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    if ".." in Path(prefix).parts:
        raise UsageError("`subfolder` leads out of the repository.", expected="a folder below it", found=subfolder)
    patterns = [prefix + pattern for pattern in allow_patterns]
    folder, origin = Path(name_or_path), None
    if folder.is_dir():
        origin = pulled_origin(folder, patterns)
    else:
        repo_id, named = split_revision(name_or_path, repo_type=repo_type)
        if named is not None and revision is not None and named != revision:
            raise UsageError("Two revisions are given.", path=repo_id, expected="one", found=f"{named} and {revision}")
        check_repo_id(repo_id)
        cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        origin, info = _resolve(repo_id, revision or named, repo_type, token, cache, local_files_only)
        if info is not None:
            _check_listing(info, patterns, repo_id, max_bytes or MAX_BYTES[repo_type])
        folder = Path(
            call_hub(
                snapshot_download,
                repo_id,
                repo_type=repo_type,
                revision=origin.sha,
                token=token,
                cache_dir=cache,
                # Without a listing nothing new is downloaded: what is cached was checked when it came.
                local_files_only=local_files_only or info is None,
                allow_patterns=patterns,
                about=repo_id,
            )
        )
        _check_hashes(folder, patterns, repo_id)
    whole, folder = folder, folder / prefix if prefix else folder
    if not folder.is_dir():
        raise UsageError(
            "None of the files that are needed are there.",
            path=name_or_path,
            expected=", ".join(patterns[:3]),
            found=holds(whole) or (f"no folder {subfolder}" if subfolder else "other files"),
            remedy="check what kind of folder or repository it is" + (", and `subfolder`" if subfolder else ""),
        )
    return Fetched(folder, origin)


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
        [`UsageError`]: an id or a revision that can be none.
    """
    check_repo_id(repo_id)
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    return _resolve(repo_id, revision, repo_type, token, cache, local_files_only)[0]


def _resolve(
    repo_id: str,
    revision: str | None,
    repo_type: str,
    token: str | bool | None,
    cache: Path,
    local_files_only: bool,
) -> tuple[Origin, ModelInfo | DatasetInfo | None]:
    """The commit, and what the Hub says of it; `None` where it was not asked, or could not be reached."""
    if revision is not None and not is_revision(revision):
        raise UsageError(
            "This can be no version of a repository.",
            path=repo_id,
            expected="a tag, a branch or a commit",
            found=in_ascii(revision),
        )
    # Offline a tag names what it named when it was last resolved; a commit names itself.
    reference = cache / repo_folder_name(repo_id=repo_id, repo_type=repo_type) / "refs"
    reference = reference / (revision or constants.DEFAULT_REVISION)
    known = revision if is_commit(revision) else _cached_commit(reference)
    if local_files_only or is_offline_mode():
        if known is None:
            raise HubError(
                "The repository's version is not in the cache.",
                path=repo_id,
                expected=f"a download of {revision or 'the default branch'}",
                found="local_files_only" if local_files_only else "HF_HUB_OFFLINE",
                remedy="load it once with the network; a folder's path is checked for its spelling",
            )
        return Origin(repo_id, revision, known), None
    try:
        info = call_hub(
            HfApi(token=token).repo_info,
            repo_id,
            repo_type=repo_type,
            revision=revision,
            files_metadata=True,
            about=repo_id,
        )
    except HubError as error:
        if known is None or error.__cause__ is None or not cannot_connect(error.__cause__):
            raise
        logger.warning("The Hub cannot be reached: the version that was cached last is used.")
        return Origin(repo_id, revision, known), None
    assert isinstance(info, ModelInfo | DatasetInfo)
    origin = Origin(repo_id, revision, str(info.sha), private=bool(info.private or info.gated))
    if (
        known not in (None, origin.sha)
        and revision is not None
        and (VERSION_TAG.fullmatch(revision) or is_commit(revision))
    ):
        raise HubError(
            "A version changed: its tag was moved since it was loaded here.",
            path=f"{repo_id}@{revision}",
            expected=known,
            found=origin.sha,
            remedy="ask its owner; load either commit by its sha, or accept the new one by deleting the cached "
            "repository (`hf cache rm`)",
        )
    if known != origin.sha:
        write_text_atomic(reference, origin.sha)
    return origin, info


def _cached_commit(reference: Path) -> str | None:
    text = reference.read_text(encoding="utf-8", errors="replace").strip() if reference.is_file() else ""
    return text if is_commit(text) else None


def check_repo_id(repo_id: str) -> None:
    """Refuse what is plainly a path, or no id, before the Hub is asked for it.

    Raises:
        [`UsageError`]
    """
    path = Path(repo_id)
    if looks_like_path(repo_id) or not is_repo_id(repo_id):
        raise UsageError(
            "Neither a folder nor a Hub repository that can be reached.",
            path=repo_id,
            expected="an existing folder, or the id of a repository on the Hub (org/name)",
            found="a file" if path.is_file() else f"no such entry in {path.parent}",
            remedy=f"{did_you_mean(path)}; an id names the account too (openai-community/gpt2, not gpt2)",
        )


def _check_listing(info: ModelInfo | DatasetInfo, patterns: Sequence[str], repo_id: str, max_bytes: int) -> None:
    """Refuse a repository whose files have unsafe names or sizes, before one of them is downloaded."""
    wanted = {
        file.rfilename: file.size or 0
        for file in info.siblings or ()
        if any(fnmatch(file.rfilename, pattern) for pattern in patterns)
    }
    check_file_names(wanted, path=repo_id)
    long_texts = {name for name, size in wanted.items() if name.endswith(_TEXT_SUFFIXES) and size > MAX_JSON_BYTES}
    total = sum(wanted.values())
    if total > max_bytes or long_texts or len(wanted) > MAX_FILES:
        raise HubError(
            "The repository is larger than what may be downloaded unasked.",
            path=repo_id,
            expected=f"at most {max_bytes:,} bytes in {MAX_FILES:,} files; {MAX_JSON_BYTES:,} bytes in a file of text",
            found=f"{total:,} bytes in {len(wanted):,} files"
            + "".join(f"; {name} has {wanted[name]:,}" for name in sorted(long_texts)[:1]),
            remedy="if you trust its owner, download it with `hf download` and give the folder",
        )


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
