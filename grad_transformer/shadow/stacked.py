"""K LoRA adapters at once on one frozen base model: one forward pass, K times the rows, each with its own A and B.

While a [`StackedAdapters`] is entered, the `forward` of each adapted layer is replaced; nothing else of the base model
is touched, and it is put back on leaving, also on an error.

Shape legend: K adapters, P values of an adapter in layout order, R rank, I and O inputs and outputs of a layer, N rows
of one adapter times their tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..adapters import Root, TensorSpec
from ..errors import RecipeError


# Dropout that attention functions apply without a module of their own.
_DROPOUT_FIELDS = ("attention_dropout", "attn_pdrop", "dropout", "hidden_dropout", "activation_dropout", "layerdrop")
REMEDY = "use --engine trl, which runs one fine-tune after the other"


class StackedAdapters:
    """K copies of a root's adapter on a frozen base model.

    Args:
        model (`PreTrainedModel`): the base model.
        root ([`Root`]): its root.
        num_adapters (`int`): K.

    Attributes:
        values_KP (`torch.Tensor`): all adapters' values in layout order, the only parameter.

    Raises:
        [`RecipeError`]: the adapter or the base model needs what this engine cannot do.
    """

    def __init__(self, model: PreTrainedModel, root: Root, num_adapters: int):
        check_stackable(model, root)
        self.num_adapters = num_adapters
        self._model, self._layout = model, root.layout
        self._layers: dict[str, dict[str, TensorSpec]] = {}
        for spec in root.layout.tensor_specs():
            self._layers.setdefault(spec.module, {})[spec.side] = spec
        weight = model.get_submodule(next(iter(self._layers))).weight
        # As peft does: adapters of a half-precision base are float32.
        dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
        root_P = root.adapter.flat(dtype=dtype).to(weight.device)
        self.values_KP = nn.Parameter(root_P.repeat(num_adapters, 1))
        self._parts: dict[str, torch.Tensor] = {}
        self._forwards: dict[str, Any] = {}

    def __enter__(self) -> StackedAdapters:
        for name, sides in self._layers.items():
            layer = self._model.get_submodule(name)
            self._forwards[name] = layer.__dict__.get("forward")
            layer.forward = self._stacked_forward(layer, sides["A"], sides["B"])
        return self

    def __exit__(self, *_: object) -> None:
        for name, forward in self._forwards.items():
            layer = self._model.get_submodule(name)
            del layer.forward
            if forward is not None:
                layer.forward = forward
        self._forwards.clear()
        self._parts.clear()

    def prepare(self) -> None:
        """Cut the values into A and B; once before each forward pass."""
        specs = list(self._layout.tensor_specs())
        # One split has one cat for its gradient, where slices would each write a gradient of full size.
        parts = self.values_KP.split([spec.numel for spec in specs], dim=1)
        self._parts = {
            spec.key: part.view(self.num_adapters, *spec.shape) for spec, part in zip(specs, parts, strict=True)
        }

    def _stacked_forward(self, layer: nn.Module, spec_a: TensorSpec, spec_b: TensorSpec) -> Any:
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
        scaling = spec_a.scaling

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            if hidden.shape[0] % self.num_adapters:
                raise RecipeError(
                    f"Layer {spec_a.module} sees rows that cannot be told apart by adapter.",
                    expected=f"a multiple of {self.num_adapters} rows",
                    found=tuple(hidden.shape),
                    remedy=REMEDY,
                )
            parts = self._parts
            return _StackedLora.apply(hidden, weight, layer.bias, parts[spec_a.key], parts[spec_b.key], scaling)

        return forward


class _StackedLora(torch.autograd.Function):
    """x W' + bias + scaling · x A' B', with A and B of K adapters; W is frozen and gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_KRI: torch.Tensor,
        b_KOR: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        num_adapters, _, num_inputs = a_KRI.shape
        output = nn.functional.linear(hidden, weight_OI, bias_O)
        hidden_KNI = hidden.reshape(num_adapters, -1, num_inputs).to(a_KRI.dtype)
        low_KNR = torch.bmm(hidden_KNI, a_KRI.transpose(1, 2))
        output_KNO = output.view(num_adapters, -1, b_KOR.shape[1]).to(b_KOR.dtype)
        output_KNO.baddbmm_(low_KNR, b_KOR.transpose(1, 2), alpha=scaling)
        ctx.save_for_backward(hidden_KNI, low_KNR, weight_OI, a_KRI, b_KOR)
        ctx.scaling = scaling
        return output_KNO.to(output.dtype).view(output.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        hidden_KNI, low_KNR, weight_OI, a_KRI, b_KOR = ctx.saved_tensors
        gradient_KNO = gradient.reshape(len(b_KOR), -1, b_KOR.shape[1]).to(b_KOR.dtype)
        low_gradient_KNR = torch.bmm(gradient_KNO, b_KOR).mul_(ctx.scaling)
        a_gradient = torch.bmm(low_gradient_KNR.transpose(1, 2), hidden_KNI)
        b_gradient = torch.bmm(gradient_KNO.transpose(1, 2), low_KNR).mul_(ctx.scaling)
        hidden_gradient = None
        if ctx.needs_input_grad[0]:
            # What comes before the first adapter is frozen, so its input needs no gradient.
            hidden_gradient = gradient @ weight_OI
            view_KNI = hidden_gradient.view(len(a_KRI), -1, a_KRI.shape[2]).to(a_KRI.dtype)
            view_KNI.baddbmm_(low_gradient_KNR, a_KRI)
            hidden_gradient = view_KNI.to(gradient.dtype).view(hidden_gradient.shape)
        return hidden_gradient, None, None, a_gradient, b_gradient, None


def check_stackable(model: PreTrainedModel, root: Root) -> None:
    """Refuse what many adapters at once cannot do as one fine-tune after the other would.

    Raises:
        [`RecipeError`]: LoRA dropout, a base model with dropout or with routed experts, or adapted layers that are not
            plain linear layers.
    """

    def refuse(message: str, expected: object, found: object) -> None:
        raise RecipeError(message, expected=expected, found=found, remedy=REMEDY)

    if root.adapter.config.get("lora_dropout"):
        refuse("LoRA dropout is not in the batched engine.", "lora_dropout=0", root.adapter.config["lora_dropout"])
    config = model.config.get_text_config()
    dropout = [name for name in _DROPOUT_FIELDS if getattr(config, name, None)]
    dropout += [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if dropout:
        refuse("The base model has dropout.", "a base model without dropout", ", ".join(dropout[:3]))
    if hasattr(config, "output_router_logits"):
        refuse("The base model routes tokens to experts.", "a dense base model", config.model_type)
    for spec in root.layout.tensor_specs():
        layer = model.get_submodule(spec.module)
        # Exact types: quantised layers are subclasses of nn.Linear with other weights.
        if type(layer) not in (nn.Linear, Conv1D) or "lora_embedding" in spec.key:
            refuse(f"Layer {spec.module} is not a plain linear layer.", "Linear or Conv1D", type(layer).__name__)
