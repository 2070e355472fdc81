"""A client's fine-tune: only the adapter that it writes is meant to leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from ..finetuning import FineTuningRecipe, SftResult, attach_root, check_rows, load_root_base, preview_base, run_sft
from ..finetuning.sft import SftTrainer
from ..outputs import prepare_output
from ..tokenization_lora_delta import LoraDeltaTokenizer
from .output import write_adapter
from .progress import show_steps
from .terms import ClientTerms, agree


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
    accept_recipe: bool | Callable[[ClientTerms], bool] = False,
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
            rows is in it; their number only with `state_num_examples`. New, empty, or with an adapter to replace.
        role (`str`, *optional*, defaults to `"source"`): `"target"` fine-tunes the LLM instead: the ceiling that a
            generated adapter is compared with, where somebody may see the rows.
        base_model (`str`, *optional*): another place of the same base model; its weights are checked.
        recipe ([`FineTuningRecipe`], *optional*): default: the one that the mapper's shadow runs used. Another one
            moves the delta away from what the mapper has learned to read.
        seed (`int`, *optional*, defaults to 0): of the data order.
        accept_recipe (`bool` or `Callable`, *optional*, defaults to `False`): whether a recipe of unusual steps,
            batch, learning rate or length is run, and a base model downloaded that the mapper names and `base_model`
            does not; or who is asked, with the [`ClientTerms`].
        state_num_examples (`bool`, *optional*, defaults to `False`): whether the adapter says how many rows it saw.
        dtype, device: see [`load_base`].
        hub_kwargs (`Mapping`, *optional*): `revision`, `token`, `cache_dir`, `local_files_only` for the mapper.
        sft_config: other fields of TRL's `SFTConfig`, for instance `gradient_checkpointing=True`;
            `disable_tqdm=False` shows a bar.

    Returns:
        the adapter, and the run's losses; its only snapshot is the last step's.

    Raises:
        [`IncompleteArtifactError`]: the mapper says no recipe and none is given.
        [`BaseModelMismatchError`]: `base_model` is not the model that the root was made for.
        [`DataError`], [`RecipeError`]: the rows cannot be used, or the fine-tune diverged or changed nothing; or the
            recipe is beyond what a client runs.
        [`UsageError`]: unusual terms that were not accepted.
        [`OutputError`]: `output_dir` is a file, holds something else, or cannot be written.
    """
    task = prepare_client(
        mapper,
        rows,
        role=role,
        recipe=recipe,
        hub_kwargs=hub_kwargs,
    )
    prepare_output(output_dir, "client_adapter")
    terms = task.terms(base_model=base_model)
    agree(terms, accept_recipe)
    model, text_tokenizer = task.load(base_model=base_model, dtype=dtype, device=device)
    result = run_sft(
        model,
        text_tokenizer,
        task.rows,
        task.only_the_last_step(),
        root=task.root,
        seed=seed,
        name="the client",
        trainer_class=_ClientTrainer,
        **sft_config,
    )
    adapter = task.save(
        output_dir, result, state_num_examples=state_num_examples, privacy=None, accepted=terms.unusual
    )
    return adapter, result


class _ClientTrainer(SftTrainer):
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        show_steps(self)


@dataclass(frozen=True)
class ClientTask:
    """What a client's fine-tune needs, checked: the root to start from, the recipe, and rows."""

    root: Root
    recipe: FineTuningRecipe
    rows: datasets.Dataset

    def terms(self, *, base_model: str | None, **privacy: Any) -> ClientTerms:
        """What will be done; `privacy` are the fields of [`ClientTerms`] that a private fine-tune adds."""
        return ClientTerms(
            base=preview_base(self.root, base_model=base_model),
            named_by_mapper=base_model is None,
            recipe=self.recipe,
            num_rows=len(self.rows),
            **privacy,
        )

    def only_the_last_step(self) -> FineTuningRecipe:
        """The recipe without the snapshots that shadow runs take: a client keeps its last step alone."""
        return self.recipe.replace(snapshot_last=1, snapshot_every=None)

    def load(
        self, *, base_model: str | None, dtype: str | torch.dtype, device: str | None
    ) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """The base model with the root attached, and its tokenizer."""
        model, text_tokenizer = load_root_base(self.root, base_model=base_model, dtype=dtype, device=device)
        return attach_root(model, self.root), text_tokenizer

    def save(
        self,
        output_dir: str | Path,
        result: SftResult,
        *,
        state_num_examples: bool,
        privacy: PrivacyStatement | None,
        accepted: Sequence[str],
    ) -> LoraAdapter:
        """Write the adapter with what may be said of it."""
        values_P = self.root.layout.flatten({key: tensor.cpu() for key, tensor in result.tensors.items()})
        metadata: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "mapper": None if self.root.origin is None else self.root.origin.to_dict(),
            "root": self.root.facts(),
            "recipe": self.recipe.to_dict(),
            "recipe_fingerprint": self.recipe.fingerprint,
            STATEMENT_KEY: None if privacy is None else privacy.to_dict(),
        }
        if state_num_examples:
            metadata["num_examples"] = len(self.rows)
        if accepted:
            metadata["accepted_terms"] = list(accepted)
        adapter = self.root.adapter.with_values(values_P, metadata=metadata)
        write_adapter(adapter, output_dir)
        return adapter


def prepare_client(
    mapper: str | Path | LoraDeltaTokenizer,
    rows: datasets.Dataset | Sequence[Mapping[str, Any]],
    *,
    role: Literal["source", "target"] = SOURCE_FOLDER,
    recipe: FineTuningRecipe | None = None,
    hub_kwargs: Mapping[str, Any] | None = None,
) -> ClientTask:
    """Read and check what [`finetune_client`] needs, but for the base model; arguments and errors as there."""
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
    return ClientTask(root, recipe, check_rows(rows))
