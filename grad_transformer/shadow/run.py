"""Running a shadow plan: what is missing is fine-tuned, what is finished is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..adapters import Root
from ..adapters.statistics import DeltaReproducibility, delta_reproducibility
from ..constants import RUNS_FOLDER
from ..errors import GradTransformerError, IncompleteArtifactError, PlanError, UsageError
from ..finetuning import FineTuningRecipe, SftResult, attach_root, load_base, run_sft, tokenize_rows
from ..locks import sole_writer
from ..outputs import disk_error, holds, try_writing
from .batched import run_batched
from .batches import FineTuneJob
from .executors import ExecutorName, Group, make_workers, spread
from .memory import choose_batch_size
from .plan import ROLES, ShadowPlan
from .progress import BatchProgress, RunBar
from .records import missing_runs, read_run, write_run


logger = logging.get_logger(__name__)

Engine = Literal["trl", "batched"]

# Below this, deltas of one task agree so little that there is hardly anything to learn.
LITTLE_TO_LEARN = 0.1
# Runs that a worker gets at a time where it chooses itself how many to train at once.
GROUP_SIZE = 16


def root_folder(plan_dir: str | Path, role: str) -> Path:
    """Where the root of a model lies beside its plan."""
    return Path(plan_dir) / f"{role}_root"


def load_plan_root(plan: ShadowPlan, plan_dir: str | Path, role: str) -> Root:
    """The root beside the plan, checked to be the plan's.

    Raises:
        [`IncompleteArtifactError`]: it is missing, or another one.
    """
    return load_checked_root(root_folder(plan_dir, role), plan.side(role).root["fingerprint"])


def load_checked_root(folder: str | Path, fingerprint: str) -> Root:
    """A root that must be a certain one.

    Raises:
        [`IncompleteArtifactError`]: it is another one.
    """
    root = Root.from_pretrained(folder)
    if root.fingerprint != fingerprint:
        raise IncompleteArtifactError(
            "The root is not the one that plan or delta dataset names.",
            path=folder,
            expected=f"fingerprint {fingerprint}",
            found=root.fingerprint,
            remedy="restore the folder as the command that made it left it",
        )
    return root


def load_plan(plan_dir: str | Path) -> ShadowPlan:
    """The plan of a folder of shadow runs.

    Raises:
        [`PlanError`]: there is none, or it is the copy in a delta dataset, which has no runs.
    """
    kind = holds(plan_dir)
    if kind not in (None, "a shadow plan"):
        raise PlanError(
            "The folder is not that of a shadow plan.",
            path=plan_dir,
            expected="the folder that `grad-transformer plan` wrote",
            found=kind,
            remedy="name the plan's own folder",
        )
    return ShadowPlan.load(plan_dir)


def run_shadows(
    plan_dir: str | Path,
    *,
    roles: Sequence[str] = ROLES,
    engine: Engine = "batched",
    adapters_per_batch: int | Literal["auto"] = "auto",
    rows: datasets.Dataset | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    gradient_checkpointing: bool = False,
    executor: ExecutorName = "local",
    num_workers: int = 1,
    cpus_per_worker: float | None = None,
    gpus_per_worker: float | None = None,
    retries: int = 3,
    **sft_config: Any,
) -> dict[str, int]:
    """Fine-tune the models of a plan on every subset that has no finished run.

    Each finished run is one file, whole or absent, so a killed process loses the runs in progress and no other.

    Args:
        plan_dir (`str` or `Path`): folder with `plan.json` and both roots; receives `runs/`.
        roles (`Sequence[str]`, *optional*): `"source"` (TinyLM), `"target"` (LLM), by default both in turn.
        engine (`str`, *optional*, defaults to `"batched"`): `"batched"` trains many adapters at once, `"trl"` one
            after another with `SFTTrainer`; both give the same deltas.
        adapters_per_batch (`int` or `"auto"`, *optional*, defaults to `"auto"`): how many at once; `"auto"`: as many
            as fill the processor, and no more than fit in its free memory.
        rows (`datasets.Dataset`, *optional*): the public data; default: loaded from where the plan says.
        dtype, device: see [`load_base`].
        gradient_checkpointing (`bool`, *optional*, defaults to `False`): less memory for more time, same result.
        executor (`str`, *optional*, defaults to `"local"`): `"local"` for processes of this machine, `"ray"` for
            workers of a Ray cluster.
        num_workers (`int`, *optional*, defaults to 1): processes; one `"local"` worker is this process itself.
            Others load the public data themselves, and are started fresh: call this from a script that can be
            imported.
        cpus_per_worker, gpus_per_worker (`float`, *optional*): see [`make_workers`].
        retries (`int`, *optional*, defaults to 3): how often the runs of a lost worker are handed out again.
        sft_config: for the TRL engine, other fields of `SFTConfig`.

    Returns:
        `dict[str, int]`: for each role how many runs were done now.

    Raises:
        [`PlanError`]: the data are not the plan's, or the folder is not that of a plan.
        [`OutputError`]: the folder cannot be written to, or another process is doing runs of the same role.
        [`BaseModelMismatchError`]: a base model is not the one that its root was made for.
        [`RecipeError`]: the engine cannot do what the recipe asks for, or a run diverged.
        [`UsageError`]: options that do not go together, or no Ray.
        [`WorkerLostError`]: a worker was lost on the same runs more than `retries` times.
    """
    _check_engine(engine, adapters_per_batch)
    plan = load_plan(plan_dir)
    here = executor == "local" and num_workers == 1
    if num_workers < 1 or executor not in ("local", "ray") or (rows is not None and not here):
        raise UsageError(
            "These options do not go together.",
            expected="executor local or ray, num_workers of at least 1, and rows that the plan names",
            found=f"executor={executor!r}, num_workers={num_workers}" + (", rows" if rows is not None else ""),
        )
    options = {
        "engine": engine,
        "adapters_per_batch": adapters_per_batch,
        "gradient_checkpointing": gradient_checkpointing,
        **sft_config,
    }
    with ExitStack() as locks:
        for role in roles:
            if missing_runs(plan, plan_dir, role):
                try_writing(plan_dir)
                locks.enter_context(sole_writer(Path(plan_dir) / RUNS_FOLDER / role))
        # Only now: another process may have finished some before it let go.
        missing = {role: missing_runs(plan, plan_dir, role) for role in roles}
        if here:
            _do_here(plan, plan_dir, missing, rows, dtype, device, options)
        elif any(missing.values()):
            size = _group_size(adapters_per_batch, max(map(len, missing.values())), num_workers)
            groups = [
                Group(role, tuple(ids[start : start + size]))
                for role, ids in missing.items()
                for start in range(0, len(ids), size)
            ]
            workers = make_workers(
                executor,
                str(Path(plan_dir).resolve()),
                {**options, "dtype": dtype, "device": device},
                do_group,
                num_workers=num_workers,
                cpus_per_worker=cpus_per_worker,
                gpus_per_worker=gpus_per_worker,
            )
            spread(groups, workers, num_workers=num_workers, retries=retries)
    return {role: len(ids) for role, ids in missing.items()}


def _do_here(
    plan: ShadowPlan,
    plan_dir: str | Path,
    missing: Mapping[str, Sequence[str]],
    rows: datasets.Dataset | None,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    options: Mapping[str, Any],
) -> None:
    """Do the missing runs of each role in this process."""
    if any(missing.values()):
        if rows is None:
            rows = plan.load_rows(plan_dir)
        else:
            plan.check_rows(rows)
    for role, ids in missing.items():
        if not ids or rows is None:
            logger.info(f"All {len(plan.runs)} {role} runs are finished.")
            continue
        side = _load_side(plan, plan_dir, role, rows, dtype, device)
        with RunBar(f"{role} runs", total=len(plan.runs), finished=len(plan.runs) - len(ids)) as bar:
            results = side.fine_tune(ids, on_progress=bar.at_work, **options)
            for shadow_id, result in zip(ids, results, strict=True):
                write_run(plan, plan_dir, role, shadow_id, result, engine=options["engine"])
                bar.finish()


def fine_tune_many(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    root: Root,
    jobs: Iterator[FineTuneJob] | Sequence[FineTuneJob],
    recipe: FineTuningRecipe,
    *,
    engine: Engine = "batched",
    adapters_per_batch: int | Literal["auto"] = "auto",
    gradient_checkpointing: bool = False,
    on_progress: Callable[[BatchProgress], Any] | None = None,
    **sft_config: Any,
) -> Iterator[SftResult]:
    """Fine-tune one adapter for each job and yield the results in order, each as soon as it is there.

    Args:
        model, tokenizer: the base model as [`load_base`] gives it.
        root ([`Root`]): where all start.
        jobs: the rows and seed of each.
        recipe ([`FineTuningRecipe`]).
        engine, adapters_per_batch, gradient_checkpointing, sft_config: see [`run_shadows`].
        on_progress (`Callable[[BatchProgress], Any]`, *optional*): told while a batch of adapters trains.
    """
    _check_engine(engine, adapters_per_batch)
    if engine == "trl":
        peft_model = attach_root(model, root)
        try:
            for job in jobs:
                yield run_sft(
                    peft_model,
                    tokenizer,
                    job.rows,
                    recipe,
                    root=root,
                    seed=job.seed,
                    name=job.name,
                    gradient_checkpointing=gradient_checkpointing,
                    **sft_config,
                )
        finally:
            peft_model.unload()
        return

    if sft_config:
        raise UsageError(
            "The batched engine takes no fields of SFTConfig.",
            expected="--engine trl, or none",
            found=", ".join(sft_config),
        )

    batch: list[FineTuneJob] = []

    def progress(step: int, loss: torch.Tensor) -> None:
        if on_progress is not None and (step % 10 == 0 or step == recipe.max_steps):
            on_progress(BatchProgress(len(batch), step, recipe.max_steps, float(loss)))

    iterator = iter(jobs)
    tokens_per_pass = None
    if adapters_per_batch == "auto":
        first = next(iterator, None)
        if first is None:
            return
        iterator = chain([first], iterator)
        root.check_base(model)
        size = choose_batch_size(model, tokenizer, root, first, recipe, gradient_checkpointing=gradient_checkpointing)
        adapters_per_batch, tokens_per_pass = size.num_adapters, size.tokens_per_pass
        logger.info(f"{adapters_per_batch} adapters at once, {size.bytes_per_token:,.0f} bytes per token measured.")
    while batch := list(islice(iterator, adapters_per_batch)):
        yield from run_batched(
            model,
            tokenizer,
            root,
            batch,
            recipe,
            gradient_checkpointing=gradient_checkpointing,
            tokens_per_pass=tokens_per_pass,
            progress=progress,
        )


@dataclass(frozen=True)
class _Side:
    """One of a plan's two models, loaded, with the public rows as its tokens."""

    plan: ShadowPlan
    role: str
    root: Root
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens: datasets.Dataset

    def fine_tune(self, shadow_ids: Sequence[str], **options: Any) -> Iterator[SftResult]:
        """Results of these runs, in order; options of [`fine_tune_many`]."""
        runs = map(self.plan.run, shadow_ids)
        jobs = (FineTuneJob(self.tokens.select(run.row_indices), run.seed, run.shadow_id) for run in runs)
        recipe = self.plan.side(self.role).recipe
        return fine_tune_many(self.model, self.tokenizer, self.root, jobs, recipe, **options)


