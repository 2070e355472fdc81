"""The stages of `grad-transformer demo`, each of which finds what an earlier, interrupted run has finished."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig
from tqdm.auto import tqdm
from transformers.utils import logging

from ..adapters import LoraAdapter, create_root
from ..adapters.io import read_record, write_json_atomic, write_text_atomic
from ..client import finetune_client
from ..constants import ADAPTER_CONFIG_NAME, DEMO_NAME, FORMAT_VERSION, HELDOUT_NAME, TRAINING_LOG_NAME
from ..errors import UsageError
from ..evaluation.clients import ClientCase
from ..evaluation.records import METHODS, Report
from ..finetuning import FineTuningRecipe, check_rows, load_base, load_rows
from ..lab import LabClient, LabWorld, pretrain_base_models
from ..lab.inputs import NUM_DIGITS
from ..modeling_grad_transformer import GradTransformer
from ..refinement import RefinementArguments
from ..schemas import DemoRecord, TrainingLogRecord
from ..shadow import FineTuneJob, build_delta_dataset, fine_tune_many, load_delta_dataset, plan_shadows, run_shadows
from ..shadow.progress import RunBar
from ..shadow.run import root_folder
from ..tokenization_lora_delta import LoraDeltaTokenizer
from ..training import GradTransformerTrainingArguments, MapperArguments
from ._training import train
from .evaluate import make_report, make_scorer, refined_methods


logger = logging.get_logger(__name__)

HELDOUT_FRACTION = 0.1

# What is told at the start of each.
STAGES = {
    "base_models": "two small base models, pretrained here",
    "plan": "shadow subsets of the public rows, and both roots",
    "shadow_source": "shadow runs of the TinyLM",
    "shadow_target": "shadow runs of the LLM",
    "build": "pairs of deltas",
    "train": "the mapper",
    "clients": "clients' adapters, and their ceilings",
    "refine": "refinement on public prompts",
    "report": "scores beside all controls",
}


class Demo:
    """The stages of the demo, each of which finds what an earlier, interrupted run has finished.

    Args:
        world ([`LabWorld`]): tasks, rows, clients and sizes.
        folder (`Path`): where everything goes.
    """

    def __init__(self, world: LabWorld, folder: Path):
        self.world = world
        self.folder = folder
        self.seconds: dict[str, float] = {}

    def run(self) -> Report:
        """All stages in turn; returns the report."""
        self._claim_folder()
        with self._stage("base_models"):
            tinylm, llm = self._base_models()
        with self._stage("plan"):
            plan_dir = self._plan(tinylm, llm)
        for role in ("source", "target"):
            with self._stage(f"shadow_{role}"):
                run_shadows(plan_dir, roles=[role], adapters_per_batch=64)
        with self._stage("build"):
            build_delta_dataset(plan_dir, self.folder / "delta_dataset")
        with self._stage("train"):
            mapper = self._train()
        with self._stage("clients"):
            cases = self._clients(mapper)
        with self._stage("refine"):
            methods = self._refine(mapper, cases)
        logger.info(f"{len(STAGES)} of {len(STAGES)}: {STAGES['report']}")
        return self._report(mapper, cases, methods)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        logger.info(f"{list(STAGES).index(name) + 1} of {len(STAGES)}: {STAGES[name]}")
        started = time.perf_counter()
        yield
        # A stage that was interrupted, or found done, keeps the time that it took before.
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self._save_state()

    def _claim_folder(self) -> None:
        """Refuse a folder of another demo: its parts must not be mixed."""
        path = self.folder / DEMO_NAME
        mine = {"preset": self.world.preset.name, "seed": self.world.seed}
        if path.is_file():
            state = read_record(path, DemoRecord)
            found = {name: state.get(name) for name in mine}
            if found != mine:
                raise UsageError(
                    "The folder holds another demo.",
                    path=self.folder,
                    expected=json.dumps(mine),
                    found=json.dumps(found),
                    remedy="choose another --output_dir",
                )
            self.seconds = dict(state.get("seconds", {}))
        self._save_state()

    def _save_state(self) -> None:
        state = {"format_version": FORMAT_VERSION, "preset": self.world.preset.name, "seed": self.world.seed}
        write_json_atomic(self.folder / DEMO_NAME, {**state, "seconds": self.seconds})

    def _base_models(self) -> tuple[Path, ...]:
        return pretrain_base_models(self.world, self.folder / "base_models")

    def _plan(self, tinylm: Path, llm: Path) -> Path:
        """Public rows, both roots, and the plan of the shadow runs."""
        preset, plan_dir = self.world.preset, self.folder / "shadows"
        public = self.folder / "public.jsonl"
        if not public.is_file():
            write_rows(public, self.world.public_rows())
        lora = LoraConfig(
            r=preset.lora_rank,
            lora_alpha=preset.lora_alpha,
            target_modules=list(preset.lora_target_modules),
            task_type="CAUSAL_LM",
        )
        roots = {
            role: create_root(base, lora, output_dir=root_folder(plan_dir, role), seed=self.world.seed)
            for role, base in (("source", tinylm), ("target", llm))
        }
        plan = plan_shadows(
            load_rows(public),
            num_runs=preset.shadow_runs,
            rows_per_run=preset.rows_per_subset,
            source_root=roots["source"],
            target_root=roots["target"],
            source_recipe=FineTuningRecipe(**preset.recipe_arguments(preset.tinylm)),
            target_recipe=FineTuningRecipe(**preset.recipe_arguments(preset.llm)),
            data={"path": str(public.resolve())},
            seed=self.world.seed,
            strategy="per_task",
            validation_fraction=HELDOUT_FRACTION,
            test_fraction=HELDOUT_FRACTION,
        )
        plan.save(plan_dir)
        logger.info(plan.describe())
        return plan_dir

    def _train(self) -> GradTransformer:
        preset, folder = self.world.preset, self.folder / "mapper"
        if not (folder / HELDOUT_NAME).is_file():
            every = max(preset.mapper_steps // 6, 1)
            train(
                self.folder / "delta_dataset",
                MapperArguments(
                    d_model=preset.mapper_d_model, d_ff=preset.mapper_d_ff, num_layers=preset.mapper_layers
                ),
                GradTransformerTrainingArguments(
                    output_dir=str(folder),
                    max_steps=preset.mapper_steps,
                    learning_rate=preset.mapper_learning_rate,
                    per_device_train_batch_size=preset.mapper_batch_size,
                    warmup_steps=every // 2,
                    eval_strategy="steps",
                    save_strategy="steps",
                    eval_steps=every,
                    save_steps=every,
                    save_total_limit=1,
                    seed=self.world.seed,
                ),
            )
        return GradTransformer.from_pretrained(folder)

    def _clients(self, mapper: GradTransformer) -> list[ClientCase]:
        """Every client's TinyLM adapter with TRL, and, as the ceiling, the LLM fine-tuned on the client's rows."""
        clients = self.world.clients()
        source, target = mapper.tokenizers()
        for client in tqdm(clients, desc="clients' TinyLMs", unit="client"):
            folder = self.client_folder(client)
            if not (folder / "tinylm" / ADAPTER_CONFIG_NAME).is_file():
                write_rows(folder / "private.jsonl", client.train_rows)
                write_rows(folder / "test.jsonl", client.test_rows)
                finetune_client(source, client.train_rows, folder / "tinylm", seed=self.world.seed)
        self._ceilings(target, clients)
        return [
            ClientCase(
                id=client.id,
                adapter=LoraAdapter.from_pretrained(self.client_folder(client) / "tinylm", layout=source.layout),
                test_rows=client.test_rows,
                llm_adapter=LoraAdapter.from_pretrained(
                    self.client_folder(client) / "llm_finetuned", layout=target.layout
                ),
                kind=client.kind,
                task=client.task,
                tasks=frozenset(row["task"] for row in client.train_rows),
            )
            for client in clients
        ]

    def _ceilings(self, target: LoraDeltaTokenizer, clients: Sequence[LabClient]) -> None:
        missing = [
            client
            for client in clients
            if not (self.client_folder(client) / "llm_finetuned" / ADAPTER_CONFIG_NAME).is_file()
        ]
        if not missing:
            return
        assert target.recipe is not None
        model, tokenizer = load_base(target.root.base_model)
        jobs = [FineTuneJob(check_rows(client.train_rows), self.world.seed, client.id) for client in missing]
        recipe = FineTuningRecipe.from_dict(target.recipe)
        with RunBar("clients' LLMs, as ceilings", total=len(missing)) as bar:
            results = fine_tune_many(model, tokenizer, target.root, jobs, recipe, on_progress=bar.at_work)
            for client, result in zip(missing, results, strict=True):
                adapter = target.root.adapter.with_values(target.layout.flatten(result.tensors))
                adapter.save_pretrained(self.client_folder(client) / "llm_finetuned")
                bar.finish()

    def _refine(self, mapper: GradTransformer, cases: list[ClientCase]) -> dict[str, list[LoraAdapter]]:
        """The clients' adapters made in further ways, see [`refined_methods`]."""
        folders = {name: [self.folder / "clients" / case.id / name for case in cases] for name in METHODS}
        if not all((folder / ADAPTER_CONFIG_NAME).is_file() for group in folders.values() for folder in group):
            made = refined_methods(
                mapper,
                load_delta_dataset(self.folder / "delta_dataset"),
                [case.adapter for case in cases],
                load_rows(self.folder / "public.jsonl"),
                RefinementArguments(max_new_tokens=NUM_DIGITS + 1, seed=self.world.seed),
            )
            for name, adapters in made.items():
                for folder, adapter in zip(folders[name], adapters, strict=True):
                    adapter.save_pretrained(folder)
        layout = mapper.tokenizers()[1].layout
        return {
            name: [LoraAdapter.from_pretrained(folder, layout=layout) for folder in group]
            for name, group in folders.items()
        }

    def _report(
        self, mapper: GradTransformer, cases: list[ClientCase], methods: dict[str, list[LoraAdapter]]
    ) -> Report:
        scorers = [make_scorer(mapper, role, None, 256) for role in ("source", "target")]
        report, adapters = make_report(
            mapper,
            load_delta_dataset(self.folder / "delta_dataset"),
            cases,
            *scorers,
            output_dir=self.folder,
            preset=self.world.preset.name,
            seed=self.world.seed,
            wall_seconds=self.seconds,
            training_log=read_record(self.folder / "mapper" / TRAINING_LOG_NAME, TrainingLogRecord)["log_history"],
            methods=methods,
        )
        for case, adapter in zip(cases, adapters, strict=True):
            adapter.save_pretrained(self.folder / "clients" / case.id / "generated")
        return report

    def client_folder(self, client: LabClient) -> Path:
        return self.folder / "clients" / client.id


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Rows as JSON lines."""
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
