"""How durations, sizes, counts and foreign text are put before people."""

from __future__ import annotations

import codecs
import re
import unicodedata


MAX_VALUE_CHARACTERS = 400

# tqdm's bar with what people ask of it: how far, since when, how long still.
BAR_FORMAT = "{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}"

# What a terminal of another encoding gets in place of characters that it lacks; `?` for all others.
_PLAIN = {
    "²": "^2",
    "°": " degrees",
    "·": "*",
    "×": "x",
    "±": "+-",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "→": "->",
    "−": "-",
    "–": "-",
    "—": "-",
    "…": "...",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "ε": "epsilon",
    "δ": "delta",
    "σ": "sigma",
    "Σ": "sum",
    "Δ": "delta",
}
PLAIN_TEXT_ERRORS = "grad_transformer_plain"

_BREAKS = re.compile(r"[\r\n\u2028\u2029\x0b\x0c\x85]")


def _write_plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in characters), error.end


# For `errors=` of streams.
codecs.register_error(PLAIN_TEXT_ERRORS, _write_plainly)


def looks_like(text: str) -> str:
    """What a name looks like, for comparing names: equal for two that differ in case, in how an accent is encoded, in
    punctuation and spaces, or in what nobody sees."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(letter for letter in folded if letter.isalnum()) or folded


def printable(text: object) -> str:
    """Text that moves no cursor, changes no colour and turns no direction; line breaks and tabs are kept.

    Control characters, unpaired surrogates and invisible formatting are shown as escapes, `\\x1b` for instance.
    """
    return "".join(_escape(character) if _is_hidden(character) else character for character in str(text))


def one_line(text: object, most: int = MAX_VALUE_CHARACTERS) -> str:
    """Foreign text as one line of at most `most` characters: line breaks are escaped, a long middle is left out."""
    line = printable(_BREAKS.sub(lambda match: _escape(match.group()), str(text).replace("\t", " ")))
    if len(line) <= most:
        return line
    kept = (most - 3) // 2
    return f"{line[: most - 3 - kept]} … {line[len(line) - kept :]}"


def in_ascii(value: object, most: int = 120) -> str:
    """A foreign value that was refused, in quotes and ASCII: a letter that only looks like another shows itself."""
    return ascii(value[:most] if isinstance(value, str) else value)[:most]


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of what an error says, shortened: other libraries write pages."""
    return (str(error).strip().splitlines() or [""])[0][:most]


def describe_error(error: BaseException) -> str:
    """An error of another library for an error of ours: its kind, and its first line."""
    return f"{type(error).__name__}: {first_line(error)}"


def describe_seconds(seconds: float) -> str:
    """A duration as people say it: `0.4 s`, `50 s`, `3 min 20 s`, `15 h`, `2 h 10 min`, `60 days`."""
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds >= 0.05 else "less than 0.1 s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 3570:
        return _two_units(round(seconds), 60, "min", "s", fine_below=10)
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return _two_units(minutes, 60, "h", "min", fine_below=10)
    days = seconds / 86_400
    return f"{days:,.0f} days" if days < 730 else f"{days / 365.25:,.0f} years"


def describe_bytes(number: float) -> str:
    """A size as people say it: `512 bytes`, `3.2 MiB`, `1,250 GiB`."""
    if number < 1024:
        return f"{number:.0f} bytes"
    unit, factor = next(
        (unit, factor) for unit, factor in (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30)) if _fits(number, factor)
    )
    number /= factor
    return f"{number:.2g} {unit}" if number < 10 else f"{number:,.0f} {unit}"


def describe_count(number: float) -> str:
    """A large number as people say it: `512`, `33 thousand`, `7.6 billion`."""
    if number < 10_000:
        return f"{number:,.0f}"
    words = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand"))
    size, word = next((size, word) for size, word in words if number >= 0.9995 * size)
    return f"{number / size:.3g} {word}" if number / size < 100 else f"{number / size:,.0f} {word}"


def _fits(number: float, factor: int) -> bool:
    """Whether a number of bytes has at most three digits in this unit; the largest unit takes all."""
    return number < 999.5 * factor or factor == 2**30


def _two_units(number: int, base: int, large: str, small: str, *, fine_below: int) -> str:
    """The smaller unit only where it says something."""
    whole, rest = divmod(number, base)
    if whole >= fine_below:
        return f"{round(number / base)} {large}"
    return f"{whole} {large} {rest} {small}" if rest else f"{whole} {large}"


def _is_hidden(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs")


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