def _load_side(
    plan: ShadowPlan,
    plan_dir: str | Path,
    role: str,
    rows: datasets.Dataset,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
) -> _Side:
    root = load_plan_root(plan, plan_dir, role)
    model, tokenizer = load_base(root.base_model, revision=root.base_revision, dtype=dtype, device=device)
    return _Side(plan, role, root, model, tokenizer, tokenize_rows(rows, tokenizer, plan.side(role).recipe.max_length))


@lru_cache(maxsize=1)
def _cached_side(plan_dir: str, role: str, dtype: str | torch.dtype, device: str | None) -> _Side:
    """What a worker keeps from one group of runs to the next."""
    plan = ShadowPlan.load(plan_dir)
    return _load_side(plan, plan_dir, role, plan.load_rows(plan_dir), dtype, device)


def do_group(
    plan_dir: str, role: str, shadow_ids: Sequence[str], options: Mapping[str, Any]
) -> dict[str, str | None] | None:
    """Do those of these runs that have no file yet; what a worker calls. Returns the typed error, if there was one."""
    settings = dict(options)
    try:
        side = _cached_side(plan_dir, role, settings.pop("dtype"), settings.pop("device"))
        missing = set(missing_runs(side.plan, plan_dir, role))
        ids = [shadow_id for shadow_id in shadow_ids if shadow_id in missing]
        for shadow_id, result in zip(ids, side.fine_tune(ids, **settings), strict=True):
            write_run(side.plan, plan_dir, role, shadow_id, result, engine=settings["engine"])
    except Exception as cause:
        error = cause if isinstance(cause, GradTransformerError) else disk_error(cause)
        if error is None:
            raise
        return error.to_dict()
    return None


