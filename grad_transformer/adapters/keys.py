"""The keys of a PEFT LoRA adapter: what they say, and other spellings of them that wrappers leave in files."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import AdapterFormatError


_KEY = re.compile(
    r"^base_model\.model\.(?P<module>.+?)\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<embedding>[AB]))$"
)
# What torch.compile, FSDP, activation checkpointing and Opacus put between two parts of a key.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_module)\.")
# What DDP puts before all.
_PARALLEL = "module."
# The adapter's name, which peft itself leaves out when it saves.
_ADAPTER_NAME = re.compile(r"\.lora_(?:(?P<side>[AB])\.[^.]+\.weight|embedding_(?P<embedding>[AB])\.[^.]+)$")

_SAVE_AGAIN = "save it again with save_pretrained of the unwrapped PeftModel; nothing need be fine-tuned again"


def parse_key(key: str, *, path: str | None = None) -> tuple[str, str]:
    """The adapted module's path inside the base model, and `"A"` or `"B"`.

    Raises:
        [`AdapterFormatError`]: not the key of a LoRA tensor.
    """
    match = _KEY.match(key)
    if match is not None:
        return match["module"], match["side"] or match["embedding"]
    if ".lora_" not in key and key.endswith(".weight"):
        raise AdapterFormatError(
            "Weights of the base model were saved with the adapter.",
            path=path,
            expected="LoRA tensors alone",
            found=key,
            remedy="save it again with save_pretrained(folder, save_embedding_layers=False); embeddings that were "
            "themselves trained or resized have no place in a mapped delta",
        )
    raise AdapterFormatError(
        f"{key!r} is not the key of a LoRA tensor.",
        path=path,
        expected="base_model.model.<module>.lora_A.weight, lora_B.weight, lora_embedding_A or lora_embedding_B",
        found=key,
        remedy=f"{_SAVE_AGAIN}, unless it has biases, magnitudes or whole modules, which are not supported",
    )


def canonical_keys(keys: Iterable[str], *, path: str | None = None) -> dict[str, str]:
    """From each key as peft writes it to the key that stands in a file: wrappers and adapter names left out.

    Raises:
        [`AdapterFormatError`]: two tensors of the file are one.
    """
    found: dict[str, str] = {}
    for key in keys:
        canonical = _WRAPPERS.sub("", key)
        if canonical.startswith(f"{_PARALLEL}base_model."):
            canonical = canonical.removeprefix(_PARALLEL)
        canonical = _ADAPTER_NAME.sub(_without_name, canonical)
        if canonical in found:
            raise AdapterFormatError(
                "Two tensors of the file are of one module.",
                path=path,
                expected="one adapter",
                found=f"{found[canonical]}, {key}",
                remedy=_SAVE_AGAIN,
            )
        found[canonical] = key
    return found


def _without_name(match: re.Match[str]) -> str:
    return f".lora_{match['side']}.weight" if match["side"] else f".lora_embedding_{match['embedding']}"
