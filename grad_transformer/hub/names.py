"""What names may be: repositories, revisions, commits and files; addresses pasted from a browser; what is a path."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypeGuard
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

from ..constants import COMMIT_PATTERN, REPO_ID_PATTERN
from ..errors import HubError, UsageError
from ..files import nearest_path
from ..wording import in_ascii, one_line


_REPO_ID = re.compile(REPO_ID_PATTERN)
_REVISION = re.compile(r"[A-Za-z0-9_][\w.+/=-]{0,199}", re.ASCII)
_COMMIT = re.compile(COMMIT_PATTERN)
_FILE_PART = re.compile(r"[\w.+=@,()~ -]{1,200}", re.ASCII)

_ADDRESS = re.compile(
    r"(?:(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):/+|(?=(?:www\.)?(?:huggingface\.co|hf\.co)/))(?P<rest>.*)"
)
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
# The first parts of pages of the Hub that are no account, and what kind of repository they lead to.
_SECTIONS = {"models": "model", "datasets": "dataset", "spaces": "space"}
_REVISION_PAGES = ("tree", "commit", "commits", "blob", "resolve", "raw", "discussions")
_FILE_SUFFIXES = (
    *(".bin", ".csv", ".gguf", ".gz", ".json", ".jsonl", ".md", ".npz", ".parquet", ".pt", ".pth", ".safetensors"),
    *(".tsv", ".txt", ".yaml", ".yml", ".zip"),
)


def is_repo_id(value: object) -> TypeGuard[str]:
    """Whether it is an id as the Hub gives them: `name` or `account/name`."""
    return (
        isinstance(value, str)
        and _REPO_ID.fullmatch(value) is not None
        and not value.endswith((".", "-", ".git"))
        and not any(part in value for part in ("..", "--"))
    )


def is_revision(value: object) -> bool:
    """Whether it can be a tag, a branch or a commit."""
    return (
        isinstance(value, str)
        and _REVISION.fullmatch(value) is not None
        and not value.endswith(("/", "."))
        and not any(part in value for part in ("..", "//"))
    )


def is_commit(value: object) -> bool:
    """Whether it is a full commit hash."""
    return isinstance(value, str) and _COMMIT.fullmatch(value) is not None


def check_file_names(names: Iterable[str], *, path: str | Path) -> None:
    """Refuse names of a listing or a manifest that would lead out of their folder, or that no file of ours has.

    Raises:
        [`HubError`]: an absolute name, `..`, a drive, a backslash, a control or other odd character; or a file that is
            also the folder of another.
    """
    known = set(names)
    for name in sorted(known):
        parts = name.split("/")
        plain = all(_FILE_PART.fullmatch(part) and part not in (".", "..") and part == part.strip() for part in parts)
        if not plain:
            raise HubError(
                "A file has a name that is not safe to write.",
                path=path,
                expected="names below the folder, of letters, digits and . _ - + =",
                found=in_ascii(name),
                remedy="do not use this repository, or ask its owner to rename the file",
            )
        folder = next((above for above in _folders_above(name) if above in known), None)
        if folder is not None:
            raise HubError(
                "A file is also a folder.",
                path=path,
                expected="one of both",
                found=in_ascii(folder),
                remedy="do not use this repository, or ask its owner to rename the file",
            )


def _folders_above(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]


def split_revision(name: str | Path, *, repo_type: str | None = None) -> tuple[str, str | None]:
    """A name as people give it, to repository id and revision.

    `"org/a@v1"` gives `("org/a", "v1")`, and so does the address of its page, `https://huggingface.co/org/a/tree/v1`.
    An existing file or folder has no revision.

    Args:
        name (`str` or `Path`): path, id or address.
        repo_type (`str`, *optional*): `model` or `dataset`: what an address must lead to.

    Raises:
        [`UsageError`]: an address that leads to no such repository, or into one.
    """
    text = str(name).strip()
    if _exists(text):
        return str(name), None
    address = _ADDRESS.fullmatch(text)
    if address is not None:
        return _from_address(text, address, repo_type)
    repo_id, _, revision = text.partition("@")
    return repo_id, revision or None


def _from_address(text: str, address: re.Match[str], repo_type: str | None) -> tuple[str, str | None]:
    scheme = (address["scheme"] or "https").lower()
    url = urlsplit(f"https://{address['rest']}")
    parts = [unquote(part) for part in url.path.split("/") if part]
    if scheme == "hf":
        parts = [unquote(part) for part in address["rest"].split("/") if part]
    elif scheme not in ("http", "https") or url.netloc.lower() not in (*_HOSTS, urlsplit(constants.ENDPOINT).netloc):
        raise _no_address(text, repo_type, found="another address")
    found_type = _SECTIONS.get(parts[0], "model") if parts else "model"
    if parts and parts[0] in _SECTIONS:
        parts = parts[1:]
    if repo_type is not None and found_type != repo_type:
        raise _no_address(text, repo_type, found=f"a {found_type}")
    repo_id, more = "/".join(parts[:2]), parts[2:]
    repo_id, _, revision = repo_id.partition("@")
    if more[:1] and more[0] in _REVISION_PAGES:
        if len(more) > 2 or more[0] not in ("tree", "commit", "commits"):
            raise _no_address(text, repo_type, found="a file or folder in it")
        revision, more = (more[1] if len(more) > 1 else ""), []
    if len(parts) < 2 or more or not is_repo_id(repo_id):
        raise _no_address(text, repo_type, found="a page that is no repository")
    return repo_id, revision or None


def _no_address(text: str, repo_type: str | None, *, found: str) -> UsageError:
    return UsageError(
        f"The address does not lead to a {repo_type or 'repository'} on the Hub.",
        path=one_line(text, 200),
        expected=f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}org/name, or org/name",
        found=found,
        remedy="give the repository's id, with its version as org/name@v1.0",
    )


def looks_like_path(name: str) -> bool:
    """Whether a name that is no existing folder was meant as a path: then the Hub need not be asked for it."""
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") != 1
        or name.endswith(("/", *_FILE_SUFFIXES))
        or re.match(r"[A-Za-z]:", name) is not None
        or _exists(str(Path(name).parent))
    )


def did_you_mean(path: str | Path) -> str:
    """A remedy for a folder that is not there: the one beside it whose name is nearly the same."""
    path = Path(path)
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except (OSError, ValueError):
        names = []
    return nearest_path(path, names)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # names that no file can have
        return False
