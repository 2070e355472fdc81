"""What every JSON and YAML file holds that is read: one typed dict each, checked by `files.py`.

Fields that a schema does not name are kept: a file of a later version, with more in it, stays readable as long as its
`format_version` does. A report is not here: its dataclasses are its schema (`evaluation/records.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, with_config
from typing_extensions import NotRequired, TypedDict

from . import constants
from .documents import as_written


# Fields that are not named: kept, in what programs write; refused, in what people write.
open_record = with_config(ConfigDict(extra="allow"))
closed_record = with_config(ConfigDict(extra="forbid"))

# Longer than any name, id or path; sentences are longer.
Name = Annotated[str, Field(max_length=4096)]
# In YAML: `id: 007` is a name.
Written = Annotated[str, Field(min_length=1, max_length=4096), BeforeValidator(as_written)]
Digest = Annotated[str, Field(max_length=128)]
Commit = Annotated[str, Field(pattern=f"^{constants.COMMIT_PATTERN}$")]
RepoId = Annotated[str, Field(pattern=f"^{constants.REPO_ID_PATTERN}$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=2**53)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Split = Literal["train", "validation", "test"]
Object = dict[str, Any]

# A model has at most so many blocks, and a block so many values, as adapters of the largest models have today.
MAX_BLOCKS = 100_000
MAX_WIDTH = 2**31


# The Hub, adapters and roots


@open_record
class OriginRecord(TypedDict):
    """`hub_origin.json`, and wherever an artifact names another: a version of a repository."""

    repo_id: RepoId
    revision: NotRequired[Name | None]
    sha: Commit
    private: NotRequired[bool | None]


@open_record
class PullRecord(OriginRecord):
    """What `pull` remembers, in the user's own cache, of a folder that it wrote."""

    folder: str
    files: dict[str, Digest]


@open_record
class AdapterConfigRecord(TypedDict):
    """`adapter_config.json`. What peft's other fields may hold is decided by `LoraLayout`."""

    base_model_name_or_path: NotRequired[Name | None]
    revision: NotRequired[Name | None]
    target_modules: NotRequired[Name | list[Name] | None]


@open_record
class RootFactsRecord(TypedDict):
    """What other artifacts say of the root that they were made from."""

    fingerprint: Digest
    base_model: Name
    base_revision: NotRequired[Name | None]
    base_fingerprint: Digest


@open_record
class RootReferenceRecord(TypedDict):
    """The root that an adapter says that it started from."""

    fingerprint: NotRequired[Digest]


@open_record
class RootRecord(RootFactsRecord):
    """`root.json`."""

    format_version: Positive
    seed: NotRequired[int]
    peft_version: NotRequired[Name]


@open_record
class HashRecord(TypedDict):
    """A client of a generated adapter of which no repository is named."""

    sha256: Digest
    repo_id: NotRequired[None]


@open_record
class ShiftFactsRecord(TypedDict):
    """Where a client lies among the shadows."""

    shift: Number


@open_record
class RefinementRecord(TypedDict):
    """How one adapter was refined."""

    candidate: Name
    agreement_by_round: Annotated[list[Number], Field(min_length=1)]
    annotators: NotRequired[list[Name]]


@open_record
class GeneratedRecord(TypedDict):
    """What a generated adapter says of how it was made."""

    source_base_model: NotRequired[Name | None]
    mapper: NotRequired[OriginRecord | None]
    num_clients: NotRequired[Positive]
    clients: NotRequired[list[OriginRecord | HashRecord]]
    order: NotRequired[Name]
    aggregation: NotRequired[Name]
    shift: NotRequired[list[ShiftFactsRecord] | None]
    refinement: NotRequired[list[RefinementRecord] | None]


@open_record
class AdapterMetadataRecord(TypedDict):
    """`grad_transformer.json` beside an adapter. The privacy statement is read by `adapters/privacy.py`."""

    format_version: NotRequired[Positive]
    root: NotRequired[RootReferenceRecord]
    mapper: NotRequired[OriginRecord | None]
    num_examples: NotRequired[Count | None]
    generated: NotRequired[GeneratedRecord]
    differential_privacy: NotRequired[Object | None]


# Shadow plans, runs and delta datasets


@open_record
class SideRecord(TypedDict):
    """One model of a plan; its recipe is read by `FineTuningRecipe`."""

    root: RootFactsRecord
    recipe: Object
    numel: Positive


