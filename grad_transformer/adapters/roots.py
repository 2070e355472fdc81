"""Roots: the initial adapter that every run of a pair and every client starts from, kept as an artifact.

A delta is adapter minus root. Two runs from different random A matrices have unrelated deltas even where the models
are equally accurate, so the root is shipped and checked, never drawn again from a seed.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..constants import FORMAT_VERSION, ROOT_FOLDER, ROOT_NAME
from ..errors import BaseModelMismatchError, IncompleteArtifactError, RootMismatchError, UsageError
from ..files import read_record, write_json_atomic
from ..hub import Origin, fetch
from ..hub.kinds import ROOT_FILES
from ..schemas import RootRecord
from .adapter import LoraAdapter
from .layout import LoraLayout, check_representable


# Cosine between the A matrices of an adapter and of the root. Runs from another draw of A lie near 0.
MINIMUM_ROOT_COSINE = 0.5

_SAMPLES_PER_TENSOR = 64


@dataclass
class Root:
    """The initial adapter of one base model.

    Args:
        adapter ([`LoraAdapter`]): config and initial values, float32.
        fingerprint (`str`): SHA-256 over keys, shapes and values; what "the same root" means.
        base_model (`str`): name or path of the base model.
        base_revision (`str`, *optional*): its revision on the Hub.
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
        found = fingerprint_base_model(model)
        if found != self.base_fingerprint:
            raise BaseModelMismatchError(
                "The base model is not the one that the root was made for.",
                path=path or model.config.name_or_path,
                expected=f"{self.base_model} (revision {self.base_revision}), fingerprint {self.base_fingerprint}",
                found=f"{model.config.name_or_path}, fingerprint {found}",
                remedy="load the same base model at the same revision, unquantised",
            )

    def check_descends(self, adapter: LoraAdapter, *, path: str | None = None) -> None:
        """Refuse an adapter that was not fine-tuned from this root.

        A declared fingerprint must match, and the adapter's A matrices must still point where the root's do: an
        adapter from another draw of A has a cosine near 0 with the root.

        Raises:
            [`RootMismatchError`]: says how far the adapter is from the root.
        """
        declared = adapter.metadata.get("root", {})
        declared = declared.get("fingerprint") if isinstance(declared, dict) else None
        cosine, distance = root_distance(adapter, self.adapter)
        if (declared is not None and declared != self.fingerprint) or not cosine >= MINIMUM_ROOT_COSINE:
            raise RootMismatchError(
                "The adapter was not fine-tuned from this root.",
                path=path,
                expected=f"root {self.fingerprint[:12]}, A matrices at cosine {MINIMUM_ROOT_COSINE} or more",
                found=f"root {str(declared or 'undeclared')[:12]}, A matrices at cosine {cosine:.3f}, "
                f"{distance:.2f} times the root's norm away",
                remedy="start the fine-tune from the mapper's source root (`grad-transformer client` does)",
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
        [`UsageError`]: the target modules are not in the model.
    """
    check_representable(lora_config.to_dict())
    if isinstance(base, PreTrainedModel):
        model = base
    else:
        model = AutoModelForCausalLM.from_pretrained(str(base), revision=revision, dtype="auto")
    base_fingerprint = fingerprint_base_model(model)
    name = str(base if not isinstance(base, PreTrainedModel) else model.config.name_or_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            # A copy: peft writes the base model's name into the config that it is given.
            peft_model = get_peft_model(model, copy.deepcopy(lora_config))
        except ValueError as cause:
            raise UsageError(
                "The LoRA config does not fit the base model.",
                path=name,
                expected="target modules that the model has",
                found=str(cause).splitlines()[0],
                remedy="see the names in model.named_modules()",
            ) from cause
    # Without embedding layers: peft would add a targeted layer's own base weights.
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    # Cloned: once unloaded, nothing must tie the root to the model's own memory.
    tensors = {key: value.detach().float().cpu().clone() for key, value in state.items()}
    config = _config_dict(peft_model.peft_config["default"], name, revision)
    peft_model.unload()
    layout = LoraLayout.from_adapter_config(config, {key: tuple(value.shape) for key, value in tensors.items()})
    adapter = LoraAdapter(config, tensors, layout)
    root = Root(adapter, fingerprint_adapter(adapter), name, revision, base_fingerprint, seed)
    root.save_pretrained(output_dir)
    return root


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


def fingerprint_base_model(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and an even sample of every parameter, the same for any loading dtype.

    Values are rounded to bfloat16 first: a checkpoint loaded in float32 and in bfloat16 has one fingerprint. (float16
    checkpoints must be loaded in the dtype they are stored in.)
    """
    digest = hashlib.sha256(str(model.config.model_type).encode())
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // _SAMPLES_PER_TENSOR)][:_SAMPLES_PER_TENSOR]
        digest.update(repr((name, tuple(parameter.shape))).encode())
        digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def root_distance(adapter: LoraAdapter, root: LoraAdapter) -> tuple[float, float]:
    """Cosine between all A matrices of adapter and root, and the norm of their difference over the root's."""
    keys = [spec.key for spec in root.layout.tensor_specs() if spec.side == "A" and root.tensors[spec.key].any()]
    if not keys:
        keys = [spec.key for spec in root.layout.tensor_specs()]
    ours = torch.cat([adapter.tensors[key].double().reshape(-1) for key in keys])
    theirs = torch.cat([root.tensors[key].double().reshape(-1) for key in keys])
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=0)
    return float(cosine), float((ours - theirs).norm() / theirs.norm())


def _config_dict(config: LoraConfig, base_model: str, revision: str | None) -> dict[str, Any]:
    data = config.to_dict()
    data.update(base_model_name_or_path=base_model, revision=revision, inference_mode=True)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in data.items()}
