"""Packages that import their modules when a name of theirs is first used, so that `--help` waits for none of them."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias


# What a package's `__getattr__` and `__dir__` are.
Names: TypeAlias = tuple[Callable[[str], Any], Callable[[], list[str]]]


def lazy_names(package: str, modules: Mapping[str, tuple[str, ...]]) -> Names:
    """`__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package (`str`): the package's `__name__`.
        modules (`Mapping[str, tuple[str, ...]]`): modules below the package, and the names that each exports.
    """
    owners = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name in owners:
            return getattr(importlib.import_module(f".{owners[name]}", package), name)
        # `import package` alone, then `package.module`.
        if name in {module.name for module in pkgutil.iter_modules(sys.modules[package].__path__)}:
            return importlib.import_module(f".{name}", package)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *owners})

    return get, names
