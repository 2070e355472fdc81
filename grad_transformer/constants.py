"""File names and the format version of everything that is written, and the names of rules that files record."""

from typing import Final, Literal, get_args


FORMAT_VERSION = 1

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
# Facts that peft's own config has no field for: the root an adapter started from, how it was made.
ADAPTER_METADATA_NAME = "grad_transformer.json"

ROOT_NAME = "root.json"
ROOT_FOLDER = "root"

TOKENIZER_NAME = "lora_delta_tokenizer.json"
TOKENIZER_STATISTICS_NAME = "statistics.safetensors"
SOURCE_FOLDER: Final = "source"
TARGET_FOLDER: Final = "target"

PLAN_NAME = "plan.json"
RUNS_FOLDER = "runs"
DELTA_DATASET_NAME = "delta_dataset.json"
REPORT_NAME = "report.json"
DEMO_NAME = "demo.json"
STUDY_NAME = "study.json"
HELDOUT_NAME = "heldout.json"
TRAINING_LOG_NAME = "training_log.json"
# Which dataset and arguments a folder is trained with: written before the first step.
TRAINING_IDENTITY_NAME = "training_identity.json"
SHIFT_NAME = "shift.json"
SHIFT_TENSORS_NAME = "shift.safetensors"

CARD_NAME = "README.md"
REPORT_FOLDER = "report"
# Beside a copy of a repository: which one, which version, which commit.
ORIGIN_NAME = "hub_origin.json"

# How several deltas become one.
Aggregation = Literal[
    "mean",
    "sum",
    "weighted",
    "exact_mean",
    "norm_clipping",
    "median",
    "trimmed_mean",
    "krum",
    "multi_krum",
    "fltrust",
]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)
