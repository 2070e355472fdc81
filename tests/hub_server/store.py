"""Repositories as commits over content-addressed files, accounts, access."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


LARGE = (".safetensors", ".parquet", ".png", ".bin", ".npz")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE).encode()


class ApiError(Exception):
    """An answer that is no success, with the Hub's own error code."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Account:
    """A user, the organisations it may write to, and whether its token may write at all."""

    name: str
    orgs: tuple[str, ...] = ()
    write: bool = True

    def may_write(self, namespace: str) -> bool:
        return self.write and namespace in (self.name, *self.orgs)

    def belongs_to(self, namespace: str) -> bool:
        return namespace in (self.name, *self.orgs)


@dataclass(frozen=True)
class Entry:
    """A file of a commit: `oid` is git's SHA-1 of small content, the SHA-256 of large."""

    oid: str
    size: int
    large: bool

    def describe(self, path: str) -> dict[str, Any]:
        if not self.large:
            return {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {self.size}\n".encode()
        lfs = {"oid": self.oid, "size": self.size, "pointerSize": len(pointer)}
        return {"type": "file", "path": path, "size": self.size, "oid": git_sha(pointer), "lfs": lfs}


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    tree: dict[str, Entry]


@dataclass
class Repo:
    kind: str
    name: str
    private: bool
    gated: str | bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.name.split("/")[0]

    def commit_at(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise ApiError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def add_commit(self, branch: str, title: str, tree: dict[str, Entry]) -> Commit:
        parent = self.branches.get(branch)
        facts = [self.kind, self.name, parent, title, sorted((path, entry.oid) for path, entry in tree.items())]
        commit = Commit(hashlib.sha1(json.dumps(facts).encode()).hexdigest(), parent, title, tree)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit


def git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Store:
    """All state of the server; every access holds `lock`."""

    def __init__(self, folder: Path, tokens: dict[str, Account]):
        self.folder = folder
        self.tokens = tokens
        self.repos: dict[tuple[str, str], Repo] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.lock = threading.RLock()
        (folder / "objects").mkdir(parents=True, exist_ok=True)

    # Content

    def path(self, oid: str) -> Path:
        return self.folder / "objects" / oid

    def put(self, oid: str, content: bytes) -> None:
        temporary = self.path(f"{oid}.{threading.get_ident()}")
        temporary.write_bytes(content)
        temporary.replace(self.path(oid))

    def put_small(self, content: bytes) -> Entry:
        oid = git_sha(content)
        self.put(oid, content)
        return Entry(oid, len(content), False)

    # Repositories

    def create(self, kind: str, name: str, private: bool) -> Repo:
        repo = Repo(kind, name, private)
        repo.add_commit("main", "initial commit", {".gitattributes": self.put_small(GITATTRIBUTES)})
        self.repos[(kind, name)] = repo
        return repo

    def account(self, token: str | None) -> Account | None:
        if token is None:
            return None
        if token not in self.tokens:
            raise ApiError(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def readable(self, kind: str, name: str, account: Account | None, *, content: bool = False) -> Repo:
        """The repository, if the account may know of it; with `content`, if it may have its files."""
        repo = self.repos.get((kind, name))
        inside = repo is not None and account is not None and account.belongs_to(repo.namespace)
        granted = repo is not None and account is not None and account.name in repo.granted
        if repo is None or (repo.private and not inside and not granted):
            raise ApiError(404 if account else 401, "Repository not found", "RepoNotFound")
        if content and repo.gated and not inside and not granted:
            raise ApiError(403 if account else 401, "Access to this repository is restricted", "GatedRepo")
        return repo

    def writable(self, kind: str, name: str, account: Account | None) -> Repo:
        repo = self.readable(kind, name, account)
        if account is None or not account.may_write(repo.namespace):
            raise ApiError(403, "You don't have the rights to write to this repository")
        return repo
