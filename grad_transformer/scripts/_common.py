'''What every command shares: its parser, its result, its logging.

A command `name` is one file, `scripts/name.py`. Its docstring says in one sentence what goes in and what comes out,
and holds commands that can be pasted; it is also what `grad-transformer name --help` prints. Below it stand a
dataclass of arguments and two functions:

```python
"""Average LoRA adapters.

    grad-transformer average --adapters bank-a bank-b --output_dir average
"""

@dataclass(frozen=True)
class AverageArguments:
    """Arguments of `grad-transformer average`."""

    adapters: list[str] = field(metadata={"help": "Adapter folders or Hub repositories."})
    output_dir: str = field(metadata={"help": "Folder to write."})
    weights: list[float] | None = field(default=None, metadata={"help": "One weight per adapter. Default: equal."})


def make_parser() -> CommandParser:
    return CommandParser(AverageArguments, command="average", description=__doc__)


def main(args: AverageArguments) -> CommandResult:
    from ..adapters import LoraAdapter  # heavy imports stand at the top of main, so that --help stays fast

    ...
    return CommandResult({"output_dir": args.output_dir, "norm": 0.5}, f"Wrote {args.output_dir}.")
```

- The dataclass is the only list of flags: the YAML of `--config` has the same names, and `--json` and `--config` are
  added to every command. A field with `"positional": True` in its metadata is given without a flag.
- `make_parser` may take several dataclasses, for instance one that extends `TrainingArguments`; `main` gets an
  instance of each, in that order.
- `main` prints nothing and calls no `sys.exit`. It returns facts for machines (`--json`) and text for people, logs
  its progress through `transformers.utils.logging.get_logger(__name__)` (level info is shown), and raises a
  `GradTransformerError` where the user can mend something. `cli.py` turns these into stdout, stderr and exit codes.
'''

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import logging
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from trl.scripts.utils import TrlParser

from ..errors import GradTransformerError, UsageError


@dataclasses.dataclass(frozen=True)
class OutputArguments:
    """What every command accepts beside its own arguments."""

    _argument_group_name = "config and output"

    json: bool = dataclasses.field(
        default=False, metadata={"help": "Print the result on stdout as JSON; errors too. Messages stay on stderr."}
    )


@dataclasses.dataclass(frozen=True)
class CommandResult:
    """What a command found or made.

    Args:
        data (`Mapping[str, Any]`): facts for machines, printed by `--json`. Paths become text, NaN becomes null.
        text (`str`): the same for people, printed otherwise.
    """

    data: Mapping[str, Any]
    text: str


