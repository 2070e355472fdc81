"""Publish a folder on the Hub as a version that never moves: one commit, one tag, a card.

    grad-transformer push deltas acme/qwen2.5-3b-to-7b-deltas
    grad-transformer push mapper acme/qwen2.5-3b-to-7b --report_dir report --license apache-2.0 --revision v1.0
    grad-transformer push bank-a bank-a/tinylm-adapter
    grad-transformer push llm-adapter acme/qwen2.5-7b-banks

What the folder holds decides its kind: a delta dataset, a mapper, a client adapter (or a plain PEFT adapter) or a
generated adapter. A client adapter only goes into a private repository, unless --private false is given. Run again
after it was killed, the command goes on from what has arrived. The token is that of `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from ._common import CommandParser, CommandResult


@dataclass(frozen=True)
class PushArguments:
    """Arguments of `grad-transformer push`."""

    folder: str = field(metadata={"help": "What build, train, client or generate wrote.", "positional": True})
    repo_id: str = field(metadata={"help": "Repository, created if needed.", "positional": True})
    kind: str | None = field(
        default=None,
        metadata={
            "help": "What the folder must hold; default: what it does hold.",
            "choices": ["delta_dataset", "mapper", "client_adapter", "generated_adapter"],
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Tag of the version; default: v1.0, then v1.1, ..."})
    private: bool | None = field(default=None, metadata={"help": "Whether the repository must be private."})
    report_dir: str | None = field(
        default=None,
        metadata={
            "help": "For a mapper: the folder of its report.json; pictures are drawn anew, without clients' names."
        },
    )
    license: str | None = field(default=None, metadata={"help": "For the card, for instance apache-2.0."})
    commit_message: str | None = field(default=None, metadata={"help": "Message of the commit."})


def make_parser() -> CommandParser:
    return CommandParser(PushArguments, command="push", description=__doc__)


def main(args: PushArguments) -> CommandResult:
    from ..constants import REPORT_FOLDER, REPORT_NAME, TRAINING_LOG_NAME
    from ..evaluation.public import public_report
    from ..files import read_json
    from ..hub import find_kind, push_folder

    folder, report = Path(args.folder), None
    report_dir = Path(args.report_dir) if args.report_dir else folder / REPORT_FOLDER
    if args.report_dir or (find_kind(folder).name == "mapper" and (report_dir / REPORT_NAME).is_file()):
        log = folder / TRAINING_LOG_NAME
        report = public_report(report_dir, training_log=read_json(log).get("log_history") if log.is_file() else None)
    published = push_folder(
        args.folder,
        args.repo_id,
        kind=args.kind,
        revision=args.revision,
        private=args.private,
        report=report,
        license=args.license,
        commit_message=args.commit_message,
    )
    state = "" if published.new else " (it was there before)"
    text = f"{published.repo_id} {published.revision}{state}, commit {published.sha}\n{published.url}"
    return CommandResult(asdict(published), text)
