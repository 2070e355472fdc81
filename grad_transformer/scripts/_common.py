'''What every command shares: its parser, its result, checks of what it was given.

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
- `make_parser` may take several dataclasses; `main` gets an instance of each, in that order. Where one extends a class
  whose import takes seconds (`TrainingArguments`), `everything` gives the whole list when arguments are parsed.
- `main` prints nothing and calls no `sys.exit`. It returns facts for machines (`--json`) and text for people, logs
  its progress through `transformers.utils.logging.get_logger(__name__)` (level info is shown), and raises a
  `GradTransformerError` where the user can mend something. `cli.py` turns these into stdout, stderr and exit codes.
'''

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from ..errors import GradTransformerError, UsageError
from ._fields import add_fields


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


class CommandParser(argparse.ArgumentParser):
    """Arguments from dataclasses, as flags and from the YAML of `--config`; errors are raised, not printed.

    Args:
        *argument_types (`type`): dataclasses whose fields are the command's arguments.
        command (`str`): name of the command.
        description (`str`, *optional*): docstring of the script.
        everything (`Callable`, *optional*): gives the dataclasses with arguments that only `--help_all` shows; they
            are loaded when arguments are parsed.
    """

    def __init__(
        self,
        *argument_types: type,
        command: str,
        description: str | None = None,
        everything: Callable[[], tuple[type, ...]] | None = None,
    ):
        super().__init__(
            prog=f"grad-transformer {command}",
            description=textwrap.dedent(description or "").strip(),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self._command, self._everything = command, everything
        self.dataclass_types = [*argument_types, OutputArguments]
        for argument_type in self.dataclass_types:
            add_fields(self, argument_type)
        group = next(group for group in self._action_groups if group.title == OutputArguments._argument_group_name)
        group.add_argument(
            "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file of arguments; flags override it."
        )
        if everything is not None:
            group.add_argument(
                "--help_all", "--help-all", action="store_true", default=argparse.SUPPRESS, help=_HELP_ALL
            )

    def whole(self) -> CommandParser:
        """The parser of all arguments, also of those that `--help` leaves out."""
        if self._everything is None:
            return self
        return CommandParser(*self._everything(), command=self._command, description=self.description)

    def parse_command(self, argv: Sequence[str]) -> tuple[tuple[Any, ...], OutputArguments]:
        """Parse flags and the YAML of `--config`.

        Returns:
            The command's own dataclass instances, and what every command accepts.

        Raises:
            [`UsageError`]: a flag or key that does not exist, a value of the wrong type, a required argument that is
                missing, or a config file that cannot be read or is not a mapping.
        """
        if self._everything is not None:
            if {"--help_all", "--help-all"} & set(argv):
                return self.whole().parse_command(["--help"])
            if not {"--help", "-h"} & set(argv):
                return self.whole().parse_command(argv)
        arguments, path = _join_config_flag(argv)
        try:
            if path is not None:
                position = arguments.index("--config")
                del arguments[position : position + 2]
                self._take_defaults_from(path)
            *own, output = self._parse_flags(arguments)
        except GradTransformerError as error:
            if path is not None and error.path is None and isinstance(error, _ConfigValueError):
                raise UsageError(
                    error.message, path=path, expected=error.expected, found=error.found, remedy=error.remedy
                ) from error
            raise
        except ValueError as error:
            raise UsageError(str(error), path=path, remedy=f"see `{self.prog} --help`") from error
        return tuple(own), output

    def print_help(self, file: Any = None) -> None:
        super().print_help(file)
        # Not only at exit: `cli.py` deals with a reader that has gone.
        (file or sys.stdout).flush()

    def error(self, message: str) -> Any:
        """Called by argparse, which would print the usage and exit."""
        message = _SAME_WITH_HYPHENS.sub(r"\1", message)
        raise UsageError(f"{message[:1].upper()}{message[1:]}.", remedy=f"see `{self.prog} --help`")

    def _parse_flags(self, arguments: Sequence[str]) -> list[Any]:
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            raise UsageError(
                f"Unknown argument {unknown[0]}.",
                found=" ".join(unknown),
                remedy=self._did_you_mean(unknown[0].partition("=")[0], flags),
            )
        return [
            kind(**{field.name: getattr(namespace, field.name) for field in dataclasses.fields(kind) if field.init})
            for kind in self.dataclass_types
        ]

    def _take_defaults_from(self, path: str) -> None:
        # pydantic and yaml are not loaded for --help.
        from ..files import read_yaml
        from ..schemas import Object

        config = read_yaml(path, Object)
        actions = {action.dest: action for action in reversed(self._actions) if action.dest not in ("help", "config")}
        for key, value in config.items():
            if key not in actions:
                raise _ConfigValueError(
                    f"Unknown key `{key}` in the config file.",
                    expected="names of the command's arguments",
                    found=key,
                    remedy=self._did_you_mean(str(key), list(actions)),
                )
            converted = self._config_value(actions[key], value)
            for action in self._actions:
                if action.dest == key:
                    action.default, action.required = converted, False

    def _config_value(self, action: argparse.Action, value: Any) -> Any:
        """A value from YAML, checked and converted as the same text on the command line would be."""
        from ..documents import describe

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
            found=describe(value),
        )

    def _config_scalar(self, action: argparse.Action, value: Any) -> Any:
        from ..documents import describe, source_text

        text_from_bool = isinstance(value, bool) and action.type is str
        if value is None or text_from_bool or isinstance(value, dict | list):
            raise _ConfigValueError(
                f"`{action.dest}` has a value of the wrong type.",
                expected="text" if action.type is str else "one value",
                found=describe(value),
                remedy="YAML reads bare yes, no, on and off as booleans: quote them" if text_from_bool else None,
            )
        try:
            # Text as it stands in the file: 0123456 is a revision, not a number.
            converted = self._get_value(action, source_text(value))
            self._check_value(action, converted)
        except argparse.ArgumentError as error:
            raise _ConfigValueError(
                f"`{action.dest}` has a value that cannot be used.", expected=error.message, found=describe(value)
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


_SAME_WITH_HYPHENS = re.compile(r"(--\w+)/--[\w-]+")
_HELP_ALL = "Show all arguments, also those of transformers' TrainingArguments."


class _ConfigValueError(UsageError):
    """Raised while a YAML mapping is read; the caller adds the file's path."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Commands of a docstring as they are written, its sentences as wide as the terminal; no `(default: None)`."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(
            paragraph if "\n " in f"\n{paragraph}" else textwrap.fill(paragraph, width) for paragraph in paragraphs
        )

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.required or not action.option_strings:
            return action.help
        return super()._get_help_string(action)


def _is_kind(hint: Any, kind: type) -> bool:
    return hint is kind or getattr(hint, "__origin__", None) is kind


def _join_config_flag(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments with `--config=FILE` as two words, and the path of the file."""
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
    """Refuse devices that torch does not know or that this machine lacks, and dtypes that weights cannot have.

    Raises:
        [`UsageError`]
    """
    from ..adapters.bases import check_device as check_placement
    from ..adapters.bases import check_dtype

    check_placement(device)
    check_dtype(dtype)


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
