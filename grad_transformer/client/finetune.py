"""A client's fine-tune: only the adapter that it writes is meant to leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..adapters import LoraAdapter, PrivacyStatement, Root
from ..adapters.privacy import STATEMENT_KEY
from ..constants import FORMAT_VERSION, SOURCE_FOLDER
from ..errors import IncompleteArtifactError
from ..finetuning import FineTuningRecipe, SftResult, attach_root, check_rows, load_root_base, run_sft
from ..tokenization_lora_delta import LoraDeltaTokenizer


logger = logging.get_logger(__name__)


def finetune_client(
    mapper: str | Path | LoraDeltaTokenizer,
    rows: datasets.Dataset | Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    *,
    role: Literal["source", "target"] = SOURCE_FOLDER,
    base_model: str | None = None,
    recipe: FineTuningRecipe | None = None,
    seed: int = 0,
    state_num_examples: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    hub_kwargs: Mapping[str, Any] | None = None,
    **sft_config: Any,
) -> tuple[LoraAdapter, SftResult]:
    """Fine-tune the TinyLM on the client's rows, from the mapper's root, by the mapper's recipe, with TRL.

    This is ordinary fine-tuning: an adapter can reveal rows it was trained on. "Only the adapter leaves" is no privacy
    guarantee; differential privacy is: see `client.private.finetune_client_privately`.

    Args:
        mapper (`str`, `Path` or [`LoraDeltaTokenizer`]): the mapper's folder or repository (also `org/name@v1.0`), or
            its tokenizer. The adapter records which version and commit it was.
        rows (`datasets.Dataset` or rows): with columns `prompt` and `completion`.
        output_dir (`str` or `Path`): receives a PEFT adapter with `grad_transformer.json` beside it. Nothing of the
            rows is in it; their number only with `state_num_examples`.
        role (`str`, *optional*, defaults to `"source"`): `"target"` fine-tunes the LLM instead: the ceiling that a
            generated adapter is compared with, where somebody may see the rows.
        base_model (`str`, *optional*): another place of the same base model; its weights are checked.
        recipe ([`FineTuningRecipe`], *optional*): default: the one that the mapper's shadow runs used. Another one
            moves the delta away from what the mapper has learned to read.
        seed (`int`, *optional*, defaults to 0): of the data order.
        state_num_examples (`bool`, *optional*, defaults to `False`): whether the adapter says how many rows it saw.
        dtype, device: see [`load_base`].
        hub_kwargs (`Mapping`, *optional*): `revision`, `token`, `cache_dir`, `local_files_only` for the mapper.
        sft_config: other fields of TRL's `SFTConfig`, for instance `gradient_checkpointing=True`.

    Returns:
        the adapter, and the run's losses and snapshots.

    Raises:
        [`IncompleteArtifactError`]: the mapper says no recipe and none is given.
        [`BaseModelMismatchError`]: `base_model` is not the model that the root was made for.
        [`DataError`], [`RecipeError`]: the rows cannot be used, or the fine-tune diverged or changed nothing.
    """
    task = prepare_client(
        mapper,
        rows,
        role=role,
        base_model=base_model,
        recipe=recipe,
        dtype=dtype,
        device=device,
        hub_kwargs=hub_kwargs,
    )
    result = run_sft(
        task.model,
        task.text_tokenizer,
        task.rows,
        task.recipe,
        root=task.root,
        seed=seed,
        name="the client",
        **sft_config,
    )
    adapter = task.save(output_dir, result, state_num_examples=state_num_examples, privacy=None)
    return adapter, result


@dataclass(frozen=True)
class ClientTask:
    """What a client's fine-tune needs, checked: the model with the root attached, its tokenizer, rows, and recipe."""

    root: Root
    recipe: FineTuningRecipe
    rows: datasets.Dataset
    model: PeftModel
    text_tokenizer: PreTrainedTokenizerBase

    def save(
        self,
        output_dir: str | Path,
        result: SftResult,
        *,
        state_num_examples: bool,
        privacy: PrivacyStatement | None,
    ) -> LoraAdapter:
        """Write the adapter with what may be said of it."""
        values_P = self.root.layout.flatten({key: tensor.cpu() for key, tensor in result.tensors.items()})
        metadata: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "mapper": None if self.root.origin is None else self.root.origin.to_dict(),
            "root": self.root.facts(),
            "recipe": self.recipe.to_dict(),
            STATEMENT_KEY: None if privacy is None else privacy.to_dict(),
        }
        if state_num_examples:
            metadata["num_examples"] = len(self.rows)
        adapter = self.root.adapter.with_values(values_P, metadata=metadata)
        adapter.save_pretrained(output_dir)
        return adapter


def prepare_client(
    mapper: str | Path | LoraDeltaTokenizer,
    rows: datasets.Dataset | Sequence[Mapping[str, Any]],
    *,
    role: Literal["source", "target"] = SOURCE_FOLDER,
    base_model: str | None = None,
    recipe: FineTuningRecipe | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    hub_kwargs: Mapping[str, Any] | None = None,
) -> ClientTask:
    """Load and check all that [`finetune_client`] needs; arguments and errors as there."""
    if isinstance(mapper, LoraDeltaTokenizer):
        tokenizer = mapper
    else:
        tokenizer = LoraDeltaTokenizer.from_pretrained(mapper, subfolder=role, **dict(hub_kwargs or {}))
    root = tokenizer.root
    if recipe is None:
        if tokenizer.recipe is None:
            raise IncompleteArtifactError(
                "The mapper does not say by which recipe its shadow runs were fine-tuned.",
                path=None if isinstance(mapper, LoraDeltaTokenizer) else mapper,
                expected=f"a recipe in its {role} tokenizer",
                remedy="pass `recipe`, the one of the shadow runs",
            )
        recipe = FineTuningRecipe.from_dict(tokenizer.recipe)
    elif (
        tokenizer.recipe is not None and recipe.fingerprint != FineTuningRecipe.from_dict(tokenizer.recipe).fingerprint
    ):
        logger.warning("The recipe is not the one of the mapper's shadow runs: it may read this adapter less well.")
    checked = check_rows(rows)
    model, text_tokenizer = load_root_base(root, base_model=base_model, dtype=dtype, device=device)
    return ClientTask(root, recipe, checked, attach_root(model, root), text_tokenizer)
