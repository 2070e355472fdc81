"""Types and ranges of a study's values: what passes can be planned, and its costs summed, in moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field
from typing_extensions import NotRequired, TypedDict

from ..documents import as_written
from ..errors import UsageError
from ..files import check_record
from ..finetuning import FineTuningRecipe
from ..refinement import RefinementArguments
from ..schemas import closed_record, open_record
from ..training import MapperArguments
from .spec import StudySpec


# What YAML takes for a number may be a name: `1.10` is a revision, as it was written.
Text = Annotated[str, Field(max_length=4096), BeforeValidator(as_written)]
Rows = Annotated[int, Field(ge=1, le=10_000_000)]
Runs = Annotated[int, Field(ge=1, le=100_000)]
Checkpoints = Annotated[int, Field(ge=1, le=1_000)]
Few = Annotated[int, Field(ge=0, le=100)]
Steps = Annotated[int, Field(ge=1, le=10_000_000)]
Size = Annotated[int, Field(ge=1, le=65_536)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
Values = Field(min_length=1, max_length=16)


@closed_record
class LabModelRecord(TypedDict, total=False):
    """A base model of the lab: what differs from the preset."""

    hidden_size: Annotated[int, Field(ge=4, le=1024)]
    num_hidden_layers: Annotated[int, Field(ge=1, le=64)]
    num_attention_heads: Annotated[int, Field(ge=1, le=64)]
    num_key_value_heads: Annotated[int, Field(ge=1, le=64)]
    intermediate_size: Annotated[int, Field(ge=1, le=8192)]
    initializer_range: Positive
    rope_theta: Positive
    pretraining_steps: Steps
    pretraining_batch_size: Size
    pretraining_learning_rate: Positive
    fine_tuning_steps: Steps
    fine_tuning_learning_rate: Positive


@closed_record
class HubModelRecord(TypedDict):
    """A base model of the Hub."""

    model: Text
    revision: NotRequired[Text | None]
    config: NotRequired[dict[str, Any]]


@closed_record
class LoraRecord(TypedDict):
    r: Annotated[int, Field(ge=1, le=4096)]
    lora_alpha: Positive | Annotated[int, Field(ge=1, le=10**9)]
    lora_dropout: Fraction
    target_modules: Annotated[list[Text], Field(min_length=1, max_length=1000)]


@closed_record
class ShadowsRecord(TypedDict):
    num_runs: Runs
    rows_per_run: Rows
    strategy: Literal["per_task", "mixed"]
    checkpoints: Checkpoints
    pairs_per_run: Checkpoints
    validation_fraction: Fraction
    test_fraction: Fraction
    engine: Literal["batched", "trl"]
    adapters_per_batch: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"]
    public_rows: Rows


@open_record
class TrainingRecord(TypedDict, total=False):
    """Training arguments that the costs are estimated from; the others are checked by transformers."""

    max_steps: Steps
    learning_rate: Annotated[float, Field(ge=0, le=100)]
    per_device_train_batch_size: Size
    num_train_epochs: Annotated[float, Field(gt=0, le=100_000)]
    warmup_steps: Annotated[float, Field(ge=0, le=1e7)]
    save_total_limit: Annotated[int, Field(ge=1, le=1000)] | None


@closed_record
class ClientsRecord(TypedDict):
    rows: Rows
    test_rows: Rows
    single: Annotated[int, Field(ge=1, le=100)]
    unseen: Few
    five_tasks: Few
    mixtures: Few


@closed_record
class PrivacyRecord(TypedDict):
    rows: Rows
    batch_size: Rows
    max_grad_norm: Positive
    delta: Annotated[float, Field(gt=0, lt=1)]
    clients: Annotated[int, Field(ge=1, le=100)]


@closed_record
class AblationsRecord(TypedDict):
    epsilons: Annotated[list[Annotated[float, Field(gt=0, le=1000)]], Values]
    source_noise: Annotated[float, Field(ge=0, le=1000)]
    shadow_rows: Annotated[list[Rows], Values]
    shadow_rows_runs: Runs
    train_runs: Annotated[list[Runs], Values]
    checkpoints: Annotated[list[Checkpoints], Values]


@closed_record
class LoadingRecord(TypedDict, total=False):
    dtype: Text
    device: Text | None


@open_record
class ModelShapeRecord(TypedDict):
    """A model's config, of which the shapes are taken."""

    model_type: Text


