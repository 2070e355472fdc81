"""JSON and YAML of strangers: plain data within limits, or a typed error; and no reader without a schema."""

from __future__ import annotations

import ast
import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from typing_extensions import NotRequired, TypedDict

from grad_transformer import constants
from grad_transformer.documents import MAX_DEPTH, DocumentError, check_schema, parse_json, parse_yaml, source_text
from grad_transformer.errors import FormatVersionError, IncompleteArtifactError, UsageError
from grad_transformer.files import read_record, read_yaml
from grad_transformer.schemas import FILES, ClientList, PlanRecord, RootRecord, open_record


PACKAGE = Path(__file__).parents[1] / "grad_transformer"


@open_record
class Sample(TypedDict):
    count: int
    share: float
    names: NotRequired[list[str]]


@dataclass(frozen=True)
class Built:
    low: float
    pair: tuple[float, float] | None = None


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * MAX_DEPTH + b"[]" + b"]" * MAX_DEPTH,
        b"[],".join([b"["] + [b""] * 1_000_001) + b"[]]",
        b'{"a": 1, "a": 2}',
        b"NaN",
        b"[-Infinity]",
        b"1e999",
        b"[1, 2, 18446744073709551616]",
        b"9" * 5000,
        b'"\\ud800"',
        b'{"\\u001b[2J": 1}',
        b'"\\u202eabc"',
        b'"\x7f"',
        b"\xff\xfe{",
        b'"' + b"x" * (2**20 + 1) + b'"',
        b"",
    ],
)
def test_json_beyond_the_limits_is_refused(text: bytes) -> None:
    with pytest.raises(DocumentError):
        parse_json(text)


def test_json_within_the_limits_is_plain_data() -> None:
    text = '{"a": [1, 2.5, true, null, "two\\nlines\\t日本 👩‍💻"], "b": {"c": -9223372036854775808}}'
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "- " * 100_000,
        "a: &x [1]\nb: [*x, *x]",
        "a: !!python/object/apply:os.system [ls]",
        "a: !!set {b}",
        "? [a, b]\n: c",
        "a: 1\na: 2",
        "a: 1\n--- \nb: 2",
        'a: "\\e[2J"',
        "a: .inf",
        "a: [b\nc: d",
        "a: \x01",
    ],
)
def test_yaml_beyond_the_limits_is_refused(text: str) -> None:
    started = time.perf_counter()
    with pytest.raises(DocumentError):
        parse_yaml(text)
    assert time.perf_counter() - started < 2


def test_yaml_keeps_how_scalars_were_written() -> None:
    data = parse_yaml("a: 0123456\nb: 1.10\nc: 2024-01-01\non: yes\n1.0: ~\nd: '1'\ne: !!str 2\nf: 1_000")
    assert list(data) == ["a", "b", "c", "on", "1.0", "d", "e", "f"]
    assert [source_text(data[key]) for key in "abcf"] == ["0123456", "1.10", "2024-01-01", "1_000"]
    assert (data["b"], data["f"], data["on"], data["1.0"], data["d"], data["e"]) == (1.1, 1000, True, None, "1", "2")
    assert json.loads(json.dumps(data["b"])) == 1.1


def test_a_number_of_yaml_is_never_computed_from_a_long_text() -> None:
    text = "1" + ":1" * 200_000
    assert parse_yaml(f"a: {text}") == {"a": text}


@pytest.mark.parametrize(
    "data",
    [{}, {"count": "1", "share": 1.0}, {"count": True, "share": 1.0}, {"count": 1, "share": 1, "names": [2]}, []],
)
def test_types_of_a_schema_are_strict(data: object) -> None:
    with pytest.raises(DocumentError) as caught:
        check_schema(data, Sample)
    assert caught.value.expected and caught.value.found


def test_unknown_fields_stay_and_dataclasses_are_built() -> None:
    assert check_schema({"count": 1, "share": 2, "later": [1]}, Sample) == {"count": 1, "share": 2.0, "later": [1]}
    assert check_schema({"low": 1, "pair": [0, 1], "later": 3}, Built) == Built(1.0, (0.0, 1.0))
    with pytest.raises(DocumentError, match="pair"):
        check_schema({"low": 1, "pair": [0]}, Built)


