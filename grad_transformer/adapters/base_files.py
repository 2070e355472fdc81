"""Where a base model is: a folder, or a repository on the Hub, told apart before the Hub is asked.

Of a repository nothing but configs, vocabularies, chat templates and safetensors is downloaded: no code, no pickle.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..constants import ADAPTER_CONFIG_NAME
from ..errors import UsageError
from ..hub.names import did_you_mean, is_repo_id, split_revision
from ..hub.revisions import fetch


# Configs, vocabularies, chat templates; no code.
_CONFIG_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHT_FILES = ("model*.safetensors",)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class BaseFiles:
    """Where a model was found.

    Args:
        name (`str`): the absolute path of a folder, or a repository id.
        revision (`str`, *optional*): of a repository, its commit.
        folder (`Path`): its files on this machine; of a repository, all but the weights.
    """

    name: str
    revision: str | None
    folder: Path

    @property
    def from_hub(self) -> bool:
        return not Path(self.name).is_absolute()


Source = str | Path | BaseFiles


def locate(name_or_path: Source, *, revision: str | None = None, **hub_kwargs: Any) -> BaseFiles:
    """Find a model, and fetch its config and tokenizer files if it is on the Hub. No weight is downloaded.

    Args:
        name_or_path (`str`, `Path` or [`BaseFiles`]): a folder, or a repository id, also as `org/name@revision`.
        revision (`str`, *optional*): tag, branch or commit of a repository.
        hub_kwargs: `token`, `cache_dir`, `local_files_only`.

    Raises:
        [`UsageError`]: no such folder, a file, or a folder that holds no model.
        [`HubError`]: no such repository or version, no access, or no answer.
    """
    if isinstance(name_or_path, BaseFiles):
        return name_or_path
    path = Path(os.path.expanduser(name_or_path))
    if os.path.isdir(path):  # which, unlike `Path.is_dir`, takes any text for a name
        found = BaseFiles(str(path.absolute()), revision, path)
    else:
        name = split_revision(name_or_path)[0]
        is_file, beside = os.path.isfile(path), str(path.parent) != "." and os.path.isdir(path.parent)
        if is_file or beside or not is_repo_id(name):
            raise UsageError(
                "There is no such model.",
                path=str(name_or_path)[:300],
                expected="a folder with a model in the format of transformers, or the id of a repository on the Hub",
                found="a file" if is_file else "no such folder",
                remedy=did_you_mean(path),
            )
        fetched = fetch(name_or_path, allow_patterns=_CONFIG_FILES, revision=revision, **hub_kwargs)
        assert fetched.origin is not None
        found = BaseFiles(name, fetched.origin.sha, fetched.folder)
    _check_is_model(found)
    return found


def fetch_weights(found: BaseFiles, num_values: int, *, revision: str | None = None, **hub_kwargs: Any) -> None:
    """Download the weights of a repository, checked by size and hash; refuse pickles, and too little for the config.

    Args:
        found ([`BaseFiles`]): from [`locate`].
        num_values (`int`): values of all parameters, by the config.
        revision, hub_kwargs: arguments of [`locate`]; the commit that was found then is the one that counts.

    Raises:
        [`UsageError`], [`HubError`]
    """
    if found.from_hub:
        # In float64 at most, and room for headers.
        max_bytes = 8 * num_values + 2**26
        fetch(found.name, allow_patterns=_WEIGHT_FILES, revision=found.revision, max_bytes=max_bytes, **hub_kwargs)
    weights = [path for pattern in _WEIGHT_FILES for path in found.folder.glob(pattern)]
    if not weights:
        pickles = sorted(path.name for pattern in _PICKLES for path in found.folder.glob(pattern))
        raise UsageError(
            "The model's weights are not stored as safetensors.",
            path=found.name,
            expected="model.safetensors, or model-00001-of-... with their index",
            found=", ".join(pickles[:3]) or "no weights",
            remedy="pickles can run code and are never read: load it where you trust it, and save it again with "
            "save_pretrained"
            if pickles
            else "check the name; a repository must have been downloaded whole before it is used offline",
        )
    size = sum(path.stat().st_size for path in weights)
    if num_values > size + 2**20:  # at two bytes a value and more
        raise UsageError(
            "The model's files cannot hold the weights that its config describes.",
            path=found.name,
            expected=f"{num_values:,} values",
            found=f"{size:,} bytes",
            remedy="download or save the model again",
        )


def _check_is_model(found: BaseFiles) -> None:
    folder = found.folder
    if (folder / ADAPTER_CONFIG_NAME).exists():
        raise UsageError(
            "That is a PEFT adapter, and not a base model.",
            path=found.name,
            expected="a model with all of its weights",
            found=ADAPTER_CONFIG_NAME,
            remedy="give its base model; or merge the adapter into it first: AutoPeftModelForCausalLM"
            ".from_pretrained(...).merge_and_unload().save_pretrained(folder), and save the tokenizer there too",
        )
    if not (folder / "config.json").is_file():
        inside = [path.parent.name for path in sorted(folder.glob("*/config.json"))]
        raise UsageError(
            "There is no model in the format of transformers.",
            path=found.name,
            expected="config.json, model.safetensors and tokenizer files",
            found="no config.json",
            remedy=f"did you mean {Path(found.name, inside[0])}?" if inside else "check the name",
        )
