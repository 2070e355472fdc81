"""Publish a delta dataset, and read it row by row without downloading it.

python publish_and_stream.py deltas acme/qwen2.5-3b-to-7b-deltas
"""

import sys

from datasets import load_dataset

from grad_transformer import push_delta_dataset


def main(folder: str, repo_id: str) -> None:
    version = push_delta_dataset(folder, repo_id)
    print(version)
    rows = load_dataset(repo_id, revision=version.sha, split="train", streaming=True)
    row = next(iter(rows))
    print(row["shadow_id"], row["task"], len(row["source_blocks"]), len(row["target_blocks"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