def _group_size(adapters_per_batch: int | str, num_runs: int, num_workers: int) -> int:
    """Runs of a group: a batch of adapters, but no more than every worker's share."""
    share = max(1, -(-num_runs // num_workers))
    return min(share, GROUP_SIZE if isinstance(adapters_per_batch, str) else adapters_per_batch)


def _check_engine(engine: str, adapters_per_batch: int | str) -> None:
    enough = adapters_per_batch == "auto" if isinstance(adapters_per_batch, str) else adapters_per_batch >= 1
    if engine not in ("trl", "batched") or not enough:
        raise UsageError(
            "There is no such engine.",
            expected="engine trl or batched, adapters_per_batch auto or at least 1",
            found=f"engine={engine!r}, adapters_per_batch={adapters_per_batch}",
        )


def shadow_summary(plan_dir: str | Path) -> dict[str, DeltaReproducibility | None]:
    """How well deltas of one task agree, for each model; the last snapshot of every finished training run counts.

    Held-out runs do not: they are what a mapper is measured on. This bounds what any mapper can learn, so look at it
    before training one. None where tasks are unknown, or no task has two finished training runs.
    """
    plan = load_plan(plan_dir)
    summary: dict[str, DeltaReproducibility | None] = {}
    for role in ROLES:
        layout = load_plan_root(plan, plan_dir, role).layout
        missing = set(missing_runs(plan, plan_dir, role))
        finished = [
            run for run in plan.runs if run.split == "train" and run.shadow_id not in missing and run.task is not None
        ]
        counts: Mapping[str | None, int] = {run.task: sum(r.task == run.task for r in finished) for run in finished}
        summary[role] = None
        if any(count > 1 for count in counts.values()):
            records = (read_run(plan, plan_dir, role, run.shadow_id, layout=layout) for run in finished)
            deltas_NP = torch.stack(
                [layout.flatten({key: values[-1] for key, values in record.snapshots.items()}) for record in records]
            )
            summary[role] = delta_reproducibility(deltas_NP, [run.task for run in finished])
    target = summary["target"]
    if target is not None and target.leave_one_out_r2 is not None and target.leave_one_out_r2 < LITTLE_TO_LEARN:
        logger.warning(
            f"LLM deltas of one task hardly agree (leave-one-out R² {target.leave_one_out_r2:.3f}): there is little "
            "to learn. A larger adam_epsilon, more rows or more steps make them agree."
        )
    return summary
