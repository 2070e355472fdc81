"""Names of files, rules and repositories, and the format version of everything that is written."""

from typing import Final, Literal, get_args


FORMAT_VERSION = 1

# Patterns of what the Hub names a repository, also without its account, and a commit.
REPO_ID_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}(?:/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95})?"
COMMIT_PATTERN = r"[0-9a-f]{40}"

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
# Pictures of a report.
PGR_FIGURE = "pgr_by_client.png"
ACCURACY_FIGURE = "accuracy.png"
BLOCKS_FIGURE = "blocks.png"
TRAINING_FIGURE = "training.png"
FIGURES = (PGR_FIGURE, ACCURACY_FIGURE, BLOCKS_FIGURE, TRAINING_FIGURE)
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

# Limits of a client's shift and of its longest part, in units that one in twenty held-out shadow runs exceeds. In the
# lab clients by the recipe stay below: unseen tasks, mixtures, twelve rows (2.9 and 1.0), and DP-SGD at epsilon 0.5
# (4.2 and 1.8). A delta three times as long lies at 5.7 and 3.1, one with B alone at twice the usual norm of the whole
# at 5.2 and 3.1.
MAXIMUM_SHIFT, MAXIMUM_SIZE = 5.0, 2.5
