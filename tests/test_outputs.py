"""A result never lands on something else, its place is tried first, and a disk that refuses is no traceback."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from safetensors import SafetensorError

from grad_transformer import GradTransformer, LoraAdapter, cli
from grad_transformer.errors import GradTransformerError, OutputError
from grad_transformer.locks import sole_writer
from grad_transformer.outputs import OutputKind, disk_error, prepare_output, try_writing
from grad_transformer.shadow import load_delta_dataset


CONTENTS: dict[str, dict[str, str]] = {
    "shadow_plan": {"plan.json": "{}", "source_root/root.json": "{}"},
    "delta_dataset": {"delta_dataset.json": "{}", "plan.json": "{}", "data/train-00000-of-00001.parquet": ""},
    "mapper": {"config.json": '{"model_type": "grad_transformer"}', "heldout.json": "{}"},
    "client_adapter": {"adapter_config.json": "{}", "grad_transformer.json": "{}"},
    "generated_adapter": {"adapter_config.json": "{}", "grad_transformer.json": '{"generated": {}}'},
    "report": {"report.json": "{}", "accuracy.png": ""},
    "demo": {"demo.json": "{}", "report.json": "{}"},
    "study": {"study.json": "{}", "stages/x": ""},
}
# What a command that was killed leaves: no manifest, and nothing of anybody else's.
INTERRUPTED: dict[str, dict[str, str]] = {
    "shadow_plan": {"source_root/root.json": "{}"},
    "delta_dataset": {"source_root/root.json": "{}", "data/train-00000-of-00001.parquet": ""},
    "mapper": {"training_identity.json": "{}", "checkpoint-3/config.json": "{}"},
    "client_adapter": {"adapter_model.safetensors": "", ".adapter_config.json.x.tmp": ""},
    "generated_adapter": {"adapter_model.safetensors": ""},
    "report": {"accuracy.png": ""},
    "study": {"stages/x": ""},
}
OTHERS = {
    "a PEFT adapter": {"adapter_config.json": "{}"},
    "a root": {"adapter_config.json": "{}", "root.json": "{}"},
    "a model": {"config.json": '{"model_type": "qwen2"}'},
    "thesis.tex": {"thesis.tex": "", "b.txt": ""},
}


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_folder_takes_its_own_kind_finished_or_interrupted(tmp_path: Path, kind: OutputKind) -> None:
    for number, files in enumerate((CONTENTS[kind], INTERRUPTED.get(kind, {}), {}, {".gitattributes": ""})):
        folder = fill(tmp_path / str(number), files)
        before = sorted(path.name for path in tmp_path.rglob("*"))
        assert prepare_output(folder, kind) == folder
        assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_folder_of_anything_else_is_refused_and_left_alone(tmp_path: Path, kind: OutputKind) -> None:
    others = {name: files for name, files in CONTENTS.items() if name != kind}
    for name, files in {**others, **OTHERS}.items():
        folder = fill(tmp_path / name.replace(" ", "_"), files)
        with pytest.raises(OutputError, match="holds something else"):
            prepare_output(folder, kind)
        assert all((folder / path).read_text() == text for path, text in files.items())


@pytest.mark.parametrize(
    ("load", "kinds"),
    [
        (GradTransformer.from_pretrained, ("mapper",)),
        (load_delta_dataset, ("delta_dataset",)),
        (LoraAdapter.from_pretrained, ("client_adapter", "generated_adapter")),
    ],
)
def test_who_gives_a_folder_of_another_kind_is_told_what_it_holds(
    tmp_path: Path, load: Callable[[Path], object], kinds: tuple[str, ...]
) -> None:
    words = {"mapper": "a mapper", "delta_dataset": "a delta dataset", "client_adapter": "a client's adapter"}
    for kind in words.keys() - set(kinds):
        folder = fill(tmp_path / kind, CONTENTS[kind])
        with pytest.raises(GradTransformerError, match="The folder holds no") as caught:
            load(folder)
        assert caught.value.found == words[kind]
    # Of its own kind, but without its manifest: what is missing is said.
    own = fill(tmp_path / "own", dict(list(CONTENTS[kinds[0]].items())[1:]))
    with pytest.raises(GradTransformerError) as caught:
        load(own)
    assert "holds no" not in caught.value.message


def test_a_result_is_not_written_over_or_into_an_input(tmp_path: Path) -> None:
    bank = fill(tmp_path / "bank", CONTENTS["client_adapter"])
    (tmp_path / "link").symlink_to(bank)
    for folder in (bank, bank / "inside", tmp_path / "link", bank / ".." / "bank"):
        with pytest.raises(OutputError, match="made from"):
            prepare_output(folder, "client_adapter", inputs=[None, "acme/mapper", bank])
    prepare_output(tmp_path / "other", "client_adapter", inputs=[None, "acme/mapper", bank])


def test_places_that_cannot_be_written_to_are_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere"), tmp_path / "nowhere"):
        with pytest.raises(OutputError, match="cannot be written") as caught:
            try_writing(place)
        assert str(place) in str(caught.value)
    try_writing(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        prepare_output(tmp_path / "new", "mapper")


def _raise(error: BaseException, cause: BaseException | None = None) -> None:
    raise error from cause


# What the system and the libraries raised on a full and on a read-only disk.
REFUSALS: dict[str, Callable[[], object]] = {
    "open": lambda: Path(__file__, "x").touch(),
    "read-only": lambda: _raise(OSError(errno.EROFS, os.strerror(errno.EROFS), "out/x")),
    "safetensors": lambda: _raise(SafetensorError("I/O error: No space left on device (os error 28)")),
    "torch": lambda: _raise(
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), RuntimeError("iostream")
    ),
    "arrow": lambda: _raise(pa.ArrowException("x"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_disk_refuses_is_a_typed_error_of_every_command(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from grad_transformer.scripts import inspect

    def main(*arguments: Any) -> Any:
        REFUSALS[name]()

    monkeypatch.setattr(inspect, "main", main)
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 2
    told = capsys.readouterr()
    assert json.loads(told.out)["error"] == "OutputError"
    assert "what was finished is kept" in told.err
    assert "Traceback" not in told.err


def test_other_errors_stay_what_they_are() -> None:
    for error in (FileNotFoundError(errno.ENOENT, "no such file", "x"), RuntimeError("shape"), KeyError("test")):
        assert disk_error(error) is None


def hold(folder: Path, held: Any) -> None:
    with sole_writer(folder):
        held.set()
        signal.pause()


def test_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "new", held))
    process.start()
    try:
        assert held.wait(60)
        with pytest.raises(OutputError, match="Another process"), sole_writer(tmp_path / "new"):
            raise AssertionError("two processes in one folder")
    finally:
        process.kill()
        process.join()
    with sole_writer(tmp_path / "new"):
        pass
