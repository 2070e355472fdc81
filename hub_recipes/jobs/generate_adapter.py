# /// script
# requires-python = ">=3.10"
# dependencies = ["grad-transformer"]
# ///
"""Generate an adapter for the large model from client adapters, and publish it.

hf jobs uv run --flavor l4x1 --secrets HF_TOKEN generate_adapter.py acme/mapper@v1.0 acme/llm-adapter bank/a@v1.0
"""

import subprocess
import sys


def run(*command: str) -> None:
    subprocess.run(["grad-transformer", *command], check=True)


def main(mapper_id: str, output_id: str, *clients: str) -> None:
    run("generate", "--mapper", mapper_id, "--adapters", *clients, "--output_dir", "llm-adapter")
    run("push", "llm-adapter", output_id)


if __name__ == "__main__":
    main(*sys.argv[1:])