@open_record
class DataRecord(TypedDict):
    """Where public rows came from."""

    path: Name
    fingerprint: NotRequired[Digest]
    num_rows: NotRequired[Count]


@open_record
class PlannedRunRecord(TypedDict):
    """One shadow subset."""

    # Names a file.
    shadow_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]{0,99}$")]
    task: Name | None
    split: Split
    seed: Count
    row_indices: Annotated[list[Count], Field(min_length=1)]


@open_record
class PlanRecord(TypedDict):
    """`plan.json`."""

    format_version: Positive
    source: SideRecord
    target: SideRecord
    data: DataRecord
    seed: int
    strategy: Literal["per_task", "mixed"]
    with_overlap: bool
    runs: Annotated[list[PlannedRunRecord], Field(min_length=1)]


@open_record
class RunRecordFacts(TypedDict):
    """What stands in the header of a run's file."""

    format_version: Positive
    shadow_id: Name
    task: Name | None
    split: Split
    role: Name
    plan: Digest


@open_record
class SplitRecord(TypedDict):
    """How much one split of a delta dataset holds."""

    runs: Positive
    pairs: Positive


@open_record
class DeltaDatasetRecord(TypedDict):
    """`delta_dataset.json`."""

    format_version: Positive
    plan_fingerprint: Digest
    # Of both models.
    roots: Annotated[dict[Literal["source", "target"], RootFactsRecord], Field(min_length=2)]
    recipes: Annotated[dict[Literal["source", "target"], Object], Field(min_length=2)]
    layouts: Annotated[dict[Literal["source", "target"], Object], Field(min_length=2)]
    data: DataRecord
    splits: dict[Split, SplitRecord]
    missing_runs: NotRequired[list[Name]]
    # Only what lies in the dataset's own folder.
    files: dict[Annotated[str, Field(pattern=r"^data/[A-Za-z0-9_\-.]{1,200}\.parquet$")], Digest]


# Mappers


@open_record
class LocalDatasetRecord(TypedDict):
    """The delta dataset of a mapper, where it came from no repository."""

    repo_id: NotRequired[None]
    fingerprint: NotRequired[Digest]
    plan_fingerprint: NotRequired[Digest]


@open_record
class MapperConfigRecord(TypedDict):
    """`config.json` of a mapper. The backbone's own fields are checked by transformers, and against the weights."""

    model_type: Literal["grad_transformer"]
    format_version: NotRequired[Positive]
    backbone_config: NotRequired[Object | None]
    source_block_types: NotRequired[list[Annotated[int, Field(ge=0, lt=MAX_BLOCKS)]]]
    target_block_types: NotRequired[list[Annotated[int, Field(ge=0, lt=MAX_BLOCKS)]]]
    source_type_widths: NotRequired[list[Annotated[int, Field(ge=1, le=MAX_WIDTH)]]]
    target_type_widths: NotRequired[list[Annotated[int, Field(ge=1, le=MAX_WIDTH)]]]
    decoding: NotRequired[Literal["autoregressive", "parallel"]]
    source_base_model: NotRequired[Name | None]
    source_base_revision: NotRequired[Name | None]
    target_base_model: NotRequired[Name | None]
    target_base_revision: NotRequired[Name | None]
    delta_dataset: NotRequired[OriginRecord | LocalDatasetRecord | None]


@open_record
class ModelConfigRecord(TypedDict):
    """`config.json` of any model, to tell a mapper from others, and what a card says of a mapper."""

    model_type: NotRequired[Name | None]
    source_base_model: NotRequired[Name | None]
    target_base_model: NotRequired[Name | None]
    delta_dataset: NotRequired[OriginRecord | LocalDatasetRecord | None]


@open_record
class TokenizerRecord(TypedDict):
    """`lora_delta_tokenizer.json`."""

    format_version: Positive
    role: Literal["source", "target"]
    center: bool
    scale: Literal["none", "global", "block"]
    fitted: bool
    root_fingerprint: NotRequired[Digest]
    layout: NotRequired[Object]
    recipe: NotRequired[Object | None]


@open_record
class ShiftRecord(TypedDict):
    """`shift.json`."""

    format_version: Positive
    num_shadows: Positive
    num_heldout: Positive


