"""Repositories on the Hub: versions that never move, resolved to a commit once; cards; nothing private in them."""

from .kinds import KINDS, RepoKind, find_kind
from .names import split_revision
from .origins import Origin
from .push import pull_folder, push_delta_dataset, push_folder
from .repos import ALLOWED_PATTERNS, Published, publish
from .revisions import Fetched, fetch, resolve, resolve_folder


__all__ = [
    "ALLOWED_PATTERNS",
    "KINDS",
    "Fetched",
    "Origin",
    "Published",
    "RepoKind",
    "fetch",
    "find_kind",
    "publish",
    "pull_folder",
    "push_delta_dataset",
    "push_folder",
    "resolve",
    "resolve_folder",
    "split_revision",
]
