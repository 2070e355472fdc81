"""Roots: the initial adapter that every run of a pair and every client starts from, kept as an artifact.

A delta is adapter minus root. Two runs from different random A matrices have unrelated deltas even where the models
are equally accurate, so the root is shipped and checked, never drawn again from a seed.
"""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel
from transformers.utils import logging

from ..constants import FORMAT_VERSION, ROOT_FOLDER, ROOT_NAME
from ..errors import BaseModelMismatchError, IncompleteArtifactError, RootMismatchError, UsageError
from ..files import read_record, write_json_atomic
from ..hub import Origin, fetch
from ..hub.kinds import ROOT_FILES
from ..schemas import RootRecord
from ..wording import first_line
from .adapter import LoraAdapter
from .base_files import locate
from .bases import load_causal_lm
from .fingerprints import comparable, fingerprint_base_model, has_fingerprint
from .layout import LoraLayout
from .lora_config import check_representable, with_simple_patterns


logger = logging.get_logger(__name__)


# Cosine between the A matrices of an adapter and of the root. Runs from another draw of A lie near 0.
MINIMUM_ROOT_COSINE = 0.5


@dataclass
class Root:
    """The initial adapter of one base model.

    Args:
        adapter ([`LoraAdapter`]): config and initial values, float32.
        fingerprint (`str`): SHA-256 over keys, shapes and values; what "the same root" means.
        base_model (`str`): the base model's repository on the Hub, or its folder.
        base_revision (`str`, *optional*): its commit on the Hub.
        base_fingerprint (`str`): see [`fingerprint_base_model`].
        seed (`int`): the seed that A was drawn with; for the record only.
        origin ([`Origin`], *optional*): repository, version and commit that it was loaded from.
    """

    adapter: LoraAdapter
    fingerprint: str
    base_model: str
    base_revision: str | None
    base_fingerprint: str
    seed: int
    origin: Origin | None = field(default=None, compare=False)

    @property
    def layout(self) -> LoraLayout:
        return self.adapter.layout

    def facts(self) -> dict[str, Any]:
        """What other artifacts record of the root they were made from."""
        return {
            "fingerprint": self.fingerprint,
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "base_fingerprint": self.base_fingerprint,
        }

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Write the root as a PEFT adapter folder with `root.json` beside it, written last."""
        folder = self.adapter.save_pretrained(save_directory)
        manifest = {
            "format_version": FORMAT_VERSION,
            **self.facts(),
            "seed": self.seed,
            "peft_version": peft.__version__,
        }
        write_json_atomic(folder / ROOT_NAME, manifest)
        return folder

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, subfolder: str | None = None, **hub_kwargs: Any) -> Root:
        """Read a root and verify its fingerprint.

        Raises:
            [`IncompleteArtifactError`]: no `root.json`, or its values changed since it was written.
            [`AdapterFormatError`]: the adapter beside it cannot be read.
            [`FormatVersionError`]: written by a newer version.
        """
        fetched = fetch(name_or_path, allow_patterns=ROOT_FILES, subfolder=subfolder, **hub_kwargs)
        folder = fetched.folder
        manifest = read_record(folder / ROOT_NAME, RootRecord)
        adapter = LoraAdapter.from_pretrained(folder)
        fingerprint = fingerprint_adapter(adapter)
        if fingerprint != manifest["fingerprint"]:
            raise IncompleteArtifactError(
                "The root's tensors are not those that it was written with.",
                path=folder,
                expected=f"fingerprint {manifest['fingerprint']}",
                found=fingerprint,
                remedy="download or copy the root again; a root is never edited",
            )
        return cls(
            adapter=adapter,
            fingerprint=fingerprint,
            base_model=manifest["base_model"],
            base_revision=manifest.get("base_revision"),
            base_fingerprint=manifest["base_fingerprint"],
            seed=manifest.get("seed", 0),
            origin=fetched.origin,
        )

    def check_base(self, model: PreTrainedModel, *, path: str | None = None) -> None:
        """Refuse a loaded base model that is not the one the root was made for.

        Raises:
            [`BaseModelMismatchError`]
        """
        if not has_fingerprint(model, self.base_fingerprint):
            raise BaseModelMismatchError(
                "The base model is not the one that the root was made for.",
                path=path or model.config.name_or_path,
                expected=f"{self.base_model} (revision {self.base_revision}), fingerprint {self.base_fingerprint}",
                found=f"{model.config.name_or_path}, fingerprint {fingerprint_base_model(model)}",
                remedy="load the same base model at the same revision, unquantised",
            )

    def check_descends(self, adapter: LoraAdapter, *, path: str | None = None) -> None:
        """Refuse an adapter that was not fine-tuned from this root, or that never left it.

        What counts is what the adapter declares and holds, not the path by which its base model was loaded: declared
        fingerprints must match, and the A matrices must still point where the root's do: an adapter from another draw
        of A has a cosine near 0 with the root.

        Raises:
            [`BaseModelMismatchError`]: it declares another base model's fingerprint.
            [`RootMismatchError`]: says how far the adapter is from the root.
        """
        declared = adapter.metadata.get("root")
        facts = declared if isinstance(declared, dict) else {}
        fingerprint, base = facts.get("fingerprint"), str(facts.get("base_fingerprint"))
        if comparable(base, self.base_fingerprint) and base != self.base_fingerprint:
            raise BaseModelMismatchError(
                "The adapter belongs to another base model.",
                path=path,
                expected=f"{self.base_model}, fingerprint {self.base_fingerprint[:15]}",
                found=f"{str(adapter.base_model)[:300]}, fingerprint {base[:15]}",
                remedy="fine-tune the base model that the root was made for",
            )
        cosine, distance = root_distance(adapter, self.adapter)
        if (fingerprint is not None and fingerprint != self.fingerprint) or not cosine >= MINIMUM_ROOT_COSINE:
            raise RootMismatchError(
                "The adapter was not fine-tuned from this root.",
                path=path,
                expected=f"root {self.fingerprint[:12]}, A matrices at cosine {MINIMUM_ROOT_COSINE} or more",
                found=f"root {str(fingerprint or 'undeclared')[:12]}, A matrices at cosine {cosine:.3f}, "
                f"{distance:.2f} times the root's norm away",
                remedy="start the fine-tune from the mapper's source root (`grad-transformer client` does)",
            )
        self._check_moved(adapter, path)
        named = adapter.base_model
        if fingerprint is None and named and model_name(named) != model_name(self.base_model):
            logger.warning_once(
                f"The adapter {path or ''} names {named[:300]!r} as its base model, and the root was made for "
                f"{self.base_model!r}. It started from the root; whether these are one model cannot be seen."
            )

    def _check_moved(self, adapter: LoraAdapter, path: str | None) -> None:
        """The halves that LoRA starts at zero move first: while they are, the adapter does nothing."""
        starts = self.adapter.tensors
        halves = [key for key, tensor in starts.items() if not tensor.any()] or list(starts)
        if all(torch.equal(adapter.tensors[key].to(starts[key]), starts[key]) for key in halves):
            raise RootMismatchError(
                "The adapter was never trained: it still has the root's values.",
                path=path,
                expected="a delta that is not zero",
                found="0",
                remedy="send the adapter that the fine-tune wrote, and check that its loss fell",
            )


def create_root(
    base: str | Path | PreTrainedModel,
    lora_config: LoraConfig,
    *,
    output_dir: str | Path,
    seed: int = 0,
    revision: str | None = None,
) -> Root:
    """Draw the initial adapter of a base model and write it as an artifact.

    Args:
        base (`str`, `Path` or `PreTrainedModel`): name or path of a causal language model, or the loaded model.
        lora_config (`peft.LoraConfig`): plain LoRA; rank, alpha, target modules and patterns as you like.
        output_dir (`str` or `Path`): folder to write.
        seed (`int`, *optional*, defaults to 0): seed of the draw.
        revision (`str`, *optional*): revision of the base model.

    Returns:
        [`Root`]

    Raises:
        [`AdapterFormatError`]: the LoRA config cannot be represented as blocks.
        [`UsageError`]: no such model, or target modules that it does not have.
        [`HubError`]: no such repository or version, no access, or no answer.
    """
    check_representable(lora_config.to_dict())
    if isinstance(base, PreTrainedModel):
        model, name = base, str(base.config.name_or_path)
        name = os.path.abspath(name) if os.path.isdir(name) else name
    else:
        files = locate(base, revision=revision)
        model, name, revision = load_causal_lm(files, device="cpu"), files.name, files.revision
    base_fingerprint = fingerprint_base_model(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_model = draw_adapter(model, lora_config, name=name)
    # Without embedding layers: peft would add a targeted layer's own base weights.
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    # Cloned: once unloaded, nothing must tie the root to the model's own memory.
    tensors = {key: value.detach().float().cpu().clone() for key, value in state.items()}
    config = adapter_config(peft_model, name, revision)
    peft_model.unload()
    layout = LoraLayout.from_adapter_config(config, {key: tuple(value.shape) for key, value in tensors.items()})
    adapter = LoraAdapter(config, tensors, layout)
    root = Root(adapter, fingerprint_adapter(adapter), name, revision, base_fingerprint, seed)
    root.save_pretrained(output_dir)
    return root


def draw_adapter(model: PreTrainedModel, lora_config: LoraConfig, *, name: str) -> PeftModel:
    """Put a newly drawn adapter on a model, as peft draws it; the config stays as it is.

    Raises:
        [`UsageError`]: the config does not fit the model.
    """
    try:
        # A copy: peft writes the base model's name into the config that it is given.
        return get_peft_model(model, copy.deepcopy(lora_config))
    except (ValueError, TypeError, re.error) as cause:
        raise UsageError(
            "The LoRA config does not fit the base model.",
            path=name,
            expected="target modules that the model has",
            found=first_line(cause),
            remedy="see the names in model.named_modules()",
        ) from cause


def adapter_config(peft_model: PeftModel, base_model: str, revision: str | None) -> dict[str, Any]:
    """The content of `adapter_config.json` for a model's adapter, with patterns that every reader takes."""
    data = with_simple_patterns(peft_model.peft_config["default"].to_dict(), peft_model)
    data.update(base_model_name_or_path=base_model, revision=revision, inference_mode=True)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in data.items()}


