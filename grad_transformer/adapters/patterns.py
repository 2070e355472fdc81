"""Rank and alpha patterns of adapter configs: regular expressions, in files that a stranger may have written.

peft matches every pattern against every module. A pattern such as `(a+)+$` takes time exponential in the length of a
name, so only patterns that cannot are let through.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any


MAX_PATTERNS = 4096
MAX_PATTERN_LENGTH = 256
# Patterns with a quantifier: peft puts another one before each, so a match takes time quadratic in a name's length.
MAX_QUANTIFIED_PATTERNS = 16
# Patterns times modules.
MAX_MATCHES = 2**18

# The whole of what may stand in a pattern: names, dots, anchors, classes, alternatives, and quantifiers.
_ALLOWED = re.compile(r"[\w.\-^$|()\[\]*+?\\{},:]*")
_QUANTIFIER = re.compile(r"(?<!\\)[*+?{]")
_QUANTIFIED_GROUP = re.compile(r"\)\s*[*+?{]")
_EXTENSION = re.compile(r"\(\?(?!:)|\\[1-9]")


def check_patterns(*mappings: Mapping[str, Any]) -> None:
    """Refuse patterns whose matching time is not bounded.

    Raises:
        `ValueError`: too many, too long, or with nested or repeated quantifiers, look-around or back references.
        `AttributeError`: not a mapping.
    """
    keys = [key for mapping in mappings for key in mapping.keys()]  # noqa: SIM118 - a list must not pass
    if len(keys) > MAX_PATTERNS:
        raise ValueError(f"{len(keys)} patterns, at most {MAX_PATTERNS} are read")
    quantified = 0
    for key in keys:
        quantifiers = len(_QUANTIFIER.findall(key.replace("(?:", "(")))
        quantified += quantifiers > 0
        if (
            len(key) > MAX_PATTERN_LENGTH
            or not _ALLOWED.fullmatch(key)
            or quantifiers > 1
            or _QUANTIFIED_GROUP.search(key)
            or _EXTENSION.search(key)
        ):
            raise ValueError(f"the pattern {key[:60]!r} is not simple")
    if quantified > MAX_QUANTIFIED_PATTERNS:
        raise ValueError(f"{quantified} patterns with quantifiers, at most {MAX_QUANTIFIED_PATTERNS} are read")


def pattern_matcher(patterns: Mapping[str, Any], default: Any, num_modules: int) -> Callable[[str], Any]:
    """From a module's path to the value of the first pattern that matches it as peft matches, or the default.

    Raises:
        `ValueError`, `AttributeError`, `re.error`: see [`check_patterns`]; or too many for so many modules.
    """
    check_patterns(patterns)
    if len(patterns) * num_modules > MAX_MATCHES:
        raise ValueError(f"{len(patterns)} patterns for {num_modules} modules")
    compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]

    def match(module: str) -> Any:
        return next((value for pattern, value in compiled if pattern.match(module)), default)

    return match