@open_record
class HeldoutRecord(TypedDict):
    """`heldout.json`; R² of controls stand in it as `r2_<name>`."""

    r2: NotRequired[Number | None]
    r2_teacher_forced: NotRequired[Number | None]
    r2_permuted_inputs: NotRequired[Number | None]
    r2_ceiling: NotRequired[Number | None]
    block_mse: NotRequired[list[Number]]
    controls: NotRequired[dict[str, Number | None]]


def _controls_are_numbers(record: HeldoutRecord) -> HeldoutRecord:
    for name, value in record.items():
        if name.startswith("r2_") and not isinstance(value, int | float | None):
            raise ValueError(f"`{name}` is no number")
    return record


Heldout = Annotated[HeldoutRecord, AfterValidator(_controls_are_numbers)]


@open_record
class TrainingLogRecord(TypedDict):
    """`training_log.json`."""

    log_history: list[Object]


@open_record
class WeightIndexRecord(TypedDict):
    """`model.safetensors.index.json`."""

    metadata: NotRequired[Object]
    weight_map: dict[str, Annotated[str, Field(pattern=r"^model-\d{5}-of-\d{5}\.safetensors$")]]


@open_record
class ReportClientRecord(TypedDict):
    """What a card says of one client of a report."""

    id: Name
    kind: Name
    tinylm: Number
    llm_base: Number
    generated: Number
    llm_finetuned: NotRequired[Number | None]
    controls: dict[str, Number | None]
    pgr: NotRequired[Number | None]
    gap_too_small: NotRequired[bool]


@open_record
class ReportRecord(TypedDict):
    """What a card says of `report.json`; the whole of it is read by `evaluation.Report`."""

    format_version: Positive
    heldout: Heldout
    clients: list[ReportClientRecord]


@open_record
class TrainingIdentityRecord(TypedDict):
    """`training_identity.json`: what a training folder belongs to, and, once finished, what was found."""

    dataset: NotRequired[Object]
    mapper: NotRequired[Object]
    training: NotRequired[Object]
    result: NotRequired[Object | None]


# The client's checkpoints, the lab, the demo and studies


@open_record
class LabBaseRecord(TypedDict):
    """`base.json` of a base model of the lab."""

    fingerprint: Digest
    skill_accuracy: NotRequired[Any]
    num_parameters: NotRequired[Count]


@open_record
class DemoRecord(TypedDict):
    """`demo.json`."""

    preset: Name
    seed: int
    seconds: NotRequired[dict[str, Annotated[float, Field(ge=0)]]]


@open_record
class WeakLabelsRecord(TypedDict):
    """A cache of what one TinyLM said."""

    fingerprint: NotRequired[Digest]
    labels: NotRequired[list[str]]


@open_record
class TrainerStateRecord(TypedDict):
    """`trainer_state.json` of transformers, in a checkpoint."""

    global_step: Count
    max_steps: NotRequired[int]
    log_history: NotRequired[list[Object]]


# What people write


@closed_record
class ClientEntry(TypedDict):
    """A client in the list that `evaluate` reads."""

    id: Written
    adapter: Written
    test_data: Written
    llm_adapter: NotRequired[Written | None]
    kind: NotRequired[Literal["seen", "mixture", "unseen", "other"] | None]
    task: NotRequired[Written | None]


ClientList = Annotated[list[ClientEntry], Field(min_length=1, max_length=10_000)]


# By file name, for those who read whatever lies in a folder: pushes, cards, `inspect`.
FILES: dict[str, Any] = {
    constants.ADAPTER_CONFIG_NAME: AdapterConfigRecord,
    constants.ADAPTER_METADATA_NAME: AdapterMetadataRecord,
    constants.ROOT_NAME: RootRecord,
    constants.TOKENIZER_NAME: TokenizerRecord,
    constants.PLAN_NAME: PlanRecord,
    constants.DELTA_DATASET_NAME: DeltaDatasetRecord,
    "config.json": ModelConfigRecord,
    "model.safetensors.index.json": WeightIndexRecord,
    constants.REPORT_NAME: ReportRecord,
    constants.HELDOUT_NAME: Heldout,
    constants.TRAINING_LOG_NAME: TrainingLogRecord,
    constants.SHIFT_NAME: ShiftRecord,
    constants.ORIGIN_NAME: OriginRecord,
    "trainer_state.json": TrainerStateRecord,
    "base.json": LabBaseRecord,
    constants.DEMO_NAME: DemoRecord,
    constants.STUDY_NAME: Object,
    constants.TRAINING_IDENTITY_NAME: TrainingIdentityRecord,
}
