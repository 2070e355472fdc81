"""The command line: what it teaches, what it accepts, where it prints, how it exits."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from grad_transformer import cli
from grad_transformer.errors import AdapterFormatError, UsageError
from grad_transformer.scripts._common import CommandParser, CommandResult, format_table
from grad_transformer.scripts._output import emit
from tests import manifests


ROOT = Path(__file__).parents[1]
CONTRACT = ROOT / "tests" / "contract" / "cli_flags.json"
UPDATE = "GRAD_TRANSFORMER_UPDATE_CONTRACTS"
SCRIPTS = sorted(
    path.stem for path in (ROOT / "grad_transformer" / "scripts").glob("*.py") if not path.stem.startswith("_")
)


@dataclass(frozen=True)
class ToyArguments:
    folder: str = field(metadata={"help": "Where.", "positional": True})
    steps: int = field(metadata={"help": "How many."})
    rate: float = field(default=0.5, metadata={"help": "How fast."})
    names: list[str] | None = field(default=None, metadata={"help": "Which."})
    engine: Literal["trl", "batched"] = field(default="trl", metadata={"help": "By what."})
    note: str | None = field(default=None, metadata={"help": "Remark."})
    shuffle: bool = field(default=True, metadata={"help": "In which order."})


@pytest.fixture
def parser() -> CommandParser:
    return CommandParser(ToyArguments, command="toy", description="A toy.")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[ToyArguments], CommandResult]], None]:
    """Put a function in the place of the `inspect` command."""

    def install(function: Callable[[ToyArguments], CommandResult]) -> None:
        script = SimpleNamespace(make_parser=lambda: CommandParser(ToyArguments, command="toy"), main=function)
        monkeypatch.setattr(cli.importlib, "import_module", lambda *_: script)

    return install


# Help


def test_help_lists_the_commands_in_the_order_of_the_data_flow(run_cli: Any) -> None:
    outcome = run_cli("--help")
    assert outcome.code == 0
    listed = [line.split()[0] for line in outcome.stdout.splitlines() if line.startswith("  ") and line[2:3].isalpha()]
    commands = ["plan", "shadow", "build", "train", "client", "generate", "evaluate", "inspect", "demo"]
    assert listed[: len(commands)] == commands
    assert max(map(len, outcome.stdout.splitlines())) <= 100


def test_without_a_command_help_goes_to_stderr(run_cli: Any) -> None:
    outcome = run_cli()
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "usage:" in outcome.stderr


def test_version_names_what_it_stands_on(run_cli: Any) -> None:
    outcome = run_cli("--version")
    assert outcome.stdout.startswith("grad-transformer 0.")
    assert "\ntorch " in outcome.stdout and "\npeft " in outcome.stdout


# What takes seconds to import, and --help and --version have no need of.
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy", "huggingface_hub"}


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, env={**os.environ, **environment}
    )


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys; from grad_transformer import cli\n"
        "def run(*arguments):\n"
        "    try: return cli.main(arguments)\n"
        "    except SystemExit as end: return end.code\n"
        "assert run('--help') == run('--version') == 0\n"
        "assert all(run(name, '--help') == 0 for name in cli.COMMAND_NAMES)\n"
        f"print('loaded:', sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = run_python(code)
    assert done.stdout.endswith(b"loaded: []\n"), done.stderr.decode()


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
def test_help_fits_every_terminal(encoding: str) -> None:
    code = (
        "import sys; from grad_transformer import cli\n"
        "for name in cli.COMMAND_NAMES:\n"
        "    try: cli.main([name, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "print('R² of all')"
    )
    done = run_python(code, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert done.stdout.decode(encoding).endswith("R^2 of all\n")


def test_train_shows_its_own_arguments_first_and_all_on_request(run_cli: Any) -> None:
    short, whole = (run_cli("train", flag) for flag in ("--help", "--help_all"))
    assert (short.code, whole.code) == (0, 0)
    assert "--help_all" in short.stdout and "--mixup_alpha" in short.stdout and "--torch_compile" not in short.stdout
    assert "--torch_compile" in whole.stdout and "--mixup_alpha" in whole.stdout
    assert len(short.stdout.splitlines()) < 200


def test_paths_in_help_texts_exist() -> None:
    missing = [
        f"{command}: {path}"
        for command in SCRIPTS
        for path in re.findall(
            r"(?:examples|docs|benchmarks|hub_recipes)/[\w./-]+",
            importlib.import_module(f"grad_transformer.scripts.{command}").__doc__ or "",
        )
        if not (ROOT / path).exists()
    ]
    assert missing == []


def test_unknown_command_suggests_the_nearest(run_cli: Any) -> None:
    outcome = run_cli("pln", "--json")
    assert outcome.code == 2
    assert "did you mean plan?" in outcome.stderr
    assert outcome.json["error"] == "UsageError"


def test_commands_and_scripts_are_the_same() -> None:
    assert sorted(cli.COMMAND_NAMES) == SCRIPTS


@pytest.mark.parametrize("command", SCRIPTS)
def test_help_of_a_command_teaches(command: str, run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    outcome = run_cli(command, "--help")
    assert outcome.code == 0
    assert f"usage: grad-transformer {command}" in outcome.stdout
    assert f"\n    grad-transformer {command} " in outcome.stdout, "the docstring shows a command that can be pasted"
    assert "--config FILE" in outcome.stdout and "--json" in outcome.stdout
    assert not re.search(r"\S {3,}--\w", outcome.stdout.split("options:")[0]), "a line break of a command was lost"
    sentences = [line for line in outcome.stdout.splitlines() if not line.startswith(" ")]
    assert max(map(len, sentences)) <= 100


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_argument_has_a_help_text(command: str) -> None:
    parser = importlib.import_module(f"grad_transformer.scripts.{command}").make_parser().whole()
    assert [action.dest for action in parser._actions if not action.help and not _is_negation(action)] == []


# Contract


def _is_negation(action: argparse.Action) -> bool:
    return any(option.startswith("--no_") for option in action.option_strings)


def _describe(action: argparse.Action) -> dict[str, Any]:
    facts = {
        "type": getattr(action.type, "__name__", None) if action.type else None,
        "default": None if action.default is argparse.SUPPRESS else action.default,
        "required": action.required,
        "nargs": action.nargs,
        "choices": list(action.choices) if action.choices else None,
    }
    return {name: value for name, value in facts.items() if value not in (None, False)}


def test_flags_are_the_frozen_ones() -> None:
    found: dict[str, dict[str, Any]] = {}
    for command in SCRIPTS:
        parser = importlib.import_module(f"grad_transformer.scripts.{command}").make_parser().whole()
        actions = [action for action in parser._actions if action.dest != "help" and not _is_negation(action)]
        found[command] = {(action.option_strings or [action.dest])[0]: _describe(action) for action in actions}
    found = json.loads(json.dumps(found, default=str))
    if os.environ.get(UPDATE) == "1":
        CONTRACT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    frozen = json.loads(CONTRACT.read_text(encoding="utf-8"))
    changes = [
        f"{command} {flag}: frozen {frozen.get(command, {}).get(flag)}, found {found.get(command, {}).get(flag)}"
        for command in sorted({*frozen, *found})
        for flag in sorted({*frozen.get(command, {}), *found.get(command, {})})
        if frozen.get(command, {}).get(flag) != found.get(command, {}).get(flag)
    ]
    assert not changes, "\n".join(
        [
            "The flags of the command line changed; other people's scripts and YAML files use them.",
            *changes,
            f"If this is meant: {UPDATE}=1 python -m pytest tests/test_cli.py -k frozen, and a line in CHANGELOG.md.",
        ]
    )


# Parsing


def test_flags_and_positionals(parser: CommandParser) -> None:
    (args,), output = parser.parse_command(
        ["here", "--steps", "3", "--names", "a", "b", "--engine", "batched", "--no_shuffle", "--json"]
    )
    assert args == ToyArguments("here", 3, names=["a", "b"], engine="batched", shuffle=False)
    assert output.json is True


def test_values_and_types_come_from_yaml_and_flags_win(parser: CommandParser, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("folder: there\nsteps: 3\nrate: 1e-4\nnames: [1, b]\nshuffle: false\nnote: null\njson: true\n")
    for arguments in (["--config", str(config)], [f"--config={config}"]):
        (args,), output = parser.__class__(ToyArguments, command="toy").parse_command([*arguments, "--steps", "9"])
        assert args == ToyArguments("there", 9, rate=1e-4, names=["1", "b"], shuffle=False)
        assert output.json is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["here"], "--steps"),
        (["here", "--steps", "many"], "invalid int value: 'many'"),
        (["here", "--steps", "3", "--step", "4"], "did you mean --steps?"),
        (["here", "there", "--steps", "3"], "Unknown argument there"),
        (["here", "--steps", "3", "--engine", "magic"], "magic"),
        (["here", "--steps", "3", "--config"], "--config takes one file"),
        (["here", "--config", "--steps", "3"], "--config takes one file"),
        (["here", "--config=a.yaml", "--config", "b.yaml"], "given once"),
        (["here", "--config", "missing.yaml"], "No such file"),
    ],
)
def test_wrong_flags_are_refused(parser: CommandParser, arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match="(?s).*" + message.replace("?", r"\?")):
        parser.parse_command(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- steps", "valid dictionary"),
        ("", "valid dictionary"),
        ("1: 2", "Unknown key `1`"),
        ("steps: &a 3", "anchor"),
        ("steps: 3\nsteps: 4", "twice"),
        ("[" * 5000, "levels"),
        ("steps: [", "not valid YAML"),
        ("stepz: 3", "did you mean steps?"),
        ("help: true", "Unknown key `help`"),
        ("steps: 3.5", "invalid int value: '3.5'"),
        ("steps: [3]", "`steps` has a value of the wrong type"),
        ("steps: null", "`steps` has a value of the wrong type"),
        ("steps: {a: 1}", "`steps` has a value of the wrong type"),
        ("names: a", "a list with at least one item"),
        ("names: []", "a list with at least one item"),
        ("engine: magic", "magic"),
        ("note: yes", "quote them"),
        ("shuffle: maybe", "maybe"),
        ("env: 3", "env"),
    ],
)
def test_wrong_yaml_is_refused_with_its_path(parser: CommandParser, tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(UsageError) as caught:
        parser.parse_command(["here", "--config", str(config)])
    assert message in str(caught.value)
    assert caught.value.path == str(config)


def test_a_file_beside_the_program_adds_no_arguments(
    parser: CommandParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "program.args").write_text("--rate 7")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "program")])
    (args,), _ = parser.parse_command(["here", "--steps", "3"])
    assert args.rate == 0.5


# Results, messages, errors


def test_only_the_result_goes_to_stdout(run_cli: Any, toy: Any) -> None:
    def main(args: ToyArguments) -> CommandResult:
        sys.stdout.write("a library's chatter\n")
        logging.getLogger("grad_transformer.shadow.run").info("run 1 of 2")
        logging.getLogger("grad_transformer.shadow.run").warning("little to learn")
        return CommandResult({"folder": Path(args.folder), "r2": float("nan")}, "wrote here\n")

    toy(main)
    outcome = run_cli("inspect", "here", "--steps", 1)
    assert (outcome.code, outcome.stdout) == (0, "wrote here\n")
    assert outcome.stderr == "a library's chatter\nrun 1 of 2\nwarning: little to learn\n"
    assert run_cli("inspect", "here", "--steps", 1, "--json").json == {"folder": "here", "r2": None}


def test_verbosity_follows_transformers(run_cli: Any, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import logging as transformers_logging

    def main(args: ToyArguments) -> CommandResult:
        logging.getLogger("grad_transformer.shadow.run").info("run 1 of 2")
        logging.getLogger("grad_transformer.shadow.run").error("broken")
        return CommandResult({}, "")

    toy(main)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setattr(transformers_logging, "get_verbosity", lambda: logging.ERROR)
    before = logging.getLogger("grad_transformer").handlers[:]
    assert run_cli("inspect", "here", "--steps", 1).stderr == "error: broken\n"
    assert logging.getLogger("grad_transformer").handlers == before


def test_an_error_of_the_user_is_one_screen_and_exit_code_2(run_cli: Any, toy: Any) -> None:
    def main(args: ToyArguments) -> CommandResult:
        raise AdapterFormatError("Broken.", path="x", expected="A\n" * 100, found="B" * 9999, remedy="mend it")

    toy(main)
    outcome = run_cli("inspect", "here", "--steps", 1)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("grad-transformer inspect: Broken.\n  path:     x\n  expected: A")
    assert len(outcome.stderr.splitlines()) <= 25
    found = run_cli("inspect", "here", "--steps", 1, "--json").json
    assert (found["error"], found["path"], found["remedy"]) == ("AdapterFormatError", "x", "mend it")


@pytest.mark.parametrize("flag", ["--json", "--json=true"])
def test_arguments_that_cannot_be_parsed_give_json_too(run_cli: Any, toy: Any, flag: str) -> None:
    toy(lambda args: CommandResult({}, ""))
    outcome = run_cli("inspect", "here", "--stepz", 1, flag)
    assert (outcome.code, outcome.json["error"]) == (2, "UsageError")


def test_interruption_says_that_work_resumes(run_cli: Any, toy: Any) -> None:
    def main(args: ToyArguments) -> CommandResult:
        raise KeyboardInterrupt

    toy(main)
    outcome = run_cli("shadow", "here", "--steps", 1)
    assert (outcome.code, outcome.stdout) == (130, "")
    assert "resumes" in outcome.stderr
    assert run_cli("inspect", "here", "--steps", 1).stderr == "\ngrad-transformer inspect: interrupted.\n"


def test_what_nobody_foresaw_is_one_line_and_a_traceback_on_request(
    run_cli: Any, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(args: ToyArguments) -> CommandResult:
        raise ZeroDivisionError("ours\x1b[2J\nand more")

    toy(main)
    outcome = run_cli("inspect", "here", "--steps", 1, "--json")
    assert (outcome.code, outcome.json["error"]) == (1, "ZeroDivisionError")
    first, second = outcome.stderr.splitlines()
    assert first == "grad-transformer inspect: unforeseen ZeroDivisionError: ours\\x1b[2J\\nand more"
    assert cli.DEBUG in second
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(ZeroDivisionError, match="ours"):
        run_cli("inspect", "here", "--steps", 1)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(28, "No space left on device", "out/x"),
            "The system refused to read or write a file.\n  path:     out/x",
        ),
        (MemoryError(), "The memory is not enough."),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "CUDA out of memory"),
    ],
)
def test_what_the_machine_lacks_is_no_bug(run_cli: Any, toy: Any, error: Exception, words: str) -> None:
    def main(args: ToyArguments) -> CommandResult:
        raise error

    toy(main)
    outcome = run_cli("inspect", "here", "--steps", 1)
    assert outcome.code == 2
    assert words in outcome.stderr and "report" not in outcome.stderr


def test_interruption_of_imports_leaves_no_traceback() -> None:
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from grad_transformer.cli import main\n"
        "sys.exit(main(['inspect', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert "interrupted" in done.stderr and "Traceback" not in done.stderr


def test_names_of_others_cannot_steer_the_terminal(run_cli: Any, toy: Any) -> None:
    def main(args: ToyArguments) -> CommandResult:
        logging.getLogger("grad_transformer.hub").warning("from \x1b]0;title\x07")
        return CommandResult({"name": "\x1b[2J"}, "model \x1b[2J\u202e")

    toy(main)
    outcome = run_cli("inspect", "here", "--steps", 1)
    assert outcome.stdout == "model \\x1b[2J\\u202e\n"
    assert "\x1b" not in outcome.stderr and "\x07" not in outcome.stderr
    assert run_cli("inspect", "here", "--steps", 1, "--json").json == {"name": "\x1b[2J"}


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys; from grad_transformer.cli import main; sys.exit(main(['train', '--help']))"
    pipe = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert pipe.stdout is not None and pipe.stderr is not None
    pipe.stdout.close()
    assert "Traceback" not in pipe.stderr.read()
    pipe.wait()
    pipe.stderr.close()


def test_only_the_main_process_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, printed in (("0", "done\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        emit({}, json_output=False, text="done")
        assert capsys.readouterr().out == printed


def test_tables_are_aligned() -> None:
    table = format_table(["client", "pgr"], [["seen-a", 98.76543], ["b", None]])
    assert table.splitlines() == ["client    pgr", "seen-a  98.77", "b           -"]


# inspect


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {}
    for layer in range(2):
        key = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{key}.lora_A.weight"] = torch.full((2, 4), 1.0)
        tensors[f"{key}.lora_B.weight"] = torch.full((6, 2), 2.0)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "acme/tiny",
        "r": 2,
        "lora_alpha": 8,
        "bias": "none",
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_inspect_shows_an_adapter_block_by_block(run_cli: Any, adapter_folder: Path) -> None:
    found = run_cli("inspect", adapter_folder, "--json").json
    assert (found["kind"], found["base_model"], found["numel"]) == ("adapter", "acme/tiny", 40)
    assert found["blocks"][1] == {
        "name": "model.layers.1",
        "tensors": 2,
        "width": 20,
        "rank": [2],
        "scaling": [4.0],
        "dtype": ["float32"],
        "norm": pytest.approx(56**0.5),
    }
    text = run_cli("inspect", adapter_folder).stdout
    assert "model.layers.1        2     20     2        4  float32  7.483" in text


def test_inspect_verifies_a_root(run_cli: Any, adapter_folder: Path) -> None:
    from grad_transformer.adapters import LoraAdapter, Root
    from grad_transformer.adapters.roots import fingerprint_adapter

    adapter = LoraAdapter.from_pretrained(adapter_folder)
    Root(adapter, fingerprint_adapter(adapter), "acme/tiny", None, "0" * 64, 7).save_pretrained(adapter_folder)
    found = run_cli("inspect", adapter_folder, "--json").json
    assert (found["kind"], found["seed"], found["fingerprint"]) == ("root", 7, fingerprint_adapter(adapter))
    adapter.with_values(adapter.flat() + 1).save_pretrained(adapter_folder)
    assert run_cli("inspect", adapter_folder, "--json").json["error"] == "IncompleteArtifactError"


@pytest.mark.parametrize(
    ("name", "manifest", "kind"),
    [
        ("config.json", {"model_type": "grad_transformer", "d_model": 128}, "mapper"),
        ("plan.json", manifests.PLAN, "shadow plan"),
        ("delta_dataset.json", manifests.DELTA_DATASET, "delta dataset"),
        ("lora_delta_tokenizer.json", manifests.TOKENIZER, "delta tokenizer"),
        ("report.json", manifests.REPORT, "report"),
    ],
)
def test_inspect_knows_a_folder_by_its_manifest(
    run_cli: Any, tmp_path: Path, name: str, manifest: dict[str, Any], kind: str
) -> None:
    (tmp_path / name).write_text(json.dumps(manifest))
    found = run_cli("inspect", tmp_path, "--json").json
    assert found["kind"] == kind
    scalars = {key: value for key, value in manifest.items() if not isinstance(value, list | dict)}
    assert scalars.items() <= found.items()
    assert kind in run_cli("inspect", tmp_path).stdout


def test_inspect_counts_the_runs_of_a_plan(run_cli: Any, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(manifests.PLAN))
    for model, count in (("tinylm", 3), ("llm", 2)):
        (tmp_path / "runs" / model).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "runs" / model / f"{number}.safetensors").touch()
    (tmp_path / "runs" / "llm" / ".2.safetensors.tmp").touch()
    assert run_cli("inspect", tmp_path, "--json").json["runs"] == {"runs/llm": 2, "runs/tinylm": 3}


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({}, "IncompleteArtifactError"),
        ({"notes.txt": "x"}, "IncompleteArtifactError"),
        ({"plan.json": '{"format_version": 99}'}, "FormatVersionError"),
        ({"plan.json": "not json"}, "IncompleteArtifactError"),
        ({"plan.json": json.dumps({**manifests.PLAN, "runs": [{"shadow_id": "../x"}]})}, "IncompleteArtifactError"),
        ({"adapter_config.json": "{}", "adapter_model.bin": "x"}, "AdapterFormatError"),
    ],
)
def test_inspect_refuses_what_it_cannot_tell(run_cli: Any, tmp_path: Path, files: dict[str, str], error: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    outcome = run_cli("inspect", tmp_path, "--json")
    assert (outcome.code, outcome.json["error"]) == (2, error)


def test_inspect_of_nothing_offers_a_way_out(run_cli: Any, tmp_path: Path) -> None:
    outcome = run_cli("inspect", tmp_path / "missing")
    assert outcome.code == 2
    assert "remedy:" in outcome.stderr
