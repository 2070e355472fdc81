"""Load a generated adapter with plain peft and score it, without this library.

    python examples/score_with_plain_peft.py demo_output/base_models/llm \
        demo_output/clients/seen-0/generated demo_output/clients/seen-0/test.jsonl
"""

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


base, adapter, test_rows = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()

with open(test_rows) as file:
    rows = [json.loads(line) for line in file]
inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
with torch.no_grad():
    sequences = model.generate(**inputs, max_new_tokens=16, do_sample=False)
answers = tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
correct = sum(answer.strip() == row["completion"].strip() for answer, row in zip(answers, rows, strict=True))
print(f"exact match {correct / len(rows):.4f} on {len(rows)} rows")
