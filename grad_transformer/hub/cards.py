"""Cards: a repository's own facts, between markers, in a text that people may edit.

Generated passages stand between `<!-- grad_transformer: name -->` and `<!-- /grad_transformer: name -->`, and are
renewed by every push. All other text, and metadata that this library does not set, stays as people left it.
Making a card asks nothing of the network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData
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
from .card_facts import Facts, adapter_facts, delta_dataset_facts, mapper_facts
from .kinds import EVAL_RESULTS_NAME, RepoKind
from .public import read_public_json


TEMPLATES = Path(__file__).parent / "templates"
_PASSAGE = re.compile(r"<!-- grad_transformer: (\w+) -->.*?<!-- /grad_transformer: \1 -->", re.DOTALL)


def card_files(
    kind: RepoKind,
    files: Mapping[str, Path | bytes],
    *,
    repo_id: str,
    license: str | None = None,
    previous: str | None = None,
) -> dict[str, bytes]:
    """The card of a repository, and for a mapper its evaluation results in the Hub's form.

    Args:
        kind ([`RepoKind`]).
        files (`Mapping`): the repository's other files; facts come from its JSON.
        repo_id (`str`): where it will lie.
        license (`str`, *optional*): default: the one on the card before.
        previous (`str`, *optional*): the card before, whose prose is kept.

    Raises:
        [`UsageError`]: the card before has metadata that huggingface_hub's card classes refuse.
    """
    facts = _facts(kind, files, repo_id)
    template = Template((TEMPLATES / f"{kind.name}.md").read_text(encoding="utf-8"))
    body = template.substitute(facts.words)
    metadata = dict(facts.metadata)
    if license is not None:
        metadata["license"] = license
    card_class = DatasetCard if kind.repo_type == "dataset" else ModelCard
    data_class: type[CardData] = DatasetCardData if kind.repo_type == "dataset" else ModelCardData
    if previous is not None:
        before = _parse(card_class, previous, repo_id)
        old = before.data.to_dict()
        tags = [*(old.get("tags") or []), *metadata["tags"]]
        # A push without a report, dataset or license leaves those of the card.
        metadata = {**old, **metadata, "tags": list(dict.fromkeys(tags))}
        body = merge_text(before.text, body)
    # Through the class that the Hub's own tools read cards with: what it refuses is never uploaded.
    data = data_class(**metadata)
    card = _parse(card_class, f"---\n{data.to_yaml()}\n---\n{body.lstrip()}", repo_id)
    result = {CARD_NAME: str(card).encode()}
    if facts.eval_results:
        result[EVAL_RESULTS_NAME] = yaml.safe_dump(facts.eval_results, sort_keys=False).encode()
    return result


def merge_text(previous: str, new: str) -> str:
    """The previous text with its generated passages renewed; passages that it never had come at its end."""
    fresh = {match[1]: match[0] for match in _PASSAGE.finditer(new)}
    known = {match[1] for match in _PASSAGE.finditer(previous)}
    if not previous.strip():
        return new
    merged = _PASSAGE.sub(lambda match: fresh.get(match[1], ""), previous)
    missing = [text for name, text in fresh.items() if name not in known]
    return "\n\n".join([merged.rstrip(), *missing]) + "\n"


def _parse(card_class: Any, content: str, repo_id: str) -> Any:
    try:
        return card_class(content)
    except (ValueError, TypeError, yaml.YAMLError) as cause:
        raise UsageError(
            "The card's metadata cannot be read.",
            path=f"{repo_id}/{CARD_NAME}",
            expected="valid YAML between the first two --- lines",
            found=str(cause).splitlines()[0],
            remedy=f"mend {CARD_NAME} in the repository",
        ) from cause


def _facts(kind: RepoKind, files: Mapping[str, Path | bytes], repo_id: str) -> Facts:
    def read(name: str) -> dict[str, Any]:
        content = files.get(name)
        return {} if content is None else dict(read_public_json(name, content))

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
