"""Generation at the paper's shape: 36 blocks of 12,800 to 28 of 22,528 through a backbone of Flan-T5-Large's sizes.

    python -m benchmarks.generation --output generation.json

Weights are random and the same for every line. `uncached` runs encoder and decoder again for every block, as a loop
over `T5Model` without a cache does. `plain cache` is transformers' own cache with `nn.Linear`. `ours` is
`generate_blocks`; `ours, parallel` a parallel-decoding mapper of the same weights. The roofline is the time that
reading the decoder's weights (its layers, psi, and phi of the target) once for each block takes at the bandwidth with
which `torch.sum` reads a gigabyte, measured just before and after each run of ours. All lines are run in turn, so
that the ratios of one repetition are of one moment; the table holds medians and ranges. Needs 6 GiB of memory, and
five minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from unittest.mock import patch

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, T5Config
from transformers.initialization import no_init_weights

from benchmarks.lab import markdown
from grad_transformer import GradTransformer, GradTransformerConfig, modeling_grad_transformer
from grad_transformer.modeling_decoding import FewRowsLinear


def make_mapper(num_layers: int) -> GradTransformer:
    """A mapper of Flan-T5-Large's sizes; its weights repeat one block of noise, which is made at once."""
    backbone = T5Config(
        vocab_size=1,
        d_model=1024,
        d_kv=64,
        d_ff=2816,
        num_layers=num_layers,
        num_heads=16,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    config = GradTransformerConfig(
        backbone_config=backbone,
        source_block_types=[0] * 36,
        source_type_widths=[12800],
        target_block_types=[0] * 28,
        target_type_widths=[22528],
    )
    with no_init_weights():
        mapper = GradTransformer(config).eval()
    # A prime length, so that no two rows of a matrix are the same.
    noise = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in mapper.named_parameters():
            if "layer_norm" in name:
                parameter.fill_(1.0)
                continue
            for part in parameter.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
    return mapper


@torch.no_grad()
def uncached(mapper: GradTransformer, source_blocks: torch.Tensor) -> torch.Tensor:
    """Encoder and decoder again for each block, as the loop over `T5Model` without a cache does it."""
    hidden = mapper._add_positions(mapper.start_block.expand(len(source_blocks), 1, -1))
    blocks = []
    for index in range(len(mapper.config.target_block_types)):
        states = mapper.backbone(
            inputs_embeds=mapper._embed_source(source_blocks), decoder_inputs_embeds=hidden, use_cache=False
        ).last_hidden_state
        blocks.append(mapper.readout(states[:, -1:]))
        step = mapper._add_positions(mapper.target_embedding(blocks[-1]), start=index + 1)
        hidden = torch.cat([hidden, step], dim=1)
    return torch.cat(blocks, dim=1)


def plain_cache(decoder_config: PreTrainedConfig) -> EncoderDecoderCache:
    """As T5 makes it when it is given none."""
    return EncoderDecoderCache(DynamicCache(config=decoder_config), DynamicCache(config=decoder_config))


def as_plain(mapper: GradTransformer, plain: bool) -> None:
    """Switch between `nn.Linear` and our linear layer; the parameters are the same objects."""
    for module in mapper.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = nn.Linear if plain else FewRowsLinear


def decoder_bytes(mapper: GradTransformer) -> tuple[int, int]:
    """Bytes of the decoder's weights with psi and phi, and of those that a step with cached cross-attention reads."""
    modules = [mapper.backbone.get_decoder(), mapper.readout, mapper.target_embedding]
    everything = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    cached = sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in mapper.backbone.get_decoder().named_parameters()
        if "EncDecAttention.k" in name or "EncDecAttention.v" in name
    )
    return everything, everything - cached


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the figures as JSON")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--num_layers", type=int, default=24, help="encoder layers, and as many decoder layers")
    parser.add_argument("--clients", type=int, nargs="*", default=[4, 16], help="more sizes of batches")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    mapper = make_mapper(args.num_layers)
    generator = torch.Generator().manual_seed(1)
    source_blocks = torch.randn(1, 36, 12800, generator=generator)
    many = {count: torch.randn(count, 36, 12800, generator=generator) for count in args.clients}
    num_blocks = len(mapper.config.target_block_types)
    everything, read = decoder_bytes(mapper)
    gigabyte = torch.ones(2**28)

    def plain(line: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """With `nn.Linear` and the cache that transformers makes."""

        def run() -> torch.Tensor:
            as_plain(mapper, True)
            with patch.object(modeling_grad_transformer, "roomy_cache", plain_cache):
                blocks = line()
            as_plain(mapper, False)
            return blocks

        return run

    def parallel() -> torch.Tensor:
        mapper.config.decoding = "parallel"
        blocks = mapper.generate_blocks(source_blocks)
        mapper.config.decoding = "autoregressive"
        return blocks

    lines: dict[str, Callable[[], object]] = {
        "uncached": plain(lambda: uncached(mapper, source_blocks)),
        "plain cache": plain(lambda: mapper.generate_blocks(source_blocks)),
        "ours": lambda: mapper.generate_blocks(source_blocks),
        "ours, parallel": parallel,
        **{f"ours, {n} clients": lambda n=n: mapper.generate_blocks(many[n]) for n in many},  # type: ignore[misc]
    }
    expected = uncached(mapper, source_blocks)
    error = float((mapper.generate_blocks(source_blocks) - expected).abs().max() / expected.abs().max())
    times: dict[str, list[float]] = {name: [] for name in lines}
    bandwidth: list[float] = []
    # Bandwidth changes with what else the machine does: that of a line is what lies around it.
    around: list[float] = []
    for _ in range(args.repeats):
        for name, line in lines.items():
            before = gigabyte.nbytes / seconds(gigabyte.sum)
            times[name].append(seconds(line))
            bandwidth += [before, gigabyte.nbytes / seconds(gigabyte.sum)]
            if name == "ours":
                around.append(fmean(bandwidth[-2:]))
    mapper.to(torch.bfloat16)
    times["ours, bfloat16"] = [seconds(lambda: mapper.generate_blocks(source_blocks)) for _ in range(args.repeats + 1)]
    del times["ours, bfloat16"][0]

    median = {name: statistics.median(values) for name, values in times.items()}
    per_second = statistics.median(bandwidth)
    roofline = {"all of the decoder": everything, "without cached cross-attention": read}
    rows = [
        [name, median[name], f"{min(v):.2f} to {max(v):.2f}", median["uncached"] / median[name]]
        for name, v in times.items()
    ]
    for name, size in roofline.items():
        bounds = [num_blocks * size / speed for speed in around]
        ratios = [ours / bound for ours, bound in zip(times["ours"], bounds, strict=True)]
        told = f"ours: {statistics.median(ratios):.2f} times as long ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([f"roofline, {name}", statistics.median(bounds), told, ""])
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}",
        "seconds": times,
        "bandwidth_gb_per_second": [value / 1e9 for value in bandwidth],
        "bandwidth_around_ours": [value / 1e9 for value in around],
        "roofline_bytes": {name: num_blocks * size for name, size in roofline.items()},
        "largest_relative_difference_to_uncached": error,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['machine']}; {per_second / 1e9:.1f} GB/s; peak memory {result['peak_memory_gib']:.1f} GiB")
    print(f"ours and uncached differ by at most {error:.1e} of the largest value\n")
    print(markdown(["float32 unless said otherwise", "seconds", "range", "times faster than uncached"], rows))


if __name__ == "__main__":
    main()
