"""Fields of a dataclass as arguments of argparse, with the rules of transformers' `HfArgumentParser`.

transformers' own is not used: its import, and TRL's, would make every `--help` wait for seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


# What a field's metadata hand on to argparse.
_OF_ARGPARSE = ("help", "choices", "nargs", "const")


def add_fields(parser: argparse.ArgumentParser, argument_type: type) -> None:
    """Add every field of a dataclass; those of a class with `_argument_group_name` in a group of that name."""
    title = getattr(argument_type, "_argument_group_name", None)
    group = parser if title is None else parser.add_argument_group(title)
    hints = get_type_hints(argument_type)
    for field in dataclasses.fields(argument_type):
        if field.init:
            _add_field(group, field, hints[field.name])


def string_to_bool(text: str) -> bool:
    """`true`, `yes`, `y`, `t`, `1` and their opposites, in any case."""
    word = text.lower()
    if word in ("true", "yes", "y", "t", "1"):
        return True
    if word in ("false", "no", "n", "f", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def mapping_of_yaml(text: str) -> dict[str, Any]:
    raise argparse.ArgumentTypeError("a mapping is given in the YAML file of --config")


def _add_field(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    options: dict[str, Any] = {name: field.metadata[name] for name in _OF_ARGPARSE if name in field.metadata}
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if field.metadata.get("positional"):
        optional = {} if default is dataclasses.MISSING else {"nargs": "?", "default": default}
        group.add_argument(field.name, type=_converter(_without_none(hint)), **options, **optional)
        return
    kind = _without_none(hint)
    options["type"] = _converter(kind)
    if kind is bool:
        if default is dataclasses.MISSING:
            default = False
        if hint is bool or default is not None:
            options.update(nargs="?", const=True)
    elif _is(kind, list):
        options["nargs"] = "+"
        # argparse would convert text as one of the items.
        default = None if isinstance(default, str) else default
    elif get_origin(kind) is Literal:
        options["choices"] = list(get_args(kind))
    elif _is_enum(kind):
        options["choices"] = [member.value for member in kind]
    options.update({"required": True} if default is dataclasses.MISSING else {"default": default})
    group.add_argument(*_flags("--", field.name), **options)
    if kind is bool and default is True:
        group.add_argument(
            *_flags("--no_", field.name),
            action="store_false",
            dest=field.name,
            default=False,
            help=options.get("help"),
        )


def _flags(prefix: str, name: str) -> list[str]:
    """The flag, and the same with hyphens."""
    flag = f"{prefix}{name}"
    return list(dict.fromkeys([flag, f"--{flag[2:].replace('_', '-')}"]))


def _without_none(hint: Any) -> Any:
    """The one type of a union that text is converted to."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    members = get_args(hint)
    kinds = [kind for kind in members if kind is not type(None)]
    if len(kinds) == 1:
        return kinds[0]
    assert str in kinds, f"text cannot be converted to one of {hint}"
    # `SchedulerType | str` names the choices; with None among them, text is what a command line can say.
    return str if type(None) in members else next(kind for kind in kinds if kind is not str)


def _converter(kind: Any) -> Callable[[str], Any]:
    if kind is bool:
        return string_to_bool
    if _is(kind, dict):
        return mapping_of_yaml
    if _is(kind, list):
        return get_args(kind)[0]
    if get_origin(kind) is Literal:
        return _choice(get_args(kind))
    if _is_enum(kind):
        return _choice([member.value for member in kind])
    return kind


def _choice(choices: Any) -> Callable[[str], Any]:
    by_text = {str(choice): choice for choice in choices}

    def choice(text: str) -> Any:
        return by_text.get(text, text)

    return choice


def _is(kind: Any, container: type) -> bool:
    return kind is container or get_origin(kind) is container


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)
