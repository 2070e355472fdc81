"""Publish a client's adapter privately, and check that it starts from the mapper's root.

python publish_and_check.py adapter bank-a/tinylm-adapter acme/qwen2.5-3b-to-7b@v1.0
"""

import sys

from grad_transformer import LoraAdapter, pull_root, push_folder


def main(folder: str, repo_id: str, mapper_id: str) -> None:
    version = push_folder(folder, repo_id, kind="client_adapter")
    print(version)
    root = pull_root(mapper_id)
    root.check_descends(LoraAdapter.from_pretrained(f"{repo_id}@{version.revision}", layout=root.layout))


if __name__ == "__main__":
    main(*sys.argv[1:])
