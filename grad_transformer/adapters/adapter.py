"""`LoraAdapter`: a PEFT LoRA adapter as plain data, read from and written to folders that peft itself understands."""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..constants import ADAPTER_CONFIG_NAME, ADAPTER_METADATA_NAME, ADAPTER_WEIGHTS_NAME, FORMAT_VERSION
from ..errors import AdapterFormatError
from ..files import read_record, write_json_atomic
from ..hub import Origin, Published, fetch, push_folder
from ..hub.kinds import ADAPTER_FILES
from ..outputs import check_manifest
from ..schemas import AdapterConfigRecord, AdapterMetadataRecord
from .io import MAX_ADAPTER_JSON_BYTES, member, read_header, read_tensors, save_tensors_atomic
from .keys import canonical_keys
from .layout import LoraLayout


__all__ = ["ADAPTER_FILES", "LoraAdapter"]

# What a stranger's repository may make this machine download where the layout is not known.
MAX_ADAPTER_BYTES = 16 * 2**30


@dataclass
class LoraAdapter:
    """A LoRA adapter: its config, its tensors, and the layout that orders them.

    Args:
        config (`dict`): content of `adapter_config.json`.
        tensors (`dict[str, torch.Tensor]`): the tensors by their keys in `adapter_model.safetensors`.
        layout ([`LoraLayout`]): order, shapes and scalings of the tensors.
        metadata (`dict`): facts that peft's config has no field for; written to `grad_transformer.json`.
        origin ([`Origin`], *optional*): repository, version and commit that it was loaded from.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    layout: LoraLayout
    metadata: dict[str, Any] = field(default_factory=dict)
    origin: Origin | None = field(default=None, compare=False)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        layout: LoraLayout | None = None,
        subfolder: str | None = None,
        **hub_kwargs: Any,
    ) -> LoraAdapter:
        """Read an adapter from a folder or a Hub repository, its config and header before any tensor.

        A stranger's adapter may be read: nothing in it is executed, imported or looked up. The base model that it
        names is compared, never loaded; no pickle is opened; files have size limits and must lie in the folder.

        Args:
            name_or_path (`str` or `Path`): PEFT adapter folder, or repository id, also as `org/name@v1.0`.
            layout ([`LoraLayout`], *optional*): the layout that the adapter must have. Without it the layout is read
                off the adapter's own config, whose rank and alpha patterns must be simple ones.
            subfolder (`str`, *optional*): folder below `name_or_path`.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            [`AdapterFormatError`]: missing or unsafe files, or content that A and B alone do not hold.
            [`LayoutMismatchError`]: not the given layout.
            [`HubError`]: no such repository or version, no access, or no answer.
        """
        # With a known layout: its values in float64, and room for the header and the JSON.
        max_bytes = MAX_ADAPTER_BYTES if layout is None else 8 * layout.numel + 32 * 2**20
        fetched = fetch(
            name_or_path, allow_patterns=ADAPTER_FILES, subfolder=subfolder, max_bytes=max_bytes, **hub_kwargs
        )
        folder = fetched.folder
        config = _read_adapter_json(folder, ADAPTER_CONFIG_NAME, AdapterConfigRecord)
        weights = member(folder, ADAPTER_WEIGHTS_NAME)
        if not weights.is_file():
            pickles = [path.name for path in itertools.islice(folder.glob("*.bin"), 3)]
            raise AdapterFormatError(
                "The adapter's weights are not stored as safetensors.",
                path=folder,
                expected=ADAPTER_WEIGHTS_NAME,
                found=", ".join(pickles) or "no weights",
                remedy="save it with peft's save_pretrained(..., safe_serialization=True); pickles are never read",
            )
        header, _ = read_header(weights)
        for key, info in header.items():
            if not info.dtype.is_floating_point:
                raise AdapterFormatError(
                    f"Tensor {key} is not floating-point.", path=weights, expected="float dtype", found=info.dtype
                )
        stored = canonical_keys(header, path=str(folder))
        shapes = {key: header[name].shape for key, name in stored.items()}
        if layout is None:
            layout = LoraLayout.from_adapter_config(config, shapes, path=str(folder))
        else:
            layout.check_config(config, shapes, path=str(folder))
        has_metadata = os.path.lexists(folder / ADAPTER_METADATA_NAME)
        metadata = _read_adapter_json(folder, ADAPTER_METADATA_NAME, AdapterMetadataRecord) if has_metadata else {}
        found = read_tensors(weights, list(header))
        return cls(config, {key: found[name] for key, name in stored.items()}, layout, metadata, fetched.origin)

    @property
    def base_model(self) -> str | None:
        """`base_model_name_or_path` of the adapter's config."""
        name = self.config.get("base_model_name_or_path")
        return None if name is None else str(name)

    def flat(self, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """All values in layout order, shape `(numel,)`."""
        return self.layout.flatten(self.tensors, dtype=dtype)

    def with_values(self, values_P: torch.Tensor, *, metadata: Mapping[str, Any] | None = None) -> LoraAdapter:
        """An adapter of the same config and layout with other values, in the dtypes of this one's tensors."""
        values = self.layout.unflatten(values_P)
        tensors = {key: values[key].to(tensor.dtype) for key, tensor in self.tensors.items()}
        return LoraAdapter(dict(self.config), tensors, self.layout, dict(metadata or {}))

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Write a folder that `PeftModel.from_pretrained(model, folder)` loads; `adapter_config.json` comes last.

        Of an adapter that is there before, config and weights go first: a process killed at any moment leaves no
        weights beside what is said of others.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME):
            (folder / name).unlink(missing_ok=True)
        if self.metadata:
            write_json_atomic(folder / ADAPTER_METADATA_NAME, self.metadata)
        else:
            (folder / ADAPTER_METADATA_NAME).unlink(missing_ok=True)
        save_tensors_atomic(folder / ADAPTER_WEIGHTS_NAME, self.tensors, {"format": "pt"})
        write_json_atomic(folder / ADAPTER_CONFIG_NAME, {**self.config, "inference_mode": True})
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        license: str | None = None,
        commit_message: str | None = None,
    ) -> Published:
        """Publish the adapter as a version of a model repository, with its card.

        Args:
            repo_id (`str`): created if needed.
            revision (`str`, *optional*): tag of the version. Default: `v1.0`, then `v1.1`, ...
            private (`bool`, *optional*): whether the repository must be private. Default: a client's adapter only
                goes into a private one, a generated one as the account's settings say.
            token, license, commit_message: as in [`push_folder`].

        Returns:
            [`Published`]: the version's tag, commit and page.

        Raises:
            [`UsageError`]: the tag names another version already; a token or local path would be published.
            [`HubError`]: no permission, or no answer.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if not self.metadata:
                write_json_atomic(Path(folder) / ADAPTER_METADATA_NAME, {"format_version": FORMAT_VERSION})
            return push_folder(
                folder,
                repo_id,
                revision=revision,
                private=private,
                token=token,
                license=license,
                commit_message=commit_message,
            )

    def sha256(self) -> str:
        """SHA-256 over keys, shapes, scalings and values in layout order, independent of file layout."""
        digest = hashlib.sha256()
        for spec in self.layout.tensor_specs():
            digest.update(repr((spec.key, spec.shape, float(spec.scaling))).encode())
            digest.update(self.tensors[spec.key].to(torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()


def _read_adapter_json(folder: Path, name: str, schema: Any) -> dict[str, Any]:
    path = member(folder, name)
    inside = sorted(folder.glob(f"*/{name}"))[:2]
    if name == ADAPTER_CONFIG_NAME and inside and not os.path.lexists(path):
        raise AdapterFormatError(
            "There is no adapter in the folder, but below it there is.",
            path=folder,
            expected=name,
            found=f"{inside[0].parent.name}/{name}",
            remedy=f"did you mean {inside[0].parent}?",
        )
    if name == ADAPTER_CONFIG_NAME:
        check_manifest(folder, name, "adapter", error=AdapterFormatError)
    return dict(read_record(path, schema, error=AdapterFormatError, max_bytes=MAX_ADAPTER_JSON_BYTES))
