"""The lab's two base models, pretrained on the spot: real `Qwen2ForCausalLM` models beside their tokenizer."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from ..adapters.io import read_record, write_json_atomic
from ..constants import FORMAT_VERSION
from ..errors import IncompleteArtifactError, UsageError
from ..schemas import LabBaseRecord
from ..wording import BAR_FORMAT
from .inputs import NUM_DIGITS
from .presets import BaseModelPreset
from .tokenizer import EOS_TOKEN, PAD_TOKEN, TOKEN_IDS, VOCABULARY, make_lab_tokenizer
from .world import UNKNOWN_PROBABILITY, LabWorld


BASE_MANIFEST_NAME = "base.json"
TINYLM_NAME = "tinylm"
LLM_NAME = "llm"

_PRETRAINING = 4
_ADAM_BETAS = (0.9, 0.98)
_WEIGHT_DECAY = 0.01
_MAX_GRAD_NORM = 1.0
_WARMUP_FRACTION = 0.05
_SKILL_ROWS_PER_TASK = 16
_LOG_EVERY = 50

logger = logging.get_logger(__name__)


def pretrain_base_models(
    world: LabWorld, output_dir: str | Path, *, names: Sequence[str] = (TINYLM_NAME, LLM_NAME)
) -> tuple[Path, ...]:
    """Pretrain the world's TinyLM and LLM into `output_dir/tinylm` and `output_dir/llm`.

    Each folder holds model and tokenizer as `save_pretrained` writes them, and `base.json`: seed and maps of the
    world, architecture, training arguments, final loss, and skill accuracy (exact match where both instructions are
    named). A folder appears whole or not at all, and one that is there with the same facts is used again. The same
    seed gives the same weights on the same machine, whatever the caller's random state.

    Args:
        world ([`LabWorld`]): tasks and sizes.
        output_dir (`str` or `Path`): where the two folders go.
        names (`Sequence[str]`, *optional*): default: both, `"tinylm"` and `"llm"`.

    Returns:
        The paths of the base models, in the order of `names`.

    Raises:
        [`UsageError`]: a folder holds a base model of another world or preset.
        [`IncompleteArtifactError`]: a folder is there, but without a manifest.
    """
    both = {TINYLM_NAME: world.preset.tinylm, LLM_NAME: world.preset.llm}
    presets = [(name, both[name]) for name in names]
    facts = [base_model_facts(world, name) for name, _ in presets]
    folders = [Path(output_dir) / name for name, _ in presets]
    finished = [_is_finished(folder, fact["fingerprint"]) for folder, fact in zip(folders, facts, strict=True)]
    for (name, preset), fact, folder, done in zip(presets, facts, folders, finished, strict=True):
        if done:
            logger.info(f"Using the {name} that is already in {folder}.")
        else:
            _pretrain_into(folder, world, name, preset, fact)
    return tuple(folders)


def base_model_facts(world: LabWorld, name: str) -> dict[str, Any]:
    """What decides the weights of a base model, with a fingerprint of it.

    Args:
        world ([`LabWorld`]): tasks and sizes.
        name (`str`): `"tinylm"` or `"llm"`.
    """
    preset = {TINYLM_NAME: world.preset.tinylm, LLM_NAME: world.preset.llm}[name]
    # How it is fine-tuned later says nothing about the base model.
    arguments = {key: value for key, value in asdict(preset).items() if not key.startswith("fine_tuning")}
    facts: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "world": world.to_dict(),
        "preset": arguments,
        "training": {
            "betas": list(_ADAM_BETAS),
            "weight_decay": _WEIGHT_DECAY,
            "max_grad_norm": _MAX_GRAD_NORM,
            "warmup_fraction": _WARMUP_FRACTION,
            "unknown_probability": UNKNOWN_PROBABILITY,
        },
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {**facts, "fingerprint": digest}


def make_base_model(preset: BaseModelPreset, *, seed: int) -> Qwen2ForCausalLM:
    """An untrained base model in float32, on the CPU."""
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=preset.hidden_size,
        num_hidden_layers=preset.num_hidden_layers,
        num_attention_heads=preset.num_attention_heads,
        num_key_value_heads=preset.num_key_value_heads,
        intermediate_size=preset.intermediate_size,
        initializer_range=preset.initializer_range,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": preset.rope_theta},
        tie_word_embeddings=True,
        pad_token_id=TOKEN_IDS[PAD_TOKEN],
        eos_token_id=TOKEN_IDS[EOS_TOKEN],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).to(torch.float32)


def pretrain(
    model: PreTrainedModel, world: LabWorld, preset: BaseModelPreset, *, rng: np.random.Generator, description: str
) -> list[float]:
    """Train a base model in place, on the loss of the answer alone.

    Args:
        model (`PreTrainedModel`): changed in place.
        world ([`LabWorld`]): gives the batches.
        preset ([`BaseModelPreset`]): steps, batch size and learning rate.
        rng (`np.random.Generator`): the stream that batches are drawn from.
        description (`str`): the label of the progress bar.

    Returns:
        The mean loss per answer token of each step.
    """
    steps = preset.pretraining_steps
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=preset.pretraining_learning_rate, betas=_ADAM_BETAS, weight_decay=_WEIGHT_DECAY
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_then_cosine(steps))
    losses = []
    model.train()
    with tqdm(total=steps, desc=description, bar_format=BAR_FORMAT) as progress:
        for step in range(steps):
            input_ids, labels = world.pretraining_batch(rng, preset.pretraining_batch_size)
            # Only the answer is scored, so only its logits are computed.
            logits = model(input_ids=input_ids[:, :-1], use_cache=False, logits_to_keep=NUM_DIGITS + 1).logits
            targets = labels[:, -(NUM_DIGITS + 1) :]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            progress.update()
            if (step + 1) % _LOG_EVERY == 0 or step + 1 == steps:
                progress.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return losses


def skill_accuracy(model: PreTrainedModel, world: LabWorld, *, rows_per_task: int = _SKILL_ROWS_PER_TASK) -> float:
    """Exact match of the six digits, greedy, with both instructions named, over all 36 tasks and unseen inputs."""
    sequences = world.skill_batch(rows_per_task).to(model.device)
    prompt_length = sequences.shape[1] - NUM_DIGITS - 1
    generated = sequences[:, :prompt_length]
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for _ in range(NUM_DIGITS):
            logits = model(input_ids=generated, use_cache=False, logits_to_keep=1).logits
            generated = torch.cat([generated, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    model.train(was_training)
    return (generated == sequences[:, :-1]).all(1).float().mean().item()


def _pretrain_into(folder: Path, world: LabWorld, name: str, preset: BaseModelPreset, facts: dict[str, Any]) -> None:
    stream = [world.seed, _PRETRAINING, 0 if name == TINYLM_NAME else 1]
    model = make_base_model(preset, seed=int(np.random.default_rng([*stream, 0]).integers(2**62)))
    losses = pretrain(model, world, preset, rng=np.random.default_rng([*stream, 1]), description=f"pretrain {name}")
    tail = losses[-20:]
    results = {
        "final_loss": sum(tail) / len(tail),
        "skill_accuracy": skill_accuracy(model, world),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    logger.info(f"{name}: final loss {results['final_loss']:.4f}, skill accuracy {results['skill_accuracy']:.3f}")
    with _atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        make_lab_tokenizer().save_pretrained(temporary)
        write_json_atomic(temporary / BASE_MANIFEST_NAME, {**facts, **results})


def _is_finished(folder: Path, fingerprint: str) -> bool:
    """Whether `folder` holds the base model with this fingerprint; `False` if there is no such folder."""
    if not folder.exists():
        return False
    remedy = "choose another output folder, or delete this one"
    if not (folder / BASE_MANIFEST_NAME).is_file():
        raise IncompleteArtifactError(
            "The folder is there, but is no finished base model.",
            path=folder,
            expected=BASE_MANIFEST_NAME,
            remedy=remedy,
        )
    found = read_record(folder / BASE_MANIFEST_NAME, LabBaseRecord)["fingerprint"]
    if found != fingerprint:
        raise UsageError(
            "The folder holds a base model of another seed or preset.",
            path=folder,
            expected=fingerprint,
            found=found,
            remedy=remedy,
        )
    return True


def _warmup_then_cosine(steps: int) -> Callable[[int], float]:
    warmup = max(1, round(steps * _WARMUP_FRACTION))

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return scale


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`; rename it when the block ends, remove it if the block fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
