"""The house rules that a parser can hold: imports run downward, files stay readable, nothing unsafe is called."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "grad_transformer"

# Folders and modules directly below the package. An import may go to a lower floor, or stay in its own folder;
# modules that lie directly in the package are one folder. `__init__` is the public interface: it sees floors 0 to 4.
FLOORS = {
    "constants": 0,
    "checkpoints": 0,
    "documents": 0,
    "errors": 0,
    "lazy": 0,
    "wording": 0,
    "files": 0,
    "verbosity": 0,
    "schemas": 0,
    "locks": 0,
    "outputs": 0,
    "version": 0,
    "hub": 1,
    "adapters": 2,
    "configuration_grad_transformer": 3,
    "tokenization_lora_delta": 3,
    "modeling_blocks": 3,
    "modeling_decoding": 3,
    "modeling_files": 3,
    "modeling_weights": 3,
    "modeling_grad_transformer": 3,
    "finetuning": 3,
    "shadow": 4,
    "training": 4,
    "client": 4,
    "evaluation": 4,
    "lab": 4,
    "refinement": 5,
    "study": 6,
    "scripts": 7,
    "registration": 6,
    "__init__": 7,
    "cli": 8,
}
MAX_LINES = 450
# Not installed with the library itself: may be imported where they are used.
OPTIONAL_PACKAGES = {"opacus", "ray", "rouge_score"}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}

# They find what they import in tables of their own.
_BY_NAME = ("cli.py", "lazy.py", "registration.py")

MODULES = sorted(PACKAGE.rglob("*.py"))
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def unit(parts: tuple[str, ...]) -> str:
    """What `FLOORS` is keyed by: the folder or module directly below the package."""
    return parts[0] if parts else "__init__"


def own_imports(path: Path, package: Path = PACKAGE) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and path below the package of every import of the package's own modules."""
    relative = path.relative_to(package)
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package.name:
                    yield node.lineno, tuple(alias.name.split(".")[1:])
        elif isinstance(node, ast.ImportFrom):
            module = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = relative.parts[: len(relative.parts) - node.level]
            elif module[:1] == (package.name,):
                base, module = (), module[1:]
            else:
                continue
            target = (*base, *module)
            for alias in node.names:
                # `from . import layout` names modules, or names that the folder exports.
                is_module = (package.joinpath(*target, alias.name)).is_dir() or (
                    package.joinpath(*target, f"{alias.name}.py")
                ).is_file()
                yield node.lineno, (*target, alias.name) if is_module else target


def check_imports(path: Path, package: Path = PACKAGE, floors: dict[str, int] = FLOORS) -> list[str]:
    """The imports of a module that break the floors, as sentences."""
    relative = path.relative_to(package)
    here = unit(relative.with_suffix("").parts)
    broken = []
    for line, target in own_imports(path, package):
        there = unit(target)
        if there not in floors:
            broken.append(f"{relative}:{line} imports {there}, which has no floor in FLOORS")
            continue
        same_folder = here == there or (
            floors[here] == floors[there] and not any((package / name).is_dir() for name in (here, there))
        )
        upward = floors[there] >= floors[here] and not same_folder
        if upward or (there == "__init__" and here != "__init__"):
            broken.append(
                f"{relative}:{line} (floor {floors[here]}) imports {'.'.join(target) or package.name} "
                f"(floor {floors[there]}): move what both need to a lower floor"
            )
    return broken


@pytest.mark.parametrize("name", sorted({unit(path.relative_to(PACKAGE).with_suffix("").parts) for path in MODULES}))
def test_every_folder_and_module_has_a_floor(name: str) -> None:
    assert name in FLOORS, f"give {name} a floor in FLOORS, and in CONTRIBUTING.md"


@every_module
def test_imports_run_downward(path: Path) -> None:
    assert check_imports(path) == []


def test_the_check_sees_every_way_to_import_upward(tmp_path: Path) -> None:
    package = tmp_path / "grad_transformer"
    for folder in ("adapters", "shadow", "training"):
        (package / folder).mkdir(parents=True)
        (package / folder / "__init__.py").touch()
    for name in ("errors", "configuration_grad_transformer", "modeling_grad_transformer"):
        (package / f"{name}.py").touch()
    module = package / "shadow" / "run.py"
    for line, allowed in (
        ("from ..errors import PlanError", True),
        ("from ..adapters import LoraLayout", True),
        ("from . import plan", True),
        ("from .plan import ShadowPlan", True),
        ("import grad_transformer.adapters.io", True),
        ("from ..training import trainer", False),
        ("from .. import training", False),
        ("from grad_transformer.training.trainer import Trainer", False),
        ("import grad_transformer.training", False),
        ("from grad_transformer import LoraAdapter", False),
        ("from ..scripts import plan", False),
        ("def f():\n    from ..training import trainer", False),
    ):
        module.write_text(line)
        assert (check_imports(module, package) == []) is allowed, line
    sibling = package / "modeling_grad_transformer.py"
    sibling.write_text("from .configuration_grad_transformer import GradTransformerConfig")
    assert check_imports(sibling, package) == []
    lower = package / "adapters" / "io.py"
    lower.write_text("from ..shadow import plan")
    assert check_imports(lower, package) != []


