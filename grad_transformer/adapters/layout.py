"""`LoraLayout`: which tensors of a LoRA adapter form which block, and in what order.

Both directions, `flatten` (named tensors to one vector) and `unflatten` (vector to named tensors), are built from the
same list of `TensorSpec`. What a key says is in `keys.py`.

Shape legend: `_P` all values of an adapter (`numel`), `_LD` L blocks of at most D values, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..errors import AdapterFormatError, LayoutMismatchError
from .keys import parse_key
from .lora_config import LORA_FIELDS, check_representable, ranks_and_scalings


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an adapter.

    Args:
        key (`str`): its key in `adapter_model.safetensors`.
        shape (`tuple[int, ...]`): A is (R, in, ...), B is (out, R, ...).
        scaling (`float`): what B·A of its module is multiplied by: alpha/R, or alpha/sqrt(R) for rsLoRA.
    """

    key: str
    shape: tuple[int, ...]
    scaling: float

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """Path of the adapted module inside the base model."""
        return parse_key(self.key)[0]

    @property
    def side(self) -> str:
        """`"A"` or `"B"`."""
        return parse_key(self.key)[1]


@dataclass(frozen=True)
class BlockSpec:
    """The tensors of one layer (or of one module that belongs to no layer), in order.

    Args:
        name (`str`): path of the layer, for instance `model.layers.3`, or of the module, for instance `lm_head`.
        tensors (`tuple[TensorSpec, ...]`): ordered by module path, A before B.
    """

    name: str
    tensors: tuple[TensorSpec, ...]

    @cached_property
    def width(self) -> int:
        """Number of values in the block."""
        return sum(spec.numel for spec in self.tensors)

    @cached_property
    def signature(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Module paths below the layer, and shapes: blocks with equal signatures are of one type."""
        return tuple((spec.key.replace(f".{self.name}.", ".", 1), spec.shape) for spec in self.tensors)


@dataclass(frozen=True)
class LoraLayout:
    """The ordered blocks of every adapter of one base model under one LoRA config.

    Args:
        blocks (`tuple[BlockSpec, ...]`): embedding blocks first, then layers by number, then other modules.
        lora (`dict`): the fields of the LoRA config that decide ranks and scalings.
    """

    blocks: tuple[BlockSpec, ...]
    lora: dict[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_adapter_config(
        cls, config: Mapping[str, Any], header: Mapping[str, Sequence[int]], *, path: str | None = None
    ) -> LoraLayout:
        """Read the layout off an adapter's config and the shapes in its safetensors header; no tensor is needed.

        Args:
            config (`Mapping`): content of `adapter_config.json`.
            header (`Mapping[str, Sequence[int]]`): shape of each stored tensor by key.
            path (`str`, *optional*): named in errors.

        Raises:
            [`AdapterFormatError`]: the config asks for what A and B alone do not hold (DoRA, saved modules, biases,
                ...), a key is not a LoRA key, a module lacks A or B, or a shape contradicts the rank.
        """
        check_representable(config, path=path)
        sides: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
        for key, shape in header.items():
            module, side = parse_key(key, path=path)
            sides.setdefault(module, {})[side] = (key, tuple(int(size) for size in shape))
        if not sides:
            raise AdapterFormatError(
                "The adapter holds no tensors.",
                path=path,
                expected="lora_A and lora_B of at least one module",
                found="0 tensors",
                remedy="save it again; a wrapped model (`_module.` in its names) can make peft write an empty file",
            )

        modules = sorted(sides)
        by_block: dict[str, list[TensorSpec]] = {}
        for module, (rank, scaling) in ranks_and_scalings(config, modules, path=path).items():
            by_block.setdefault(_block_name(module), []).extend(
                _module_specs(module, sides[module], rank, scaling, path)
            )
        names = sorted(by_block, key=lambda name: _block_order(name, by_block[name]))
        return cls(
            blocks=tuple(BlockSpec(name, tuple(by_block[name])) for name in names),
            lora={name: config.get(name) for name in LORA_FIELDS},
        )

    def check_config(
        self, config: Mapping[str, Any], header: Mapping[str, Sequence[int]], *, path: str | None = None
    ) -> None:
        """Refuse an adapter of another layout, evaluating nothing that its config says (safe for strangers' files).

        Raises:
            [`AdapterFormatError`]: what the adapter holds cannot be represented.
            [`LayoutMismatchError`]: ranks, alphas, keys or shapes differ from this layout's.
        """
        check_representable(config, path=path)
        for name in LORA_FIELDS:
            ours, theirs = self.lora.get(name), config.get(name)
            if (ours or None) != (theirs or None):
                raise LayoutMismatchError(
                    f"The adapter's `{name}` differs from the root's.",
                    path=path,
                    expected=ours,
                    found=theirs,
                    remedy="fine-tune from the root adapter itself, with its config unchanged",
                )
        expected = {spec.key: spec.shape for spec in self.tensor_specs()}
        missing, extra = sorted(expected.keys() - header.keys()), sorted(header.keys() - expected.keys())
        for key in extra:
            parse_key(key, path=path)  # what is no LoRA tensor at all has a remedy of its own
        if missing or extra:
            raise LayoutMismatchError(
                "The adapter's tensors are not those of the root.",
                path=path,
                expected=f"{len(expected)} tensors" + (f", among them {missing[0]}" if missing else ""),
                found=f"{len(header)} tensors" + (f", among them {extra[0]}" if extra else ""),
                remedy="fine-tune from the root adapter itself, on the same base model and target modules",
            )
        for key, shape in expected.items():
            if tuple(header[key]) != shape:
                raise LayoutMismatchError(
                    f"Tensor {key} has another shape than in the root.",
                    path=path,
                    expected=shape,
                    found=tuple(header[key]),
                    remedy="fine-tune on the base model that the root was made for",
                )

    # Facts

    @cached_property
    def numel(self) -> int:
        """Number of values of an adapter."""
        return sum(self.widths)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Number of values of each block."""
        return tuple(block.width for block in self.blocks)

    @cached_property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @cached_property
    def block_types(self) -> tuple[int, ...]:
        """For each block the number of its type; types are numbered in order of first appearance."""
        numbers: dict[tuple[tuple[str, tuple[int, ...]], ...], int] = {}
        return tuple(numbers.setdefault(block.signature, len(numbers)) for block in self.blocks)

    @cached_property
    def type_widths(self) -> tuple[int, ...]:
        """Block width of each type."""
        return tuple(self.widths[self.block_types.index(number)] for number in range(max(self.block_types) + 1))

    def tensor_specs(self) -> Iterator[TensorSpec]:
        """All tensors, in the order of their values in a flattened adapter."""
        return (spec for block in self.blocks for spec in block.tensors)

    # Named tensors <-> one vector <-> blocks

    def flatten(self, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Concatenate named tensors, each `(..., *shape)`, to `(..., numel)`.

        Raises:
            [`LayoutMismatchError`]: a tensor is missing, unknown, or has another shape.
        """
        specs = list(self.tensor_specs())
        unknown = tensors.keys() - {spec.key for spec in specs}
        if unknown:
            raise LayoutMismatchError("A tensor is not part of the layout.", found=sorted(unknown)[0])
        parts = []
        for spec in specs:
            tensor = tensors.get(spec.key)
            if tensor is None or tuple(tensor.shape[tensor.dim() - len(spec.shape) :]) != spec.shape:
                raise LayoutMismatchError(
                    f"Tensor {spec.key} is missing or has another shape.",
                    expected=spec.shape,
                    found=None if tensor is None else tuple(tensor.shape),
                )
            leading = tensor.shape[: tensor.dim() - len(spec.shape)]
            parts.append(tensor.to(dtype).reshape(*leading, spec.numel))
        return torch.cat(parts, dim=-1)

    def unflatten(self, values_P: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inverse of [`~LoraLayout.flatten`]: `(..., numel)` to named tensors `(..., *shape)`.

        Raises:
            [`LayoutMismatchError`]: the last dimension is not `numel`.
        """
        self._check_numel(values_P)
        tensors, start = {}, 0
        for spec in self.tensor_specs():
            part = values_P[..., start : start + spec.numel]
            tensors[spec.key] = part.reshape(*values_P.shape[:-1], *spec.shape).contiguous()
            start += spec.numel
        return tensors

    def to_blocks(self, values_P: torch.Tensor) -> torch.Tensor:
        """`(..., numel)` to `(..., L, D)` with D the widest block; narrower blocks are padded with zeros."""
        self._check_numel(values_P)
        width = max(self.widths)
        if self.numel == width * self.num_blocks:
            return values_P.reshape(*values_P.shape[:-1], self.num_blocks, width)
        blocks_LD = values_P.new_zeros(*values_P.shape[:-1], self.num_blocks, width)
        for index, part in enumerate(values_P.split(self.widths, dim=-1)):
            blocks_LD[..., index, : part.shape[-1]] = part
        return blocks_LD

    def from_blocks(self, blocks_LD: torch.Tensor) -> torch.Tensor:
        """The inverse of [`~LoraLayout.to_blocks`]; padding is dropped.

        Raises:
            [`LayoutMismatchError`]: number or width of the blocks differ from the layout's.
        """
        expected = (self.num_blocks, max(self.widths))
        if tuple(blocks_LD.shape[-2:]) != expected:
            raise LayoutMismatchError(
                "The block sequence does not fit the layout.", expected=expected, found=tuple(blocks_LD.shape[-2:])
            )
        return torch.cat([blocks_LD[..., index, :width] for index, width in enumerate(self.widths)], dim=-1)

    def _check_numel(self, values_P: torch.Tensor) -> None:
        if values_P.shape[-1] != self.numel:
            raise LayoutMismatchError(
                "The vector does not fit the layout.", expected=self.numel, found=values_P.shape[-1]
            )

    # JSON

    def to_dict(self) -> dict[str, Any]:
        return {
            "lora": self.lora,
            "blocks": [
                {
                    "name": block.name,
                    "tensors": [
                        {"key": spec.key, "shape": list(spec.shape), "scaling": spec.scaling} for spec in block.tensors
                    ],
                }
                for block in self.blocks
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoraLayout:
        """Raises [`LayoutMismatchError`] if `data` was not written by [`~LoraLayout.to_dict`]."""
        try:
            blocks = tuple(
                BlockSpec(
                    block["name"],
                    tuple(
                        TensorSpec(spec["key"], tuple(int(size) for size in spec["shape"]), float(spec["scaling"]))
                        for spec in block["tensors"]
                    ),
                )
                for block in data["blocks"]
            )
            lora = dict(data["lora"])
        except (KeyError, TypeError, ValueError) as error:
            raise LayoutMismatchError("Not a layout.", expected="keys `lora` and `blocks`", found=error) from error
        for block in blocks:
            for spec in block.tensors:
                parse_key(spec.key)
        if not blocks:
            raise LayoutMismatchError("Not a layout.", expected="at least one block", found="none")
        return cls(blocks, lora)


def _block_name(module: str) -> str:
    """Path up to the first number: the layer, also where experts or sub-layers are numbered below it."""
    parts = module.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal() and part.isascii() and len(part) <= 9:
            return ".".join(parts[: index + 1])
    return module


def _block_order(name: str, specs: list[TensorSpec]) -> tuple[int, str, int]:
    stack, _, number = name.rpartition(".")
    if number.isdecimal() and number.isascii() and len(number) <= 9:
        return (1, stack, int(number))
    return (0 if ".lora_embedding_" in specs[0].key else 2, name, 0)


def _module_specs(
    module: str,
    sides: dict[str, tuple[str, tuple[int, ...]]],
    rank: int,
    scaling: float,
    path: str | None,
) -> list[TensorSpec]:
    if sides.keys() != {"A", "B"}:
        raise AdapterFormatError(
            f"Module {module} has only one of its two LoRA tensors.",
            path=path,
            expected="A and B",
            found=sorted(sides),
        )
    (key_a, shape_a), (key_b, shape_b) = sides["A"], sides["B"]
    if len(shape_a) < 2 or len(shape_b) < 2 or shape_a[0] != rank or shape_b[1] != rank or 0 in shape_a + shape_b:
        raise AdapterFormatError(
            f"The shapes of module {module} contradict its rank.",
            path=path,
            expected=f"A ({rank}, in), B (out, {rank})",
            found=f"A {shape_a}, B {shape_b}",
            remedy="check r and rank_pattern in adapter_config.json",
        )
    return [TensorSpec(key_a, shape_a, scaling), TensorSpec(key_b, shape_b, scaling)]
