"""Feed broken, hostile and random adapters to the reader: only typed errors may come out, in bounded time and memory.

    python -m benchmarks.fuzz_adapters --inputs 20000 --output fuzz.json

Each input is a valid adapter folder with one to four mutations: bytes of any of its files, values of its config,
metadata or safetensors header, or files replaced by links, folders and pipes. It is read as `generate` reads it (with
the mapper's layout and root) and as `inspect` does (with its own). An adapter may be accepted; what is refused must
raise a `GradTransformerError`. The table says how often each error came, the slowest input, and the peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from grad_transformer import LoraAdapter, LoraDeltaTokenizer, LoraLayout, Root
from grad_transformer.adapters.privacy import statement_of
from grad_transformer.adapters.roots import fingerprint_adapter
from grad_transformer.errors import GradTransformerError


CONFIG, WEIGHTS, METADATA = "adapter_config.json", "adapter_model.safetensors", "grad_transformer.json"
HOSTILE: list[Any] = [
    None,
    True,
    -1,
    0,
    2,
    10**400,
    1e308,
    "",
    "x" * 5000,
    "\ud800",
    "../../etc/passwd",
    "LORA",
    "(a+)+$",
    [],
    [[]],
    {},
    {"": 0},
    {"(a+)+$": 2},
    {"q_proj": 10**400},
    [1, 2, 3],
    "os.system",
]
FIELDS = [
    "r",
    "lora_alpha",
    "peft_type",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "bias",
    "modules_to_save",
    "auto_mapping",
    "base_model_name_or_path",
    "init_lora_weights",
    "target_modules",
    "use_dora",
    "format_version",
]


def make_tokenizer() -> LoraDeltaTokenizer:
    """A tokenizer with a root for two layers of width 8, made without a base model."""
    generator = torch.Generator().manual_seed(0)
    prefix = "base_model.model.model.layers"
    shapes = {
        f"{prefix}.{layer}.self_attn.{name}.lora_{side}.weight": (2, 8) if side == "A" else (8, 2)
        for layer in range(2)
        for name in ("q_proj", "v_proj")
        for side in "AB"
    }
    config = {"peft_type": "LORA", "base_model_name_or_path": "acme/tiny", "r": 2, "lora_alpha": 8}
    layout = LoraLayout.from_adapter_config(config, shapes)
    tensors = {
        key: torch.randn(shape, generator=generator) if "lora_A" in key else torch.zeros(shape)
        for key, shape in shapes.items()
    }
    adapter = LoraAdapter(config, tensors, layout)
    return LoraDeltaTokenizer(Root(adapter, fingerprint_adapter(adapter), "acme/tiny", None, "unknown", 0))


def write_valid(folder: Path, tokenizer: LoraDeltaTokenizer) -> None:
    """An adapter that the tokenizer takes."""
    generator = torch.Generator().manual_seed(1)
    values_P = tokenizer.root.adapter.flat() + 0.05 * torch.randn(tokenizer.layout.numel, generator=generator)
    metadata = {"format_version": 1, "root": tokenizer.root.facts()}
    tokenizer.root.adapter.with_values(values_P, metadata=metadata).save_pretrained(folder)


def mutate(folder: Path, rng: random.Random, outside: Path) -> None:
    """One random mutation of one of the folder's files."""
    kind = rng.choice(["bytes", "bytes", "config", "metadata", "header", "header", "length", "file"])
    if kind == "bytes":
        mutate_bytes(folder / rng.choice([CONFIG, WEIGHTS, METADATA]), rng)
    elif kind == "config":
        mutate_json(folder / CONFIG, rng, FIELDS)
    elif kind == "metadata":
        mutate_json(folder / METADATA, rng, ["root", "format_version", "differential_privacy", "x"])
    elif kind == "header":
        mutate_header(folder / WEIGHTS, rng)
    elif kind == "length":
        mutate_length(folder / WEIGHTS, rng)
    else:
        mutate_file(folder / rng.choice([CONFIG, WEIGHTS, METADATA]), rng, outside)


def mutate_bytes(path: Path, rng: random.Random) -> None:
    if not path.is_file():
        return
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 2, 8, 64])):
        action, place = rng.randrange(5), rng.randrange(len(content) + 1)
        if action == 0 and content:
            content[min(place, len(content) - 1)] = rng.randrange(256)
        elif action == 1:
            content[place:place] = rng.randbytes(rng.choice([1, 4, 300]))
        elif action == 2:
            del content[place : place + rng.choice([1, 8, 200])]
        elif action == 3 and content:
            content[min(place, len(content) - 1)] ^= 1 << rng.randrange(8)
        else:
            content[place:place] = rng.choice([b"\x00" * 9, b"\xff" * 8, b'"', b"{", b"[" * 2000, b"1e999", b"NaN"])
    path.write_bytes(content)