def local_imports(tree: ast.Module) -> Iterator[tuple[str, ast.Import | ast.ImportFrom]]:
    """Imports inside functions, with the name of the innermost function."""

    def visit(node: ast.AST, function: str | None) -> Iterator[tuple[str, ast.Import | ast.ImportFrom]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom) and function is not None:
                yield function, child
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from visit(child, child.name if inside else function)

    return visit(tree, None)


@every_module
def test_imports_stand_at_the_top(path: Path) -> None:
    """A lazy import is for a fast --help: in cli.py and in the files of commands."""
    relative = path.relative_to(PACKAGE)
    for function, node in local_imports(parse(path)):
        packages = {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
        packages |= {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()
        allowed = (
            relative.parts[0] in ("cli.py", "scripts")
            # Only where transformers is loaded already.
            or (relative.parts == ("registration.py",) and function == "register_mappers")
            or packages <= OPTIONAL_PACKAGES
        )
        assert allowed, f"{relative}:{node.lineno}: move the import in {function}() to the top of the file"


@every_module
def test_files_stay_readable(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: give the second subject in this file a file of its own"


def unsafe_uses(tree: ast.Module, *, may_print: bool, may_import_by_name: bool) -> Iterator[str]:
    """What no module may do: read or write pickles, swallow every exception, print, import by a computed name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"line {node.lineno}: {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES)
            if module == "torch":
                yield from (f"line {node.lineno}: torch.{a.name}" for a in node.names if a.name in ("load", "save"))
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: bare except"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("torch.load", "torch.save", "eval", "exec", "__import__"):
                yield f"line {node.lineno}: {name}"
            if name == "print" and not may_print:
                yield f"line {node.lineno}: print (use a logger)"
            if name.endswith("import_module") and not may_import_by_name:
                yield f"line {node.lineno}: {name}"
            for keyword in node.keywords:
                if keyword.arg in ("allow_pickle", "trust_remote_code") and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield f"line {node.lineno}: {keyword.arg}"


@every_module
def test_nothing_unsafe(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    in_command_line = relative.parts[0] in ("cli.py", "scripts")
    uses = unsafe_uses(parse(path), may_print=in_command_line, may_import_by_name=relative.parts[0] in _BY_NAME)
    assert list(uses) == []


def models_loaded(tree: ast.Module) -> list[str]:
    """Every place where an `Auto` class of transformers makes a model, tokenizer or config."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [(node, ast.unparse(node.func)) for node in calls]
    return [
        f"line {node.lineno}: {name}{'' if trusts_nothing(node) else ' without trust_remote_code=False'}"
        for node, name in names
        if re.search(r"(^|\.)Auto\w*\.from_(pretrained|config)$", name)
    ]


def trusts_nothing(call: ast.Call) -> bool:
    return any(keyword.arg == "trust_remote_code" for keyword in call.keywords)


@every_module
def test_models_come_through_one_door(path: Path) -> None:
    """`adapters/bases.py` loads base models, tokenizers and backbones; nothing else does."""
    found = models_loaded(parse(path))
    if path == PACKAGE / "adapters" / "bases.py":
        assert found and not [place for place in found if "without" in place]
    else:
        assert found == []


def test_the_check_sees_models_loaded_elsewhere() -> None:
    for code in ("AutoModel.from_pretrained(x)", "transformers.AutoTokenizer.from_pretrained(x, use_fast=True)"):
        assert models_loaded(ast.parse(code)) == [f"line 1: {code.split('(')[0]} without trust_remote_code=False"]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "torch.load('x')",
        "from torch import load",
        "numpy.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=flag)",
        "try:\n    f()\nexcept:\n    pass",
        "print('x')",
        "importlib.import_module(name)",
        "eval('1')",
    ],
)
def test_the_check_sees_what_is_unsafe(code: str) -> None:
    assert list(unsafe_uses(ast.parse(code), may_print=False, may_import_by_name=False))
