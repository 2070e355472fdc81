# /// script
# requires-python = ">=3.10"
# dependencies = ["grad-transformer", "huggingface_hub"]
# ///
"""Fine-tune every shadow subset of a plan, build the delta dataset, publish it.

The plan (the folder that `grad-transformer plan` wrote, with its rows) lies in a private dataset repository.

    hf jobs uv run --flavor a100-large --secrets HF_TOKEN shadow_runs.py acme/plan acme/deltas
"""

import subprocess
import sys

from huggingface_hub import snapshot_download


def run(*command: str) -> None:
    subprocess.run(["grad-transformer", *command], check=True)


def main(plan_id: str, dataset_id: str) -> None:
    plan = snapshot_download(plan_id, repo_type="dataset", local_dir="shadows")
    run("shadow", plan, "--dtype", "bfloat16", "--engine", "trl", "--gradient_checkpointing", "true")
    run("build", plan, "--output_dir", "deltas")
    run("push", "deltas", dataset_id, "--private", "true")


if __name__ == "__main__":
    main(*sys.argv[1:])