class CommandParser(TrlParser):
    """TRL's parser with the checks that YAML needs, and with errors that are raised, not printed.

    Args:
        *argument_types (`type`): dataclasses whose fields are the command's arguments.
        command (`str`): name of the command.
        description (`str`, *optional*): docstring of the script.
    """

    def __init__(self, *argument_types: type, command: str, description: str | None = None):
        super().__init__(
            dataclass_types=[*argument_types, OutputArguments],
            prog=f"grad-transformer {command}",
            description=textwrap.dedent(description or "").strip(),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        group = next(group for group in self._action_groups if group.title == OutputArguments._argument_group_name)
        group.add_argument(
            "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file of arguments; flags override it."
        )

    def parse_command(self, argv: Sequence[str]) -> tuple[tuple[Any, ...], OutputArguments]:
        """Parse flags and the YAML of `--config`.

        Returns:
            The command's own dataclass instances, and what every command accepts.

        Raises:
            [`UsageError`]: a flag or key that does not exist, a value of the wrong type, a required argument that is
                missing, or a config file that cannot be read or is not a mapping.
        """
        arguments, path = _join_config_flag(argv)
        try:
            *own, output = self.parse_args_and_config(arguments)
        except GradTransformerError as error:
            if path is not None and error.path is None and isinstance(error, _ConfigValueError):
                raise UsageError(
                    error.message, path=path, expected=error.expected, found=error.found, remedy=error.remedy
                ) from error
            raise
        except OSError as error:
            if path is None or error.filename != path:
                raise
            raise UsageError(
                "The config file cannot be read.", path=path, expected="a YAML file", found=error.strerror
            ) from error
        except yaml.YAMLError as error:
            raise UsageError("The config file is not valid YAML.", path=path, found=error) from error
        except ValueError as error:
            raise UsageError(str(error), path=path, remedy=f"see `{self.prog} --help`") from error
        return tuple(own), output

    def error(self, message: str) -> Any:
        """Called by argparse, which would print the usage and exit."""
        raise UsageError(f"{message[:1].upper()}{message[1:]}.", remedy=f"see `{self.prog} --help`")

    # Steps of TRL's and transformers' own parsing

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
        if field.metadata.get("positional"):
            optional: dict[str, Any] = {}
            if field.default is not dataclasses.MISSING:
                optional = {"nargs": "?", "default": field.default}
            parser.add_argument(field.name, type=field.type, help=field.metadata.get("help"), **optional)
        else:
            TrlParser._parse_dataclass_field(parser, field)

    def parse_args_into_dataclasses(self, args: Sequence[str] | None = None, **kwargs: Any) -> tuple[Any, ...]:
        # Never the `.args` file beside the program that transformers would look for.
        *instances, unknown = super().parse_args_into_dataclasses(
            args=args, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            raise UsageError(
                f"Unknown argument {unknown[0]}.",
                found=" ".join(unknown),
                remedy=self._did_you_mean(unknown[0].partition("=")[0], flags),
            )
        return tuple(instances)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        actions = {action.dest: action for action in reversed(self._actions) if action.dest not in ("help", "config")}
        values = {}
        for key, value in kwargs.items():
            if key not in actions:
                raise _ConfigValueError(
                    f"Unknown key `{key}` in the config file.",
                    expected="names of the command's arguments",
                    found=key,
                    remedy=self._did_you_mean(str(key), list(actions)),
                )
            values[key] = self._config_value(actions[key], value)
        return super().set_defaults_with_config(**values)

    def _config_value(self, action: argparse.Action, value: Any) -> Any:
        """A value from YAML, checked and converted as the same text on the command line would be."""
        if value is None and action.default is None and not action.required:
            return None
        if isinstance(value, dict | list) and type(value) in self._containers(action.dest):
            if action.nargs == "+" and isinstance(value, list) and value:
                return [self._config_scalar(action, item) for item in value]
            if action.nargs != "+":
                return value
        elif action.nargs != "+" and not isinstance(value, dict | list):
            return self._config_scalar(action, value)
        raise _ConfigValueError(
            f"`{action.dest}` has a value of the wrong type.",
            expected="a list with at least one item" if action.nargs == "+" else "one value",
            found=f"{value!r} ({type(value).__name__})",
        )

    def _config_scalar(self, action: argparse.Action, value: Any) -> Any:
        text_from_bool = isinstance(value, bool) and action.type is str
        if value is None or text_from_bool or isinstance(value, dict | list):
            raise _ConfigValueError(
                f"`{action.dest}` has a value of the wrong type.",
                expected="text" if action.type is str else "one value",
                found=f"{value!r} ({type(value).__name__})",
                remedy="YAML reads bare yes, no, on and off as booleans: quote them" if text_from_bool else None,
            )
        try:
            converted = self._get_value(action, str(value))
            self._check_value(action, converted)
        except argparse.ArgumentError as error:
            raise _ConfigValueError(
                f"`{action.dest}` has a value that cannot be used.", expected=error.message, found=repr(value)
            ) from error
        return converted

    def _containers(self, name: str) -> set[type]:
        """`dict` and `list`, where the field's declared type allows them."""
        for argument_type in self.dataclass_types:
            hint = get_type_hints(argument_type).get(name)
            if hint is not None:
                return {kind for part in (hint, *get_args(hint)) for kind in (dict, list) if _is_kind(part, kind)}
        return set()

    def _did_you_mean(self, word: str, known: list[str]) -> str:
        close = difflib.get_close_matches(word, known, n=1)
        return f"did you mean {close[0]}? see `{self.prog} --help`" if close else f"see `{self.prog} --help`"


class _ConfigValueError(UsageError):
    """Raised while a YAML mapping is read; the caller adds the file's path."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Docstrings as they are written; defaults, but no `(default: None)`."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.required or not action.option_strings:
            return action.help
        return super()._get_help_string(action)


def _is_kind(hint: Any, kind: type) -> bool:
    return hint is kind or getattr(hint, "__origin__", None) is kind


def _join_config_flag(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """TRL takes `--config FILE` only, so `--config=FILE` is rewritten. Returns the path too."""
    arguments: list[str] = []
    for argument in argv:
        name, equals, path = argument.partition("=")
        arguments.extend([name, path] if name == "--config" and equals else [argument])
    count = arguments.count("--config")
    if count == 0:
        return arguments, None
    following = arguments[arguments.index("--config") + 1 :]
    if count > 1 or not following or not following[0] or following[0].startswith("--"):
        raise UsageError(
            "--config takes one file, and is given once.",
            expected="--config run.yaml",
            found=" ".join(argument for argument in argv if argument.startswith("--config")),
        )
    return arguments, following[0]


def check_device(device: str | None, dtype: str = "auto") -> None:
    """Refuse devices that this machine has not, and dtypes that no model has.

    Raises:
        [`UsageError`]
    """
    from ..adapters.bases import check_device as check_placement
    from ..adapters.bases import check_dtype

    check_placement(device)
    check_dtype(dtype)


def emit(data: Mapping[str, Any], *, json_output: bool, text: str) -> None:
    """Print a result on stdout, on the main process only where several run (`accelerate launch`)."""
    if os.environ.get("RANK", "0") != "0":
        return
    print(json.dumps(_to_json(data), indent=2, allow_nan=False) if json_output else text.rstrip("\n"))
    sys.stdout.flush()


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_to_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return _to_json(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def format_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns: the first to the left, the others to the right; floats with four significant digits."""
    cells = [list(headers), *([_format_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(headers))]
    lines = (
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _format_cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def command_logging() -> Iterator[None]:
    """Show this library's messages on stderr while a command runs.

    transformers' `get_logger` gives us loggers outside its own tree, which its verbosity variable does not reach: the
    level of `TRANSFORMERS_VERBOSITY` is set on ours too; without it a command tells its progress (level info).
    """
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("grad_transformer")
    before = (logger.level, logger.propagate)
    chosen = os.environ.get("TRANSFORMERS_VERBOSITY") in transformers_logging.log_levels
    logger.setLevel(transformers_logging.get_verbosity() if chosen else logging.INFO)
    logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_MessageFormatter())
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            # What peft, TRL and transformers warn each other of is not the user's to mend.
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\.")
            yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before[0], before[1]


class _MessageFormatter(logging.Formatter):
    """The plain message; its level before it from warnings upwards."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {message}"
