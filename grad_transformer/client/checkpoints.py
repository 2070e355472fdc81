"""Checkpoints of a private fine-tune: taken up only by the run that made them, and only whole ones.

They hold all that the noise protects, so the folder stays with the client. `run.json` in it says whose they are.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from ..checkpoints import last_whole_checkpoint, numbered_checkpoints
from ..constants import FORMAT_VERSION
from ..errors import IncompleteArtifactError, UsageError
from ..files import read_record, write_json_atomic
from ..schemas import Count, Number, open_record
from .output import Spent


RUN_NAME = "run.json"
MANIFEST_NAME = "privacy_accounting.json"


_Spent = Annotated[list[Number | bool], Field(min_length=2, max_length=3)]


@open_record
class _RunRecord(TypedDict):
    """`run.json`: whose checkpoints lie beside it."""

    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    identity: dict[str, str]
    spent_before: dict[str, _Spent]
    delivered_steps: Count
    # What the adapter that this run wrote to a place says was spent.
    stated: NotRequired[dict[str, _Spent]]


@open_record
class _ManifestRecord(TypedDict):
    """`privacy_accounting.json`: noise multiplier, sampling rate and steps so far; the size of every other file."""

    history: list[Annotated[list[Number], Field(min_length=3, max_length=3)]]
    sizes: dict[str, Count]


def rows_digest(rows: Iterable[Any]) -> str:
    """SHA-256 of rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def claim_folder(folder: str | Path, identity: Mapping[str, Any], *, output_dir: str | Path, spent: Spent) -> Spent:
    """Make the folder this run's, or refuse one that is another's; remove checkpoints that are half written.

    Args:
        folder (`str` or `Path`): where checkpoints are, or will be.
        identity (`Mapping`): what decides the run, by name. Only keyed hashes of it are kept.
        output_dir (`str` or `Path`): where the adapter will go.
        spent ([`Spent`]): what the adapter there says was spent.

    Returns:
        what others had spent there. Where the adapter in `output_dir` is the one that this run wrote, its own spending
        is not counted twice.

    Raises:
        [`UsageError`]: the checkpoints are of other rows, another recipe, budget or base model; or one that an adapter
            was made from is not whole any more.
        [`IncompleteArtifactError`]: there are checkpoints, but nothing says whose they are.
    """
    folder, place = Path(folder), _place(output_dir)
    path = folder / RUN_NAME
    if not path.is_file():
        if numbered_checkpoints(folder):
            raise IncompleteArtifactError(
                "The folder has checkpoints, and nothing that says whose they are.",
                path=path,
                expected=f"checkpoints beside their {RUN_NAME}",
                remedy="choose an empty folder",
            )
        key = secrets.token_hex(32)
        new: _RunRecord = {
            "key": key,
            "identity": _keyed(identity, key),
            "spent_before": {place: [*spent]},
            "delivered_steps": 0,
        }
        write_json_atomic(path, {"format_version": FORMAT_VERSION, **new})
        return spent
    run = read_record(path, _RunRecord)
    expected = _keyed(identity, run["key"])
    differing = sorted(name for name in expected if run["identity"].get(name) != expected[name])
    if differing:
        raise UsageError(
            "The checkpoints are those of another fine-tune.",
            path=folder,
            expected="the same rows, recipe, privacy budget, root and base model",
            found=f"a difference in {', '.join(differing)}",
            remedy="choose an empty --dp_checkpoint_dir",
        )
    last = last_whole(folder)
    if run["delivered_steps"] > sum(steps for _, _, steps in (read_history(last) if last else ())):
        raise UsageError(
            "The checkpoint behind an adapter that was delivered is gone: its steps, run again, would spend again.",
            path=folder,
            expected=f"a checkpoint after {run['delivered_steps']} steps",
            found=last or "no checkpoint",
            remedy="choose an empty --dp_checkpoint_dir",
        )
    before, stated = run["spent_before"], run.get("stated", {}).get(place)
    if place not in before or (Spent() if stated is None else _spent(stated)) != spent:
        before[place] = [*spent]
        write_json_atomic(path, dict(run))
    return _spent(before[place])


def record_delivery(folder: str | Path, steps: int, *, output_dir: str | Path, stated: Spent) -> None:
    """Say in a claimed folder that an adapter leaves after so many steps, and what it states, before it does."""
    path = Path(folder) / RUN_NAME
    run = read_record(path, _RunRecord)
    everywhere = {**run.get("stated", {}), _place(output_dir): [*stated]}
    write_json_atomic(path, {**run, "delivered_steps": steps, "stated": everywhere})


def _spent(entry: Sequence[float | bool]) -> Spent:
    return Spent(entry[0], entry[1], *map(bool, entry[2:]))


def _place(output_dir: str | Path) -> str:
    return str(Path(output_dir).resolve())


def write_manifest(checkpoint: str | Path, history: Iterable[Iterable[float]]) -> None:
    """Written last: what was spent so far, and the size of every file, so that a half-written one is known."""
    checkpoint = Path(checkpoint)
    sizes = {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir()) if path.name != MANIFEST_NAME}
    data = {"format_version": FORMAT_VERSION, "history": [list(entry) for entry in history], "sizes": sizes}
    write_json_atomic(checkpoint / MANIFEST_NAME, data)


def read_history(checkpoint: str | Path) -> list[tuple[float, float, int]]:
    """What was spent until a checkpoint: noise multiplier, sampling rate, steps.

    Raises:
        [`IncompleteArtifactError`]: the checkpoint is not whole, or does not say it.
    """
    path = Path(checkpoint) / MANIFEST_NAME
    manifest = read_record(path, _ManifestRecord)
    for name, size in manifest["sizes"].items():
        found = (path.parent / name).stat().st_size if (path.parent / name).is_file() else "no file"
        if found != size:
            raise IncompleteArtifactError(
                "The checkpoint is not whole.",
                path=path.parent / name,
                expected=f"{size} bytes",
                found=found,
                remedy="go on from an earlier one, or choose an empty --dp_checkpoint_dir",
            )
    return [(noise, rate, int(steps)) for noise, rate, steps in manifest["history"]]


def last_whole(folder: str | Path) -> Path | None:
    """The last checkpoint that was written to its end; those that were not are removed."""
    return last_whole_checkpoint(folder, _is_whole, remove_others=True)


def _is_whole(checkpoint: Path, step: int) -> bool:
    try:
        read_history(checkpoint)
    except IncompleteArtifactError:
        return False
    return True


def _keyed(identity: Mapping[str, Any], key: str) -> dict[str, str]:
    """Keyed, so that a hash tells nobody who has the file alone what the rows are."""
    return {
        name: hmac.new(bytes.fromhex(key), json.dumps(value, sort_keys=True).encode(), "sha256").hexdigest()
        for name, value in identity.items()
    }
