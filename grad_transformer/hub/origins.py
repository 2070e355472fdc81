"""Where on the Hub something came from, as this machine knows it from its own downloads.

A folder cannot say it of itself: whoever made it could write anything. So `pull` records in the user's own cache what
it wrote where, and a folder has that origin as long as its files are those. `hub_origin.json` in the folder tells
people the same; it is never believed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers.utils import logging

from ..errors import HubError
from ..files import read_record, write_json_atomic
from ..schemas import PullRecord
from ..wording import in_ascii
from .hashes import file_sha256
from .names import is_commit, is_repo_id, is_revision


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where on the Hub something came from.

    Args:
        repo_id (`str`): repository.
        revision (`str` or `None`): the tag or branch that was asked for; `None`: the default branch.
        sha (`str`): the commit that it was at.
        private (`bool` or `None`): whether the repository was private; `None` where it was not asked (offline).

    Raises:
        [`HubError`]: a field that cannot be what it should be.
    """

    repo_id: str
    revision: str | None
    sha: str
    private: bool | None = None

    def __post_init__(self) -> None:
        fits = {
            "repo_id": is_repo_id(self.repo_id),
            "revision": self.revision is None or is_revision(self.revision),
            "sha": is_commit(self.sha),
            "private": self.private is None or isinstance(self.private, bool),
        }
        for name, fine in fits.items():
            if not fine:
                raise HubError(
                    f"`{name}` of an origin on the Hub is malformed.",
                    expected="a repository id, a tag or branch, and a commit of 40 hexadecimal digits",
                    found=in_ascii(getattr(self, name)),
                    remedy="make again what names it",
                )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Origin:
        """The inverse of [`~Origin.to_dict`].

        Raises:
            [`HubError`]: a field is missing or malformed.
        """
        return cls(*(data.get(name) for name in ("repo_id", "revision", "sha", "private")))  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, str | None]:
        """What is written into everything that is made from it."""
        return {"repo_id": self.repo_id, "revision": self.revision, "sha": self.sha}


def record_pull(folder: Path, origin: Origin, files: Mapping[str, str]) -> None:
    """Remember that a folder was pulled: its files by name, with their SHA-256."""
    record = {**origin.to_dict(), "private": origin.private, "folder": str(folder.resolve()), "files": dict(files)}
    write_json_atomic(_record_path(folder), record)


def pulled_origin(folder: Path, patterns: Sequence[str]) -> Origin | None:
    """Where a folder was pulled from; `None` where nobody pulled it here, or where a file is not as it was pulled.

    Args:
        folder (`Path`): the folder.
        patterns (`Sequence[str]`): the files that are used of it: these are compared.
    """
    record = pull_record(folder)
    if not record:
        return None

    def used(names: Iterable[str]) -> list[str]:
        return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in patterns))

    pulled = {name: record["files"][name] for name in used(record["files"])}
    found = used(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if found != list(pulled) or any(file_sha256(folder / name) != pulled[name] for name in found):
        logger.warning("%s was changed since it was pulled: it counts as a folder of your own.", folder)
        return None
    return Origin.from_dict(record)


def pull_record(folder: Path) -> dict[str, Any]:
    """What [`record_pull`] wrote of a folder; empty where nothing was pulled into it on this machine.

    Where several users share a cache, what another one wrote there is not believed.
    """
    path = _record_path(folder)
    if not path.is_file() or (hasattr(os, "getuid") and path.stat().st_uid != os.getuid()):
        return {}
    record = dict(read_record(path, PullRecord))
    return record if record.get("folder") == str(folder.resolve()) else {}


def _record_path(folder: Path) -> Path:
    name = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
    return Path(constants.HF_HOME).expanduser() / "grad_transformer" / "pulled" / f"{name}.json"
