"""`LoraDeltaTokenizer`: PEFT adapters to block sequences and back.

There is no vocabulary: a block is one layer's LoRA delta (adapter minus root), flattened. Encoding subtracts the root,
cuts the delta into blocks and standardises them; decoding does the inverse, in reverse order.

Shape legend: `_NP` N deltas of P values, `_NLD` N sequences of L blocks of D values.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import BatchFeature

from .adapters import LoraAdapter, LoraLayout, Root
from .adapters.io import load_tensors, save_tensors_atomic
from .constants import FORMAT_VERSION, ROOT_FOLDER, TOKENIZER_NAME, TOKENIZER_STATISTICS_NAME
from .errors import AdapterFormatError, IncompleteArtifactError, LayoutMismatchError, UsageError
from .files import read_record, write_json_atomic
from .hub import Origin, Published, fetch, publish
from .hub.kinds import TOKENIZER_FILES
from .hub.public import public_files
from .schemas import TokenizerRecord


Adapters = str | Path | LoraAdapter | Sequence[str | Path | LoraAdapter]
Role = Literal["source", "target"]
Scale = Literal["none", "global", "block"]

# A delta that is so many times longer than the usual one is refused unread by the mapper.
MAXIMUM_NORM_RATIO = 30.0
# The same of one block, where the usual length of each is known.
MAXIMUM_BLOCK_RATIO = 10.0


class LoraDeltaTokenizer:
    """Turns LoRA adapters of one base model into sequences of standardised blocks, and back.

    Args:
        root ([`Root`]): the adapter that deltas are measured from; it fixes the layout.
        role (`str`, *optional*, defaults to `"source"`): `"source"` for the TinyLM's side of a mapper, `"target"` for
            the LLM's. Names the tensor that `__call__` returns: `source_blocks` or `target_blocks`.
        center (`bool`, *optional*, defaults to `False`): subtract the mean training delta.
        scale (`str`, *optional*, defaults to `"none"`): divide by the root mean square of the (centred) training
            deltas: one number for all (`"global"`), one for each block (`"block"`), or not at all.
        recipe (`dict`, *optional*): how the adapters were fine-tuned (`FineTuningRecipe.to_dict()`); clients use it.

    With `center` or `scale`, [`~LoraDeltaTokenizer.fit`] must be called before encoding.
    """

    def __init__(
        self,
        root: Root,
        *,
        role: Role = "source",
        center: bool = False,
        scale: Scale = "none",
        recipe: dict[str, Any] | None = None,
    ):
        if role not in ("source", "target") or scale not in ("none", "global", "block"):
            raise UsageError(
                "Unknown role or scale.",
                expected="role source or target; scale none, global or block",
                found=f"role={role!r}, scale={scale!r}",
            )
        self.root = root
        self.role = role
        self.center = center
        self.scale = scale
        self.recipe = recipe
        # Mean training delta (P,) and scale of each block (L,): the identity until fitted.
        self.mean_P: torch.Tensor | None = None
        self.scale_L: torch.Tensor | None = None
        # Repository, version and commit that it was loaded from.
        self.origin: Origin | None = None
        self._root_P = root.adapter.flat(dtype=torch.float64)

    @property
    def layout(self) -> LoraLayout:
        return self.root.layout

    @property
    def model_input_names(self) -> list[str]:
        return [f"{self.role}_blocks", "attention_mask"]

    # Standardisation

    def fit(self, deltas: Iterable[torch.Tensor]) -> LoraDeltaTokenizer:
        """Fit mean and scale to the training deltas, in one pass over chunks that need not fit in memory together.

        Args:
            deltas (`Iterable[torch.Tensor]`): chunks of shape `(n, numel)`, raw deltas of training runs only.

        Returns:
            the tokenizer itself.

        Raises:
            [`UsageError`]: no deltas.
            [`LayoutMismatchError`]: deltas of another size.
        """
        count, mean_P, squares_P = 0, torch.zeros(1), torch.zeros(1)
        for chunk_NP in deltas:
            chunk_NP = chunk_NP.double()
            if chunk_NP.dim() != 2 or chunk_NP.shape[1] != self.layout.numel:
                raise LayoutMismatchError(
                    "The deltas do not fit the layout.",
                    expected=f"(n, {self.layout.numel})",
                    found=tuple(chunk_NP.shape),
                )
            if len(chunk_NP) == 0:
                continue
            # Chan, Golub and LeVeque's merge of partial means and sums of squares: stable for any number of chunks.
            chunk_mean_P = chunk_NP.mean(dim=0)
            chunk_squares_P = (chunk_NP - chunk_mean_P).square().sum(dim=0)
            total = count + len(chunk_NP)
            shift_P = chunk_mean_P - mean_P
            squares_P = squares_P + chunk_squares_P + shift_P.square() * (count * len(chunk_NP) / total)
            mean_P = mean_P + shift_P * (len(chunk_NP) / total)
            count = total
        if count == 0:
            raise UsageError("The tokenizer cannot be fitted.", expected="at least one training delta", found="none")
        second_moment_P = squares_P / count if self.center else squares_P / count + mean_P.square()
        by_block = [part.mean() for part in second_moment_P.split(self.layout.widths)]
        if self.scale == "global":
            by_block = [second_moment_P.mean()] * self.layout.num_blocks
        scale_L = torch.stack(by_block).sqrt() if self.scale != "none" else torch.ones(self.layout.num_blocks)
        # A block that never moves keeps its values.
        self.scale_L = torch.where(scale_L > 0, scale_L, torch.ones_like(scale_L)).float()
        self.mean_P = mean_P.float()
        return self

    def standardize(self, deltas_NP: torch.Tensor, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Raw deltas `(..., numel)` to blocks `(..., L, D)`, zero-padded where blocks are narrower than the widest."""
        if not self._is_identity():
            deltas_NP = deltas_NP.to(torch.promote_types(deltas_NP.dtype, torch.float32))
            if self.center and self.mean_P is not None:
                deltas_NP = deltas_NP - self.mean_P
            deltas_NP = deltas_NP / self._scale_P().to(deltas_NP.dtype)
        return self.layout.to_blocks(deltas_NP.to(dtype))

    def unstandardize(self, blocks_NLD: torch.Tensor, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The inverse of [`~LoraDeltaTokenizer.standardize`]: `(..., L, D)` to raw deltas `(..., numel)`."""
        deltas_NP = self.layout.from_blocks(blocks_NLD)
        if not self._is_identity():
            deltas_NP = deltas_NP.double() * self._scale_P()
            if self.center and self.mean_P is not None:
                deltas_NP = deltas_NP + self.mean_P
        return deltas_NP.to(dtype)

    def _is_identity(self) -> bool:
        if not self.center and self.scale == "none":
            return True
        if self.mean_P is None:
            raise UsageError(
                "The tokenizer standardises but was not fitted.",
                expected="statistics of training deltas",
                found="none",
                remedy="call tokenizer.fit(deltas) first",
            )
        return False

    def _scale_P(self) -> torch.Tensor:
        assert self.scale_L is not None
        return self.scale_L.double().repeat_interleave(torch.tensor(self.layout.widths))

    # Adapters <-> deltas <-> blocks

    def delta(self, adapter: str | Path | LoraAdapter, **hub_kwargs: Any) -> torch.Tensor:
        """Adapter minus root, float32, shape `(numel,)`.

        Raises:
            [`AdapterFormatError`], [`LayoutMismatchError`], [`BaseModelMismatchError`], [`RootMismatchError`]: the
                adapter is not one that was fine-tuned from this tokenizer's root.
        """
        return self._delta(adapter, **hub_kwargs).float()

    def _delta(self, adapter: str | Path | LoraAdapter, **hub_kwargs: Any) -> torch.Tensor:
        return self._checked(adapter, **hub_kwargs)[1]

    def read_client(self, adapter: str | Path | LoraAdapter, **hub_kwargs: Any) -> tuple[LoraAdapter, torch.Tensor]:
        """A client's adapter, checked as in [`~LoraDeltaTokenizer.delta`], and its delta, float32 `(numel,)`."""
        checked, delta_P = self._checked(adapter, **hub_kwargs)
        return checked, delta_P.float()

    def _checked(self, adapter: str | Path | LoraAdapter, **hub_kwargs: Any) -> tuple[LoraAdapter, torch.Tensor]:
        path = None if isinstance(adapter, LoraAdapter) else str(adapter)
        if isinstance(adapter, LoraAdapter):
            shapes = {key: tuple(tensor.shape) for key, tensor in adapter.tensors.items()}
            self.layout.check_config(adapter.config, shapes)
        else:
            adapter = LoraAdapter.from_pretrained(adapter, layout=self.layout, **hub_kwargs)
        self.root.check_descends(adapter, path=path)
        delta_P = adapter.flat(dtype=torch.float64) - self._root_P
        self._check_norm(delta_P, path)
        return adapter, delta_P

    def _check_norm(self, delta_P: torch.Tensor, path: str | None) -> None:
        """Refuse a delta or block far longer than any that training showed; NaN and infinity fail every comparison."""
        usual, longest = float(self._root_P.norm()), 0.0
        if self.scale_L is not None and self.scale != "none":
            squares_L = self.scale_L.double().square() * torch.tensor(self.layout.widths)
            if self.center and self.mean_P is not None:
                squares_L += _block_squares(self.mean_P, self.layout)
            usual = float(squares_L.sum()) ** 0.5
            if self.scale == "block":
                longest = float((_block_squares(delta_P, self.layout) / squares_L).max()) ** 0.5
        norm, limit = float(delta_P.norm()), MAXIMUM_NORM_RATIO * usual
        if not (norm <= limit and longest <= MAXIMUM_BLOCK_RATIO):
            raise AdapterFormatError(
                "The adapter is absurdly far from its root.",
                path=path,
                expected=f"a delta of norm up to {limit:.4g}, {MAXIMUM_NORM_RATIO:g} times the usual one, and blocks "
                f"up to {MAXIMUM_BLOCK_RATIO:g} times",
                found=f"norm {norm:.4g}, the longest block {longest:.4g} times its usual norm",
                remedy="the fine-tune diverged, or the adapter was scaled: fine-tune again with the mapper's recipe",
            )

    def encode(
        self, adapter: str | Path | LoraAdapter, *, dtype: torch.dtype = torch.float32, **hub_kwargs: Any
    ) -> torch.Tensor:
        """One adapter to its standardised blocks, shape `(L, D)`; errors as in [`~LoraDeltaTokenizer.delta`].

        float32 holds a delta exactly wherever adapter and root share a sign and a magnitude within a factor of two
        (Sterbenz), or the root is zero: so for all that fine-tuning usually leaves. `dtype=torch.float64` holds it
        exactly for any float32, bfloat16 or float16 adapter whose exponents differ by less than 29 from the root's.
        """
        return self.standardize(self._delta(adapter, **hub_kwargs), dtype=dtype)

    def decode(self, blocks: torch.Tensor | np.ndarray) -> Any:
        """Blocks `(L, D)` to a [`LoraAdapter`] (root plus delta); `(N, L, D)` to a list of them.

        Raises:
            [`LayoutMismatchError`]: the blocks do not fit the layout.
        """
        blocks = torch.as_tensor(blocks).cpu()
        if blocks.dim() == 3:
            return [self.decode(sequence) for sequence in blocks]
        return self.decode_delta(self.unstandardize(blocks.double(), dtype=torch.float64))

    def decode_delta(self, delta_P: torch.Tensor) -> LoraAdapter:
        """A raw delta `(numel,)` to the adapter that has it: root plus delta, in the root's dtype.

        Raises:
            [`LayoutMismatchError`]: a delta of another size.
            [`AdapterFormatError`]: values that are not finite, also where the root's dtype cannot hold them.
        """
        metadata = {"format_version": FORMAT_VERSION, "root": self.root.facts()}
        adapter = self.root.adapter.with_values(self._root_P + delta_P.double(), metadata=metadata)
        broken = [key for key, tensor in adapter.tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise AdapterFormatError(
                "The delta is not finite, so that there is no adapter to write.",
                expected="finite values",
                found=f"NaN or infinite values in {len(broken)} tensors, the first {broken[0]}",
                remedy="the mapper or the adapters that it was given are damaged; in a narrow dtype, use float32",
            )
        return adapter

    def __call__(
        self,
        adapters: Adapters,
        *,
        padding: bool | Literal["longest", "max_length"] = False,
        max_length: int | None = None,
        return_tensors: Literal["pt", "np"] | None = "pt",
        **hub_kwargs: Any,
    ) -> BatchFeature:
        """Encode one or many adapters.

        Args:
            adapters: a PEFT adapter folder, a repository id, a [`LoraAdapter`], or a list of these.
            padding (`bool` or `str`, *optional*, defaults to `False`): `"max_length"` pads with zero blocks to
                `max_length`; all sequences of one tokenizer have equal length, so `True` and `"longest"` add none.
            max_length (`int`, *optional*): number of blocks to pad to.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"`, `"np"`, or `None` for nested lists.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

        Returns:
            `BatchFeature` with `source_blocks` (or `target_blocks`), float32 of shape `(N, L, D)`, and
            `attention_mask`, int64 of shape `(N, L)`, 0 at padding.

        Raises:
            [`UsageError`]: nothing to encode, or a `max_length` shorter than the sequences.
            errors of [`~LoraDeltaTokenizer.delta`]: an adapter is refused.
        """
        many = [adapters] if isinstance(adapters, (str, Path, LoraAdapter)) else list(adapters)
        if not many:
            raise UsageError("There is nothing to encode.", expected="at least one adapter", found="none")
        blocks_NLD = torch.stack([self.encode(adapter, **hub_kwargs) for adapter in many])
        mask_NL = torch.ones(blocks_NLD.shape[:2], dtype=torch.int64)
        if padding == "max_length":
            missing = (max_length or 0) - blocks_NLD.shape[1]
            if missing < 0:
                raise UsageError(
                    "`max_length` is shorter than the sequences, and blocks are never cut off.",
                    expected=f"at least {blocks_NLD.shape[1]}",
                    found=max_length,
                )
            blocks_NLD = torch.nn.functional.pad(blocks_NLD, (0, 0, 0, missing))
            mask_NL = torch.nn.functional.pad(mask_NL, (0, missing))
        features = {f"{self.role}_blocks": blocks_NLD, "attention_mask": mask_NL}
        if return_tensors == "pt":
            return BatchFeature(features)
        arrays = {name: value.numpy() for name, value in features.items()}
        return BatchFeature(arrays if return_tensors == "np" else {name: a.tolist() for name, a in arrays.items()})

    # Files

    def save_pretrained(self, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write root, statistics and config to a folder; the config comes last. Returns the files written.

        Args:
            save_directory (`str` or `Path`)
            push_to_hub (`bool`, *optional*, defaults to `False`): also publish it, as `repo_id` (default: the folder's
                name) and with the other arguments of [`~LoraDeltaTokenizer.push_to_hub`].
        """
        folder = Path(save_directory)
        self.root.save_pretrained(folder / ROOT_FOLDER)
        if self.mean_P is not None and self.scale_L is not None:
            save_tensors_atomic(folder / TOKENIZER_STATISTICS_NAME, {"mean": self.mean_P, "scale": self.scale_L})
        write_json_atomic(folder / TOKENIZER_NAME, self.to_dict())
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return [str(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()]

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, subfolder: str | None = None, **hub_kwargs: Any
    ) -> LoraDeltaTokenizer:
        """Load a tokenizer from a folder or a Hub repository.

        Args:
            name_or_path (`str` or `Path`): folder or repository id, also as `org/name@v1.0`.
            subfolder (`str`, *optional*): `"source"` or `"target"` in a mapper's repository.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            [`IncompleteArtifactError`]: no tokenizer there, or part of it is missing.
            [`FormatVersionError`]: written by a newer version.
            [`HubError`]: no such repository or version, no access, or no answer.
        """
        fetched = fetch(name_or_path, allow_patterns=TOKENIZER_FILES, subfolder=subfolder, **hub_kwargs)
        folder = fetched.folder
        config = read_record(folder / TOKENIZER_NAME, TokenizerRecord)
        root = Root.from_pretrained(folder, subfolder=ROOT_FOLDER)
        if config.get("root_fingerprint", root.fingerprint) != root.fingerprint:
            raise IncompleteArtifactError(
                "The root beside the tokenizer is not the tokenizer's.",
                path=folder / ROOT_FOLDER,
                expected=f"fingerprint {config.get('root_fingerprint')}",
                found=root.fingerprint,
                remedy="save or download the tokenizer again",
            )
        tokenizer = cls(
            root,
            role=config["role"],
            center=config["center"],
            scale=config["scale"],
            recipe=config.get("recipe"),
        )
        tokenizer.origin = tokenizer.root.origin = fetched.origin
        if config["fitted"]:
            path = folder / TOKENIZER_STATISTICS_NAME
            shapes = {"mean": (tokenizer.layout.numel,), "scale": (tokenizer.layout.num_blocks,)}
            statistics = load_tensors(path, shapes)
            tokenizer.mean_P, tokenizer.scale_L = statistics["mean"], statistics["scale"]
            if not bool((tokenizer.scale_L > 0).all()):
                raise IncompleteArtifactError(
                    "The tokenizer's scales are not all above 0.",
                    path=path,
                    remedy="save or download the tokenizer again",
                )
        return tokenizer

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> Published:
        """Publish the tokenizer alone as a version of a repository; a mapper publishes both of its own.

        Args:
            repo_id (`str`): created if needed.
            subfolder (`str`, *optional*): folder in the repository; what lies beside it stays.
            revision (`str`, *optional*): tag of the version. Default: `v1.0`, then `v1.1`, ...
            private, token, commit_message: as in [`push_folder`].

        Raises:
            [`UsageError`]: the tag names another version already; a token or local path would be published.
            [`HubError`]: no permission, or no answer.
        """
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            paths = [path for path in Path(folder).rglob("*") if path.is_file()]
            files = public_files({prefix + path.relative_to(folder).as_posix(): path for path in paths})
            return publish(
                repo_id,
                lambda _: files,
                owned=lambda name: name.startswith(prefix) and name.removeprefix(prefix) in TOKENIZER_FILES,
                revision=revision,
                private=private,
                token=token,
                message=commit_message or "Upload delta tokenizer",
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "role": self.role,
            "center": self.center,
            "scale": self.scale,
            "fitted": self.mean_P is not None,
            "root_fingerprint": self.root.fingerprint,
            "layout": self.layout.to_dict(),
            "recipe": self.recipe,
        }

    def __repr__(self) -> str:
        facts = {
            "role": self.role,
            "base_model": self.root.base_model,
            "blocks": self.layout.num_blocks,
            "widths": sorted(set(self.layout.widths)),
            "center": self.center,
            "scale": self.scale,
            "fitted": self.mean_P is not None,
        }
        return f"{type(self).__name__} {json.dumps(facts)}"


def _block_squares(delta_P: torch.Tensor, layout: LoraLayout) -> torch.Tensor:
    return torch.stack([part_W.double().square().sum() for part_W in delta_P.split(layout.widths)])
