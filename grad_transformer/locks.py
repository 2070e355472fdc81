"""One process at a time where two would do the same work, or write over each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import OutputError


LOCK_NAME = ".grad_transformer.lock"


@contextmanager
def sole_writer(folder: str | Path) -> Iterator[None]:
    """While entered, no other process that asks for it gets the folder; a process that is killed lets go of it.

    Raises:
        [`OutputError`]: another process has it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout as cause:
        raise OutputError(
            "Another process is at work in this folder.",
            path=folder,
            expected="one process at a time",
            found=f"{LOCK_NAME} is held",
            remedy="wait for it; one that was killed holds nothing",
        ) from cause
    except NotImplementedError:
        # A file system without locks: nothing tells of another process.
        yield
        return
    try:
        yield
    finally:
        lock.release()
