"""Whether a checkpoint of a mapper's training is whole."""

from __future__ import annotations

import zipfile
from pathlib import Path

from ..adapters.io import read_header, read_record
from ..constants import SOURCE_FOLDER, TARGET_FOLDER
from ..errors import GradTransformerError
from ..schemas import TrainerStateRecord


_STATE_NAME = "trainer_state.json"


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
