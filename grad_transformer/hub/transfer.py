"""One call to the Hub: tried again while the Hub is busy, and a typed error that mends where it fails."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import logging

from ..errors import GradTransformerError, HubError


logger = logging.get_logger(__name__)
T = TypeVar("T")

# Base of the errors of huggingface_hub's HTTP library, whichever its version uses.
HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]

# What huggingface_hub raises; a RuntimeError wraps the failed upload of one file.
TRANSFER_ERRORS = (HTTPError, HFValidationError, LocalEntryNotFoundError, OSError, RuntimeError)

BUSY = (408, 425, 429, 500, 502, 503, 504)
MAX_TRIES = 6
# A connection that cannot be made is seldom there a moment later.
MAX_CONNECTION_TRIES = 3
# A host whose name is not known is one that a machine without the network asks for.
MAX_NAME_TRIES = 2
MAX_WAIT_SECONDS = 600.0
_MAX_FOUND = 500

_RATELIMIT = re.compile(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}|(?<=Bearer )\S+")


def call_hub(function: Callable[..., T], *args: Any, about: str | Path, **kwargs: Any) -> T:
    """Call a function of huggingface_hub, again while the Hub is busy (429, 5xx) or the connection breaks.

    Waits as long as `Retry-After` or the `ratelimit` headers say, and otherwise 1, 2, 4, ... seconds. What is tried
    again must be harmless to do twice.

    Args:
        function (`Callable`), args, kwargs: what to call.
        about (`str` or `Path`): the repository, for messages.

    Raises:
        [`HubError`]: the call failed, or the Hub asks to wait for more than ten minutes.
    """
    tries = 0
    while True:
        tries += 1
        try:
            return function(*args, **kwargs)
        except TRANSFER_ERRORS as error:
            wait_or_raise(error, tries, about)


def wait_or_raise(error: Exception, tries: int, about: str | Path) -> None:
    """After the `tries`-th failure: return when it is time to try again; raise [`HubError`] where that cannot help."""
    if isinstance(error, GradTransformerError) or (
        isinstance(error, RuntimeError) and not isinstance(_http_cause(error), HTTPError)
    ):
        raise error
    wait = _seconds_to_wait(error, tries)
    if wait is None:
        raise hub_error(error, about) from error
    logger.warning("The Hub is busy or cannot be reached; trying again in %.0f s.", wait)
    time.sleep(wait)


def status_of(error: BaseException) -> int | None:
    """HTTP status behind an error, also where huggingface_hub wrapped it."""
    response = getattr(_http_cause(error), "response", None)
    return None if response is None else int(response.status_code)


def cannot_connect(error: BaseException) -> bool:
    """Whether no answer came at all: no network, no such host, a connection that broke."""
    cause = _http_cause(error)
    return isinstance(cause, HTTPError) and getattr(cause, "response", None) is None


def _http_cause(error: BaseException) -> BaseException:
    return next((cause for cause in _causes(error) if isinstance(cause, HTTPError)), error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    for _ in range(20):
        if current is not None:
            yield current
            current = current.__cause__ or current.__context__


def _seconds_to_wait(error: BaseException, tries: int) -> float | None:
    """None where trying again does not help."""
    status = status_of(error)
    if status is None:
        most = MAX_NAME_TRIES if any(isinstance(cause, socket.gaierror) for cause in _causes(error)) else None
        again = cannot_connect(error) and tries < (most or MAX_CONNECTION_TRIES)
        return 2.0 ** (tries - 1) if again else None
    if status not in BUSY or tries >= MAX_TRIES:
        return None
    asked = _asked_to_wait(getattr(_http_cause(error), "response").headers)  # noqa: B009
    wait = 2.0 ** (tries - 1) if asked is None else asked
    return wait if wait <= MAX_WAIT_SECONDS else None


def _asked_to_wait(headers: Any) -> float | None:
    """Seconds from `ratelimit` (`"api";r=0;t=55`) or `Retry-After` (seconds, or a date)."""
    match = _RATELIMIT.search(headers.get("ratelimit", ""))
    if match:
        return float(match[1])
    value = (headers.get("Retry-After") or "").strip()
    if value.isdigit():
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    return max(0.0, (until - datetime.now(timezone.utc)).total_seconds())


def hub_error(error: BaseException, about: str | Path) -> HubError:
    """The typed error for what huggingface_hub raised; it holds no token."""
    status = status_of(error)
    cause = _http_cause(error)
    if isinstance(error, HFValidationError) or (isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled)):
        message = "Neither a folder nor a Hub repository that can be reached."
        expected = "an existing folder, or the id of a repository on the Hub"
        remedy = "check the spelling, the network (HF_HUB_OFFLINE), and your access token (HF_TOKEN)"
    elif isinstance(cause, GatedRepoError):
        message, expected = "The repository is gated.", "an account that was given access"
        remedy = "ask for access on the repository's page, then log in (`hf auth login`, or HF_TOKEN)"
    elif isinstance(cause, RevisionNotFoundError):
        message, expected = "The repository has no such version.", "a tag, branch or commit that exists"
        remedy = "see its tags with `hf repos tag list`, or leave the revision out"
    elif isinstance(cause, RepositoryNotFoundError) or status == 401:
        message = "Neither a folder nor a Hub repository that can be reached."
        expected = "an existing folder, or the id of a repository that this account may read"
        remedy = "check the spelling; a private repository needs a token (`hf auth login`, or HF_TOKEN)"
    elif isinstance(cause, EntryNotFoundError):
        message, expected = "The repository lacks a file.", "a repository of this library, whole"
        remedy = "check the repository and its version"
    elif status == 403:
        message, expected = "The Hub refuses this.", "a token with write access to the repository"
        remedy = "log in with a token that may write there (`hf auth login`, or HF_TOKEN)"
    elif status == 429:
        message, expected = "The Hub asks to wait for too long.", "an answer"
        remedy = "run it again later: what was transferred is kept"
    elif status is not None:
        message, expected = "The Hub does not do what was asked.", "success"
        remedy = "run it again: what was transferred is kept"
    elif not cannot_connect(error):
        message, expected = "The transfer failed.", "whole files"
        remedy = "run it again: what was transferred is kept; check the space on the disk"
    else:
        message, expected = "The Hub cannot be reached.", "an answer"
        remedy = (
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and the spelling if a folder was meant; cached "
            "versions load with local_files_only"
        )
    return HubError(message, path=about, expected=expected, found=_found(cause, status), remedy=remedy)


def _found(cause: BaseException, status: int | None) -> str:
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    code = "" if status is None else f" {status}"
    return redact(f"{type(cause).__name__}{code}: {lines[0] if lines else ''}")


def redact(text: str) -> str:
    """Text without tokens, without this machine's home folder, and without what a terminal would obey."""
    home = re.compile(rf"(?<![\w.-]){re.escape(str(Path.home()))}(?![\w.-])")
    plain = "".join(letter if letter.isprintable() else "_" for letter in text[:_MAX_FOUND])
    return home.sub("~", _TOKEN.sub("***", plain))
