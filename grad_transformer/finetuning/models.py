"""Base models and the adapter on them: loaded, attached at the root, read and written tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..adapters import Root
from ..errors import RecipeError, UsageError


def load_base(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, frozen, and its tokenizer.

    Args:
        name_or_path (`str` or `Path`): folder or Hub id.
        revision (`str`, *optional*): revision on the Hub.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): of the weights; `"auto"` as they are stored.
        device (`str` or `torch.device`, *optional*): default: the first GPU, or the CPU where there is none.

    Raises:
        [`UsageError`]: no model or no tokenizer there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(str(name_or_path), revision=revision, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), revision=revision)
    except (OSError, ValueError) as cause:
        lines = str(cause).strip().splitlines()
        raise UsageError(
            "The base model or its tokenizer cannot be loaded.",
            path=name_or_path,
            expected="a causal language model with its tokenizer, in a folder or on the Hub",
            found=f"{type(cause).__name__}: {lines[0] if lines else ''}",
            remedy="check the name, the network (HF_HUB_OFFLINE) and your access token (HF_TOKEN)",
        ) from cause
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False)
    return model.to(device).eval(), tokenizer


def attach_root(model: PreTrainedModel, root: Root) -> PeftModel:
    """Put a trainable adapter on the base model, with exactly the root's values.

    Adapters of a half-precision base are float32, as peft makes them.

    Raises:
        [`BaseModelMismatchError`]: not the base model that the root was made for.
    """
    root.check_base(model)
    # peft takes the name from the model, and warns where a copy of it lies elsewhere: its weights were just checked.
    settings = {**root.adapter.config, "inference_mode": False, "base_model_name_or_path": None}
    config = PeftConfig.from_peft_type(**settings)
    with torch.random.fork_rng(devices=[]):  # peft draws an A that is overwritten at once
        peft_model = get_peft_model(model, config)
    write_adapter_tensors(peft_model, root.adapter.tensors)
    for key, value in read_adapter_tensors(peft_model, root=root).items():
        assert torch.equal(value, root.adapter.tensors[key].to(value)), key
    return peft_model


def read_adapter_tensors(peft_model: PeftModel, *, root: Root | None = None) -> dict[str, torch.Tensor]:
    """A copy of the adapter's tensors, on their device, by their keys in `adapter_model.safetensors`.

    Args:
        peft_model (`PeftModel`): a model with one adapter.
        root ([`Root`], *optional*): the keys must be those of its layout.

    Raises:
        [`RecipeError`]: NaN or infinite values: the fine-tune diverged.
    """
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    tensors = {key: value.detach().clone() for key, value in state.items()}
    # A wrapper around the model can make peft see none of its own parameters.
    assert tensors, "peft found no adapter tensors"
    if root is not None:
        assert tensors.keys() == {spec.key for spec in root.layout.tensor_specs()}
    check_finite(tensors)
    return tensors


def write_adapter_tensors(peft_model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Overwrite all values of the model's adapter, in place: parameters stay the same objects."""
    present = get_peft_model_state_dict(peft_model, save_embedding_layers=False).keys()
    assert present == tensors.keys(), sorted(present ^ tensors.keys())[:2]
    outcome = set_peft_model_state_dict(peft_model, dict(tensors))
    assert not outcome.unexpected_keys, outcome.unexpected_keys


def check_finite(tensors: Mapping[str, torch.Tensor], *, name: str = "the fine-tune") -> None:
    """Raises [`RecipeError`] where a tensor holds NaN or infinity."""
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise RecipeError(
                f"{name[:1].upper()}{name[1:]} diverged: the adapter holds NaN or infinite values.",
                expected="finite values",
                found=key,
                remedy="lower learning_rate or max_grad_norm in the recipe, or load the base model in float32",
            )


def check_moved(tensors: Mapping[str, torch.Tensor], root: Root, *, name: str = "the fine-tune") -> None:
    """Raises [`RecipeError`] where a fine-tuned adapter still has the root's values."""
    if all(torch.equal(value, root.adapter.tensors[key].to(value)) for key, value in tensors.items()):
        raise RecipeError(
            f"{name[:1].upper()}{name[1:]} changed nothing: the adapter still has the root's values.",
            expected="a delta that is not zero",
            found="0",
            remedy="check learning_rate, warmup_steps and max_steps in the recipe",
        )
