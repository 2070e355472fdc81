"""`StudySpec`: what a study's YAML says. The defaults are the lab's study."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import UsageError


# Every mapping of a spec with its defaults; a key that is not here is refused.
LAB_DEFAULTS: dict[str, dict[str, Any]] = {
    "tinylms": {"S": {"hidden_size": 16}, "M": {}, "L": {"hidden_size": 32, "intermediate_size": 64}},
    "llms": {"S": {}, "L": {"num_hidden_layers": 6}},
    "lora": {"r": 2, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
    "recipe": {
        "adam_epsilon": 0.1,
        "per_device_batch_size": 16,
        "warmup_steps": 10,
        "lr_scheduler_type": "linear",
        "max_length": 32,
    },
    "tinylm_recipe": {"learning_rate": 3e-2, "max_steps": 120},
    "llm_recipe": {"learning_rate": 6e-2, "max_steps": 80},
    "shadows": {
        "num_runs": 140,
        "rows_per_run": 256,
        "strategy": "per_task",
        "checkpoints": 8,
        "pairs_per_run": 1,
        "validation_fraction": 0.1,
        "test_fraction": 0.1,
        "engine": "batched",
        "adapters_per_batch": 64,
        "public_rows": 1280,
    },
    "mapper": {"d_model": 128, "d_ff": 256, "num_layers": 2},
    "training": {
        "max_steps": 600,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 64,
        "warmup_steps": 50,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 100,
        "save_steps": 100,
        "save_total_limit": 1,
    },
    "clients": {"rows": 256, "test_rows": 128, "single": 6, "unseen": 4, "five_tasks": 2, "mixtures": 3},
    "privacy": {"rows": 2048, "batch_size": 256, "max_grad_norm": 1.0, "delta": 1e-5, "clients": 3},
    "ablations": {
        "epsilons": [0.5, 2.0, 8.0],
        "source_noise": 2.0,
        "shadow_rows": [32, 96],
        "shadow_rows_runs": 84,
        "train_runs": [28, 68],
        "checkpoints": [8],
    },
}
# Mappings whose keys are checked where they are used.
TEXT_ONLY: dict[str, dict[str, Any]] = {"data": {}, "refinement": {}, "loading": {"dtype": "bfloat16"}, "configs": {}}


@dataclass
class StudySpec:
    """What is studied."""

    world: str = field(
        default="lab",
        metadata={
            "help": "lab: small models made on the spot; text: models and tasks of the Hub.",
            "choices": ["lab", "text"],
        },
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Each is a world of its own."})
    experiments: list[str] = field(
        default_factory=lambda: ["all"], metadata={"help": "Names of experiments, or all; --dry_run lists them."}
    )
    tinylm: str = field(default="M", metadata={"help": "The TinyLM of all experiments but that on model scales."})
    llm: str = field(default="S", metadata={"help": "The LLM, likewise."})
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "Tasks of a text study, e.g. gsm8k; the lab has its own."}
    )
    tinylms: dict = field(
        default_factory=dict,
        metadata={"help": "Name to settings: of the lab's base models, or model, revision and config of the Hub's."},
    )
    llms: dict = field(default_factory=dict, metadata={"help": "Likewise."})
    lora: dict = field(default_factory=dict, metadata={"help": "r, lora_alpha, lora_dropout, target_modules."})
    recipe: dict = field(default_factory=dict, metadata={"help": "Fine-tuning recipe of both models."})
    tinylm_recipe: dict = field(default_factory=dict, metadata={"help": "What is particular to the TinyLM."})
    llm_recipe: dict = field(default_factory=dict, metadata={"help": "What is particular to the LLM."})
    shadows: dict = field(default_factory=dict, metadata={"help": "Shadow runs: num_runs, rows_per_run, ..."})
    mapper: dict = field(default_factory=dict, metadata={"help": "Mapper arguments, as of `train`."})
    training: dict = field(default_factory=dict, metadata={"help": "Training arguments, as of `train`."})
    clients: dict = field(default_factory=dict, metadata={"help": "Rows and numbers of clients."})
    privacy: dict = field(default_factory=dict, metadata={"help": "DP-SGD of the sweep."})
    ablations: dict = field(default_factory=dict, metadata={"help": "Values that the ablations try."})
    refinement: dict = field(default_factory=dict, metadata={"help": "Refinement arguments, as of `generate`."})
    data: dict = field(default_factory=dict, metadata={"help": "Task to {split: file}, instead of the Hub."})
    loading: dict = field(default_factory=dict, metadata={"help": "dtype and device of the Hub's base models."})
    configs: dict = field(
        default_factory=dict,
        metadata={"help": "Model to its config, for --dry_run where the Hub cannot be asked for shapes."},
    )

    def filled(self, known_experiments: Sequence[str]) -> StudySpec:
        """With all defaults in place; [`check_study`] looks at every value.

        Args:
            known_experiments (`Sequence[str]`): names that `experiments` may have.

        Raises:
            [`UsageError`]: unknown keys or experiments, models that are not there, or no tasks.
        """
        spec = copy.deepcopy(self)
        for name, defaults in LAB_DEFAULTS.items():
            given = getattr(spec, name)
            if not isinstance(given, dict):
                raise UsageError(f"`{name}` of the study is no mapping.", expected="names and values", found=given)
            if name in ("tinylms", "llms"):
                setattr(spec, name, given or copy.deepcopy(defaults))
                continue
            if name not in ("mapper", "training", "recipe", "tinylm_recipe", "llm_recipe"):
                _check_keys(name, given, defaults)
            # Sizes of the lab's models say nothing about others.
            own = self.world == "text" and name in ("mapper", "training", "recipe", "tinylm_recipe", "llm_recipe")
            setattr(spec, name, given if own else {**copy.deepcopy(defaults), **given})
        for name, defaults in TEXT_ONLY.items():
            given = getattr(spec, name)
            if not isinstance(given, dict):
                raise UsageError(f"`{name}` of the study is no mapping.", expected="names and values", found=given)
            setattr(spec, name, {**defaults, **given})
        for role, chosen, known in (("tinylm", spec.tinylm, spec.tinylms), ("llm", spec.llm, spec.llms)):
            if chosen not in known:
                raise UsageError(f"The study has no such {role}.", expected=", ".join(known), found=chosen)
        if spec.world == "text" and not spec.tasks:
            raise UsageError(
                "A text study needs tasks.",
                expected="tasks: [gsm8k, ...]",
                found="none",
                remedy="name the tasks under `tasks`",
            )
        unknown = set(spec.experiments) - {"all", *known_experiments}
        if unknown:
            raise UsageError(
                "There is no such experiment.", expected=", ".join(known_experiments), found=", ".join(sorted(unknown))
            )
        return spec

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _check_keys(name: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    unknown = given.keys() - known.keys()
    if unknown:
        raise UsageError(
            f"`{name}` of the study has an unknown key.", expected=", ".join(known), found=", ".join(sorted(unknown))
        )
