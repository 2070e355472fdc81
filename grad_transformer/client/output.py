"""The folder that a client's adapter is written to: tried before the fine-tune, and what it says of budget spent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..adapters import LoraAdapter
from ..adapters.privacy import statement_of
from ..constants import ADAPTER_METADATA_NAME, CARD_NAME, ORIGIN_NAME
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
