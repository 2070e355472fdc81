"""Durations, sizes and foreign text as people read them."""

from __future__ import annotations

import pytest

from grad_transformer.errors import UsageError
from grad_transformer.wording import (
    PLAIN_TEXT_ERRORS,
    describe_bytes,
    describe_count,
    describe_seconds,
    one_line,
    printable,
)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "less than 0.1 s"),
        (0.4, "0.4 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (1230, "20 min"),
        (3599, "1 h"),
        (7800, "2 h 10 min"),
        (15.2 * 3600, "15 h"),
        (60 * 86_400, "60 days"),
        (5.234e5 * 3600, "60 years"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert describe_seconds(seconds) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [(512, "512 bytes"), (3.2 * 2**20, "3.2 MiB"), (999.9 * 2**10, "0.98 MiB"), (1250 * 2**30, "1,250 GiB")],
)
def test_sizes(number: float, words: str) -> None:
    assert describe_bytes(number) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [(512, "512"), (9_999, "9,999"), (33_000, "33 thousand"), (7.62e9, "7.62 billion"), (3.4e15, "3,400 trillion")],
)
def test_counts(number: float, words: str) -> None:
    assert describe_count(number) == words


def test_foreign_text_moves_no_cursor_and_turns_no_direction() -> None:
    assert printable("a\x1b[2Jb\x9bc\u202ed\ud800\n\té²") == "a\\x1b[2Jb\\x9bc\\u202ed\\ud800\n\té²"
    assert one_line("a\nremedy: rm\u2028x\ty") == "a\\nremedy: rm\\u2028x y"
    assert one_line("begin" + "x" * 999 + "end", 20).startswith("begin")
    assert len(one_line("x" * 999, 20)) <= 20


def test_no_field_of_an_error_can_be_forged() -> None:
    error = UsageError("Broken:\n  remedy:   run this", found="a\n  remedy:   and this\x1b[1m", remedy="mend it")
    lines = str(error).splitlines()
    assert [line for line in lines if line.startswith("  remedy:")] == ["  remedy:   mend it"]
    assert "\x1b" not in str(error)


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "latin-1"])
def test_a_terminal_that_lacks_a_character_gets_another(encoding: str) -> None:
    text = "R² → x ± ε ☃".encode(encoding, PLAIN_TEXT_ERRORS).decode(encoding)
    assert text.startswith(("R^2", "R²")) and text.endswith("?")
    assert "epsilon" in text or encoding == "gbk"
