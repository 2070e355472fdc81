"""The names that git and the Hub give to content."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


def git_blob_sha(content: bytes) -> str:
    """The name that git, and so the Hub, gives to a small file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def git_file_sha(path: Path) -> str:
    """The same, of a file on disk."""
    return _digest(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    return _digest(path, hashlib.sha256())


def _digest(path: Path, digest: Any) -> str:
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(2**20), b""):
            digest.update(chunk)
    return str(digest.hexdigest())
