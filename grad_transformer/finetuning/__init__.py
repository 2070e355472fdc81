"""From rows of text to a fine-tuned adapter: the recipe, the data, the base model, one run with TRL."""

from .data import check_rows, load_rows, row_order, tokenize_rows
from .models import (
    BasePreview,
    attach_root,
    check_tokens,
    load_base,
    load_root_base,
    preview_base,
    read_adapter_tensors,
    write_adapter_tensors,
)
from .recipe import FineTuningRecipe
from .sft import SftResult, SftTrainer, run_sft


__all__ = [
    "BasePreview",
    "FineTuningRecipe",
    "SftResult",
    "SftTrainer",
    "attach_root",
    "check_rows",
    "check_tokens",
    "load_base",
    "load_root_base",
    "load_rows",
    "preview_base",
    "read_adapter_tensors",
    "row_order",
    "run_sft",
    "tokenize_rows",
    "write_adapter_tensors",
]
