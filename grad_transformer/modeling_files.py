"""A mapper's files: saved and loaded with both tokenizers, published as one version."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from .adapters import ShiftReference
from .configuration_grad_transformer import GradTransformerConfig
from .constants import SOURCE_FOLDER, TARGET_FOLDER
from .errors import IncompleteArtifactError, LayoutMismatchError
from .files import sync_and_move
from .hub import KINDS, Origin, Published, fetch, push_folder
from .modeling_weights import CONFIG_NAME, check_loaded, check_weights, read_mapper_config, read_weight_shapes
from .outputs import check_manifest
from .tokenization_lora_delta import LoraDeltaTokenizer


_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")


class MapperFiles:
    """What [`GradTransformer`] has beside `PreTrainedModel`'s own files."""

    config: GradTransformerConfig
    source_tokenizer: LoraDeltaTokenizer | None
    target_tokenizer: LoraDeltaTokenizer | None
    # Repository, version and commit that it was loaded from.
    origin: Origin | None = None
    _folder: Path | None = None

    @cached_property
    def shift_reference(self) -> ShiftReference | None:
        """Where the mapper's shadows lie, read from the folder or commit that it was loaded from when it is asked for.

        `None` for a mapper that was not loaded, or was saved without it.

        Raises:
            [`IncompleteArtifactError`]: its file is broken.
        """
        if self._folder is None or self.source_tokenizer is None:
            return None
        return ShiftReference.from_folder(self._folder, self.source_tokenizer.layout)

    def save_pretrained(self, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config, weights and both tokenizers; arguments as in `PreTrainedModel.save_pretrained`.

        `config.json` goes first and comes last: what a save that was interrupted leaves is not taken for a mapper.

        With `push_to_hub` also publish it, as `repo_id` (default: the folder's name), see
        [`~GradTransformer.push_to_hub`].
        """
        hub = {name: kwargs.pop(name) for name in ("repo_id", "revision", "private", "license") if name in kwargs}
        if not kwargs.get("is_main_process", True):
            super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        for left in folder.glob(".saving-*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
            for tokenizer, name in ((self.source_tokenizer, SOURCE_FOLDER), (self.target_tokenizer, TARGET_FOLDER)):
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder / name)
            if self.shift_reference is not None:
                self.shift_reference.save_pretrained(folder)
            super().save_pretrained(staging, **kwargs)  # type: ignore[misc]
            for pattern in ("model*.safetensors", "model.safetensors.index.json"):
                for stale in folder.glob(pattern):
                    stale.unlink()
            for path in sorted(Path(staging).iterdir(), key=lambda path: path.name == "config.json"):
                sync_and_move(path, folder / path.name)
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), token=kwargs.get("token"), **hub)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Load a mapper with its tokenizers; arguments as in `PreTrainedModel.from_pretrained`.

        Headers are read before anything is allocated, so that a config cannot ask for more than its files hold.

        The revision (`revision=`, or `org/name@v1.0`) is resolved to a commit once, which `origin` keeps; config,
        weights and tokenizers all come from it.

        Raises:
            [`IncompleteArtifactError`]: config, weights or tokenizers are missing or damaged: weights are safetensors,
                exactly those that the config asks for, and finite.
            [`LayoutMismatchError`]: tokenizers and config do not belong together.
            [`FormatVersionError`]: written by a newer version.
            [`HubError`]: no such repository or version, no access, or no answer.
        """
        prefix = (kwargs.get("subfolder") or "").strip("/")
        hub_kwargs = {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
        fetched = fetch(
            pretrained_model_name_or_path,
            allow_patterns=KINDS["mapper"].patterns[1:],
            subfolder=prefix or None,
            **hub_kwargs,
        )
        check_manifest(fetched.folder, CONFIG_NAME, "mapper", error=IncompleteArtifactError)
        shapes = read_weight_shapes(fetched.folder)
        config = read_mapper_config(fetched.folder, num_tensors=len(shapes))
        tokenizers = {}
        if config.source_base_model is not None:
            for side in (SOURCE_FOLDER, TARGET_FOLDER):
                tokenizers[side] = LoraDeltaTokenizer.from_pretrained(fetched.folder, subfolder=side)
                tokenizers[side].origin = tokenizers[side].root.origin = fetched.origin
                _check_fits(tokenizers[side], config, side, pretrained_model_name_or_path)
        check_weights(cls, config, shapes, fetched.folder)
        name: str | Path = pretrained_model_name_or_path
        if fetched.origin is not None and not Path(name).is_dir():
            name = fetched.origin.repo_id
            kwargs.update(revision=fetched.origin.sha, local_files_only=True)
        with_info = kwargs.pop("output_loading_info", False)
        kwargs.update(use_safetensors=True, output_loading_info=True)
        model, info = super().from_pretrained(name, *args, **kwargs)  # type: ignore[misc]
        check_loaded(model, info["missing_keys"], pretrained_model_name_or_path)
        model.origin, model._folder = fetched.origin, fetched.folder
        model.source_tokenizer, model.target_tokenizer = tokenizers.get(SOURCE_FOLDER), tokenizers.get(TARGET_FOLDER)
        return (model, info) if with_info else model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        report: Mapping[str, bytes] | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        license: str | None = None,
        commit_message: str | None = None,
        **save_kwargs: Any,
    ) -> Published:
        """Publish the mapper, its tokenizers and both roots as a version of a model repository, with its card.

        Args:
            repo_id (`str`): created if needed.
            revision (`str`, *optional*): tag of the version. Default: `v1.0`, then `v1.1`, ...
            report (`Mapping[str, bytes]`, *optional*): `report.json` and pictures without names of clients, as
                `grad_transformer.evaluation.public` makes them of what `evaluate` wrote.
            private, token, license, commit_message: as in [`push_folder`].
            save_kwargs: as in `save_pretrained`, for instance `max_shard_size`.

        Returns:
            [`Published`]: the version's tag, commit and page.

        Raises:
            [`UsageError`]: the tag names another version already; a token or local path would be published.
            [`HubError`]: no permission, or no answer.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_kwargs)
            return push_folder(
                folder,
                repo_id,
                kind="mapper",
                revision=revision,
                report=report,
                private=private,
                token=token,
                license=license,
                commit_message=commit_message,
            )


def _check_fits(tokenizer: LoraDeltaTokenizer, config: GradTransformerConfig, side: str, path: str | Path) -> None:
    types, widths = list(getattr(config, f"{side}_block_types")), list(getattr(config, f"{side}_type_widths"))
    found = (list(tokenizer.layout.block_types), list(tokenizer.layout.type_widths))
    if found != (types, widths):
        raise LayoutMismatchError(
            f"The {side} tokenizer does not fit the mapper.",
            path=path,
            expected=f"block types {types}, widths {widths}",
            found=f"block types {found[0]}, widths {found[1]}",
            remedy="save or download the mapper's repository again, as one revision",
        )
