"""From rows of text to a fine-tuned adapter: the recipe, the data, the base model, one run with TRL."""

from .data import check_rows, load_rows, load_source, row_order
from .models import attach_root, load_base, read_adapter_tensors, write_adapter_tensors
from .recipe import FineTuningRecipe
from .sft import SftResult, SftTrainer, run_sft
from .sources import RowSource
from .tokens import IGNORED_LABEL, TokenCounts, count_tokens, tokenize_rows


__all__ = [
    "FineTuningRecipe",
    "IGNORED_LABEL",
    "RowSource",
    "SftResult",
    "SftTrainer",
    "TokenCounts",
    "attach_root",
    "check_rows",
    "count_tokens",
    "load_base",
    "load_rows",
    "load_source",
    "read_adapter_tensors",
    "row_order",
    "run_sft",
    "tokenize_rows",
    "write_adapter_tensors",
]
