"""Configuration of the mapper."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .constants import FORMAT_VERSION


# No `from __future__ import annotations` here: `strict` checks the types that it finds, and strings are none.
@strict
class GradTransformerConfig(PreTrainedConfig):
    r"""
    Configuration of a [`GradTransformer`]. The defaults give a small T5 backbone and one block of width 8 on each
    side, enough to build a model without arguments; real ones come from [`GradTransformer.from_backbone`].

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*):
            Config of any encoder-decoder that `AutoModel` knows and that accepts `inputs_embeds` on both sides.
        source_block_types, target_block_types (`list[int]`, *optional*, defaults to `[0]`):
            For each block of the TinyLM's (LLM's) delta the number of its type. Each type has its own projections.
        source_type_widths, target_type_widths (`list[int]`, *optional*, defaults to `[8]`):
            Block width of each type.
        decoding (`str`, *optional*, defaults to `"autoregressive"`):
            `"autoregressive"` predicts each block from the predictions before it (paper, equations 7 to 11);
            `"parallel"` predicts all blocks in one pass from learned queries.
        position_embeddings (`bool`, *optional*, defaults to `True`):
            Add a learned embedding of the block's index to encoder and decoder inputs. `False` is the paper's model,
            which knows positions only as far as its backbone does.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of projections, start block and position embeddings at initialisation.
        source_base_model, target_base_model (`str`, *optional*), source_base_revision, target_base_revision (`str`,
            *optional*): the pair of base models that the mapper connects.
        delta_dataset (`dict`, *optional*): `fingerprint` and `plan_fingerprint` of the delta dataset that it was
            trained on, and repository, revision and commit where that came from the Hub.
        training_fingerprint (`str`, *optional*): SHA-256 of delta dataset and training arguments.
        format_version (`int`, *optional*): version of the repository's format.
    """

    model_type = "grad_transformer"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="t5",
            init_kwargs={
                "d_model": 64,
                "d_kv": 16,
                "d_ff": 128,
                "num_layers": 2,
                "num_heads": 4,
                "dropout_rate": 0.0,
                "feed_forward_proj": "gated-gelu",
                "vocab_size": 1,
                "pad_token_id": None,
                "eos_token_id": None,
                "tie_word_embeddings": False,
            },
        )
    }

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    source_block_types: list[int] | tuple[int, ...] = (0,)
    source_type_widths: list[int] | tuple[int, ...] = (8,)
    target_block_types: list[int] | tuple[int, ...] = (0,)
    target_type_widths: list[int] | tuple[int, ...] = (8,)
    decoding: Literal["autoregressive", "parallel"] = "autoregressive"
    position_embeddings: bool = True
    initializer_range: float = 0.02
    source_base_model: str | None = None
    source_base_revision: str | None = None
    target_base_model: str | None = None
    target_base_revision: str | None = None
    delta_dataset: dict[str, Any] | None = None
    training_fingerprint: str | None = None
    format_version: int = FORMAT_VERSION
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = False

    def validate_block_types(self) -> None:
        """Every block has a type, and every type a width."""
        for side in ("source", "target"):
            types, widths = getattr(self, f"{side}_block_types"), getattr(self, f"{side}_type_widths")
            if not types or set(types) != set(range(len(widths))) or min(widths) < 1:
                raise ValueError(
                    f"{side}_block_types must use each number from 0 to {len(widths) - 1} (one for each of "
                    f"{side}_type_widths, all positive), found {list(types)} and {list(widths)}"
                )

    def validate_backbone(self) -> None:
        """The backbone is an encoder-decoder."""
        if isinstance(self.backbone_config, PreTrainedConfig) and not self.backbone_config.is_encoder_decoder:
            raise ValueError(f"backbone_config must be an encoder-decoder, found {self.backbone_config.model_type!r}")
