"""How much this library's loggers say: as much as transformers' own, whose tree they lie outside of."""

from __future__ import annotations

import logging
import os


def chosen_level() -> int | None:
    """The level that `TRANSFORMERS_VERBOSITY` names, as transformers reads it; `None` where it names none."""
    levels = {
        "detail": logging.DEBUG,
        "debug": logging.DEBUG,
        "info": logging.INFO,
        "warning": logging.WARNING,
        "error": logging.ERROR,
        "critical": logging.CRITICAL,
    }
    return levels.get(os.environ.get("TRANSFORMERS_VERBOSITY", "").lower())
