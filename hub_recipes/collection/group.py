"""Put the repositories of one base pair into a collection; safe to run again.

python group.py "Qwen2.5 3B to 7B" acme datasets/acme/deltas acme/mapper acme/adapter
"""

import sys

from huggingface_hub import HfApi


def main(title: str, namespace: str, *repositories: str) -> None:
    api = HfApi()
    collection = api.create_collection(title, namespace=namespace, exists_ok=True)
    for name in repositories:
        kind = "dataset" if name.startswith("datasets/") else "model"
        api.add_collection_item(collection.slug, name.removeprefix("datasets/"), kind, exists_ok=True)
    print(collection.url)


if __name__ == "__main__":
    main(*sys.argv[1:])
