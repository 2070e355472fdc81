"""What a plan is said to cost follows from the models' shapes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from grad_transformer import create_root
from grad_transformer.adapters.io import write_text_atomic
from grad_transformer.cli import main
from grad_transformer.errors import UsageError
from grad_transformer.finetuning import FineTuningRecipe
from grad_transformer.lab import make_lab_tokenizer
from grad_transformer.shadow.estimate import DEVICES, Device, estimate_side, outline_root
from tests.worlds import lora, tiny_qwen2


RECIPE = FineTuningRecipe(max_steps=10, warmup_steps=1, per_device_batch_size=4, max_length=32, snapshot_last=2)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_qwen2(tmp_path / "base", layers=3, hidden=64)


def test_the_outline_of_a_root_is_that_of_the_root(base: Path, tmp_path: Path) -> None:
    config = lora(target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 3})
    root = create_root(base, config, output_dir=tmp_path / "root")
    (base / "model.safetensors").unlink()
    model, outline = outline_root(base, config)
    assert outline.layout == root.layout
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(UsageError, match="does not fit"):
        outline_root(base, lora(target_modules=["no_such_module"]))
    with pytest.raises(UsageError, match="no such model"):
        outline_root(tmp_path / "nowhere", config)


def test_flops_are_those_that_torch_counts(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    hidden = model.get_input_embeddings()(torch.zeros(1, 32, dtype=torch.int64)).requires_grad_()
    # torch counts attention without its causal half; it has no part in what is compared here.
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=hidden).logits.sum().backward()
    counted = sum(flops for kind, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(kind))
    found = estimate_side(
        *outline_root(base, lora()), RECIPE, num_runs=1, device=DEVICES["H100"], completion_share=1.0
    )
    attention = 3 * 2 * 32 * 64 * 3
    assert (found.flops_per_token - attention) * 32 == counted


def test_hours_disk_and_memory_follow_from_the_sizes(base: Path) -> None:
    model, root = outline_root(base, lora())
    one = estimate_side(model, root, RECIPE, num_runs=1, device=DEVICES["H100"])
    many = estimate_side(model, root, RECIPE, num_runs=300, device=DEVICES["H100"], mfu=0.7)
    assert many.hours == pytest.approx(one.hours * 300 / 2)
    assert one.tokens == 10 * 4 * 32
    assert one.run_bytes == 4 * 2 * root.layout.numel
    assert one.weight_bytes == 4 * one.parameters == 4 * sum(value.numel() for value in model.parameters())
    assert one.batch is not None
    assert one.weight_bytes < one.memory < 80e9
    assert estimate_side(model, root, RECIPE, num_runs=1, device=Device(1e12, one.weight_bytes + 1e4)).batch is None


def test_neither_estimate_nor_dry_run_loads_weights(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base / "model.safetensors").unlink()
    make_lab_tokenizer().save_pretrained(base)
    rows = "".join(f'{{"prompt": "?1 {row:02d} >", "completion": "{row:02d}"}}\n' for row in range(20))
    write_text_atomic(tmp_path / "public.jsonl", rows)
    arguments = ["plan", "--data", str(tmp_path / "public.jsonl"), "--output_dir", str(tmp_path / "plan")]
    arguments += ["--source_model", str(base), "--target_model", str(base), "--num_runs", "8", "--rows_per_run", "4"]
    assert main([*arguments, "--dry_run"]) == 0
    assert "8 shadow runs" in capsys.readouterr().out
    assert main([*arguments, "--estimate", "--estimate_device", "A100", "--estimate_mfu", "0.25"]) == 0
    told = capsys.readouterr().out
    for part in ("8 runs of each model", "time of one device", "312 TFLOP/s", "0.25 (assumed", "Nothing was written"):
        assert part in told
    assert not (tmp_path / "plan").exists()
    assert main([*arguments, "--estimate", "--estimate_mfu", "0"]) != 0
