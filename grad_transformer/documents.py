"""JSON and YAML as strangers may write them: text to plain data, within limits, and plain data to what a schema asks.

Plain data are objects with text keys, lists, text, 64-bit integers, finite numbers, booleans and null. Nothing else
comes out of here, however the text was made.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError


T = TypeVar("T")

MAX_DEPTH = 32
MAX_NODES = 1_000_000
MAX_TEXT = 2**20
# Numbers of YAML are short; 1:1:1:... is a number to it, of any length.
_MAX_NUMBER = 64
# Control characters but tab and newlines, terminal escapes among them; changes of writing direction; half characters.
UNSAFE_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class DocumentError(ValueError):
    """The text is no document that is read here; the caller adds where it stood.

    Args:
        message (`str`): what is wrong.
        expected, found (`str`, *optional*): where a schema was not kept.
    """

    def __init__(self, message: str, *, expected: str | None = None, found: str | None = None):
        super().__init__(message)
        self.expected, self.found = expected, found


class SourceInt(int):
    """An integer of YAML that keeps how it was written: `0123456` may be meant as text."""

    source: str


class SourceFloat(float):
    """A number of YAML that keeps how it was written: `1.10` may be meant as text."""

    source: str


def source_text(value: Any) -> str:
    """A scalar as it stands in the YAML file."""
    return str(getattr(value, "source", value))


def as_written(value: Any) -> Any:
    """A number of YAML as text, where text is asked for; anything else as it is."""
    return getattr(value, "source", value)


def parse_json(content: bytes | str, *, max_nodes: int = MAX_NODES) -> Any:
    """JSON text as plain data: a name twice in one object, NaN and Infinity are refused.

    Raises:
        [`DocumentError`]
    """
    text = _decode(content)
    # What is parsed may take fifty times the memory of its text, so that it is counted first.
    if sum(text.count(mark) for mark in ",[{") >= max_nodes:
        raise DocumentError(f"it has more than {max_nodes:,} values")
    try:
        data = strict_json(text)
    except RecursionError as cause:
        raise DocumentError(f"it is nested more than {MAX_DEPTH} levels deep") from cause
    except DocumentError:
        raise
    except ValueError as cause:
        raise DocumentError(str(cause)) from cause
    check_plain(data, max_nodes=max_nodes)
    return data


def strict_json(text: str) -> Any:
    """JSON text as Python makes it, without limits, but for a name twice in one object, NaN and Infinity.

    Raises:
        [`DocumentError`], `json.JSONDecodeError`, `RecursionError`
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)


def parse_yaml(content: bytes | str, *, max_nodes: int = MAX_NODES) -> Any:
    """One YAML document as plain data. Keys and dates are text as written; numbers keep how they were written.

    Anchors, aliases and tags are refused: they can make much of little, or something else than data.

    Raises:
        [`DocumentError`]
    """
    try:
        data = _build(yaml.parse(_decode(content), Loader=_LOADER), max_nodes)
    except DocumentError:
        raise
    except (yaml.YAMLError, ValueError) as cause:
        raise DocumentError(str(cause)) from cause
    check_plain(data, max_nodes=max_nodes)
    return data


def check_plain(data: Any, *, max_nodes: int = MAX_NODES) -> None:
    """Refuse data that are too deep, too many, no plain data, or hold unsafe text.

    Raises:
        [`DocumentError`]
    """
    level, depth, count = [data], 0, 1
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise DocumentError(f"it is nested more than {MAX_DEPTH} levels deep")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                for key in value:
                    if not isinstance(key, str):
                        raise DocumentError(f"it has a key that is no text, {str(key)[:40]!r}")
                    check_text(key)
                count += len(value)
                below.extend(value.values())
            elif isinstance(value, list):
                count += len(value)
                # Long lists hold numbers: not one by one.
                if set(map(type, value)) == {int}:
                    _check_number(min(value))
                    _check_number(max(value))
                else:
                    below.extend(value)
            else:
                _check_scalar(value)
        if count > max_nodes:
            raise DocumentError(f"it has more than {max_nodes:,} values")
        level = below


def _check_scalar(value: Any) -> None:
    if isinstance(value, str):
        check_text(value)
    elif isinstance(value, int | float):
        _check_number(value)
    elif value is not None:
        raise DocumentError(f"it holds a {type(value).__name__}")


def _check_number(value: int | float) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DocumentError("it holds a number that is not finite")
    elif not -(2**63) <= value < 2**63:
        raise DocumentError("it holds an integer of more than 64 bits")


def check_text(text: str) -> None:
    """Refuse text with control characters, changes of writing direction or half characters, or of a length of 2^20.

    Raises:
        [`DocumentError`]
    """
    if len(text) > MAX_TEXT:
        raise DocumentError(f"it holds a text of more than {MAX_TEXT} characters")
    if not text.isprintable() and (found := UNSAFE_TEXT.search(text)):
        raise DocumentError(f"it holds text with the character {found[0]!a}, which can mislead a reader")


