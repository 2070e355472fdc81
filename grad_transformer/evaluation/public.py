"""What may be published of a report: its clients by kind and number, in the records and in every picture."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..constants import REPORT_NAME
from ..wording import looks_like
from .figures import draw_figures
from .records import ClientReport, Report
from .report import read_report


def public_report(
    report_dir: str | Path, *, training_log: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, bytes]:
    """The files of a report as they may be published: records without names, and pictures drawn from these records.

    Args:
        report_dir (`str` or `Path`): what `evaluate` wrote; of it only `report.json` is read.
        training_log (`Sequence[Mapping]`, *optional*): the mapper's `Trainer.state.log_history`, for its picture.

    Returns:
        `dict[str, bytes]`: `report.json` and PNG files, by name, for `push_folder(..., report=...)`.

    Raises:
        [`IncompleteArtifactError`]: there is no report in the folder.
        [`UsageError`]: it is not valid.
    """
    report = without_names(read_report(report_dir))
    files = {REPORT_NAME: (json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n").encode()}
    with tempfile.TemporaryDirectory() as folder:
        pictures = draw_figures(report, folder, training_log=training_log)
        return {**files, **{picture.name: picture.read_bytes() for picture in pictures}}


def without_names(report: Report) -> Report:
    """The report with clients called by kind and number.

    Tasks of clients of one's own are left out, and names of tasks in which that of any client is to be read.
    """
    counts: Counter[str] = Counter()
    names = [looks_like(client.id) for client in report.clients]
    clients: list[ClientReport] = []
    for client in report.clients:
        named = any(name in looks_like(client.task) for name in names)
        task = "other" if client.kind == "other" or named else client.task
        clients.append(replace(client, id=f"{client.kind}-{counts[client.kind]}", task=task))
        counts[client.kind] += 1
    return replace(report, clients=clients)
