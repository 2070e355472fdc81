"""The recipes are true: their YAML has the commands' own names, their scripts run, the metric is the library's."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest
import yaml

from grad_transformer.evaluation.metrics import performance_gap_recovered
from grad_transformer.scripts._common import CommandParser
from tests.hub.worlds import client_adapter, delta_dataset, tiny_mapper, tiny_roots


RECIPES = Path(__file__).parents[2] / "hub_recipes"
YAML = sorted(RECIPES.rglob("*.yaml"))
SCRIPTS = sorted(path for path in RECIPES.rglob("*.py") if path.parent.name != "pgr")


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_is_understood_by_its_command(path):
    command = path.read_text().splitlines()[0].split("grad-transformer ")[1].split()
    positional = [word for word in command[1:] if not word.startswith("--") and not word.endswith(".yaml")]
    parser: CommandParser = importlib.import_module(f"grad_transformer.scripts.{command[0]}").make_parser()
    arguments, _ = parser.parse_command([*positional, "--config", str(path)])
    for name, value in yaml.safe_load(path.read_text()).items():
        assert any(getattr(part, name, None) == value for part in arguments), name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_one_screen_and_say_how_they_are_run(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 45 and "def main(" in text
    docstring = ast.get_docstring(ast.parse(text))
    assert f"{path.name} " in docstring
    if path.parent.name == "jobs":
        assert text.startswith("# /// script\n") and "dependencies = [" in text and "hf jobs uv run" in docstring


def test_recipes_publish_and_consume(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    roots = tiny_roots(tmp_path / "roots")
    tiny_mapper(roots).save_pretrained(tmp_path / "mapper")
    client_adapter(roots[0]).save_pretrained(tmp_path / "adapter")
    delta_dataset(tmp_path / "deltas", roots)
    load(RECIPES / "delta_dataset" / "publish_and_stream.py").main("deltas", "acme/deltas")
    assert "train-0 copy" in capsys.readouterr().out
    load(RECIPES / "mapper" / "publish_and_load.py").main("mapper", "acme/mapper")
    assert roots[0].fingerprint[:12] in capsys.readouterr().out
    load(RECIPES / "client_adapter" / "publish_and_check.py").main("adapter", "acme/client", "acme/mapper@v1.0")
    recipe = load(RECIPES / "generated_adapter" / "generate_and_publish.py")
    recipe.main("acme/mapper@v1.0", "acme/generated", "acme/client@v1.0")
    group = load(RECIPES / "collection" / "group.py").main
    for _ in range(2):
        group("A pair", "acme", "datasets/acme/deltas", "acme/mapper", "acme/generated")
    (collection,) = hub.store.collections.values()
    assert [item["id"] for item in collection["items"]] == ["acme/deltas", "acme/mapper", "acme/generated"]


def test_the_metric_loads_by_path_and_is_the_librarys_pgr():
    evaluate = pytest.importorskip("evaluate")
    pgr = evaluate.load(str(RECIPES / "metrics" / "pgr"))
    rows = {"predictions": [1.0, 0.5, 0.0], "tinylm": [0.5, 0.0, 0.0], "llm_finetuned": [1.0, 1.0, 1.0]}
    assert pgr.compute(**rows)["pgr"] == pytest.approx(performance_gap_recovered(0.5, 1 / 6, 1.0))
    assert pgr.compute(**{**rows, "llm_finetuned": [0.5, 0.0, 0.0]})["pgr"] is None
