"""The encoder-decoder that a mapper is built on."""

from __future__ import annotations

from transformers import PreTrainedConfig, T5Config

from ..errors import UsageError
from .arguments import MapperArguments


def backbone_or_config(arguments: MapperArguments) -> str | PreTrainedConfig:
    """The name of the pretrained backbone, or the config of a random one.

    Raises:
        [`UsageError`]: the heads do not divide the hidden size.
    """
    if arguments.backbone is not None:
        return arguments.backbone
    if arguments.d_model % arguments.num_heads:
        raise UsageError(
            "The attention heads do not divide the hidden size.",
            expected="d_model a multiple of num_heads",
            found=f"d_model={arguments.d_model}, num_heads={arguments.num_heads}",
            remedy="choose another --num_heads or --d_model",
        )
    return T5Config(
        vocab_size=1,
        d_model=arguments.d_model,
        d_kv=arguments.d_model // arguments.num_heads,
        d_ff=arguments.d_ff,
        num_layers=arguments.num_layers,
        num_heads=arguments.num_heads,
        dropout_rate=arguments.dropout_rate,
        feed_forward_proj="gated-gelu",
        pad_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
