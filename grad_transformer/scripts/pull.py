"""Copy a version from the Hub into a folder, checked by hash; a root alone with --kind root.

    grad-transformer pull acme/qwen2.5-3b-to-7b@v1.0 --kind root --output_dir root
    grad-transformer pull acme/qwen2.5-3b-to-7b --kind mapper --output_dir mapper
    grad-transformer pull acme/qwen2.5-3b-to-7b-deltas --kind delta_dataset --output_dir deltas
    grad-transformer pull bank-a/tinylm-adapter --kind client_adapter --output_dir bank-a

The folder remembers which commit it is (hub_origin.json), and so does what is made from it. All commands also take
repository ids directly: a pull is for machines without the network, and for looking inside.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..outputs import try_writing
from ._common import CommandParser, CommandResult


@dataclass(frozen=True)
class PullArguments:
    """Arguments of `grad-transformer pull`."""

    repo_id: str = field(metadata={"help": "Repository, also as org/name@v1.0.", "positional": True})
    output_dir: str = field(metadata={"help": "Folder to write: new, or an earlier pull of the same repository."})
    kind: str = field(
        metadata={
            "help": "What the repository is; root: the root that a mapper's clients start from.",
            "choices": ["delta_dataset", "mapper", "client_adapter", "generated_adapter", "root"],
        }
    )
    revision: str | None = field(default=None, metadata={"help": "Tag, branch or commit."})
    local_files_only: bool = field(default=False, metadata={"help": "From the cache, without the network."})


def make_parser() -> CommandParser:
    return CommandParser(PullArguments, command="pull", description=__doc__)


def main(args: PullArguments) -> CommandResult:
    from ..adapters import pull_root
    from ..hub import pull_folder

    try_writing(args.output_dir)
    origin: dict[str, Any]
    if args.kind == "root":
        root = pull_root(
            args.repo_id,
            output_dir=args.output_dir,
            revision=args.revision,
            local_files_only=args.local_files_only,
        )
        origin = {} if root.origin is None else root.origin.to_dict()
    else:
        _, origin = pull_folder(
            args.repo_id,
            args.output_dir,
            kind=args.kind,
            revision=args.revision,
            local_files_only=args.local_files_only,
        )
    data = {"output_dir": args.output_dir, "kind": args.kind, **origin}
    text = f"{args.output_dir}: {args.kind.replace('_', ' ')} of {origin.get('repo_id')}, commit {origin.get('sha')}"
    return CommandResult(data, text)
