"""What "the same base model" means: a hash over every value of its parameters.

A hash reads all weights, so it is kept: beside the loaded model, and on disk under the identity of the checkpoint's
files, for the next time that they are loaded.
"""

from __future__ import annotations

import hashlib
import os
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from huggingface_hub import constants
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import GradTransformerError
from ..files import read_json, write_json_atomic


logger = logging.get_logger(__name__)

# Of fingerprints over every value. Those without a prefix are of a sample, as earlier versions took it.
_PREFIX = "v2:"
_FINGERPRINT = re.compile(re.escape(_PREFIX) + "[0-9a-f]{64}")
_CHUNK_VALUES = 2**24
_SAMPLES_PER_TENSOR = 64

# Files that decide what a loaded model's parameters are.
_CHECKPOINT_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")


class Fingerprints(NamedTuple):
    """Of one base model: over all values, and the one over a sample that earlier versions recorded."""

    full: str
    sampled: str


# Fingerprints of a loaded model, and the state of its parameters when they were taken.
_KNOWN: weakref.WeakKeyDictionary[PreTrainedModel, tuple[Fingerprints, object]] = weakref.WeakKeyDictionary()


def fingerprint_base_model(model: PreTrainedModel) -> str:
    """BLAKE2b over names, shapes and all values of every parameter, the same for any loading dtype but float16.

    Values are rounded to bfloat16 first: a checkpoint in float32 and its copy in bfloat16 have one fingerprint.
    float16 rounds otherwise; a model that [`load_causal_lm`] loaded in it has the fingerprint of its checkpoint.

    Returns:
        `str`: `v2:` and 64 hexadecimal digits.
    """
    return _fingerprints(model).full


def has_fingerprint(model: PreTrainedModel, recorded: str) -> bool:
    """Whether a model has a fingerprint that was recorded, also by a version that took it of a sample of values."""
    if recorded.startswith(_PREFIX):
        return _fingerprints(model).full == recorded
    logger.warning_once(
        "The root was made by an earlier version, which compared a sample of the base model's values, not all of them."
    )
    return _fingerprints(model).sampled == recorded


def comparable(first: str, second: str) -> bool:
    """Whether two recorded fingerprints are of one kind, so that they differ only where base models do."""
    return all(_FINGERPRINT.fullmatch(text) for text in (first, second))


def recall_fingerprints(folder: Path) -> Fingerprints | None:
    """The fingerprints that are kept for a checkpoint's files as they are now; None where there are none."""
    try:
        data = read_json(_cache_file(folder))
    except (GradTransformerError, OSError):
        return None
    found = Fingerprints(str(data.get("full")), str(data.get("sampled")))
    whole = _FINGERPRINT.fullmatch(found.full) and re.fullmatch("[0-9a-f]{64}", found.sampled)
    return found if whole else None


def keep_fingerprints(model: PreTrainedModel, folder: Path) -> Fingerprints:
    """Take the fingerprints of a model just loaded from a checkpoint, and keep them for the checkpoint's files."""
    found = _fingerprints(model)
    try:
        write_json_atomic(_cache_file(folder), found._asdict())
    except OSError as cause:  # a full or read-only disk costs the next load a hash, and nothing else
        logger.info(f"The base model's fingerprint is not kept: {cause}")
    return found


def set_fingerprints(model: PreTrainedModel, found: Fingerprints) -> None:
    """Say what the fingerprints of a model are, as it was just loaded from a checkpoint."""
    _KNOWN[model] = (found, _state(model))


def _fingerprints(model: PreTrainedModel) -> Fingerprints:
    known = _KNOWN.get(model)
    if known is not None and known[1] == _state(model):
        return known[0]
    parameters = sorted(model.named_parameters())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing and rounding let other threads run
        digests = list(pool.map(_hash_values, (parameter for _, parameter in parameters)))
    total = hashlib.blake2b(str(model.config.model_type).encode(), digest_size=32)
    for (name, parameter), digest in zip(parameters, digests, strict=True):
        total.update(repr((name, tuple(parameter.shape))).encode() + digest)
    found = Fingerprints(_PREFIX + total.hexdigest(), _sampled_fingerprint(model))
    set_fingerprints(model, found)
    return found


def _state(model: PreTrainedModel) -> object:
    """What differs once a parameter was replaced or written to; moving a model to a device writes nothing.

    Versions count what autograd sees; the sample is for merged adapters, which go past it.
    """
    return _sampled_fingerprint(model), [parameter._version for parameter in model.parameters()]


def _hash_values(parameter: torch.Tensor) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for chunk in parameter.detach().reshape(-1).split(_CHUNK_VALUES):
        digest.update(chunk.to("cpu", torch.bfloat16).view(torch.int16).numpy())
    return digest.digest()


def _cache_file(folder: Path) -> Path:
    """Where the fingerprint of a checkpoint is kept; named by what changes when one of its files does."""
    digest = hashlib.sha256(transformers.__version__.encode())  # which decides what parameters are called
    for path in sorted({path for pattern in _CHECKPOINT_FILES for path in folder.glob(pattern)}):
        real = path.resolve()
        status = real.stat()
        # The time of the last change of the inode, beside that of the content, which anybody can set.
        times = (status.st_mtime_ns, status.st_ctime_ns)
        digest.update(repr((path.name, os.fspath(real), status.st_dev, status.st_ino, status.st_size, times)).encode())
    return Path(constants.HF_HOME) / "grad_transformer" / "base_fingerprints" / f"{digest.hexdigest()}.json"


def _sampled_fingerprint(model: PreTrainedModel) -> str:
    """The fingerprint that earlier versions recorded: SHA-256 over an even sample of every parameter."""
    digest = hashlib.sha256(str(model.config.model_type).encode())
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // _SAMPLES_PER_TENSOR)][:_SAMPLES_PER_TENSOR]
        digest.update(repr((name, tuple(parameter.shape))).encode())
        digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
