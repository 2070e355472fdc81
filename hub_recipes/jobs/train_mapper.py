# /// script
# requires-python = ">=3.10"
# dependencies = ["grad-transformer"]
# ///
"""Train a mapper on a version of a delta dataset, and publish it.

hf jobs uv run --flavor a100-large --secrets HF_TOKEN train_mapper.py acme/deltas@v1.0 acme/mapper
"""

import subprocess
import sys


def run(*command: str) -> None:
    subprocess.run(["grad-transformer", *command], check=True)


def main(dataset_id: str, mapper_id: str, *arguments: str) -> None:
    run("train", "--dataset", dataset_id, "--output_dir", "mapper", *arguments)
    run("push", "mapper", mapper_id)


if __name__ == "__main__":
    main(*sys.argv[1:])
