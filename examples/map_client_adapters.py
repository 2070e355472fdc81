"""The provider's side in Python: from client adapters of the TinyLM to one adapter for the LLM.

python examples/map_client_adapters.py demo_output/mapper llm-adapter demo_output/clients/seen-*/tinylm
"""

import sys

from grad_transformer import GradTransformer, LoraDeltaTokenizer


mapper_path, output_dir, *clients = sys.argv[1:]

tokenizer = LoraDeltaTokenizer.from_pretrained(mapper_path, subfolder="source")
blocks = tokenizer(clients, return_tensors="pt")
print({name: tuple(tensor.shape) for name, tensor in blocks.items()})

mapper = GradTransformer.from_pretrained(mapper_path)
adapter = mapper.generate_adapter(clients, aggregation="mean")
adapter.save_pretrained(output_dir)
print(f"{len(clients)} clients -> {output_dir}, an adapter for {adapter.base_model}")
