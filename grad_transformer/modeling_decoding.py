"""What makes generating blocks quick: a linear layer whose weights every core reads, and a cache with room to grow."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


# Measured with MKL on two cores: up to as many rows the weights times the rows are quickest, then the rows times the
# weights, except with far more outputs than inputs; from many rows on BLAS's own way of sharing the work will do.
_VERY_FEW_ROWS, _FEW_ROWS = 2, 256
_FAR_MORE = 4


class FewRowsLinear(nn.Linear):
    """`nn.Linear`, faster on several cores when generation maps the blocks of one or a few clients.

    Then the time goes into reading the weights. With one row BLAS reads them with one core, since its unit of work is
    a tile of the output, and with a few dozen it shares them badly. Here each core multiplies its own rows of the
    weights. Only in float32 on the CPU without gradients; in every other case, and in its parameters, it is
    `nn.Linear`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        cores, rows = torch.get_num_threads(), input.numel() // self.in_features
        if (
            not 0 < rows <= _FEW_ROWS
            or cores == 1
            or self.out_features % cores
            or self.weight.device.type != "cpu"
            or self.weight.dtype != torch.float32
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        weight = self.weight.view(cores, -1, self.in_features)
        flat = input.reshape(rows, self.in_features)
        if rows <= _VERY_FEW_ROWS or self.out_features >= _FAR_MORE * self.in_features:
            output = torch.bmm(weight, flat.t().expand(cores, -1, -1)).view(self.out_features, rows).t()
        else:
            output = torch.bmm(flat.expand(cores, -1, -1), weight.transpose(1, 2)).transpose(0, 1)
        output = output.reshape(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias


def read_weights_with_every_core(backbone: nn.Module) -> None:
    """Make every plain linear layer of a backbone a [`FewRowsLinear`]; names and values of parameters stay."""
    for module in backbone.modules():
        if type(module) is nn.Linear:
            module.__class__ = FewRowsLinear


class RoomyLayer(DynamicLayer):
    """transformers' growing cache layer, which does not copy all it holds at each step."""

    _ROOM = 32

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [states[..., :0, :] for states in (key_states, value_states)]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            before = self._buffers
            room = max(self._ROOM, 2 * end)
            self._buffers = [
                states.new_empty(*states.shape[:-2], room, states.shape[-1]) for states in (key_states, value_states)
            ]
            for buffer, old in zip(self._buffers, before, strict=True):
                buffer[..., :start, :] = old[..., :start, :]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values


def roomy_cache(decoder_config: PreTrainedConfig) -> EncoderDecoderCache:
    """The cache that transformers would make for an encoder-decoder, with [`RoomyLayer`] where it is plain."""
    own = DynamicCache(config=decoder_config)
    own.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in own.layers]
    if own.layer_class_to_replicate is DynamicLayer:
        own.layer_class_to_replicate = RoomyLayer
    return EncoderDecoderCache(own, DynamicCache(config=decoder_config))
