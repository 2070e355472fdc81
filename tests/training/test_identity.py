"""A folder belongs to one dataset and one set of arguments, and a training that was killed always goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grad_transformer import GradTransformer, Root
from grad_transformer.checkpoints import last_whole_checkpoint
from grad_transformer.errors import DeltaDatasetError, OutputError, UsageError
from grad_transformer.locks import sole_writer
from grad_transformer.refinement import fit_candidates
from grad_transformer.scripts._training import train
from grad_transformer.scripts.evaluate import heldout_split
from grad_transformer.scripts.train import verdict
from grad_transformer.shadow import check_dataset_of, load_delta_dataset
from grad_transformer.training import GradTransformerTrainingArguments, MapperArguments
from grad_transformer.training.checkpoints import is_whole
from tests.worlds import tiny_root, write_delta_dataset


SMALL = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
RUNS = {"train": 10, "validation": 2, "test": 3}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Root, Root]:
    path = tmp_path_factory.mktemp("roots")
    return tiny_root(path / "tiny"), tiny_root(path / "large", layers=3, hidden=32)


@pytest.fixture(scope="module")
def dataset(roots: tuple[Root, Root], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_delta_dataset(tmp_path_factory.mktemp("deltas"), roots, runs=RUNS)


@pytest.fixture(scope="module")
def other(roots: tuple[Root, Root], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another plan from the same roots, by the same recipes."""
    return write_delta_dataset(tmp_path_factory.mktemp("other"), roots, runs=RUNS, seed=1, plan="plan-b")


def arguments(output_dir: Path, **overrides: Any) -> GradTransformerTrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return GradTransformerTrainingArguments(output_dir=str(output_dir), **{**settings, **overrides})


def run(
    dataset: Path, output_dir: Path, *, overwrite: bool = False, mapper: dict[str, Any] | None = None, **overrides: Any
) -> dict[str, Any]:
    sizes = MapperArguments(**{**SMALL, **(mapper or {})})
    return train(dataset, sizes, arguments(output_dir, **overrides), overwrite=overwrite)


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mapper")
    run(dataset, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def test_the_same_training_again_says_that_it_is_finished_and_writes_nothing(dataset: Path, copy: Path) -> None:
    before = contents(copy)
    again = run(dataset, copy, logging_steps=1, save_total_limit=1)
    assert again["finished_before"]
    assert again["steps"] == 4
    assert again["heldout"] == json.loads((copy / "heldout.json").read_text())
    assert again["output_dir"] == str(copy)
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 1e-2}, "learning_rate 0.01"),
        ({"seed": 7}, "seed 7"),
        ({"max_steps": 6}, "max_steps 6"),
        ({"per_device_train_batch_size": 4}, "pairs_per_step 4"),
        ({"mapper": {"d_model": 16}}, "d_model 16"),
    ],
)
def test_other_arguments_in_a_used_folder_are_refused_by_name(
    dataset: Path, copy: Path, change: dict[str, Any], words: str
) -> None:
    before = contents(copy)
    with pytest.raises(OutputError, match="another training") as caught:
        run(dataset, copy, **change)
    assert words in str(caught.value.expected)
    assert "--overwrite_output_dir" in str(caught.value.remedy)
    assert contents(copy) == before


def test_another_dataset_in_a_used_folder_is_refused_or_trained_anew(other: Path, copy: Path) -> None:
    before = contents(copy)
    with pytest.raises(OutputError, match="another training") as caught:
        run(other, copy)
    assert str(caught.value.expected) == f"dataset {load_delta_dataset(other).fingerprint[:12]}"
    assert contents(copy) == before
    (copy / "notes.txt").write_text("mine")
    assert not run(other, copy, overwrite=True)["finished_before"]
    mapper = GradTransformer.from_pretrained(copy)
    check_dataset_of(mapper, load_delta_dataset(other))
    assert (copy / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert (copy / "notes.txt").read_text() == "mine"


def test_a_mapper_that_does_not_say_what_it_was_trained_with_is_not_resumed(dataset: Path, copy: Path) -> None:
    (copy / "training_identity.json").unlink()
    with pytest.raises(OutputError, match="does not say"):
        run(dataset, copy)


def test_a_training_that_left_nothing_holds_no_folder(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="do not divide"):
        run(dataset, tmp_path, mapper={"num_heads": 3})
    assert (tmp_path / "training_identity.json").is_file()
    assert run(dataset, tmp_path)["steps"] == 4


def test_a_folder_of_something_else_is_refused(dataset: Path, roots: tuple[Root, Root], tmp_path: Path) -> None:
    roots[0].save_pretrained(tmp_path / "root")
    for folder in (tmp_path / "root", dataset, dataset / "mapper"):
        with pytest.raises(OutputError):
            run(dataset, folder)


def test_two_trainings_do_not_share_a_folder(dataset: Path, tmp_path: Path) -> None:
    with sole_writer(tmp_path), pytest.raises(OutputError, match="Another process"):
        run(dataset, tmp_path)


def truncate(name: str) -> Callable[[Path], None]:
    def cut(checkpoint: Path) -> None:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])

    return cut


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


