"""Checkpoints of a private fine-tune belong to one run, and count only when they are whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grad_transformer.client.checkpoints import claim_folder, last_whole, read_history, record_delivery, write_manifest
from grad_transformer.client.output import Spent
from grad_transformer.errors import IncompleteArtifactError, UsageError


IDENTITY = {"rows": "a", "recipe": "b"}


def make_checkpoint(folder: Path, step: int, *, whole: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(b"x" * 100)
    if whole:
        write_manifest(checkpoint, [(1.0, 0.25, step)])
    return checkpoint


def test_half_written_checkpoints_are_removed_and_the_last_whole_one_is_taken(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 10)
    truncated = make_checkpoint(tmp_path, 12)
    (truncated / "optimizer.pt").write_bytes(b"x" * 50)
    make_checkpoint(tmp_path, 14, whole=False)
    last = last_whole(tmp_path)
    assert last == tmp_path / "checkpoint-10" and read_history(last) == [(1.0, 0.25, 10)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    assert last_whole(tmp_path / "nowhere") is None


@pytest.mark.parametrize("content", ["", "{}", '{"history": 3, "sizes": {}}', '{"history": [[1]], "sizes": {}}'])
def test_a_manifest_that_says_nothing_is_a_typed_error(tmp_path: Path, content: str) -> None:
    checkpoint = make_checkpoint(tmp_path, 2)
    (checkpoint / "privacy_accounting.json").write_text(content)
    with pytest.raises(IncompleteArtifactError):
        read_history(checkpoint)


def test_a_folder_is_claimed_once_and_remembers_what_was_spent_before(tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "checkpoints"

    def claim(place: Path, spent: Spent) -> Spent:
        return claim_folder(folder, IDENTITY, output_dir=place, spent=spent)

    assert claim(out, Spent(1.0, 1e-5)) == Spent(1.0, 1e-5)
    # This run writes its own adapter there: what it spent is not counted twice.
    make_checkpoint(folder, 4)
    record_delivery(folder, 4, output_dir=out, stated=Spent(3.0, 2e-5))
    assert claim(out, Spent(3.0, 2e-5)) == Spent(1.0, 1e-5)
    assert claim(tmp_path / "other", Spent(2.0, 1e-6)) == Spent(2.0, 1e-6)
    # Another run wrote there since: what that spent is not forgotten.
    assert claim(out, Spent(5.0, 3e-5)) == Spent(5.0, 3e-5)
    assert claim(out, Spent(unbounded=True)) == Spent(unbounded=True)
    with pytest.raises(UsageError, match="another fine-tune") as caught:
        claim_folder(folder, {**IDENTITY, "rows": "c"}, output_dir=out, spent=Spent())
    assert caught.value.found == "a difference in rows"


def test_a_delivered_run_whose_checkpoint_is_gone_does_not_spend_again(tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "checkpoints"
    claim_folder(folder, IDENTITY, output_dir=out, spent=Spent())
    make_checkpoint(folder, 4)
    last = make_checkpoint(folder, 5)
    record_delivery(folder, 5, output_dir=out, stated=Spent(1.0, 1e-5))
    claim_folder(folder, IDENTITY, output_dir=out, spent=Spent(1.0, 1e-5))
    (last / "privacy_accounting.json").unlink()
    with pytest.raises(UsageError, match="would spend again"):
        claim_folder(folder, IDENTITY, output_dir=out, spent=Spent(1.0, 1e-5))


def test_equal_rows_have_different_hashes_in_different_folders(tmp_path: Path) -> None:
    for name in "ab":
        claim_folder(tmp_path / name, IDENTITY, output_dir=tmp_path / "out", spent=Spent())
    first, second = (json.loads((tmp_path / name / "run.json").read_text())["identity"] for name in "ab")
    assert first["rows"] != second["rows"]


@pytest.mark.parametrize("content", [None, "{}", '{"key": "zz", "identity": {}, "spent_before": {}}'])
def test_checkpoints_of_nobody_are_refused(tmp_path: Path, content: str | None) -> None:
    make_checkpoint(tmp_path, 2)
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(IncompleteArtifactError):
        claim_folder(tmp_path, IDENTITY, output_dir=tmp_path / "out", spent=Spent())
