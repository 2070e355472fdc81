"""`AutoConfig` and `AutoModel` know mappers after `import grad_transformer`, which by itself imports no transformers.

transformers keeps tables from model types to names of classes, and imports a class when it is looked up. Where it is
not loaded yet, our names are added to these tables at the moment at which it makes them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


MODEL_TYPE = "grad_transformer"
# The modules of transformers with such a table: the mapping's name in it, and our class.
_TABLES = {
    "transformers.models.auto.configuration_auto": ("CONFIG_MAPPING", "GradTransformerConfig"),
    "transformers.models.auto.modeling_auto": ("MODEL_MAPPING", "GradTransformer"),
}


def register_mappers() -> None:
    """Tell the Auto classes of mappers: now where transformers has made its tables, else when it makes them."""
    if any(name in sys.modules for name in _TABLES):
        from transformers import AutoConfig, AutoModel

        package = sys.modules[__package__]
        AutoConfig.register(MODEL_TYPE, package.GradTransformerConfig, exist_ok=True)
        AutoModel.register(package.GradTransformerConfig, package.GradTransformer, exist_ok=True)
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


class _TableFinder(MetaPathFinder):
    """Adds our names to a table as soon as its module has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            _add_names(module)

        spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec


def _add_names(module: ModuleType) -> None:
    mapping_name, class_name = _TABLES[module.__name__]
    getattr(module, f"{mapping_name}_NAMES")[MODEL_TYPE] = class_name
    # Where the mapping looks for the class, instead of `transformers.models.grad_transformer`.
    getattr(module, mapping_name)._modules[MODEL_TYPE] = importlib.import_module(__package__)
