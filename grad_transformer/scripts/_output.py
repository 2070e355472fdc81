"""What a command prints: its result on stdout, messages on stderr, in characters that the terminal has.

All of it may quote names and values that other people wrote, so all of it passes [`printable`].
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..verbosity import chosen_level
from ..wording import PLAIN_TEXT_ERRORS, printable


_LIBRARIES = r"(accelerate|datasets|huggingface_hub|opacus|peft|torch|transformers|trl)\."


def write_plainly() -> None:
    """Let stdout and stderr put other characters where their encoding lacks one, instead of failing at it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PLAIN_TEXT_ERRORS)


def emit(data: Mapping[str, Any], *, json_output: bool, text: str) -> None:
    """Print a result on stdout, on the main process only where several run (`accelerate launch`)."""
    if os.environ.get("RANK", "0") != "0":
        return
    print(json.dumps(_to_json(data), indent=2, allow_nan=False) if json_output else printable(text.rstrip("\n")))
    sys.stdout.flush()


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_to_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return _to_json(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextlib.contextmanager
def command_logging() -> Iterator[None]:
    """Show this library's messages on stderr while a command runs: its progress too (level info), unless
    `TRANSFORMERS_VERBOSITY` names another level."""
    logger = logging.getLogger("grad_transformer")
    before = (logger.level, logger.propagate)
    logger.setLevel(chosen_level() or logging.INFO)
    logger.propagate = False
    handler = _AboveBars(sys.stderr)
    handler.setFormatter(_MessageFormatter())
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            # What libraries warn each other of is not the user's to mend; what is, our own messages say.
            for category in (FutureWarning, UserWarning):
                warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
            yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before[0], before[1]


class _AboveBars(logging.StreamHandler):
    """Messages stand above progress bars, not behind them."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class _MessageFormatter(logging.Formatter):
    """The plain message; its level before it from warnings upwards."""

    def format(self, record: logging.LogRecord) -> str:
        message = printable(super().format(record))
        return message if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {message}"
