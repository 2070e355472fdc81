"""Cards: a repository's own facts, between markers, in a text that people may edit.

Generated passages stand between `<!-- grad_transformer: name -->` and `<!-- /grad_transformer: name -->`, and are
renewed by every push. All other text, and metadata that this library does not set, stays as people left it.
Making a card asks nothing of the network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import CardData

from ..constants import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_METADATA_NAME,
    CARD_NAME,
    DELTA_DATASET_NAME,
    HELDOUT_NAME,
    REPORT_FOLDER,
    REPORT_NAME,
)
from ..errors import UsageError
from ..wording import describe_error, in_ascii
from .adapter_facts import adapter_facts
from .card_facts import Facts, delta_dataset_facts, mapper_facts
from .fields import Fields
from .kinds import EVAL_RESULTS_NAME, RepoKind
from .names import is_repo_id
from .public import read_public_json


TEMPLATES = Path(__file__).parent / "templates"
MAX_CARD_BYTES = 2**20
_MARKER = re.compile(r"<!-- (/?)grad_transformer: (\w+) -->")
# A card's metadata is a page or two: more of it is an attack on whoever reads it.
_MAX_METADATA_BYTES = 2**16
_MAX_METADATA_VALUES = 10_000


def card_files(
    kind: RepoKind,
    files: Mapping[str, Path | bytes],
    *,
    repo_id: str,
    license: str | None = None,
    previous: bytes | None = None,
) -> dict[str, bytes]:
    """The card of a repository, and for a mapper its evaluation results in the Hub's form.

    Args:
        kind ([`RepoKind`]).
        files (`Mapping`): the repository's other files; facts come from its JSON.
        repo_id (`str`): where it will lie.
        license (`str`, *optional*): default: the one on the card before.
        previous (`bytes`, *optional*): the card before, whose prose is kept.

    Raises:
        [`UsageError`]: a fact is malformed; the card before is no text, or its metadata cannot be kept.
    """
    if not is_repo_id(repo_id):
        raise UsageError("This can be no repository.", expected="an id such as org/name", found=in_ascii(repo_id))
    facts = _facts(kind, files, repo_id)
    template = Template((TEMPLATES / f"{kind.name}.md").read_text(encoding="utf-8"))
    body = template.substitute(facts.words)
    metadata = dict(facts.metadata)
    if license is not None:
        metadata["license"] = license
    card_class = DatasetCard if kind.repo_type == "dataset" else ModelCard
    data_class: type[CardData] = DatasetCardData if kind.repo_type == "dataset" else ModelCardData
    if previous is not None:
        text = _decode(previous, repo_id)
        with _card_errors(repo_id):
            before = card_class(text)
            old = _kept_metadata(before.data.to_dict())
        # A push without a report, dataset or license leaves those of the card.
        metadata = {**old, **metadata, "tags": list(dict.fromkeys([*(old.get("tags") or []), *metadata["tags"]]))}
        body = merge_text(before.text, body)
    # Through the class that the Hub's own tools read cards with: what it refuses is never uploaded.
    with _card_errors(repo_id):
        data = data_class(**metadata)
        card = card_class(f"---\n{data.to_yaml()}\n---\n{body.lstrip()}")
    result = {CARD_NAME: str(card).encode()}
    if facts.eval_results:
        result[EVAL_RESULTS_NAME] = yaml.safe_dump(facts.eval_results, sort_keys=False).encode()
    return result


def merge_text(previous: str, new: str) -> str:
    """The previous text with its generated passages renewed; passages that it never had come at its end.

    A passage reaches from its first opening marker to its last closing one: text between two passages of one name was
    written by neither people nor this library, and goes.
    """
    if not previous.strip():
        return new
    fresh = {name: new[start:end] for name, start, end in _passages(new)}
    parts, position, known = [], 0, set()
    for name, start, end in _passages(previous):
        parts += [previous[position:start], fresh.get(name, "")]
        known.add(name)
        position = end
    merged = "".join([*parts, previous[position:]])
    missing = [text for name, text in fresh.items() if name not in known]
    return "\n\n".join([merged.rstrip(), *missing]) + "\n"


def _passages(text: str) -> list[tuple[str, int, int]]:
    """Name, start and end of the passages, in their order; none overlaps another."""
    found: list[tuple[str, int, int]] = []
    markers = list(_MARKER.finditer(text))
    for marker in markers:
        name, start = marker[2], marker.start()
        ends = [other.end() for other in markers if other[1] and other[2] == name and other.start() > start]
        inside = any(first <= start < last for _, first, last in found)
        if not marker[1] and ends and not inside:
            found.append((name, start, ends[-1]))
    return found


def _decode(card: bytes, repo_id: str) -> str:
    with _card_errors(repo_id):
        if len(card) > MAX_CARD_BYTES:
            raise ValueError(f"more than {MAX_CARD_BYTES} bytes")
        text = card.decode("utf-8-sig")
        head = REGEX_YAML_BLOCK.search(text)
        if head is not None and len(head[2]) > _MAX_METADATA_BYTES:
            raise ValueError(f"more than {_MAX_METADATA_BYTES} bytes of metadata")
        return text


def _kept_metadata(old: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of the card before, with ids where there must be ids: what is none was let in by mistake.

    YAML may name one value a million times, in a few lines: its values are counted as they would be written.
    """
    tags = old.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError("`tags` is no list of words")
    pending: list[Any] = [old]
    count = 0
    while pending:
        value = pending.pop()
        count += 1
        if count > _MAX_METADATA_VALUES:
            raise ValueError(f"more than {_MAX_METADATA_VALUES} values")
        if isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, list | tuple | set):
            pending += value
    kept = dict(old)
    for name in ("base_model", "datasets"):
        named = old.get(name)
        ids = [value for value in (named if isinstance(named, list) else [named]) if is_repo_id(value)]
        kept[name] = ids or None
    return kept


@contextmanager
def _card_errors(repo_id: str) -> Iterator[None]:
    """What the Hub's classes raise for metadata that they cannot hold, as one typed error."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError, yaml.YAMLError) as cause:
        raise UsageError(
            "The card's metadata cannot be read.",
            path=f"{repo_id}/{CARD_NAME}",
            expected="UTF-8, with valid YAML between the first two --- lines",
            found=describe_error(cause),
            remedy=f"mend or delete {CARD_NAME} in the repository, and push again",
        ) from cause


def _facts(kind: RepoKind, files: Mapping[str, Path | bytes], repo_id: str) -> Facts:
    def read(name: str) -> Fields:
        return Fields(read_public_json(name, files[name]) if name in files else {}, name)

    if kind.name == "delta_dataset":
        return delta_dataset_facts(repo_id, read(DELTA_DATASET_NAME))
    if kind.name == "mapper":
        pictures = [name for name in files if name.startswith(f"{REPORT_FOLDER}/") and name.endswith(".png")]
        return mapper_facts(
            repo_id,
            read("config.json"),
            heldout=read(HELDOUT_NAME),
            report=read(f"{REPORT_FOLDER}/{REPORT_NAME}"),
            pictures=pictures,
        )
    return adapter_facts(repo_id, read(ADAPTER_CONFIG_NAME), read(ADAPTER_METADATA_NAME))
