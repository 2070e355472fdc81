"""Base models and the adapter on them: loaded, attached at the root, read and written tensor by tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.compute
import torch
from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..adapters import Root
from ..adapters.base_files import Source, locate
from ..adapters.bases import load_causal_lm, load_tokenizer
from ..adapters.lora_config import LORA_FIELDS
from ..errors import AdapterFormatError, BaseModelMismatchError, DataError, RecipeError, UsageError
from ..hub.names import is_repo_id, split_revision
from ..hub.revisions import check_repo_id
from ..wording import first_line


logger = logging.get_logger(__name__)


def load_base(
    name_or_path: Source,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, frozen, and its tokenizer. No code of theirs is run, and no pickle read.

    Args:
        name_or_path (`str` or `Path`): folder or Hub id.
        revision (`str`, *optional*): revision on the Hub.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): of the weights; `"auto"` as they are stored.
        device (`str` or `torch.device`, *optional*): default: the first GPU, or the CPU where there is none.

    Raises:
        [`UsageError`]: no model or no tokenizer there, not whole, or not as safetensors; no such device or dtype.
        [`HubError`]: no such repository or version, no access, or no answer.
    """
    files = locate(name_or_path, revision=revision)
    tokenizer = load_tokenizer(files)
    return _with_padding(load_causal_lm(files, dtype=dtype, device=device), tokenizer)


