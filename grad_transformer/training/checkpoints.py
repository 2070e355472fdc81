"""Checkpoints that are whole: a training that was killed while it wrote one goes on from the one before."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path

from transformers.utils import logging

from ..adapters.io import read_header, read_record
from ..constants import SOURCE_FOLDER, TARGET_FOLDER
from ..errors import GradTransformerError
from ..schemas import TrainerStateRecord


logger = logging.get_logger(__name__)

_STATE_NAME = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def last_whole_checkpoint(folder: str | Path, *, remove_others: bool = False) -> Path | None:
    """The latest checkpoint that was written to its end; None where there is none.

    Args:
        folder (`str` or `Path`): with folders `checkpoint-<step>`.
        remove_others (`bool`, *optional*, defaults to `False`): remove those that were not, and say so.
    """
    if not Path(folder).is_dir():
        return None
    matches = [(path, _NAME.fullmatch(path.name)) for path in Path(folder).iterdir() if path.is_dir()]
    checkpoints = sorted((int(match[1]), path) for path, match in matches if match)
    whole = None
    for step, path in checkpoints:
        if is_whole(path, step):
            whole = path
        elif remove_others:
            logger.warning(f"{path} was not written to its end: it is removed.")
            shutil.rmtree(path, ignore_errors=True)
    return whole


def is_whole(checkpoint: Path, step: int) -> bool:
    """Whether a checkpoint has its state, which `Trainer` writes last, and no file that ends too early."""
    try:
        state = read_record(checkpoint / _STATE_NAME, TrainerStateRecord)
        if state["global_step"] != step or not (checkpoint / "config.json").is_file():
            return False
        weights = sorted(checkpoint.glob("*.safetensors"))
        for path in weights:
            read_header(path)
        states = [path for pattern in ("*.pt", "*.pth", "*.bin") for path in checkpoint.glob(pattern)]
        # Weights in pieces (FSDP, DeepSpeed) lie in folders, of which the state has to speak alone.
        folders = {path.name for path in checkpoint.iterdir() if path.is_dir()} - {SOURCE_FOLDER, TARGET_FOLDER}
    except (OSError, GradTransformerError):
        return False
    return bool(weights or folders) and all(zipfile.is_zipfile(path) for path in states)