@closed_record
class StudyRecord(TypedDict):
    """All of a study, defaults filled in."""

    world: Literal["lab", "text"]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=20)]
    experiments: Annotated[list[Text], Field(min_length=1, max_length=100)]
    tinylm: Text
    llm: Text
    tasks: Annotated[list[Text], Field(max_length=100)]
    tinylms: Annotated[dict[Text, LabModelRecord | HubModelRecord], Values]
    llms: Annotated[dict[Text, LabModelRecord | HubModelRecord], Values]
    lora: LoraRecord
    recipe: dict[str, Any]
    tinylm_recipe: dict[str, Any]
    llm_recipe: dict[str, Any]
    shadows: ShadowsRecord
    mapper: dict[str, Any]
    training: TrainingRecord
    clients: ClientsRecord
    privacy: PrivacyRecord
    ablations: AblationsRecord
    refinement: dict[str, Any]
    data: Annotated[dict[str, dict[str, Text]], Field(max_length=1000)]
    loading: LoadingRecord
    configs: Annotated[dict[str, ModelShapeRecord], Field(max_length=100)]


# Of the arguments of other commands, whose classes have types but no upper ends.
_LARGEST = {
    "d_model": 65_536,
    "d_ff": 262_144,
    "num_layers": 512,
    "num_heads": 1024,
    "num_prompts": 10_000_000,
    "max_new_tokens": 65_536,
    "rounds": 100,
    "steps": 1_000_000,
    "annotators": 10_000,
    "screening_prompts": 1_000_000,
    "batch_size": 65_536,
    "top_tokens": 65_536,
}


def check_study(spec: StudySpec) -> StudySpec:
    """A filled study with every value of the right type and in its range.

    Raises:
        [`UsageError`], [`RecipeError`]: names the value, and what it may be.
    """
    data = spec.to_dict()
    study = check_record(data, StudyRecord, error=UsageError)
    kind = LabModelRecord if study["world"] == "lab" else HubModelRecord
    for role in ("tinylms", "llms"):
        check_record(data[role], dict[str, kind], error=UsageError)  # type: ignore[valid-type]
    for own in ("tinylm_recipe", "llm_recipe"):
        FineTuningRecipe.from_dict({**study["recipe"], **study[own], "snapshot_last": study["shadows"]["checkpoints"]})
    _check_arguments("mapper", study["mapper"], MapperArguments)
    _check_arguments("refinement", study["refinement"], RefinementArguments)
    shadows = study["shadows"]
    held_out = shadows["validation_fraction"] + shadows["test_fraction"]
    if held_out >= 1 or shadows["pairs_per_run"] > shadows["checkpoints"]:
        raise UsageError(
            "The shadow runs of the study do not fit together.",
            expected="held-out fractions below 1 together, and pairs_per_run up to checkpoints",
            found=f"{held_out}, {shadows['pairs_per_run']} of {shadows['checkpoints']}",
        )
    return StudySpec(**cast(dict[str, Any], study))


def _check_arguments(name: str, given: Mapping[str, Any], kind: type) -> None:
    known = [field.name for field in fields(kind)]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise UsageError(
            f"`{name}` of the study has an unknown key.", expected=", ".join(known), found=", ".join(unknown)[:200]
        )
    check_record(dict(given), kind, error=UsageError)
    for key, value in given.items():
        if key in _LARGEST and isinstance(value, int) and not 0 <= value <= _LARGEST[key]:
            raise UsageError(
                f"`{key}` of the study's `{name}` is out of range.", expected=f"0 to {_LARGEST[key]:,}", found=value
            )