def load_root_base(
    root: Root,
    *,
    base_model: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model that a root was made for, and check its weights before anything else is done with it.

    Args:
        root ([`Root`]): perhaps of another party's mapper.
        base_model (`str` or `Path`, *optional*): another place of the same base model.
        dtype, device: see [`load_base`].

    Raises:
        [`BaseModelMismatchError`]: it is another model.
        [`UsageError`]: as in [`load_base`]; or a mapper from the Hub names a path.
    """
    preview = preview_base(root, base_model=base_model)
    if preview.place == "hub" and base_model is None:
        logger.warning(f"Base model: {preview.describe()}.")
    files = locate(preview.name, revision=preview.revision)
    model = load_causal_lm(files, dtype=dtype, device=device)
    root.check_base(model)
    return _with_padding(model, load_tokenizer(files))


@dataclass(frozen=True)
class BasePreview:
    """Which base model will be loaded, and from where; for people to see before anything of it is.

    Args:
        name (`str`): folder or Hub id.
        revision (`str`, *optional*): on the Hub.
        place (`str`): `"folder"`; `"cache"`: of the Hub, on this machine already; `"hub"`: to be downloaded.
    """

    name: str
    revision: str | None
    place: Literal["folder", "cache", "hub"]

    def describe(self) -> str:
        where = {
            "folder": "in a folder of this machine",
            "cache": "from the Hub, on this machine already",
            "hub": "to be downloaded from the Hub",
        }
        version = "" if self.place == "folder" else f" at {self.revision or 'its newest revision'}"
        return f"{self.name}{version}, {where[self.place]}"


def preview_base(root: Root, *, base_model: str | Path | None = None) -> BasePreview:
    """Say which base model [`load_root_base`] will load. Nothing is downloaded, and the Hub is not asked.

    Raises:
        [`UsageError`]: a mapper from the Hub names a path, on a machine that is not this one; or there is no such
            folder, and it can be no repository.
    """
    name = root.base_model if base_model is None else str(base_model)
    revision = root.base_revision if name == root.base_model else None
    if base_model is None and root.origin is not None and not is_repo_id(name):
        raise UsageError(
            "The mapper names a path as its base model.",
            path=root.origin.repo_id,
            expected="the id of a repository on the Hub, from a mapper that comes from there",
            found=repr(name[:200]),
            remedy="give the base model's place on this machine: --base_model",
        )
    if os.path.isdir(os.path.expanduser(name)):
        return BasePreview(name, None, "folder")
    name, named = split_revision(name, repo_type="model")
    check_repo_id(name)
    revision = named or revision
    cached = isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    return BasePreview(name, revision, "cache" if cached else "hub")


def _with_padding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # Nothing is ever learned at padding, so any token that the model knows will do.
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= num_embeddings(model):
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def num_embeddings(model: PreTrainedModel) -> int:
    """How many tokens a model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_tokens(tokens: Dataset, model: PreTrainedModel) -> None:
    """Refuse rows with tokens that the model has no embedding for: its tokenizer belongs to a larger one.

    Args:
        tokens (`datasets.Dataset`): with `input_ids`.
        model (`PreTrainedModel`): the base model.

    Raises:
        [`DataError`]
    """
    column = tokens.with_format("arrow")[:].column("input_ids")
    greatest = pyarrow.compute.max(pyarrow.compute.list_flatten(column)).as_py()
    if greatest is not None and greatest >= num_embeddings(model):
        check_token(greatest, model, row=next(row for row, ids in enumerate(column) if greatest in ids.as_py()))


def check_token(token: int, model: PreTrainedModel, *, row: int) -> None:
    """Raises [`DataError`] where a model, which needs no weights for that, has no embedding for a row's token."""
    known = num_embeddings(model)
    if token >= known:
        raise DataError(
            f"Row {row} has a token that the base model does not know.",
            path=model.config.name_or_path,
            expected=f"tokens below {known}, the size of the model's embedding",
            found=token,
            remedy="use the tokenizer that the base model came with; tokens added later need new embeddings",
        )


def attach_root(model: PreTrainedModel, root: Root) -> PeftModel:
    """Put a trainable adapter on the base model, with exactly the root's values.

    The adapted modules are those that the root has tensors for: no pattern in its config is matched with anything.
    Adapters of a half-precision base are float32, as peft makes them.

    Raises:
        [`BaseModelMismatchError`]: not the base model that the root was made for.
        [`AdapterFormatError`]: the root's config holds values that no adapter can have.
    """
    root.check_base(model)
    with torch.random.fork_rng(devices=[]):  # peft draws an A that is overwritten at once
        peft_model = _attach(model, root)
    write_adapter_tensors(peft_model, root.adapter.tensors)
    for key, value in read_adapter_tensors(peft_model, root=root).items():
        assert torch.equal(value, root.adapter.tensors[key].to(value)), key
    return peft_model


def _attach(model: PreTrainedModel, root: Root) -> PeftModel:
    settings, specs = root.adapter.config, list(root.layout.tensor_specs())
    modules = sorted({spec.module for spec in specs})
    dropout = settings.get("lora_dropout") or 0.0
    try:
        if not 0 <= dropout < 1:
            raise ValueError(f"lora_dropout {dropout}")
        config = LoraConfig(
            **{name: settings[name] for name in LORA_FIELDS if settings.get(name) is not None},
            lora_dropout=dropout,
            target_modules="|".join(map(re.escape, modules)),
            fan_in_fan_out=bool(settings.get("fan_in_fan_out")),
            task_type="CAUSAL_LM",
        )
        peft_model = get_peft_model(model, config)
    except (ValueError, TypeError) as cause:
        raise AdapterFormatError(
            "The root's adapter cannot be put on its base model.",
            path=model.config.name_or_path,
            expected=f"{len(modules)} modules that the base model has, and a lora_dropout from 0 to 1",
            found=first_line(cause),
            remedy="ask the provider for a mapper of this base model, or download it again",
        ) from cause
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    found, expected = {key: tuple(value.shape) for key, value in state.items()}, {s.key: s.shape for s in specs}
    if found != expected:
        first = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))[0]
        raise BaseModelMismatchError(
            "The root's tensors do not fit the base model.",
            path=model.config.name_or_path,
            expected=f"{first} {expected.get(first)}",
            found=found.get(first),
            remedy="load the base model that the root was made for",
        )
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
