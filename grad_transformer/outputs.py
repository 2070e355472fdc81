"""Where results go: a folder is tried before the work, and never something else's."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from .constants import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_METADATA_NAME,
    ADAPTER_WEIGHTS_NAME,
    CARD_NAME,
    DELTA_DATASET_NAME,
    DEMO_NAME,
    HELDOUT_NAME,
    ORIGIN_NAME,
    PLAN_NAME,
    REPORT_FOLDER,
    REPORT_NAME,
    ROOT_NAME,
    RUNS_FOLDER,
    SHIFT_NAME,
    SHIFT_TENSORS_NAME,
    SOURCE_FOLDER,
    STUDY_NAME,
    TARGET_FOLDER,
    TRAINING_IDENTITY_NAME,
    TRAINING_LOG_NAME,
)
from .errors import GradTransformerError, OutputError
from .files import read_record
from .schemas import Object


# What is written to try a place: enough that a full disk says so.
_TRIAL_BYTES = 2**18

OutputKind = Literal[
    "shadow_plan",
    "delta_dataset",
    "mapper",
    "client_adapter",
    "generated_adapter",
    "report",
    "demo",
    "study",
    "copy",
]


@dataclass(frozen=True)
class _Kind:
    """What people call it, and patterns of all that it has at its top, also where its command was interrupted."""

    words: str
    names: tuple[str, ...]


_ADAPTER = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, ADAPTER_METADATA_NAME, CARD_NAME)
_ROOTS = (f"{SOURCE_FOLDER}_root", f"{TARGET_FOLDER}_root")
_MAPPER = (
    *("config.json", "model*.safetensors", "model.safetensors.index.json", SOURCE_FOLDER, TARGET_FOLDER, CARD_NAME),
    *("checkpoint-*", "training_args.json", TRAINING_IDENTITY_NAME, TRAINING_LOG_NAME, HELDOUT_NAME),
    *(SHIFT_NAME, SHIFT_TENSORS_NAME, RUNS_FOLDER, REPORT_FOLDER),
)
_KINDS = {
    "shadow_plan": _Kind("a shadow plan", (PLAN_NAME, *_ROOTS, RUNS_FOLDER)),
    "delta_dataset": _Kind("a delta dataset", (DELTA_DATASET_NAME, PLAN_NAME, *_ROOTS, "data", CARD_NAME)),
    "mapper": _Kind("a mapper", _MAPPER),
    "client_adapter": _Kind("a client's adapter", _ADAPTER),
    "generated_adapter": _Kind("a generated adapter", _ADAPTER),
    "report": _Kind("a report", (REPORT_NAME, "report.md", "*.png")),
    "demo": _Kind("a demo", (DEMO_NAME,)),
    "study": _Kind("a study", (STUDY_NAME, "study.md", "*.png", "stages")),
    "copy": _Kind("a copy of a repository", (ORIGIN_NAME,)),
    "root": _Kind("a root", (*_ADAPTER, ROOT_NAME)),
    "adapter": _Kind("a PEFT adapter", _ADAPTER),
    "model": _Kind("a model", ()),
}


def prepare_output(folder: str | Path, kind: OutputKind, *, inputs: Iterable[str | Path | None] = ()) -> Path:
    """Check, before any work, that a result may and can be written to a folder. Nothing is written.

    A folder may be new, empty, or hold the same kind, finished or interrupted: that is what its command goes on with
    or writes anew.

    Args:
        folder (`str` or `Path`): the place of the result.
        kind (`str`): what will be written.
        inputs (`Iterable`, *optional*): what the result is made from: paths, names of repositories, or None.

    Returns:
        `Path`: the folder.

    Raises:
        [`OutputError`]: it holds something else, is an input or lies in one, or cannot be written to.
    """
    folder = Path(folder)
    for given in inputs:
        path = None if given is None else Path(given)
        if path is not None and path.exists() and folder.resolve().is_relative_to(path.resolve()):
            raise OutputError(
                "The result would be written over or into what it is made from.",
                path=folder,
                expected="a folder of its own",
                found=f"{given} is an input",
                remedy="choose another --output_dir",
            )
    try_writing(folder)
    if not folder.is_dir():
        return folder
    entries = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    found = _kind_of(folder)
    names = (*_KINDS[kind].names, ORIGIN_NAME)
    foreign = [name for name in entries if not any(fnmatch(name, pattern) for pattern in names)]
    if found not in (None, kind) or (found is None and foreign):
        raise OutputError(
            "The folder of the result holds something else.",
            path=folder,
            expected=f"a new or empty folder, or {_KINDS[kind].words}",
            found=_KINDS[found].words if found else ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else ""),
            remedy="choose another --output_dir, or move away what is there",
        )
    return folder


def check_manifest(folder: str | Path, name: str, expected: str, *, error: type[GradTransformerError]) -> None:
    """Refuse a folder without the manifest that is to be read, where it plainly holds something else.

    Args:
        folder (`str` or `Path`): the folder.
        name (`str`): its manifest's name. Where the folder holds nothing known, whoever reads it says what is missing.
        expected (`str`): what it should hold: adapter, mapper or delta dataset.
        error (`type`): what is raised.

    Raises:
        `error`
    """
    found = None if (Path(folder) / name).exists() else holds(folder)
    if found is not None and expected not in found:
        raise error(
            f"The folder holds no {expected}.",
            path=folder,
            expected=name,
            found=found,
            remedy="check which folder is meant",
        )


def holds(folder: str | Path) -> str | None:
    """In words, what a folder holds of all that this library writes or reads; None where it is none of it."""
    found = _kind_of(Path(folder))
    return None if found is None else _KINDS[found].words


def _kind_of(folder: Path) -> str | None:
    def has(*names: str) -> bool:
        return any((folder / name).is_file() for name in names)

    if has(DEMO_NAME):
        return "demo"
    if has(STUDY_NAME):
        return "study"
    if has(DELTA_DATASET_NAME) or any((folder / "data").glob("*-*-of-*.parquet")):
        return "delta_dataset"
    if has(ROOT_NAME):
        return "root"
    if has(ADAPTER_CONFIG_NAME, ADAPTER_METADATA_NAME):
        return _kind_of_adapter(folder / ADAPTER_METADATA_NAME)
    if has(TRAINING_IDENTITY_NAME) or any(folder.glob("checkpoint-*/config.json")):
        return "mapper"
    if has("config.json"):
        return "mapper" if _read(folder / "config.json").get("model_type") == "grad_transformer" else "model"
    if has(PLAN_NAME):
        return "shadow_plan"
    return "report" if has(REPORT_NAME) else None


def _kind_of_adapter(metadata: Path) -> str:
    if not metadata.is_file():
        return "adapter"
    return "generated_adapter" if "generated" in _read(metadata) else "client_adapter"


def _read(path: Path) -> dict[str, object]:
    """A manifest, or nothing where it cannot be read: whoever uses the folder says why."""
    try:
        return read_record(path, Object)
    except GradTransformerError:
        return {}


def try_writing(folder: str | Path) -> None:
    """Find out whether files can be written to a folder, or where it would be made. Leaves nothing behind.

    Raises:
        [`OutputError`]: a file is in the way, no permission, a read-only or a full disk.
    """
    place = Path(folder).absolute()
    try:
        while not os.path.lexists(place):
            place = place.parent
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as cause:
        raise OutputError(
            "The result cannot be written there.",
            path=folder,
            expected="a folder on a disk with space that may be written to",
            found=f"{place}: {cause.strerror}",
            remedy="free space, or choose another --output_dir",
        ) from cause


_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}
# Libraries that write in their own way report what the system said as text.
_DISK_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|Read-only file system|Permission denied|os error (28|30|122|13)\b"
    r"|PytorchStreamWriter|inline_container\.cc.*(write|pos)",
    re.DOTALL,
)


def disk_error(error: BaseException) -> OutputError | None:
    """The typed error for one that a full, read-only or forbidden disk has caused; None for every other.

    Args:
        error (`BaseException`): of the system, or of a library that was writing when the system refused.
    """
    cause: BaseException | None = error
    while cause is not None:
        path = getattr(cause, "filename", None)
        known = isinstance(cause, OSError) and cause.errno in _DISK_ERRORS
        if known or (isinstance(cause, OSError | RuntimeError) and _DISK_WORDS.search(str(cause))):
            return _refused(cause, path)
        if type(cause).__name__ == "SafetensorError" and _DISK_WORDS.search(str(cause)):
            return _refused(cause, path)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _refused(cause: BaseException, path: object) -> OutputError:
    # torch says only that fewer bytes arrived than it wrote.
    short = isinstance(cause, RuntimeError)
    said = [] if short else (getattr(cause, "strerror", None) or str(cause)).strip().splitlines()
    return OutputError(
        "The system refused to read or write a file.",
        path=None if path is None else str(path),
        found="a file that ended too early, as on a full disk" if short else said[0][:200] if said else None,
        remedy="free space, or see that the place may be written to, and run the same command again: "
        "what was finished is kept",
    )
