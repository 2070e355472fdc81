"""A mapper's files: saved and loaded with both tokenizers, published as one version."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from .adapters.bases import check_config
from .configuration_grad_transformer import GradTransformerConfig
from .constants import SOURCE_FOLDER, TARGET_FOLDER
from .errors import LayoutMismatchError
from .files import read_json
from .hub import KINDS, Origin, Published, fetch, push_folder
from .tokenization_lora_delta import LoraDeltaTokenizer


_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")


class MapperFiles:
    """What [`GradTransformer`] has beside `PreTrainedModel`'s own files."""

    config: GradTransformerConfig
    source_tokenizer: LoraDeltaTokenizer | None
    target_tokenizer: LoraDeltaTokenizer | None
    # Repository, version and commit that it was loaded from.
    origin: Origin | None = None

    def save_pretrained(self, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config, weights and both tokenizers; arguments as in `PreTrainedModel.save_pretrained`.

        With `push_to_hub` also publish it, as `repo_id` (default: the folder's name), see
        [`~GradTransformer.push_to_hub`].
        """
        hub = {name: kwargs.pop(name) for name in ("repo_id", "revision", "private", "license") if name in kwargs}
        if kwargs.get("is_main_process", True):
            for tokenizer, name in ((self.source_tokenizer, SOURCE_FOLDER), (self.target_tokenizer, TARGET_FOLDER)):
                if tokenizer is not None:
                    tokenizer.save_pretrained(Path(save_directory) / name)
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), token=kwargs.get("token"), **hub)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Load a mapper with its tokenizers; arguments as in `PreTrainedModel.from_pretrained`.

        The revision (`revision=`, or `org/name@v1.0`) is resolved to a commit once, which `origin` keeps; config,
        weights and tokenizers all come from it.

        Raises:
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
        if (fetched.folder / "config.json").is_file():
            # A newer format, and a backbone that cannot be, are refused before anything is made of them.
            check_config(read_json(fetched.folder / "config.json"), path=pretrained_model_name_or_path)
        name: str | Path = pretrained_model_name_or_path
        if fetched.origin is not None and not Path(name).is_dir():
            name = fetched.origin.repo_id
            kwargs.update(revision=fetched.origin.sha, local_files_only=True)
        loaded = super().from_pretrained(name, *args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.origin = fetched.origin
        if model.config.source_base_model is not None:
            for side, folder in (("source", SOURCE_FOLDER), ("target", TARGET_FOLDER)):
                tokenizer = LoraDeltaTokenizer.from_pretrained(fetched.folder, subfolder=folder)
                tokenizer.origin = tokenizer.root.origin = fetched.origin
                _check_fits(tokenizer, model.config, side, pretrained_model_name_or_path)
                setattr(model, f"{side}_tokenizer", tokenizer)
        return loaded

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        report_dir: str | Path | None = None,
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
            report_dir (`str` or `Path`, *optional*): folder of its `report.json` and pictures, as `evaluate` wrote
                them; clients in it go by kind and number.
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
                report_dir=report_dir,
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
