"""Versions of a repository: one commit and one tag each, never moved.

A version is complete before it is tagged: the commit is atomic, its tree is compared with the local files by hash, and
only then does the tag name it. A push that was killed leaves no tag; the next one finds what is there and goes on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile

from ..constants import CARD_NAME
from ..errors import HubError, UsageError
from .hashes import file_sha256, git_blob_sha, git_file_sha
from .transfer import MAX_TRIES, TRANSFER_ERRORS, call_hub, hub_error, status_of, wait_or_raise


# Everything that is uploaded, anywhere in a repository. No pickle has such a name.
ALLOWED_PATTERNS = ("*.safetensors", "*.json", "*.md", "*.yaml", "*.parquet", "*.png")
FIRST_VERSION = "v1.0"
_VERSION = re.compile(r"v(\d+)\.(\d+)")
_STALE = (409, 412)

Files = Mapping[str, Path | bytes]


@dataclass(frozen=True)
class Published:
    """A version on the Hub.

    Args:
        repo_id (`str`), repo_type (`str`): the repository.
        revision (`str`): the version's tag.
        sha (`str`): the commit that it names.
        url (`str`): its page.
        new (`bool`): `False` where this very version was there before.
    """

    repo_id: str
    repo_type: str
    revision: str
    sha: str
    url: str
    new: bool = True

    def __str__(self) -> str:
        return self.url


def check_allowed(names: Sequence[str], *, path: str | Path | None = None) -> None:
    """Raises [`UsageError`] where a file is none that is ever uploaded: pickles, scripts, anything unknown."""
    refused = [name for name in names if not any(fnmatch(name, pattern) for pattern in ALLOWED_PATTERNS)]
    if refused:
        raise UsageError(
            "A file is of a kind that is never uploaded.",
            path=path,
            expected=" ".join(ALLOWED_PATTERNS),
            found=", ".join(sorted(refused)[:5]) + (", ..." if len(refused) > 5 else ""),
            remedy="move it out of the folder; weights belong into safetensors, facts into JSON",
        )


def publish(
    repo_id: str,
    make_files: Callable[[bytes | None], Files],
    *,
    owned: Callable[[str], bool],
    repo_type: str = "model",
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str = "Upload",
) -> Published:
    """Bring a repository to a set of files, in one commit, and tag it.

    Args:
        repo_id (`str`): created if needed.
        make_files (`Callable`): from the card as it is there now (`None`: there is none), which people may have
            edited, to the files, as paths or bytes by their name in the repository. Called again if somebody else
            pushed in between.
        owned (`Callable[[str], bool]`): which of the repository's other files belong to the version that is replaced,
            and go if they are not in the new one.
        repo_type (`str`, *optional*, defaults to `"model"`): or `"dataset"`.
        revision (`str`, *optional*): the version's tag. Default: `v1.0`, then `v1.1`, ...
        private (`bool`, *optional*): whether the repository must be private; with `False` a new one is public.
        token (`str`, *optional*): default: `HF_TOKEN`, or that of `hf auth login`.
        message (`str`, *optional*): of the commit.

    Returns:
        [`Published`]

    Raises:
        [`UsageError`]: a file that is never uploaded, a tag that names another version already, or a repository that
            everybody can see where it must be private: nothing is uploaded then.
        [`HubError`]: no permission, no answer, or what arrived is not what was sent.
    """
    api = HfApi(token=token)
    call_hub(api.create_repo, repo_id, repo_type=repo_type, private=private, exist_ok=True, about=repo_id)
    for attempt in range(1, MAX_TRIES + 1):
        info = call_hub(api.repo_info, repo_id, repo_type=repo_type, about=repo_id)
        if private and not info.private:
            raise UsageError(
                "The repository is there already, and everybody can see it.",
                path=repo_id,
                expected="a private repository",
                found="a public one",
                remedy="take another name, make it private in its settings, or, if everybody may have the files, say "
                "so with private=False (--private false)",
            )
        head = str(info.sha)
        tags = _tags(api, repo_id, repo_type)
        present = list_hashes(api, repo_id, repo_type, head)
        files = make_files(_card(api, repo_id, repo_type, head) if CARD_NAME in present else None)
        check_allowed(list(files), path=repo_id)
        wanted = {name: _hashes(content) for name, content in files.items()}
        if revision in tags:
            return _same_version(api, repo_id, repo_type, str(revision), tags[str(revision)], wanted, owned)
        changed = [name for name in files if present.get(name) not in wanted[name]]
        stale = [name for name in present if name not in files and owned(name)]
        if not changed and not stale:
            named = [tag for tag, sha in tags.items() if sha == head and _VERSION.fullmatch(tag)]
            if revision is None and named:
                return _published(api, repo_id, repo_type, named[-1], head, new=False)
            return _tag(api, repo_id, repo_type, revision or _next_version(tags), head)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationDelete(name) for name in stale),
            *(CommitOperationAdd(name, _content(files[name])) for name in changed),
        ]
        try:
            # `create_commit`, not `upload_folder`: that may split a version over several commits.
            commit = api.create_commit(
                repo_id, operations, commit_message=message, repo_type=repo_type, parent_commit=head
            )
        except TRANSFER_ERRORS as error:
            # Lost answers and other people's pushes are seen in the next round, from the repository's own state.
            if status_of(error) not in _STALE:
                wait_or_raise(error, attempt, repo_id)
            elif attempt == MAX_TRIES:
                raise hub_error(error, repo_id) from error
            continue
        arrived = list_hashes(api, repo_id, repo_type, commit.oid)
        missing = [name for name in wanted if arrived.get(name) not in wanted[name]]
        if missing:
            raise HubError(
                "What arrived is not what was sent, so the version is not tagged.",
                path=repo_id,
                expected=f"{len(wanted)} files",
                found=f"{len(missing)} that differ, among them {missing[0]}",
                remedy="push again",
            )
        return _tag(api, repo_id, repo_type, revision or _next_version(tags), commit.oid)
    raise AssertionError("the last round returns or raises")


def list_hashes(api: HfApi, repo_id: str, repo_type: str, sha: str) -> dict[str, str]:
    """Name to hash (SHA-256 of large files, git's SHA-1 of small ones) of all files of a commit."""
    entries = call_hub(
        lambda: list(api.list_repo_tree(repo_id, repo_type=repo_type, revision=sha, recursive=True)), about=repo_id
    )
    return {
        entry.path: entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
        for entry in entries
        if isinstance(entry, RepoFile)
    }


def _card(api: HfApi, repo_id: str, repo_type: str, sha: str) -> bytes:
    path = call_hub(api.hf_hub_download, repo_id, CARD_NAME, repo_type=repo_type, revision=sha, about=repo_id)
    return Path(path).read_bytes()


def _tags(api: HfApi, repo_id: str, repo_type: str) -> dict[str, str]:
    refs = call_hub(api.list_repo_refs, repo_id, repo_type=repo_type, about=repo_id)
    tags = {tag.name: tag.target_commit for tag in refs.tags}
    return dict(sorted(tags.items(), key=lambda item: _version_key(item[0])))


def _version_key(tag: str) -> tuple[int, int]:
    match = _VERSION.fullmatch(tag)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def _next_version(tags: Mapping[str, str]) -> str:
    major, minor = max((_version_key(tag) for tag in tags), default=(-1, -1))
    return FIRST_VERSION if major < 0 else f"v{major}.{minor + 1}"


def _content(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)


def _hashes(content: Path | bytes) -> tuple[str, str]:
    """Both names that the Hub may give to a file: it decides by its size whether it is a large one."""
    if isinstance(content, bytes):
        return git_blob_sha(content), hashlib.sha256(content).hexdigest()
    return git_file_sha(content), file_sha256(content)


def _same_version(
    api: HfApi,
    repo_id: str,
    repo_type: str,
    tag: str,
    sha: str,
    wanted: Mapping[str, tuple[str, str]],
    owned: Callable[[str], bool],
) -> Published:
    """The tag exists: fine if it names exactly these files, and otherwise it is never moved."""
    present = list_hashes(api, repo_id, repo_type, sha)
    # The card says which version it is of and may have been edited since: it alone does not make another version.
    differ = [name for name in wanted if name != CARD_NAME and present.get(name) not in wanted[name]]
    differ += [name for name in present if name not in wanted and owned(name)]
    if differ:
        raise UsageError(
            f"The version {tag} exists with other content, and a version is never moved.",
            path=repo_id,
            expected="the tag of a new version",
            found=f"{len(differ)} files that differ, among them {sorted(differ)[0]}",
            remedy="give another tag, or none: the next number is taken then",
        )
    return _published(api, repo_id, repo_type, tag, sha, new=False)


def _tag(api: HfApi, repo_id: str, repo_type: str, tag: str, sha: str) -> Published:
    call_hub(
        api.create_tag, repo_id, tag=tag, revision=sha, repo_type=repo_type, exist_ok=True, about=f"{repo_id}@{tag}"
    )
    found = _tags(api, repo_id, repo_type).get(tag)
    if found != sha:
        raise HubError(
            f"Somebody else made the version {tag} at the same time.",
            path=repo_id,
            expected=sha,
            found=found,
            remedy="push again: the next number is taken then",
        )
    return _published(api, repo_id, repo_type, tag, sha, new=True)


def _published(api: HfApi, repo_id: str, repo_type: str, tag: str, sha: str, *, new: bool) -> Published:
    prefix = "" if repo_type == "model" else f"{repo_type}s/"
    return Published(repo_id, repo_type, tag, sha, f"{api.endpoint}/{prefix}{repo_id}/tree/{tag}", new)
