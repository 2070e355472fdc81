"""A user: the generated adapter on the large model, with plain peft; nothing of this library is needed.

python examples/use_adapter.py Qwen/Qwen2.5-7B acme/qwen2.5-7b-banks v1.0 "The balance of"
"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(llm_id: str, adapter_id: str, revision: str, prompt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llm_id)
    llm = AutoModelForCausalLM.from_pretrained(llm_id)
    model = PeftModel.from_pretrained(llm, adapter_id, revision=revision).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        scores = torch.log_softmax(model(**inputs).logits[0, -1].double(), dim=-1)
    for score, token in zip(*scores.topk(5), strict=True):
        print(f"{float(score):.17g} {tokenizer.decode(token)!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
