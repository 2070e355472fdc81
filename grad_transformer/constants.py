"""File names and the format version of everything that is written."""

from typing import Final


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
HELDOUT_NAME = "heldout.json"
TRAINING_LOG_NAME = "training_log.json"
SHIFT_NAME = "shift.json"
SHIFT_TENSORS_NAME = "shift.safetensors"

CARD_NAME = "README.md"
REPORT_FOLDER = "report"
# Pictures of a report.
PGR_FIGURE = "pgr_by_client.png"
ACCURACY_FIGURE = "accuracy.png"
BLOCKS_FIGURE = "blocks.png"
TRAINING_FIGURE = "training.png"
FIGURES = (PGR_FIGURE, ACCURACY_FIGURE, BLOCKS_FIGURE, TRAINING_FIGURE)
# Beside a copy of a repository: which one, which version, which commit.
ORIGIN_NAME = "hub_origin.json"