def check_schema(data: Any, schema: type[T]) -> T:
    """Plain data as a schema asks for them: a typed dict, or a dataclass that is built.

    Types are strict: a number is no text, 1 no boolean. Fields that the schema does not know stay in a typed dict.

    Raises:
        [`DocumentError`]: names the first field that is missing, of another type, or out of its range.
    """
    adapter = _adapter(cast(Any, schema))
    try:
        if dataclasses.is_dataclass(schema):
            # Strict dataclasses are built from JSON alone, where a list may stand for a tuple.
            return cast(T, adapter.validate_json(json.dumps(data), strict=True))
        return cast(T, adapter.validate_python(data, strict=True))
    except ValidationError as cause:
        first = cause.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part)[:80] for part in first["loc"]) or "the whole"
        found = first["input"]
        raise DocumentError(
            f"`{place}` is not what it must be",
            expected=f"`{place}`: {first['msg'][:1].lower()}{first['msg'][1:]}",
            found="no such field" if first["type"] == "missing" else describe(found),
        ) from cause


def describe(value: Any) -> str:
    """A value of a document for an error: short, with the name of its kind."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    for kind, name in ((dict, "an object"), (list, "a list")):
        if isinstance(value, kind):
            return name
    name = "text" if isinstance(value, str) else "a number"
    return f"{source_text(value)[:80]!r} ({name})"


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _decode(content: bytes | str) -> str:
    try:
        return content if isinstance(content, str) else content.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise DocumentError(f"it is not UTF-8 text: {cause.reason} at byte {cause.start}") from cause


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DocumentError(f"the name {twice[:40]!r} stands twice in one object")
    return result


def _refuse_constant(name: str) -> Any:
    raise DocumentError(f"{name} is not a number of JSON")


# YAML

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_RESOLVER = yaml.resolver.Resolver()
_CONSTRUCTOR = yaml.constructor.SafeConstructor()
_TAG = "tag:yaml.org,2002:"


def _build(events: Iterator[Any], max_nodes: int) -> Any:
    """Plain data from the parser's events, without recursion and no further than the limits allow."""
    # The containers that are open, with the key that waits for its value; the outermost holds the document.
    document: list[Any] = []
    open_: list[tuple[list[Any] | dict[str, Any], str | None]] = [(document, None)]
    count = 0

    def add(value: Any) -> None:
        container, key = open_[-1]
        if isinstance(container, list):
            container.append(value)
        elif key is None:
            if not isinstance(value, _Scalar):
                raise DocumentError("it has a key that is no text")
            if value.text in container:
                raise DocumentError(f"the key {value.text[:40]!r} stands twice")
            open_[-1] = (container, value.text)
            return
        else:
            container[key] = value
            open_[-1] = (container, None)

    event: Any
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise DocumentError(f"it uses the alias *{str(event.anchor)[:40]}: write the value out")
        if isinstance(event, yaml.DocumentStartEvent) and document:
            raise DocumentError("it holds more than one document")
        if isinstance(event, yaml.CollectionEndEvent):
            open_.pop()
        if not isinstance(event, yaml.NodeEvent):
            continue
        count += 1
        if count > max_nodes or len(open_) > MAX_DEPTH:
            raise DocumentError(f"it has more than {max_nodes:,} values, or more than {MAX_DEPTH} levels")
        tag = getattr(event, "tag", None)
        if event.anchor is not None or tag not in (None, "!", f"{_TAG}str"):
            raise DocumentError(f"it uses the anchor or tag {str(event.anchor or tag)[:40]!r}")
        if isinstance(event, yaml.ScalarEvent):
            is_key = isinstance(open_[-1][0], dict) and open_[-1][1] is None
            add(_Scalar(event.value) if is_key else _scalar(event))
        else:
            value: list[Any] | dict[str, Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
            add(value)
            open_.append((value, None))
    return document[0] if document else None


@dataclasses.dataclass(frozen=True)
class _Scalar:
    """A key."""

    text: str


def _scalar(event: yaml.ScalarEvent) -> Any:
    text, implicit = str(event.value), event.implicit
    if event.tag is not None or not implicit[0] or len(text) > _MAX_NUMBER:
        return text
    tag = _RESOLVER.resolve(yaml.ScalarNode, text, implicit).removeprefix(_TAG)
    node = yaml.ScalarNode(f"{_TAG}{tag}", text)
    try:
        if tag == "null":
            return None
        if tag == "bool":
            return _CONSTRUCTOR.construct_yaml_bool(node)
        if tag == "int":
            number = SourceInt(_CONSTRUCTOR.construct_yaml_int(node))
            number.source = text
            return number
        if tag == "float":
            real = SourceFloat(_CONSTRUCTOR.construct_yaml_float(node))
            real.source = text
            return real
    except ValueError as cause:
        raise DocumentError(f"{text!r} is no number") from cause
    return text