def test_errors_of_files_are_typed_and_name_the_place(tmp_path: Path) -> None:
    path = tmp_path / "root.json"
    for content, error in (
        (b"{}", IncompleteArtifactError),
        (b"[1]", IncompleteArtifactError),
        (b'{"format_version": 2}', FormatVersionError),
        (b"\x00", IncompleteArtifactError),
    ):
        path.write_bytes(content)
        with pytest.raises(error) as caught:
            read_record(path, RootRecord)
        assert caught.value.path == str(path)
    for place in (tmp_path, tmp_path / "none", Path("a\0b"), Path("/dev/zero")):
        with pytest.raises(IncompleteArtifactError):
            read_record(place, RootRecord)
    path.write_text(json.dumps({"format_version": 1, "fingerprint": "f", "base_model": 3, "base_fingerprint": "b"}))
    with pytest.raises(IncompleteArtifactError) as caught:
        read_record(path, RootRecord)
    assert "base_model" in str(caught.value.expected) and "3" in str(caught.value.found)
    clients = tmp_path / "clients.yaml"
    clients.write_text("- id: a\n  adapter: b\n  test_data: c\n  colour: blue\n")
    with pytest.raises(UsageError) as caught:
        read_yaml(clients, ClientList)
    assert "colour" in str(caught.value.expected)


def test_a_plan_of_ten_thousand_runs_is_read_at_once(tmp_path: Path) -> None:
    root = {"fingerprint": "f", "base_model": "m", "base_revision": None, "base_fingerprint": "b"}
    side = {"root": root, "recipe": {}, "numel": 8}
    runs = [
        {"shadow_id": f"shadow-{i:05d}", "task": None, "split": "train", "seed": i, "row_indices": list(range(32))}
        for i in range(10_000)
    ]
    plan = {"format_version": 1, "source": side, "target": side, "data": {"path": "p"}, "seed": 0}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**plan, "strategy": "mixed", "with_overlap": True, "runs": runs}))
    started = time.process_time()
    assert len(read_record(path, PlanRecord)["runs"]) == 10_000
    assert time.process_time() - started < 1.0


# No reader without a schema


# Rows are the client's own text, of which nothing is printed or published: their parser has limits of its own.
PARSERS = ("documents.py", "finetuning/reading.py")


def test_every_file_of_ours_has_a_schema_by_its_name() -> None:
    names = {value for name, value in vars(constants).items() if name.endswith("_NAME") and value.endswith(".json")}
    assert names <= FILES.keys()


def untyped_readings(tree: ast.Module) -> list[str]:
    """Calls that parse JSON or YAML past `documents.py`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("json", "yaml"):
            found += [f"line {node.lineno}: from {node.module} import {alias.name}" for alias in node.names]
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("safetensors"):
            found += [f"line {node.lineno}: {alias.name}" for alias in node.names if alias.name.startswith("load")]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            parses = name in ("json.load", "json.loads", "json.JSONDecoder") or (
                node.value.id == "yaml" and node.attr not in ("safe_dump", "YAMLError")
            )
            if parses:
                found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_json_and_yaml_is_read_with_a_schema(path: Path) -> None:
    if str(path.relative_to(PACKAGE)) in PARSERS:
        return
    found = untyped_readings(ast.parse(path.read_text(encoding="utf-8")))
    assert found == [], "read files with `files.read_record` or `files.read_yaml`, text with `files.parse_record`"


@pytest.mark.parametrize(
    "code",
    [
        "json.loads(x)",
        "json.load(f)",
        "yaml.safe_load(x)",
        "yaml.load(x, L)",
        "from json import loads",
        "from safetensors.torch import load_file",
    ],
)
def test_the_check_sees_a_reading_without_a_schema(code: str) -> None:
    assert untyped_readings(ast.parse(code))
