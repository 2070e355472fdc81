"""What a mapper's folder must hold before anything of it is allocated: a config, and safetensors that account for it.

A config of two lines can ask for a model of any size, and transformers fills weights that are missing with random
values. So headers are read first, the model is built without memory, and every parameter must be in the files with
the shape that the config asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from .adapters.bases import check_config, config_fields
from .adapters.io import member, read_header
from .configuration_grad_transformer import GradTransformerConfig
from .errors import AdapterFormatError, IncompleteArtifactError
from .files import read_record
from .schemas import MapperConfigRecord, WeightIndexRecord
from .wording import describe_error


CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"

# No backbone that a mapper is built on has more: some compute a table of them.
_MOST_POSITIONS = 2**20
_REMEDY = "save the mapper again with save_pretrained, or download it again"


def read_mapper_config(folder: Path, *, num_tensors: int) -> GradTransformerConfig:
    """The config of a mapper's folder.

    Args:
        folder (`Path`): the folder.
        num_tensors (`int`): tensors of its weights; no model has more layers.

    Raises:
        [`IncompleteArtifactError`]: there is none, or it describes no mapper.
        [`FormatVersionError`]: written by a newer version.
    """
    path = folder / CONFIG_NAME
    record = read_record(path, MapperConfigRecord)
    check_config(
        record, path=path, error=IncompleteArtifactError, most_layers=num_tensors, most_positions=_MOST_POSITIONS
    )
    if any(name == "auto_map" for name, _ in config_fields(record)):
        raise IncompleteArtifactError(
            "The mapper's config names code.", path=path, expected="no auto_map", found="auto_map", remedy=_REMEDY
        )
    try:
        return GradTransformerConfig.from_dict(dict(record))
    # Whatever the parts of transformers that a stranger's config reaches may raise.
    except Exception as cause:
        raise IncompleteArtifactError(
            "The config does not describe a mapper.", path=path, found=describe_error(cause), remedy=_REMEDY
        ) from cause


def read_weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a mapper's weights by name, from the headers of its safetensors files.

    Raises:
        [`IncompleteArtifactError`]: no safetensors, a shard that is missing or damaged, or a tensor in two of them.
    """
    names = [WEIGHTS_NAME]
    index = None
    if not (folder / WEIGHTS_NAME).is_file():
        if not (folder / INDEX_NAME).is_file():
            others = sorted(path.name for path in folder.glob("*.bin"))[:3]
            raise IncompleteArtifactError(
                "The mapper has no weights that are read.",
                path=folder,
                expected=f"{WEIGHTS_NAME}, or its shards with {INDEX_NAME}",
                found=", ".join(others) or "no weights",
                remedy="save it again with save_pretrained; pickles are never read",
            )
        index = read_record(member(folder, INDEX_NAME, error=IncompleteArtifactError), WeightIndexRecord)["weight_map"]
        names = sorted(set(index.values()))
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        path = member(folder, name, error=IncompleteArtifactError)
        try:
            header, _ = read_header(path)
        except AdapterFormatError as cause:
            raise IncompleteArtifactError(
                f"{name} cannot be used.", path=path, found=cause.found or cause.message, remedy=_REMEDY
            ) from cause
        expected = set(header) if index is None else {key for key, shard in index.items() if shard == name}
        if set(header) != expected or shapes.keys() & header.keys():
            raise IncompleteArtifactError(
                f"{name} does not hold the tensors that {INDEX_NAME} says.", path=path, remedy=_REMEDY
            )
        shapes.update({key: info.shape for key, info in header.items()})
    return shapes


def check_weights(
    model_class: Any, config: GradTransformerConfig, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """Refuse weights that are not exactly those that the config asks for.

    Raises:
        [`IncompleteArtifactError`]: tensors are missing, of another shape, or not the model's.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config)
    except Exception as cause:
        raise IncompleteArtifactError(
            "No mapper can be built from the config.", path=path, found=describe_error(cause), remedy=_REMEDY
        ) from cause
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if get_model_conversion_mapping(model, add_legacy=False):
        # Such a backbone stores other tensors than it computes with; transformers says below what was missing.
        ours, theirs = (sum(map(_numel, found.values())) for found in (expected, shapes))
        problem = None if ours == theirs else f"{theirs:,} values of weights, and the config asks for {ours:,}"
    else:
        tied = set(model.all_tied_weights_keys)
        missing = sorted(expected.keys() - shapes.keys() - tied)
        extra = sorted(shapes.keys() - expected.keys())
        other = sorted(name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name])
        problem = None
        if missing or extra:
            problem = f"{len(missing)} tensors missing, {len(extra)} unknown, the first {(missing or extra)[0]}"
        elif other:
            problem = f"{other[0]} of shape {shapes[other[0]]}, and the config asks for {expected[other[0]]}"
    if problem is not None:
        raise IncompleteArtifactError(
            "The mapper's weights are not those that its config asks for.",
            path=path,
            expected=f"{len(expected)} tensors",
            found=problem,
            remedy=_REMEDY,
        )


def check_loaded(model: PreTrainedModel, missing: set[str] | list[str], path: str | Path) -> None:
    """Refuse a loaded mapper with weights that were not in its files, or that are not finite.

    Raises:
        [`IncompleteArtifactError`]
    """
    broken = [
        name
        for name, value in model.named_parameters()
        if value.device.type != "meta" and not bool(torch.isfinite(value).all())
    ]
    left_out = sorted(set(missing) - set(model.all_tied_weights_keys))
    if left_out or broken:
        raise IncompleteArtifactError(
            "The mapper's weights are missing or not finite.",
            path=path,
            expected="finite weights, all of them in the files",
            found=f"{len(left_out)} missing, {len(broken)} with NaN or infinity, the first {(left_out + broken)[0]}",
            remedy=_REMEDY + "; weights of a large range need float32 or bfloat16",
        )


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
