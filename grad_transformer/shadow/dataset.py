"""The delta dataset: pairs of TinyLM and LLM deltas as Parquet that plain `datasets.load_dataset` reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from ..adapters import LoraLayout, Root
from ..adapters.io import atomic_write, member, read_record, write_json_atomic, write_text_atomic
from ..adapters.rows import DeltaRows, text_column
from ..constants import DELTA_DATASET_NAME, FORMAT_VERSION, PLAN_NAME
from ..errors import DeltaDatasetError, IncompleteArtifactError
from ..hub import KINDS, Origin, fetch
from ..hub.hashes import file_sha256
from ..locks import sole_writer
from ..outputs import check_manifest, prepare_output
from ..schemas import DeltaDatasetRecord
from .identity import dataset_fingerprint
from .parquet import checked_ids, load_splits, schema_of, stream_splits
from .plan import ROLES, SPLITS, ShadowPlan
from .records import missing_runs, read_run
from .run import load_checked_root, load_plan, load_plan_root, root_folder


# Readers hold whole row groups.
_ROW_GROUP_BYTES = 2**20
_CHECKED_ROWS = 64


@dataclass(frozen=True)
class DeltaPairs:
    """All pairs of one or more splits: raw deltas `(N, numel)` float32, shadow run and task of each pair."""

    source: torch.Tensor
    target: torch.Tensor
    shadow_ids: list[str]
    tasks: list[str | None]


@dataclass(frozen=True)
class DeltaDataset:
    """A loaded delta dataset.

    Args:
        splits (`dict[str, datasets.Dataset]`): `train`, and `validation` and `test` where runs were held out; columns
            `shadow_id`, `task`, `step`, `source_blocks`, `target_blocks`.
        manifest (`dict`): `delta_dataset.json`.
        folder (`Path`): where it lies.
        origin ([`Origin`], *optional*): repository, version and commit that it was loaded from.
    """

    splits: dict[str, datasets.Dataset]
    manifest: dict[str, Any]
    folder: Path
    origin: Origin | None = None

    @cached_property
    def source_root(self) -> Root:
        return self._root("source")

    @cached_property
    def target_root(self) -> Root:
        return self._root("target")

    def _root(self, role: str) -> Root:
        return load_checked_root(root_folder(self.folder, role), self.manifest["roots"][role]["fingerprint"])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of plan, roots, recipes and every file of pairs."""
        return dataset_fingerprint(self.manifest)

    @property
    def identity(self) -> dict[str, str]:
        """What a mapper that is trained on it remembers."""
        return {"fingerprint": self.fingerprint, "plan_fingerprint": self.manifest["plan_fingerprint"]}

    @property
    def source_layout(self) -> LoraLayout:
        return self.source_root.layout

    @property
    def target_layout(self) -> LoraLayout:
        return self.target_root.layout

    def pairs(self, *splits: str) -> DeltaPairs:
        """All pairs of one or more splits as tensors, whose memory is files (see [`~DeltaRows.to_tensor`]).

        Raises:
            [`DeltaDatasetError`]: a value is not finite.
        """
        rows = datasets.concatenate_datasets([self.splits[split] for split in splits])
        return DeltaPairs(
            source=self._values(rows, "source_blocks"),
            target=self._values(rows, "target_blocks"),
            shadow_ids=text_column(rows, "shadow_id"),
            tasks=text_column(rows, "task"),
        )

    def layout(self, role: str) -> LoraLayout:
        return self.source_layout if role == "source" else self.target_layout

    def _values(self, rows: datasets.Dataset, column: str) -> torch.Tensor:
        values_NP = DeltaRows(rows, column).to_tensor()
        for chunk_BP in values_NP.split(_CHECKED_ROWS):
            if not bool(torch.isfinite(chunk_BP).all()):
                raise DeltaDatasetError(
                    "The delta dataset holds NaN or infinite values.",
                    path=self.folder,
                    remedy="build or download the dataset again; a run that diverged has to be done again",
                )
        return values_NP

    def tuning_pairs(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Deltas of held-out runs that settings may be chosen on: of `validation`, else of `test`; None without."""
        for split in ("validation", "test"):
            if split in self.splits:
                pairs = self.pairs(split)
                return pairs.source, pairs.target
        return None


def build_delta_dataset(
    plan_dir: str | Path, output_dir: str | Path, *, allow_missing: bool = False
) -> dict[str, Any]:
    """Turn finished runs into a delta dataset; repeatable, and never more than one run in memory.

    Snapshot i of the TinyLM's run is paired with snapshot i of the LLM's. A delta is adapter minus root, float32,
    flattened in the layout's order: blocks can be read off with the widths in the manifest.

    Args:
        plan_dir (`str` or `Path`): folder of a plan and its runs.
        output_dir (`str` or `Path`): receives `data/*.parquet`, both roots, the plan, a card, and the manifest
            `delta_dataset.json`, which comes last.
        allow_missing (`bool`, *optional*, defaults to `False`): leave unfinished runs out instead of refusing.

    Returns:
        the manifest.

    Raises:
        [`DeltaDatasetError`]: runs are missing or belong to another plan, or `output_dir` holds that of another plan.
        [`OutputError`]: `output_dir` holds something else or cannot be written to, or another process builds there.
    """
    plan = load_plan(plan_dir)
    folder = prepare_output(output_dir, "delta_dataset", inputs=[plan_dir])
    with sole_writer(folder):
        return _build(plan, plan_dir, folder, allow_missing)


def _build(plan: ShadowPlan, plan_dir: str | Path, folder: Path, allow_missing: bool) -> dict[str, Any]:
    _refuse_another_plan(plan, folder)
    missing = {run_id for role in ROLES for run_id in missing_runs(plan, plan_dir, role)}
    finished = [run for run in plan.runs if run.shadow_id not in missing]
    if (missing and not allow_missing) or not any(run.split == "train" for run in finished):
        raise DeltaDatasetError(
            "Shadow runs are missing.",
            path=plan_dir,
            expected=f"{len(plan.runs)} finished runs of both models",
            found=f"{len(finished)}, without {sorted(missing)[0]}",
            remedy="run `grad-transformer shadow` again: it does what is missing; or allow missing runs",
        )
    (folder / DELTA_DATASET_NAME).unlink(missing_ok=True)
    roots = {role: load_plan_root(plan, plan_dir, role) for role in ROLES}
    for role in ROLES:
        roots[role].save_pretrained(root_folder(folder, role))
    features = datasets.Features(
        {
            "shadow_id": datasets.Value("string"),
            "task": datasets.Value("string"),
            "step": datasets.Value("int32"),
            "source_blocks": datasets.List(datasets.Value("float32"), length=roots["source"].layout.numel),
            "target_blocks": datasets.List(datasets.Value("float32"), length=roots["target"].layout.numel),
        }
    )
    counts, files = {}, {}
    with tqdm(total=len(finished), desc="build", unit="run", smoothing=0) as bar:
        for split in SPLITS:
            runs = [run for run in finished if run.split == split]
            path = folder / "data" / f"{split}-00000-of-00001.parquet"
            path.unlink(missing_ok=True)
            if not runs:
                continue
            counts[split] = {"runs": len(runs), "pairs": 0}
            with (
                atomic_write(path) as temporary,
                pq.ParquetWriter(temporary, features.arrow_schema, use_dictionary=["shadow_id", "task"]) as writer,
            ):
                pending = 0
                tables: list[pa.Table] = []
                for run in runs:
                    table = _run_table(plan, plan_dir, run.shadow_id, roots, features)
                    counts[split]["pairs"] += len(table)
                    tables.append(table)
                    pending += table.nbytes
                    if pending >= _ROW_GROUP_BYTES:
                        _write_groups(writer, tables)
                        pending, tables = 0, []
                    bar.update()
                if tables:
                    _write_groups(writer, tables)
            files[str(path.relative_to(folder))] = file_sha256(path)
    manifest = {
        "format_version": FORMAT_VERSION,
        "plan_fingerprint": plan.fingerprint,
        "roots": {role: roots[role].facts() for role in ROLES},
        "recipes": {role: plan.side(role).recipe.to_dict() for role in ROLES},
        "layouts": {role: roots[role].layout.to_dict() for role in ROLES},
        "data": plan.data,
        "splits": counts,
        "missing_runs": sorted(missing),
        "files": files,
    }
    manifest["fingerprint"] = dataset_fingerprint(manifest)
    # So late that a build which was interrupted is not taken for a plan.
    write_text_atomic(folder / PLAN_NAME, (Path(plan_dir) / PLAN_NAME).read_text(encoding="utf-8"))
    write_text_atomic(folder / "README.md", _card(manifest))
    write_json_atomic(folder / DELTA_DATASET_NAME, manifest)
    return manifest


def _refuse_another_plan(plan: ShadowPlan, folder: Path) -> None:
    path = folder / DELTA_DATASET_NAME
    there = read_record(path, DeltaDatasetRecord).get("plan_fingerprint") if path.is_file() else plan.fingerprint
    if there != plan.fingerprint:
        raise DeltaDatasetError(
            "The folder holds the delta dataset of another plan.",
            path=folder,
            expected=f"a new folder, or one of plan {plan.fingerprint[:12]}",
            found=f"plan {str(there)[:12]}",
            remedy="choose another --output_dir, or remove what is there",
        )


def load_delta_dataset(
    name_or_path: str | Path, *, revision: str | None = None, streaming: bool = False, **hub_kwargs: Any
) -> DeltaDataset:
    """Load a delta dataset from a folder or a Hub repository.

    Args:
        name_or_path (`str` or `Path`): the folder that `build_delta_dataset` wrote, or a repository id, also as
            `org/name@v1.0`.
        revision (`str`, *optional*): tag, branch or commit, resolved to a commit once; `origin` keeps it.
        streaming (`bool`, *optional*, defaults to `False`): splits are `datasets.IterableDataset`s whose rows come as
            they are read; only manifest and roots are downloaded before, and no file is hashed.
        hub_kwargs: `token`, `cache_dir`, `local_files_only`.

    Raises:
        [`IncompleteArtifactError`]: there is no manifest: the build was not finished.
        [`DeltaDatasetError`]: a file is missing or changed, or a shadow run is in two splits.
        [`FormatVersionError`]: written by a newer version.
        [`HubError`]: no such repository or version, no access, or no answer.
    """
    patterns = KINDS["delta_dataset"].patterns
    if streaming:
        patterns = tuple(pattern for pattern in patterns if not pattern.endswith(".parquet"))
    fetched = fetch(name_or_path, allow_patterns=patterns, repo_type="dataset", revision=revision, **hub_kwargs)
    folder = fetched.folder
    check_manifest(folder, DELTA_DATASET_NAME, "delta dataset", error=IncompleteArtifactError)
    manifest: dict[str, Any] = dict(read_record(folder / DELTA_DATASET_NAME, DeltaDatasetRecord))
    # Datasets of earlier versions do not carry it.
    if "fingerprint" in manifest and manifest["fingerprint"] != dataset_fingerprint(manifest):
        raise DeltaDatasetError(
            "The manifest of the delta dataset was changed.",
            path=folder / DELTA_DATASET_NAME,
            expected=f"fingerprint {manifest['fingerprint']}",
            found=dataset_fingerprint(manifest),
            remedy="build or download the dataset again",
        )
    if streaming:
        dataset = DeltaDataset({}, manifest, folder, fetched.origin)
        schema = schema_of({role: dataset.layout(role) for role in ROLES})
        return replace(dataset, splits=stream_splits(fetched, manifest, schema, hub_kwargs.get("token")))
    for name, digest in manifest["files"].items():
        path = member(folder, name, error=DeltaDatasetError)
        found = file_sha256(path) if path.is_file() else "no file"
        if found != digest:
            raise DeltaDatasetError(
                "A file of the delta dataset is missing or was changed.",
                path=folder / name,
                expected=f"SHA-256 {digest}",
                found=found,
                remedy="build or download the dataset again",
            )
    dataset = DeltaDataset({}, manifest, folder, fetched.origin)
    schema = schema_of({role: dataset.layout(role) for role in ROLES})
    splits = load_splits(folder, manifest, schema)
    seen: dict[str, str] = {}
    for split, rows in splits.items():
        ids = checked_ids(rows, split, folder)
        for shadow_id in set(ids):
            if seen.setdefault(shadow_id, split) != split:
                raise DeltaDatasetError(
                    "A shadow run is in two splits, so held-out figures would lie.",
                    path=folder,
                    expected="splits by shadow run",
                    found=f"{shadow_id} in {seen[shadow_id]} and {split}",
                )
    return replace(dataset, splits=splits)


def _run_table(
    plan: ShadowPlan, plan_dir: str | Path, shadow_id: str, roots: dict[str, Root], features: datasets.Features
) -> pa.Table:
    """The pairs of one run."""
    run = plan.run(shadow_id)
    columns, steps = {}, []
    for role in ROLES:
        root = roots[role]
        record = read_run(plan, plan_dir, role, shadow_id, layout=root.layout)
        deltas_KP = root.layout.flatten(record.snapshots, dtype=torch.float64) - root.adapter.flat(dtype=torch.float64)
        values = pa.array(deltas_KP.to(torch.float32).reshape(-1).numpy())
        columns[f"{role}_blocks"] = pa.FixedSizeListArray.from_arrays(values, root.layout.numel)
        steps.append(record.steps)
    if len(steps[0]) != len(steps[1]):
        raise DeltaDatasetError(
            "TinyLM and LLM have different numbers of snapshots.",
            path=plan_dir,
            expected=f"{len(steps[0])} for {shadow_id}",
            found=len(steps[1]),
        )
    columns = {
        "shadow_id": pa.array([shadow_id] * len(steps[0])),
        "task": pa.array([run.task] * len(steps[0]), pa.string()),
        # The LLM's step: with equal recipes the TinyLM's too.
        "step": pa.array(steps[1], pa.int32()),
        **columns,
    }
    return pa.table(columns).cast(features.arrow_schema)


def _write_groups(writer: pq.ParquetWriter, tables: list[pa.Table]) -> None:
    table = pa.concat_tables(tables)
    writer.write_table(table, row_group_size=max(1, _ROW_GROUP_BYTES * len(table) // table.nbytes))


def _card(manifest: dict[str, Any]) -> str:
    """A card with what `datasets` and the Hub's viewer need, and the facts of the manifest."""
    splits = "\n".join(f"      - split: {split}\n        path: data/{split}-*.parquet" for split in manifest["splits"])
    counts = ", ".join(
        f"{name}: {count['runs']} runs, {count['pairs']} pairs" for name, count in manifest["splits"].items()
    )
    source, target = (manifest["roots"][role]["base_model"] for role in ROLES)
    names = [str(name).rstrip("/").rsplit("/", 1)[-1] for name in (source, target)]
    return f"""---
library_name: grad_transformer
tags:
  - grad_transformer
  - lora
configs:
  - config_name: default
    data_files:
{splits}
---

# Deltas of {names[0]} and {names[1]}

Pairs of LoRA deltas (adapter minus root) of two language models fine-tuned on the same subsets of public data.
{counts}. Splits are by shadow run: no run is on both sides.

Each row: `shadow_id`, `task`, `step`, and `source_blocks` and `target_blocks`, flattened in the order and with the
widths that `layouts` in `{DELTA_DATASET_NAME}` gives. Both roots lie beside the data.

```python
from datasets import load_dataset

pairs = load_dataset("path/or/repository")
```
"""
