"""Feed broken, hostile and random files to every reader: only typed errors may come out, in bounded time and memory.

    python -m benchmarks.fuzz --kind all --inputs 100000
    python -m benchmarks.fuzz --kind mappers --inputs 2000 --seed 7

Each input is a valid artifact with one to four mutations of its files. It is read as the commands read it, in a worker
process; an input is *found* if an exception is not a `GradTransformerError`, the process dies, it takes 5 seconds of
processor time or memory grows by 200 MiB. Found inputs are kept with what came of them. `--inputs` are shared evenly
by the kinds. The exit code is 1 where any was found.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path


for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
    os.environ[name] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="all", help="all, or names of kinds with commas")
    parser.add_argument("--inputs", type=int, default=8000, help="inputs of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--found", default="fuzz_found", help="folder for inputs that were found")
    parser.add_argument("--output", help="JSON file for the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_HOME"] = os.environ["HF_DATASETS_CACHE"] = cache
        # Libraries read these variables when they are imported.
        import torch
        from transformers.utils import logging

        from .kinds import KINDS
        from .runner import Tally, run_in_workers

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        names = list(KINDS) if args.kind == "all" else args.kind.split(",")
        tallies: list[Tally] = []
        for name in names:
            with tempfile.TemporaryDirectory() as temporary:
                kind, valid = KINDS[name](), Path(temporary) / "valid"
                kind.make(valid)
                inputs = -(-args.inputs // len(names))
                found_dir = Path(args.found)
                tally = run_in_workers(
                    kind, valid, seed=args.seed, inputs=inputs, workers=args.workers, found_dir=found_dir
                )
            tallies.append(tally)
            print(f"{name}: {tally.inputs:,} inputs, {len(tally.found)} found", flush=True)
    headers = ["kind", "inputs", "accepted", "typed", "untyped", "crashes", "hangs", "growth", "slowest s"]
    print("\n| " + " | ".join(headers) + " |\n|---|" + "---:|" * (len(headers) - 1))
    for tally in tallies:
        print("| " + " | ".join(tally.row()) + " |")
    if args.output:
        Path(args.output).write_text(json.dumps([asdict(tally) for tally in tallies], indent=2) + "\n")
    raise SystemExit(1 if any(tally.found for tally in tallies) else 0)


if __name__ == "__main__":
    main()
