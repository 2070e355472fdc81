"""A client: start from the mapper's root, fine-tune on rows that stay here, push the adapter privately.

python examples/client.py acme/qwen2.5-3b-to-7b rows.jsonl bank-a/tinylm-adapter
"""

import sys

from grad_transformer.client import finetune_client
from grad_transformer.client.terms import ClientTerms
from grad_transformer.finetuning import load_rows


def agreed(terms: ClientTerms) -> bool:
    """Asked where the mapper's terms are unusual, or have a base model downloaded."""
    print(terms.text())
    return input("Do you accept these terms? [y/N] ") == "y"


def main(mapper_id: str, rows: str, adapter_id: str) -> None:
    adapter, _ = finetune_client(mapper_id, load_rows(rows), "adapter", accept_recipe=agreed)
    print(adapter.push_to_hub(adapter_id))


if __name__ == "__main__":
    main(*sys.argv[1:])
