"""The content of `adapter_config.json`: whether A and B are all there is, and each module's rank and scaling."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from ..errors import AdapterFormatError
from .patterns import check_patterns, pattern_matcher


# What decides the shapes and scalings of an adapter, beside its base model and target modules.
LORA_FIELDS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")

# Fields that say how an adapter came to be or where it goes, and nothing that its tensors do not show.
_KNOWN_FIELDS = {
    *LORA_FIELDS,
    "peft_type",
    "peft_version",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "bias",
    "lora_dropout",
    "fan_in_fan_out",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "runtime_config",
}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(LoraConfig)}

# Initialisations that also rewrite the base model's weights, so that A and B are no update of the original base.
_BASE_CHANGING_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_representable(config: Mapping[str, Any], *, path: str | None = None) -> None:
    """Refuse an adapter config that asks for more than A and B of its target modules.

    A field that is not known here (of a newer peft, say) is refused where it is switched on.

    Raises:
        [`AdapterFormatError`]: names the field and what to do.
    """

    def refuse(name: str, expected: object) -> None:
        raise AdapterFormatError(
            f"`{name[:60]}` of the adapter cannot be represented as a sequence of LoRA blocks.",
            path=path,
            expected=expected,
            found=str(config.get(name))[:200],
            remedy=f"train a plain LoRA adapter with {name[:60]}={expected!r}",
        )

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "LORA")
    if config.get("bias", "none") != "none":
        refuse("bias", "none")
    for name, value in config.items():
        default = _DEFAULTS.get(name)
        if value and name not in _KNOWN_FIELDS and value != default:
            refuse(name, False if isinstance(value, bool) else default if name in _DEFAULTS else None)
    initialisation = config.get("init_lora_weights", True)
    if isinstance(initialisation, str) and initialisation.lower().startswith(_BASE_CHANGING_INITIALISATIONS):
        refuse("init_lora_weights", True)


def ranks_and_scalings(
    config: Mapping[str, Any], modules: Sequence[str], *, path: str | None = None
) -> dict[str, tuple[int, float]]:
    """Rank and scaling (alpha/r, or alpha/sqrt(r) for rsLoRA) of each module, as peft reads them off the config.

    Raises:
        [`AdapterFormatError`]: they cannot be read, or its patterns may take for ever to match.
    """
    try:
        ranks = pattern_matcher(config.get("rank_pattern") or {}, config["r"], len(modules))
        alphas = pattern_matcher(config.get("alpha_pattern") or {}, config["lora_alpha"], len(modules))
        found = {}
        for module in modules:
            rank, alpha = ranks(module), alphas(module)
            scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
            if type(rank) is not int or not math.isfinite(scaling):
                raise ValueError(f"rank {str(rank)[:40]}, scaling {scaling}")
            found[module] = (rank, scaling)
        return found
    except (KeyError, TypeError, AttributeError, ArithmeticError, ValueError, RecursionError, re.error) as error:
        raise AdapterFormatError(
            "Ranks or alphas cannot be read from the adapter config.",
            path=path,
            expected="positive r and lora_alpha; rank_pattern and alpha_pattern as dicts of simple patterns",
            found=repr(error)[:200],
            remedy="name the modules in these patterns in full, or by their last parts",
        ) from error


def with_simple_patterns(config: Mapping[str, Any], peft_model: PeftModel) -> dict[str, Any]:
    """The config of a model's adapter; patterns that readers would refuse give way to what they came to, by module."""
    try:
        check_patterns(config.get("rank_pattern") or {}, config.get("alpha_pattern") or {})
        return dict(config)
    except ValueError:
        layers = {
            name: module
            for name, module in peft_model.get_base_model().named_modules()
            if isinstance(module, LoraLayer)
        }
        return {
            **config,
            "rank_pattern": _exactly({name: layer.r["default"] for name, layer in layers.items()}, config["r"]),
            "alpha_pattern": _exactly(
                {name: layer.lora_alpha["default"] for name, layer in layers.items()}, config["lora_alpha"]
            ),
        }


def _exactly(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}
