"""The one door through which base models, their tokenizers and configs, and the mapper's backbone are loaded.

What is loaded may have been named by another party, so nothing of it is executed: no code of a repository is run or
even downloaded, whatever the environment says; weights are safetensors alone; a config is checked before any weight is
read. A name is taken for a folder or for a repository before the Hub is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import GradTransformerError, UsageError
from ..files import read_json
from ..wording import describe_error, first_line
from .base_files import BaseFiles, Source, fetch_weights, locate
from .fingerprints import keep_fingerprints, recall_fingerprints, set_fingerprints


T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

_MAX_CONFIG_BYTES = 8 * 2**20
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
# What a config may ask for: modules are made one by one, and some models compute a table of positions.
_MOST_MODULES, _MOST_POSITIONS = 4096, 2**26


def load_config(source: Source, **locate_kwargs: Any) -> PreTrainedConfig:
    """The config of a model: of a known architecture, not quantised, and of a size that can be.

    Args:
        source (`str`, `Path` or [`BaseFiles`]): a folder, or a repository id.
        locate_kwargs: arguments of [`locate`].

    Raises:
        [`UsageError`], [`HubError`]: it cannot be found or read, or names code of its own.
    """
    found = locate(source, **locate_kwargs)
    raw = read_json(found.folder / "config.json", error=UsageError, max_bytes=_MAX_CONFIG_BYTES)
    # What computes attention is this machine's choice: a config could name compiled code on the Hub.
    check_config({name: value for name, value in raw.items() if name not in _IMPLEMENTATIONS}, path=found.name)
    config = _loaded(
        found.name,
        "config",
        lambda: AutoConfig.from_pretrained(found.folder, trust_remote_code=False, local_files_only=True),
    )
    config._attn_implementation = config._experts_implementation = None
    config.name_or_path = found.name
    return config


def check_config(
    values: Mapping[str, Any],
    *,
    path: str | Path | None = None,
    error: type[GradTransformerError] = UsageError,
    most_layers: int = _MOST_MODULES,
    most_positions: int = _MOST_POSITIONS,
) -> None:
    """Refuse a config, perhaps of another party, that would fetch code or fill the memory, or that is quantised.

    Args:
        values (`Mapping`): the content of a `config.json`, before anything is made of it.
        path (`str` or `Path`, *optional*): named in errors.
        error (`type`, *optional*): what is raised.
        most_layers (`int`, *optional*, defaults to 4,096), most_positions (`int`, *optional*, defaults to 2^26): what
            it may ask for.

    Raises:
        `error`
    """
    most = {"layer": most_layers, "depth": most_layers, "expert": _MOST_MODULES, "position": most_positions}
    for name, value in config_fields(values):
        limit = next((limit for part, limit in most.items() if part in name), None)
        if type(value) is int and limit is not None and value > limit:
            raise error(
                "The model's config is absurd.",
                path=path,
                expected=f"{name[:60]} up to {limit}",
                found=str(value)[:30],
                remedy="download or save the model again",
            )
        if name.endswith(_IMPLEMENTATIONS) and isinstance(value, str) and "/" in value:
            raise error(
                "The model's config names compiled code on the Hub.",
                path=path,
                expected="an implementation that transformers has itself",
                found=f"{name[:60]}: {value[:80]}",
                remedy=f"take `{name[:60]}` out of its config.json",
            )
        if name == "quantization_config" and value:
            raise error(
                "The model is quantised, so its weights are not those of the model that it was made from.",
                path=path,
                expected="an unquantised checkpoint",
                found=str(value)[:120],
                remedy="give the original model; loading it in bfloat16 halves the memory of a float32 one",
            )


def config_fields(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Names and values of a config and of the configs inside it; items of a list have the list's name."""
    if name:
        yield name, value
    if isinstance(value, Mapping) and depth < 8:
        for key, item in value.items():
            yield from config_fields(item, str(key), depth + 1)
    elif isinstance(value, list | tuple):
        yield from ((name, item) for item in value)