def mutate_json(path: Path, rng: random.Random, fields: list[str]) -> None:
    if not path.is_file():
        return
    try:
        data = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return
    if isinstance(data, dict):
        data[rng.choice(fields)] = rng.choice(HOSTILE)
        if rng.random() < 0.2:
            data.pop(rng.choice(list(data)))
    path.write_text(json.dumps(data))


def mutate_header(path: Path, rng: random.Random) -> None:
    if not path.is_file():
        return
    content = path.read_bytes()
    try:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        key = rng.choice(list(header))
        if rng.random() < 0.3:
            header[
                rng.choice([key + ".", "__metadata__", "x" * 600, "base_model.model." + "9" * 400 + ".lora_A.weight"])
            ] = header.pop(key)
        elif rng.random() < 0.3:
            header[key] = rng.choice(HOSTILE)
        else:
            values = [
                [2, 2],
                [0],
                [2**40, 2**40],
                [-1, 4],
                [1] * 300,
                [2.5, 2],
                "F8_E4M3",
                "I64",
                [10**30, 0],
                *HOSTILE,
            ]
            header[key][rng.choice(["shape", "data_offsets", "dtype"])] = rng.choice(values)
    except (ValueError, TypeError, IndexError, AttributeError, RecursionError):
        return
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def mutate_length(path: Path, rng: random.Random) -> None:
    if path.is_file():
        length = rng.choice([0, 1, 2**63 - 1, 2**64 - 1, rng.randrange(4000), 100_000_001])
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])


def mutate_file(path: Path, rng: random.Random, outside: Path) -> None:
    if not os.path.lexists(path) or path.is_dir():
        return
    path.unlink()
    action = rng.randrange(6)
    if action == 0:
        path.symlink_to(outside / path.name)
    elif action == 1:
        path.symlink_to(path.name)
    elif action == 2:
        path.mkdir()
    elif action == 3:
        os.mkfifo(path)
    elif action == 4:
        path.symlink_to("/dev/zero")


def read_both_ways(folder: Path, tokenizer: LoraDeltaTokenizer) -> list[str]:
    """What came of reading the folder as `generate` and as `inspect` do: `accepted`, or the name of a typed error."""
    outcomes = []
    for read in (lambda: tokenizer.read_client(folder)[0], lambda: LoraAdapter.from_pretrained(folder)):
        try:
            statement_of(read().metadata)
            outcomes.append("accepted")
        except GradTransformerError as error:
            outcomes.append(type(error).__name__)
    return outcomes


def fuzz(inputs: int, *, seed: int = 0) -> dict[str, Any]:
    """Read `inputs` mutated adapters; an exception that is not typed escapes from here.

    Returns:
        outcomes of both readings, seconds of the slowest input, and peak memory above that of the first 100, in MiB.
    """
    tokenizer = make_tokenizer()
    outcomes: dict[str, Counter[str]] = {"generate": Counter(), "inspect": Counter()}
    slowest, baseline = 0.0, 0
    with tempfile.TemporaryDirectory() as temporary:
        valid, outside, folder = (Path(temporary) / name for name in ("valid", "outside", "input"))
        for place in (valid, outside):
            write_valid(place, tokenizer)
        assert read_both_ways(valid, tokenizer) == ["accepted", "accepted"]
        for number in range(inputs):
            rng = random.Random(f"{seed}-{number}")
            shutil.copytree(valid, folder)
            for _ in range(rng.choice([1, 1, 2, 4])):
                mutate(folder, rng, outside)
            started = time.perf_counter()
            try:
                first, second = read_both_ways(folder, tokenizer)
            except BaseException as error:
                error.add_note(f"input {number} of seed {seed}")
                raise
            slowest = max(slowest, time.perf_counter() - started)
            outcomes["generate"][first] += 1
            outcomes["inspect"][second] += 1
            shutil.rmtree(folder)
            if number == 100:
                baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "inputs": inputs,
        "outcomes": {name: dict(counter.most_common()) for name, counter in outcomes.items()},
        "slowest_seconds": slowest,
        "peak_memory_growth_mib": (peak - baseline) / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file for the result")
    args = parser.parse_args()
    result = fuzz(args.inputs, seed=args.seed)
    text = json.dumps(result, indent=2)
    if args.output:
        Path(args.output).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
