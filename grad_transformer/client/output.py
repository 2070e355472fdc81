"""The folder that a client's adapter is written to: tried before the fine-tune, and shared with nothing else."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..adapters import LoraAdapter
from ..adapters.privacy import statement_of
from ..constants import ADAPTER_CONFIG_NAME, ADAPTER_METADATA_NAME, ADAPTER_WEIGHTS_NAME, CARD_NAME, ORIGIN_NAME
from ..errors import AdapterFormatError, UsageError
from ..files import read_record
from ..schemas import AdapterMetadataRecord


_OWN_FILES = {ADAPTER_CONFIG_NAME, ADAPTER_METADATA_NAME, ADAPTER_WEIGHTS_NAME, CARD_NAME, ORIGIN_NAME}
_SPARE_BYTES = 2**16
_DISK_WORDS = re.compile("StreamWriter|write failed|No space left|Read-only")


def check_output_dir(
    output_dir: str | Path, *, bytes_needed: int = 0, checkpoint_dir: str | Path | None = None
) -> None:
    """Refuse a folder that a client's adapter cannot, or should not, be written to. Nothing is created.

    Args:
        output_dir (`str` or `Path`): new, empty, or with a client's adapter that will be replaced.
        bytes_needed (`int`, *optional*, defaults to 0): of the adapter's values.
        checkpoint_dir (`str` or `Path`, *optional*): must lie outside, since checkpoints stay with the client.

    Raises:
        [`UsageError`]: a file; a folder that holds something else; not writable; too little space.
    """
    folder = Path(output_dir)
    if checkpoint_dir is not None and Path(checkpoint_dir).resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            "Checkpoints are private, and would lie in the folder that leaves.",
            path=checkpoint_dir,
            expected=f"a folder outside {folder}",
        )
    if os.path.lexists(folder) and not folder.is_dir():
        raise UsageError("The output is no folder.", path=folder, expected="a new folder", found="a file")
    if folder.is_dir():
        with storage_errors(folder):
            _check_contents(folder)
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    with storage_errors(folder):
        with tempfile.TemporaryFile(dir=place):
            pass
        free = shutil.disk_usage(place).free
    # Twice: an adapter that is there is replaced only once the new one is whole.
    if free < 2 * bytes_needed + _SPARE_BYTES:
        raise UsageError(
            "There is too little space for the adapter.",
            path=folder,
            expected=f"{(2 * bytes_needed) / 2**20 + 0.1:.1f} MiB",
            found=f"{free / 2**20:.1f} MiB",
            remedy="free some space, or choose another disk",
        )


def _check_contents(folder: Path) -> None:
    others = sorted(path.name for path in folder.iterdir() if path.name not in _OWN_FILES and path.name[0] != ".")
    generated = False
    if not others and (folder / ADAPTER_METADATA_NAME).is_file():
        generated = "generated" in read_record(
            folder / ADAPTER_METADATA_NAME, AdapterMetadataRecord, error=AdapterFormatError
        )
    if others or generated:
        raise UsageError(
            "The output folder holds something else.",
            path=folder,
            expected="a new or empty folder, or one with a client's adapter that is to be replaced",
            found="an adapter that was generated" if generated else ", ".join(others[:5]),
            remedy="choose another --output_dir: all that lies in it is meant to leave",
        )


def spent_before(output_dir: str | Path) -> tuple[float, float]:
    """Epsilon and delta that the adapter in a folder says were spent; zeros where it says nothing.

    Raises:
        [`AdapterFormatError`]: it says something that cannot be read.
    """
    path = Path(output_dir) / ADAPTER_METADATA_NAME
    if not path.is_file():
        return 0.0, 0.0
    statement = statement_of(read_record(path, AdapterMetadataRecord, error=AdapterFormatError), path=str(path))
    return (0.0, 0.0) if statement is None else (statement.epsilon, statement.delta)


def write_adapter(adapter: LoraAdapter, output_dir: str | Path) -> None:
    """Replace what is in the folder, its card included, which would speak of the old adapter.

    Raises:
        [`UsageError`]: the disk is full or cannot be written.
    """
    folder = Path(output_dir)
    with storage_errors(folder):
        for name in (CARD_NAME, ORIGIN_NAME):
            (folder / name).unlink(missing_ok=True)
        adapter.save_pretrained(folder)


@contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises, here and in torch and safetensors, into a [`UsageError`]."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as cause:
        # torch reports what the disk refused as a RuntimeError of its archive writer.
        if isinstance(cause, RuntimeError) and not _DISK_WORDS.search(str(cause)):
            raise
        raise UsageError(
            "Writing failed.",
            path=getattr(cause, "filename", None) or path,
            expected="a folder that can be written, on a disk with space",
            found=getattr(cause, "strerror", None) or str(cause).splitlines()[0],
            remedy="free some space or choose another folder",
        ) from cause
