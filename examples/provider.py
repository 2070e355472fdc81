"""The provider's first half: publish a delta dataset and the mapper that was trained on it.

python examples/provider.py deltas mapper acme/qwen2.5-3b-to-7b-deltas acme/qwen2.5-3b-to-7b
"""

import sys

from grad_transformer import push_delta_dataset, push_folder


def main(deltas: str, mapper: str, dataset_id: str, mapper_id: str) -> None:
    print(push_delta_dataset(deltas, dataset_id, private=True))
    print(push_folder(mapper, mapper_id))


if __name__ == "__main__":
    main(*sys.argv[1:])
