"""The commands in the order of the data flow, as a user types them, on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from grad_transformer.adapters.io import write_text_atomic
from grad_transformer.evaluation.records import METHODS
from grad_transformer.evaluation.report import read_report
from grad_transformer.lab import make_lab_tokenizer
from tests import manifests
from tests.worlds import tiny_qwen2


# As little as shows that it runs.
REFINEMENT = [
    *["--refine_data", "public.jsonl", "--refine_prompts", "16", "--refine_rounds", "1", "--refine_steps", "2"],
    *["--refine_max_new_tokens", "5", "--refine_learning_rate", "0.1"],
]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def task_rows(task: int, count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"prompt": f"?1 ?2 {row:04d} >", "completion": f"{row * (task + 3) % 10000:04d}", "task": f"task-{task}"}
        for row in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("commands")
    for name, layers in (("tinylm", 2), ("llm", 3)):
        tiny_qwen2(path / name, layers=layers)
        make_lab_tokenizer().save_pretrained(path / name)
    write_rows(path / "public.jsonl", [row for task in range(3) for row in task_rows(task, 40)])
    for client in range(2):
        write_rows(path / f"private-{client}.jsonl", task_rows(client, 20, 100))
        write_rows(path / f"test-{client}.jsonl", task_rows(client, 6, 200))
    return path


def test_all_commands_in_turn(folder: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    plan = {
        "data": "public.jsonl",
        "source_model": str(folder / "tinylm"),
        "target_model": str(folder / "llm"),
        "output_dir": "shadows",
        "num_runs": 12,
        "rows_per_run": 16,
        "strategy": "per_task",
        "validation_fraction": 0.25,
        "test_fraction": 0.25,
        "lora_alpha": 8,
        "learning_rate": 0.01,
        "max_steps": 5,
        "per_device_batch_size": 4,
        "warmup_steps": 1,
        "max_length": 16,
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    dry = run_cli("plan", "--config", "plan.yaml", "--dry_run")
    assert dry.code == 0, dry.stderr
    assert "12 shadow runs" in dry.stdout
    assert not (folder / "shadows").exists()

    steps = {
        "plan": ["--config", "plan.yaml"],
        "shadow": ["shadows", "--adapters_per_batch", "6"],
        "build": ["shadows", "--output_dir", "deltas"],
        "train": [
            *["--dataset", "deltas", "--output_dir", "mapper", "--d_model", "16", "--num_heads", "2", "--d_ff", "16"],
            *["--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "2"],
            *["--save_strategy", "steps", "--save_steps", "2", "--use_cpu", "true"],
        ],
        "client": ["--mapper", "mapper", "--data", "private-0.jsonl", "--output_dir", "client-0"],
        "generate": ["--mapper", "mapper", "--adapters", "client-0", "--output_dir", "generated"],
    }
    results = {}
    for command, arguments in steps.items():
        outcome = run_cli(command, *arguments, "--json")
        assert outcome.code == 0, f"{command}: {outcome.stderr}"
        results[command] = outcome.json
    assert results["shadow"]["runs_done_now"] == {"source": 12, "target": 12}
    assert results["build"]["splits"]["train"] == {"runs": 6, "pairs": 6}
    assert {"r2", "r2_permuted_inputs", "r2_ceiling", "r2_ridge"} <= results["train"]["heldout"].keys()
    assert results["client"]["rows"] == 20

    again = run_cli("shadow", "shadows", "--json")
    assert again.json["runs_done_now"] == {"source": 0, "target": 0}

    run_cli("client", "--mapper", "mapper", "--data", "private-1.jsonl", "--output_dir", "client-1")
    ceiling = ["--role", "target", "--output_dir", "ceiling-0"]
    assert run_cli("client", "--mapper", "mapper", "--data", "private-0.jsonl", *ceiling).code == 0
    several = ["--adapters", "client-0", "client-1", "--aggregation", "weighted", "--weights", "1", "3"]
    assert run_cli("generate", "--mapper", "mapper", *several, "--output_dir", "joint").code == 0

    clients = [
        {"id": "a", "adapter": "client-0", "test_data": "test-0.jsonl", "llm_adapter": "ceiling-0", "task": "x"},
        {"id": "b", "adapter": "client-1", "test_data": "test-1.jsonl", "task": "y"},
    ]
    (folder / "clients.yaml").write_text(yaml.safe_dump(clients))
    outcome = run_cli(
        *["evaluate", "--mapper", "mapper", "--dataset", "deltas", "--clients", "clients.yaml"],
        *["--output_dir", "report", "--json", *REFINEMENT],
    )
    assert outcome.code == 0, outcome.stderr
    report = read_report(folder / "report")
    assert all(set(client.methods) == set(METHODS) for client in report.clients)
    assert [client.id for client in report.clients] == ["a", "b"]
    assert report.clients[1].llm_finetuned is None
    assert all(score is not None for score in report.clients[0].controls.values())
    assert {path.name for path in (folder / "report").glob("*.png")} >= {
        "pgr_by_client.png",
        "accuracy.png",
        "blocks.png",
    }

    for path, kind in (("shadows", "shadow plan"), ("deltas", "delta dataset"), ("mapper", "mapper")):
        assert run_cli("inspect", path, "--json").json["kind"] == kind
    assert run_cli("inspect", "generated", "--json").json["base_model"] == str(folder / "llm")

    refined = ["generate", "--mapper", "mapper", "--adapters", "client-0", "--output_dir", "refined", *REFINEMENT]
    outcome = run_cli(*refined, "--dataset", "deltas", "--method", "best", "--json")
    assert outcome.code == 0, outcome.stderr
    facts = json.loads((folder / "refined" / "grad_transformer.json").read_text())["generated"]["refinement"]
    assert facts == outcome.json["refinement"]
    assert set(facts[0]["agreement"]) == {"mapper", "nearest_shadow", "ridge", "reduced_rank"}
    assert len(facts[0]["agreement_by_round"]) == 2
    assert "Agreement with the TinyLM on public prompts" in run_cli(*refined).stdout
    outcome = run_cli("generate", *refined[1:7], "--dataset", "deltas", "--method", "ridge", "--json")
    assert (outcome.code, outcome.json["method"], outcome.json["refinement"]) == (0, "ridge", None)


def test_a_generated_adapter_needs_nothing_of_this_library(folder: Path) -> None:
    """Plain peft in a process where this library cannot even be imported."""
    code = (
        "import sys; sys.modules['grad_transformer'] = None\n"
        "from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])\n"
        "print(sum(float(p.abs().sum()) for n, p in model.named_parameters() if 'lora_B' in n) > 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder / "llm", folder / "generated"], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["plan", "--data", "absent.jsonl", "--source_model", "x", "--target_model", "x", "--output_dir", "o"],
            "rows",
        ),
        (["shadow", "absent"], "plan.json"),
        (["build", "absent", "--output_dir", "o"], "plan.json"),
        (["client", "--mapper", "absent/absent", "--data", "d.jsonl", "--output_dir", "o"], "d.jsonl"),
        (["generate", "--mapper", "mapper", "--adapters", "a", "--output_dir", "o", "--method", "best"], "mapper"),
        (
            ["evaluate", "--mapper", "m", "--dataset", "d", "--clients", "absent.yaml", "--output_dir", "o"],
            "absent.yaml",
        ),
    ],
)
def test_bad_input_is_one_screen_and_exit_code_2(arguments: list[str], words: str, run_cli: Any) -> None:
    outcome = run_cli(*arguments)
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert words in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_a_report_can_be_inspected(tmp_path: Path, run_cli: Any) -> None:
    write_text_atomic(tmp_path / "report.json", json.dumps({**manifests.REPORT, "blocks": {"cosine": [1.0]}}))
    outcome = run_cli("inspect", tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert "report" in outcome.stdout


def test_paths_devices_and_dtypes_that_do_not_exist_are_said_so(tmp_path: Path, run_cli: Any) -> None:
    generate = ["generate", "--mapper", "./nope", "--adapters", "x", "--output_dir", "o"]
    evaluate = ["--mapper", "m", "--dataset", "d", "--clients", "c", "--output_dir", "o"]
    write_text_atomic(tmp_path / "file.md", "text")
    for arguments, words in (
        (["inspect", "./nope"], "Neither a folder nor"),
        (["inspect", tmp_path / "nope"], "no such entry"),
        (["inspect", tmp_path / "file.md"], "a file"),
        (generate, "Neither a folder nor"),
        ([*generate, "--dtype", "foo"], "no such dtype"),
        ([*generate, "--device", "foo"], "no such device"),
        ([*generate, "--device", "cuda"], "no such device on this machine"),
        (["shadow", "nope", "--device", "cuda:3"], "no such device on this machine"),
        (["evaluate", *evaluate, "--dtype", "int8"], "no such dtype"),
    ):
        outcome = run_cli(*arguments)
        assert outcome.code == 2, outcome.stderr
        assert words in outcome.stderr