def pull_root(
    repo_id: str | Path,
    *,
    role: Literal["source", "target"] = "source",
    output_dir: str | Path | None = None,
    **hub_kwargs: Any,
) -> Root:
    """The root that a mapper's clients start from, alone: neither the mapper's weights nor its data are downloaded.

    Args:
        repo_id (`str` or `Path`): the mapper's repository, also as `org/name@v1.0`, or its folder.
        role (`str`, *optional*, defaults to `"source"`): `"target"` for the LLM's root.
        output_dir (`str` or `Path`, *optional*): also write it there.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        [`HubError`]: no such repository or version, no access, or no answer.
        [`IncompleteArtifactError`]: it holds no root, or one that was changed.
    """
    root = Root.from_pretrained(repo_id, subfolder=f"{role}/{ROOT_FOLDER}", **hub_kwargs)
    if output_dir is not None:
        root.save_pretrained(output_dir)
    return root


def fingerprint_adapter(adapter: LoraAdapter) -> str:
    """What "the same root" means, see [`LoraAdapter.sha256`]."""
    return adapter.sha256()


def root_distance(adapter: LoraAdapter, root: LoraAdapter) -> tuple[float, float]:
    """Cosine between all A matrices of adapter and root, and the norm of their difference over the root's."""
    keys = [spec.key for spec in root.layout.tensor_specs() if spec.side == "A" and root.tensors[spec.key].any()]
    if not keys:
        keys = [spec.key for spec in root.layout.tensor_specs()]
    ours = torch.cat([adapter.tensors[key].double().reshape(-1) for key in keys])
    theirs = torch.cat([root.tensors[key].double().reshape(-1) for key in keys])
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=0)
    return float(cosine), float((ours - theirs).norm() / theirs.norm())


def model_name(name_or_path: str) -> str:
    """What a base model is called, without the place where a copy of it lies."""
    parts = [part for part in re.split(r"[/\\]", name_or_path) if part]
    for part in parts:  # a snapshot in the Hub's cache
        if part.startswith("models--"):
            return part.rsplit("--", 1)[-1].lower()
    return parts[-1].lower() if parts else ""
