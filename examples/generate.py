"""The provider's second half: from client adapters to one adapter for the large model.

python examples/generate.py acme/qwen2.5-3b-to-7b@v1.0 acme/qwen2.5-7b-banks bank-a/tinylm-adapter@v1.0 bank-b/adapter
"""

import sys

from grad_transformer import GradTransformer


def main(mapper_id: str, output_id: str, *adapters: str) -> None:
    adapter = GradTransformer.from_pretrained(mapper_id).generate_adapter(list(adapters))
    print(adapter.push_to_hub(output_id))


if __name__ == "__main__":
    main(*sys.argv[1:])
