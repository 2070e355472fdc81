"""`grad-transformer <command>`: finds the command's script, runs it, and turns what happens into output and exit code.

Exit codes: 0 done; 1 what nobody foresaw, with its traceback where GRAD_TRANSFORMER_DEBUG is 1; 2 something in the
call or its inputs that the user can mend; 130 interrupted. Results go to stdout and everything else to stderr.

Under a launcher: `accelerate launch -m grad_transformer.cli train --config train.yaml`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence

from .errors import GradTransformerError, UsageError
from .outputs import disk_error
from .scripts._output import command_logging, emit, write_plainly
from .version import __version__
from .wording import one_line, printable


# In the order of the data flow: from public data to a mapper, from private data to an adapter, at any time.
COMMANDS: dict[str, dict[str, str]] = {
    "From public data to a mapper": {
        "plan": "split public data into shadow subsets; show what will run and what it costs",
        "shadow": "fine-tune both base models on every subset, each from its root; resumable",
        "build": "turn finished runs into a delta dataset of (TinyLM, LLM) pairs",
        "train": "train the mapper on the pairs; report held-out R² beside its controls",
    },
    "From private data to an adapter for the LLM": {
        "client": "fine-tune the TinyLM on the client's own data; only the adapter leaves",
        "generate": "aggregate client adapters and map them to one PEFT adapter for the LLM",
        "evaluate": "score the generated adapter beside its controls; write the report",
    },
    "At any time": {
        "inspect": "say what a folder or Hub repository holds",
        "demo": "run all of it on a small self-made world, in a few minutes on a laptop",
        "study": "run the paper's experiments over several seeds; plan, share, resume, report",
    },
    "To and from the Hub": {
        "push": "publish a folder as a version with a card; client adapters stay private",
        "pull": "copy a version into a folder, checked by hash",
    },
}

COMMAND_NAMES: tuple[str, ...] = tuple(name for group in COMMANDS.values() for name in group)

# Commands that go on from what an interrupted run has finished.
RESUMABLE = frozenset({"shadow", "build", "train", "demo", "study", "push", "pull"})
RESUMED = " What is finished is kept: run the same command again and it resumes from there."

DEBUG = "GRAD_TRANSFORMER_DEBUG"

_MAX_ERROR_LINES, _MAX_ERROR_COLUMNS = 24, 400


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`): command and its arguments.

    Returns:
        `int`: the exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    as_json = _wants_json(rest)
    try:
        write_plainly()
        if not arguments:
            print(help_text(), file=sys.stderr)
            return 2
        if command in ("-h", "--help", "help"):
            print(help_text(), flush=True)
            return 0
        if command == "--version":
            print(version_text(), flush=True)
            return 0
        if command not in COMMAND_NAMES:
            raise _unknown_command(command)
        # Bars over rows that are read in moments.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        # Only now, as for everything that a command needs: `--help` and `--version` wait for none of it.
        script = importlib.import_module(f".scripts.{command}", __package__)
        own_arguments, output = script.make_parser().parse_command(rest)
        as_json = output.json
        # Libraries print to stdout as they please: it is kept for the result.
        with command_logging(), contextlib.redirect_stdout(sys.stderr):
            result = script.main(*own_arguments)
        emit(result.data, json_output=as_json, text=result.text)
    except KeyboardInterrupt:
        _complain(command, f"interrupted.{RESUMED if command in RESUMABLE else ''}", before="\n")
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone, as `| head` does. What is still to be flushed at exit has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as cause:
        known = cause if isinstance(cause, GradTransformerError) else disk_error(cause)
        if known is None and os.environ.get(DEBUG) == "1":
            raise
        error, code = (known, 2) if known is not None else _explain(cause)
        _complain(command, str(error))
        if as_json:
            print(json.dumps({**error.to_dict(), "error": type(known or cause).__name__}, indent=2))
        return code
    return 0


def _explain(error: Exception) -> tuple[GradTransformerError, int]:
    """An error of another library in one line, and the exit code: 2 where the machine, not code, is to be mended."""
    shown = f"with {DEBUG}=1 in the environment the traceback is shown"
    if isinstance(error, OSError):
        what = one_line(error.strerror or error)
        return UsageError(f"{type(error).__name__}: {what}", path=error.filename, remedy=shown), 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return UsageError(
            "The memory is not enough.",
            found=one_line(error) or None,
            remedy=f"smaller batches, gradient checkpointing or another --dtype, where the command has them; {shown}",
        ), 2
    return GradTransformerError(
        f"unforeseen {type(error).__name__}: {one_line(error)}", remedy=f"{shown}; please report it"
    ), 1


def _complain(command: str, message: str, before: str = "") -> None:
    print(_one_screen(f"{before}grad-transformer {command}: {printable(message)}"), file=sys.stderr)


def help_text() -> str:
    """What `grad-transformer --help` prints."""
    width = max(map(len, COMMAND_NAMES))
    groups = "\n\n".join(
        "\n".join([f"{title}:", *(f"  {name:<{width}}  {summary}" for name, summary in group.items())])
        for title, group in COMMANDS.items()
    )
    return f"""\
usage: grad-transformer <command> [--config run.yaml] [arguments]

Fine-tune small, in private; deploy large. Each command reads what the one before it wrote.

{groups}

Every command takes its arguments as flags or from a YAML file with the same names (flags win),
prints its result on stdout (--json for machines) and messages on stderr, and exits with 2 if
something in its input has to be mended.

  -h, --help   this text; grad-transformer <command> --help explains one command
  --version    versions of this library and of those it stands on

Example:
  grad-transformer demo --output_dir demo_output --preset quick
  grad-transformer inspect demo_output"""


def version_text() -> str:
    """What `grad-transformer --version` prints: all that a bug report needs."""
    lines = [f"grad-transformer {__version__}", f"python {platform.python_version()}"]
    for name in ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "huggingface_hub"):
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} not installed")
    return "\n".join(lines)


def _unknown_command(command: str) -> UsageError:
    close = difflib.get_close_matches(command, COMMAND_NAMES, n=1)
    return UsageError(
        f"There is no command {command!r}.",
        expected=", ".join(COMMAND_NAMES),
        remedy=f"did you mean {close[0]}?" if close else "see `grad-transformer --help`",
    )


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether `--json` was asked for, also where the arguments cannot be parsed."""
    yes = {f"--json={value}" for value in ("true", "1", "yes", "y", "t")}
    return "--json" in arguments or any(argument.lower() in yes for argument in arguments)


def _one_screen(message: str) -> str:
    lines = [
        line if len(line) <= _MAX_ERROR_COLUMNS else f"{line[:_MAX_ERROR_COLUMNS]} …" for line in message.splitlines()
    ]
    return "\n".join(lines if len(lines) <= _MAX_ERROR_LINES else [*lines[:_MAX_ERROR_LINES], "…"])


if __name__ == "__main__":
    sys.exit(main())