def load_tokenizer(source: Source, **locate_kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Its chat template is only ever rendered in transformers' sandbox.

    Raises:
        [`UsageError`], [`HubError`]: it cannot be found or read.
    """
    found = locate(source, **locate_kwargs)

    def load() -> tuple[PreTrainedTokenizerBase, bool]:
        tokenizer = AutoTokenizer.from_pretrained(found.folder, trust_remote_code=False, local_files_only=True)
        # Where files are missing, transformers makes a tokenizer that knows special tokens alone, or one word more.
        words = tokenizer.get_vocab().keys() - tokenizer.added_tokens_encoder.keys()
        return tokenizer, len(words) > 1

    tokenizer, has_words = _loaded(found.name, "tokenizer", load)
    if not has_words:
        raise UsageError(
            "The model has no tokenizer.",
            path=found.name,
            expected="tokenizer.json, or the vocabulary files of its kind",
            found="none",
            remedy="save the tokenizer into the model's folder: tokenizer.save_pretrained(folder)",
        )
    tokenizer.name_or_path = found.name
    return tokenizer


def outline_causal_lm(source: Source, **locate_kwargs: Any) -> PreTrainedModel:
    """A causal language model without weights, on the meta device, in its checkpoint's dtype; only configs are read.

    Raises:
        [`UsageError`], [`HubError`]: it cannot be found, or is none.
    """
    found = locate(source, **locate_kwargs)
    with torch.device("meta"):
        return make_causal_lm(load_config(found), path=found.name).eval().requires_grad_(False)


def load_causal_lm(
    source: Source,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    **locate_kwargs: Any,
) -> PreTrainedModel:
    """A causal language model, frozen, with every weight of its checkpoint.

    Args:
        source (`str`, `Path` or [`BaseFiles`]): a folder, or a repository id.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): of the weights; `"auto"` as they are stored.
        device (`str` or `torch.device`, *optional*): default: the first GPU, or the CPU where there is none.
        locate_kwargs: arguments of [`locate`].

    Raises:
        [`UsageError`]: no such device or dtype; no causal language model there, or not whole, or not as safetensors.
        [`HubError`]: no such repository or version, no access, or no answer.
    """
    device, dtype = check_device(device), check_dtype(dtype)
    found = locate(source, **locate_kwargs)
    outline = outline_causal_lm(found)
    fetch_weights(found, sum(parameter.numel() for parameter in outline.parameters()), **locate_kwargs)

    def load(dtype: str | torch.dtype) -> PreTrainedModel:
        return _loaded(found.name, "causal language model", lambda: _whole(AutoModelForCausalLM, found, dtype))

    known = recall_fingerprints(found.folder)
    if known is None and dtype == torch.float16 and outline.dtype != torch.float16:
        # float16 rounds in a way of its own, and a fingerprint is of the values as they are stored.
        known = keep_fingerprints(load("auto"), found.folder)
    model = load(dtype)
    if known is None:
        keep_fingerprints(model, found.folder)
    else:
        set_fingerprints(model, known)
    model.requires_grad_(False)
    return _loaded(found.name, "model", lambda: model.to(device)).eval()


def load_backbone(source: Source, *, dtype: str | torch.dtype = "auto", **locate_kwargs: Any) -> PreTrainedModel:
    """The pretrained encoder-decoder that a mapper starts from, without a head; errors as in [`load_causal_lm`]."""
    dtype = check_dtype(dtype)
    found = locate(source, **locate_kwargs)
    with torch.device("meta"):
        outline = make_backbone(load_config(found), path=found.name)
    fetch_weights(found, sum(parameter.numel() for parameter in outline.parameters()), **locate_kwargs)
    return _loaded(found.name, "backbone", lambda: _whole(AutoModel, found, dtype))


def make_backbone(config: PreTrainedConfig, *, path: str | Path | None = None) -> PreTrainedModel:
    """A backbone with random weights from a config, which may be that of another party's mapper.

    Raises:
        [`UsageError`]: the config asks for code, or is absurd.
    """
    check_config({**config.to_dict(), "attn_implementation": config._attn_implementation}, path=path)
    return _loaded(path, "backbone", lambda: AutoModel.from_config(config, trust_remote_code=False))


def make_causal_lm(config: PreTrainedConfig, *, path: str | Path | None = None) -> PreTrainedModel:
    """A causal language model with random weights from a config, in the dtype that it names.

    Raises:
        [`UsageError`]: the config is of no such model, or is absurd.
    """
    check_config(config.to_dict(), path=path)
    dtype = config.dtype or torch.float32
    return _loaded(
        path,
        "causal language model",
        lambda: AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False),
    )


def check_device(device: str | torch.device | None = None) -> torch.device:
    """A device that this machine has; default: the first GPU, or the CPU where there is none.

    Raises:
        [`UsageError`]
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        raise UsageError(
            "There is no such device on this machine.",
            expected="cpu, or cuda, cuda:0, mps, ... where torch sees one",
            found=f"{device}: {first_line(cause)}",
            remedy="leave the device out: the first GPU is taken, or the CPU",
        ) from cause
    if found.type == "meta":
        raise UsageError("The meta device holds no weights.", expected="cpu, cuda, ...", found=device)
    return found


def check_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """`"auto"`, or a dtype that a model can be loaded in.

    Raises:
        [`UsageError`]
    """
    found = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if found != "auto" and found not in DTYPES.values():
        raise UsageError("A model has no such dtype.", expected=f"auto, {', '.join(DTYPES)}", found=dtype)
    return found


def _whole(auto: Any, found: BaseFiles, dtype: str | torch.dtype) -> PreTrainedModel:
    """The model with all its weights: what a checkpoint lacks, transformers would draw at random."""
    model, report = auto.from_pretrained(
        found.folder,
        config=load_config(found),
        dtype=dtype,
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise UsageError(
            "The checkpoint lacks weights of the model.",
            path=found.name,
            expected="all weights",
            found=f"{len(missing)} missing, among them {missing[0]}",
            remedy="download or save the model again; a checkpoint of another head is no causal language model",
        )
    model.config.name_or_path = model.name_or_path = found.name
    return model


def _loaded(path: str | Path | None, what: str, load: Callable[[], T]) -> T:
    """What `load` gives; whatever foreign files make transformers raise becomes a typed error."""
    try:
        return load()
    except GradTransformerError:
        raise
    except Exception as cause:
        if "trust_remote_code" in str(cause):
            raise UsageError(
                f"The {what} needs code from its repository, which is never run.",
                path=path,
                expected="an architecture that transformers knows",
                found="auto_map in its config",
                remedy="use another base model, or a newer transformers that knows it",
            ) from cause
        raise UsageError(
            f"The {what} cannot be loaded.",
            path=path,
            expected="a causal language model with its tokenizer, in a folder or on the Hub"
            if what != "backbone"
            else "a pretrained encoder-decoder",
            found=describe_error(cause),
            remedy="check that its files are whole, and of an architecture that transformers knows",
        ) from cause
