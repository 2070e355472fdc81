"""Publish a mapper, and load that version.

python publish_and_load.py mapper acme/qwen2.5-3b-to-7b
"""

import sys

from grad_transformer import GradTransformer, pull_root, push_folder


def main(folder: str, repo_id: str) -> None:
    version = push_folder(folder, repo_id, kind="mapper")
    print(version)
    mapper = GradTransformer.from_pretrained(repo_id, revision=version.revision)
    print(mapper.origin, pull_root(repo_id, revision=version.revision).fingerprint[:12])


if __name__ == "__main__":
    main(*sys.argv[1:])
