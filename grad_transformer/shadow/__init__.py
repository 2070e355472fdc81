"""Phase 1, curation: plan shadow subsets, fine-tune both models on each, pair their deltas."""

from .batched import run_batched
from .batches import FineTuneJob
from .dataset import DeltaDataset, DeltaPairs, build_delta_dataset, load_delta_dataset
from .identity import check_dataset_of
from .plan import ShadowPlan, ShadowRun
from .planning import plan_shadows
from .records import RunRecord, missing_runs, read_run, write_run
from .run import fine_tune_many, run_shadows, shadow_summary


__all__ = [
    "DeltaDataset",
    "DeltaPairs",
    "FineTuneJob",
    "RunRecord",
    "ShadowPlan",
    "ShadowRun",
    "build_delta_dataset",
    "check_dataset_of",
    "fine_tune_many",
    "load_delta_dataset",
    "missing_runs",
    "plan_shadows",
    "read_run",
    "run_batched",
    "run_shadows",
    "shadow_summary",
    "write_run",
]
