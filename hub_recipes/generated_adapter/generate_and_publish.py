"""Generate an adapter for the large model from client adapters, and publish it.

python generate_and_publish.py acme/qwen2.5-3b-to-7b@v1.0 acme/qwen2.5-7b-banks bank-a/tinylm-adapter@v1.0
"""

import sys

from grad_transformer import GradTransformer


def main(mapper_id: str, repo_id: str, *clients: str) -> None:
    adapter = GradTransformer.from_pretrained(mapper_id).generate_adapter(list(clients))
    print(adapter.metadata["generated"])
    print(adapter.push_to_hub(repo_id))


if __name__ == "__main__":
    main(*sys.argv[1:])
