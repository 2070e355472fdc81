"""Build, write and read the report of a run: `report.json`, `report.md` and pictures in one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters.io import read_record, write_json_atomic, write_text_atomic
from ..adapters.statistics import BlockAgreement, DeltaReproducibility
from ..constants import REPORT_NAME
from ..schemas import Object
from .figures import draw_figures
from .records import KINDS, ClientReport, HeldoutScores, Report
from .tables import markdown, summary_table


__all__ = [
    "KINDS",
    "ClientReport",
    "HeldoutScores",
    "Report",
    "build_report",
    "read_report",
    "summary_table",
    "write_report",
]

REPORT_MARKDOWN_NAME = "report.md"


def build_report(
    *,
    preset: str,
    seed: int,
    wall_seconds: Mapping[str, float],
    heldout: HeldoutScores,
    reproducibility: Mapping[str, DeltaReproducibility],
    clients: Sequence[ClientReport],
    blocks: BlockAgreement | None = None,
) -> Report:
    """A validated report.

    Args:
        preset (`str`), seed (`int`): what was run.
        wall_seconds (`Mapping[str, float]`): seconds by stage.
        heldout ([`HeldoutScores`]): R² on held-out shadow runs.
        reproducibility (`Mapping[str, DeltaReproducibility]`): of the `tinylm` and the `llm` deltas.
        clients (`Sequence[ClientReport]`): as from [`ClientReport.from_rows`].
        blocks ([`BlockAgreement`], *optional*): as from `block_cosine_and_norm`.

    Raises:
        [`UsageError`]: a number is not finite or out of its range, or names do not fit.
    """
    report = Report(
        preset=preset,
        seed=seed,
        wall_seconds=dict(wall_seconds),
        heldout=heldout,
        delta_reproducibility={name: deltas.leave_one_out_r2 for name, deltas in reproducibility.items()},
        delta_cosine={name: deltas.centred_cosine for name, deltas in reproducibility.items()},
        clients=list(clients),
        blocks=blocks,
    )
    report.check_names()
    report.validate()
    return report


def write_report(
    report: Report, output_dir: str | Path, *, training_log: Sequence[Mapping[str, Any]] | None = None
) -> Path:
    """Write pictures and `report.md`, then `report.json`, whose presence says that the rest is whole.

    Args:
        report ([`Report`]).
        output_dir (`str` or `Path`): created where it does not exist.
        training_log (`Sequence[Mapping]`, *optional*): the mapper's `Trainer.state.log_history`.

    Returns:
        `Path`: of `report.json`.

    Raises:
        [`UsageError`]: the report is not valid; nothing is written then.
    """
    report.validate()
    output_dir = Path(output_dir)
    path = output_dir / REPORT_NAME
    path.unlink(missing_ok=True)
    figures = draw_figures(report, output_dir, training_log=training_log)
    write_text_atomic(output_dir / REPORT_MARKDOWN_NAME, markdown(report, figures=[figure.name for figure in figures]))
    write_json_atomic(path, report.to_dict())
    return path


def read_report(path: str | Path) -> Report:
    """The report in a folder, or in a `report.json`.

    Raises:
        [`IncompleteArtifactError`]: there is no such file, or it is no JSON object.
        [`FormatVersionError`]: it is newer than this version.
        [`UsageError`]: a field is missing, of another type, or out of its range.
    """
    path = Path(path)
    return Report.from_dict(read_record(path / REPORT_NAME if path.is_dir() else path, Object))
