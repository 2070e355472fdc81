"""Folders `checkpoint-<step>` of a trainer: a run that was killed while it wrote one goes on from the one before."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging


logger = logging.get_logger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")


def numbered_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """Step and folder of every checkpoint, whole or not, the first step first; none where there is no such folder."""
    found = [(_NAME.fullmatch(path.name), path) for path in Path(folder).glob("checkpoint-*") if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def last_whole_checkpoint(
    folder: str | Path, is_whole: Callable[[Path, int], bool], *, remove_others: bool = False
) -> Path | None:
    """The latest checkpoint that was written to its end; None where there is none.

    Args:
        folder (`str` or `Path`): with folders `checkpoint-<step>`.
        is_whole (`Callable[[Path, int], bool]`): whether a checkpoint of a step was.
        remove_others (`bool`, *optional*, defaults to `False`): remove those that were not, and say so.
    """
    last = None
    for step, path in numbered_checkpoints(folder):
        if is_whole(path, step):
            last = path
        elif remove_others:
            logger.warning(f"{path} was not written to its end: it is removed.")
            shutil.rmtree(path, ignore_errors=True)
    return last
