"""What stands between blocks and a backbone's hidden states: phi, psi, and the token embedding that is not needed.

Shape legend: B batch, n blocks, D width of the widest block (narrower ones are padded with zeros), H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .modeling_decoding import FewRowsLinear


class BlockEmbedding(nn.Module):
    """phi: blocks `(B, n, D)` to hidden states `(B, n, H)`, one linear layer for each block type (equations 6, 7)."""

    def __init__(self, block_types: Sequence[int], type_widths: Sequence[int], hidden_size: int):
        super().__init__()
        self.block_types = list(block_types)
        self.type_widths = list(type_widths)
        self.hidden_size = hidden_size
        self.projections = nn.ModuleList([FewRowsLinear(width, hidden_size) for width in type_widths])

    def forward(self, blocks_BnD: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Embed the blocks at positions `start`, `start + 1`, ... of the sequence."""
        blocks_BnD = blocks_BnD.to(next(self.parameters()).dtype)
        if len(self.projections) == 1:
            return self.projections[0](blocks_BnD[..., : self.type_widths[0]])
        types = self.block_types[start : start + blocks_BnD.shape[1]]
        hidden_BnH = blocks_BnD.new_zeros(*blocks_BnD.shape[:2], self.hidden_size, dtype=_linear_dtype(blocks_BnD))
        for number in sorted(set(types)):
            where = [index for index, block_type in enumerate(types) if block_type == number]
            hidden_BnH[:, where] = self.projections[number](blocks_BnD[:, where, : self.type_widths[number]])
        return hidden_BnH


class BlockReadout(nn.Module):
    """psi: hidden states `(B, n, H)` to blocks `(B, n, D)`, one linear layer for each block type (equation 9)."""

    def __init__(self, block_types: Sequence[int], type_widths: Sequence[int], hidden_size: int):
        super().__init__()
        self.block_types = list(block_types)
        self.type_widths = list(type_widths)
        self.projections = nn.ModuleList([FewRowsLinear(hidden_size, width) for width in type_widths])

    def forward(self, hidden_BnH: torch.Tensor, start: int = 0) -> torch.Tensor:
        if len(self.projections) == 1:
            return self.projections[0](hidden_BnH)
        types = self.block_types[start : start + hidden_BnH.shape[1]]
        shape = (*hidden_BnH.shape[:2], max(self.type_widths))
        blocks_BnD = hidden_BnH.new_zeros(shape, dtype=_linear_dtype(hidden_BnH))
        for number in sorted(set(types)):
            where = [index for index, block_type in enumerate(types) if block_type == number]
            blocks_BnD[:, where, : self.type_widths[number]] = self.projections[number](hidden_BnH[:, where])
        return blocks_BnD


def _linear_dtype(input: torch.Tensor) -> torch.dtype:
    """What a linear layer gives for an input: under autocast not the input's own dtype."""
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype


class NoTokenEmbedding(nn.Module):
    """Stands where a backbone expects its token embedding; holds no parameters, since blocks have no vocabulary."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(0, hidden_size), persistent=False)


def hidden_size_of(config: PreTrainedConfig) -> int:
    """Hidden size of the decoder, also where encoder and decoder have configs of their own (T5Gemma)."""
    return int(config.get_text_config(decoder=True).hidden_size)


def drop_token_embeddings(backbone: PreTrainedModel) -> None:
    """Replace every token embedding by an empty module: blocks come in through `inputs_embeds` on both sides."""
    hidden_size = hidden_size_of(backbone.config)
    embeddings = {id(backbone.get_input_embeddings())}
    for stack in (backbone.get_encoder(), backbone.get_decoder()):
        embeddings.add(id(stack.get_input_embeddings()))
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in embeddings and isinstance(child, nn.Embedding):
                setattr(parent, name, NoTokenEmbedding(hidden_size))
    # Nothing is left to tie.
    for module in backbone.modules():
        if isinstance(module, PreTrainedModel):
            module._tied_weights_keys = None
            module.all_tied_weights_keys = {}
