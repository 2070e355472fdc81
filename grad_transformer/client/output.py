"""The folder that a client's adapter is written to: tried before the fine-tune, and what it says of budget spent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..adapters import LoraAdapter
from ..adapters.privacy import PrivacyStatement, statement_of
from ..constants import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_METADATA_NAME,
    ADAPTER_WEIGHTS_NAME,
    CARD_NAME,
    ORIGIN_NAME,
)
from ..errors import AdapterFormatError, UsageError
from ..files import read_record
from ..outputs import disk_error
from ..schemas import AdapterMetadataRecord


def check_outside(checkpoint_dir: str | Path, output_dir: str | Path) -> None:
    """Refuse checkpoints in the folder that leaves.

    Raises:
        [`UsageError`]
    """
    if Path(checkpoint_dir).resolve().is_relative_to(Path(output_dir).resolve()):
        raise UsageError(
            "Checkpoints are private, and would lie in the folder that leaves.",
            path=checkpoint_dir,
            expected=f"a folder outside {output_dir}",
            remedy="choose another --dp_checkpoint_dir, beside the folder of the adapter",
        )


class Spent(NamedTuple):
    """What earlier fine-tunes into a folder cost: epsilon and delta, and whether one of them had no bound at all."""

    epsilon: float = 0.0
    delta: float = 0.0
    unbounded: bool = False


def spent_before(output_dir: str | Path) -> Spent:
    """What the adapter in a folder says was spent; one that says nothing, or is half there, has no bound.

    Raises:
        [`AdapterFormatError`]: it says something that cannot be read.
    """
    folder = Path(output_dir)
    path = folder / ADAPTER_METADATA_NAME
    if not path.is_file():
        return Spent(unbounded=any((folder / name).exists() for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)))
    statement = statement_of(read_record(path, AdapterMetadataRecord, error=AdapterFormatError), path=str(path))
    return Spent(unbounded=True) if statement is None else spent_by(statement)


def spent_by(statement: PrivacyStatement) -> Spent:
    """What an adapter with this statement, and those before it in its folder, cost."""
    return Spent(statement.epsilon, statement.delta, "unbounded_before" in statement.unusual_terms)


def write_adapter(adapter: LoraAdapter, output_dir: str | Path) -> None:
    """Replace what is in the folder, its card included, which would speak of the old adapter.

    Raises:
        [`OutputError`]: the disk is full or cannot be written.
    """
    folder = Path(output_dir)
    with disk_errors():
        for name in (CARD_NAME, ORIGIN_NAME):
            (folder / name).unlink(missing_ok=True)
        adapter.save_pretrained(folder)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what a full or read-only disk raises, here and in torch and safetensors, into an [`OutputError`]."""
    try:
        yield
    except Exception as cause:
        error = disk_error(cause)
        if error is None:
            raise
        raise error from cause