HALVES: dict[str, Callable[[Path], None]] = {
    "an empty folder": empty,
    "no state": lambda checkpoint: (checkpoint / "trainer_state.json").unlink(),
    "half a state": truncate("trainer_state.json"),
    "half of the weights": truncate("model.safetensors"),
    "half an optimizer": truncate("optimizer.pt"),
    "no weights": lambda checkpoint: (checkpoint / "model.safetensors").unlink(),
}


@pytest.mark.parametrize("name", HALVES)
def test_a_checkpoint_that_was_not_written_to_its_end_does_not_count(copy: Path, name: str) -> None:
    assert last_whole_checkpoint(copy, is_whole) == copy / "checkpoint-4"
    HALVES[name](copy / "checkpoint-4")
    assert not is_whole(copy / "checkpoint-4", 4)
    assert last_whole_checkpoint(copy, is_whole) == copy / "checkpoint-2"
    assert (copy / "checkpoint-4").is_dir()
    assert last_whole_checkpoint(copy, is_whole, remove_others=True) == copy / "checkpoint-2"
    assert not (copy / "checkpoint-4").exists()


def test_a_training_killed_while_it_wrote_a_checkpoint_ends_as_if_it_had_not_been(
    dataset: Path, copy: Path, finished: Path
) -> None:
    truncate("optimizer.pt")(copy / "checkpoint-4")
    for name in ("config.json", "model.safetensors", "heldout.json", "training_log.json", "training_args.json"):
        (copy / name).unlink()
    identity = json.loads((copy / "training_identity.json").read_text())
    (copy / "training_identity.json").write_text(json.dumps({**identity, "result": None}))
    data = run(dataset, copy)
    assert not data["finished_before"]
    for name in ("model.safetensors", "heldout.json"):
        assert (copy / name).read_bytes() == (finished / name).read_bytes()
    # Killed before its first checkpoint was whole: it starts anew.
    half = copy.parent / "half"
    shutil.copytree(copy, half)
    (half / "training_identity.json").write_text(json.dumps({**identity, "result": None}))
    shutil.rmtree(half / "checkpoint-4")
    empty(half / "checkpoint-2")
    assert not run(dataset, half)["finished_before"]
    assert (half / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_save_that_is_interrupted_leaves_nothing_that_looks_whole(
    copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    mapper = GradTransformer.from_pretrained(copy)

    def move(temporary: Path, path: Path) -> None:
        if path == copy / name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.replace(temporary, path)

    monkeypatch.setattr("grad_transformer.modeling_files.sync_and_move", move)
    with pytest.raises(OSError, match="No space"):
        mapper.save_pretrained(copy)
    assert not (copy / "config.json").exists()
    assert not list(copy.glob(".saving-*"))
    monkeypatch.undo()
    mapper.save_pretrained(copy)
    again = GradTransformer.from_pretrained(copy).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in mapper.state_dict().items())


def test_a_mapper_records_its_dataset_and_takes_no_other(finished: Path, dataset: Path, other: Path) -> None:
    mapper, deltas = GradTransformer.from_pretrained(finished), load_delta_dataset(dataset)
    plan = deltas.manifest["plan_fingerprint"]
    assert mapper.config.delta_dataset == {"fingerprint": deltas.fingerprint, "plan_fingerprint": plan}
    assert len(mapper.config.training_fingerprint) == 64
    check_dataset_of(mapper, deltas)
    with pytest.raises(DeltaDatasetError, match="another delta dataset"):
        check_dataset_of(mapper, load_delta_dataset(other))


def test_another_build_of_the_plan_is_accepted_and_told(
    finished: Path, roots: tuple[Root, Root], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rebuilt = write_delta_dataset(tmp_path, roots, runs={**RUNS, "train": 11})
    check_dataset_of(GradTransformer.from_pretrained(finished), load_delta_dataset(rebuilt))
    assert "another build" in caplog.text


def test_of_a_mapper_from_before_roots_and_recipes_are_compared(
    finished: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mapper = GradTransformer.from_pretrained(finished)
    mapper.config.delta_dataset = None
    deltas = load_delta_dataset(dataset)
    check_dataset_of(mapper, deltas)
    assert "could not be checked" in caplog.text
    deltas.manifest["recipes"]["target"]["learning_rate"] = 0.5
    with pytest.raises(DeltaDatasetError, match="another delta dataset") as caught:
        check_dataset_of(mapper, deltas)
    assert caught.value.found == "learning_rate=0.5"
    strange = (tiny_root(tmp_path / "a", seed=3), tiny_root(tmp_path / "b", layers=3, hidden=32, seed=3))
    foreign = load_delta_dataset(write_delta_dataset(tmp_path / "foreign", strange, runs=RUNS))
    with pytest.raises(DeltaDatasetError, match="another delta dataset"):
        check_dataset_of(mapper, foreign)


@pytest.mark.parametrize("runs", [{"train": 10}, {"train": 10, "validation": 2}, {"train": 10, "test": 3}])
def test_without_held_out_runs_what_can_be_done_is_done(
    roots: tuple[Root, Root], tmp_path: Path, runs: dict[str, int]
) -> None:
    folder = write_delta_dataset(tmp_path / "deltas", roots, runs=runs)
    data = run(folder, tmp_path / "mapper", early_stopping_patience=1 if "validation" not in runs else None)
    assert ("r2" in data["heldout"]) == ("test" in runs)
    assert (data["validation_r2"] is not None) == ("validation" in runs)
    assert (tmp_path / "mapper" / "shift.json").is_file() == (len(runs) > 1)
    told = verdict(data["heldout"], data["validation_r2"], "mapper")
    assert ("not measured" in told) == ("test" not in runs)
    deltas = load_delta_dataset(folder)
    predictors = fit_candidates(deltas)
    assert torch.isfinite(predictors["ridge"].predict(deltas.pairs("train").source)).all()
    if len(runs) == 1:
        with pytest.raises(DeltaDatasetError, match="No shadow run was held out"):
            heldout_split(deltas)
    else:
        assert heldout_split(deltas) in runs


def test_the_verdict_says_what_to_do() -> None:
    good = {"r2": 0.8, "r2_permuted_inputs": -0.5, "r2_ceiling": 1.0, "r2_ridge": 0.5, "r2_nearest_shadow": 0.1}
    for change, words in (
        ({}, "80% of what tasks alone explain). Next: grad-transformer client --mapper out"),
        ({"r2": -0.1}, "do not use it"),
        ({"r2_permuted_inputs": 0.7}, "hardly reads"),
        ({"r2_ridge": 0.9}, "--method ridge"),
        ({"r2_permuted_inputs": None, "r2_ceiling": None}, "beats the mean shadow (R² 0.800)"),
        ({"r2_permuted_inputs": None, "r2_ridge": 0.9}, "beats the mean shadow (R² 0.800, 80%"),
    ):
        assert words in verdict({**good, **change}, None, "out"), change


def test_trackers_that_are_not_there_are_said_before_anything(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not installed"):
        run(dataset, tmp_path / "mapper", report_to=["neptune"])
    with pytest.raises(UsageError, match="no such experiment tracker"):
        run(dataset, tmp_path / "mapper", report_to="excel")
    assert not (tmp_path / "mapper").exists()


def test_on_a_cpu_no_memory_is_pinned(dataset: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    run(dataset, tmp_path)
    assert not any("pin_memory" in str(warning.message) for warning in recwarn)
    assert json.loads((tmp_path / "training_args.json").read_text())["dataloader_pin_memory"] is False
