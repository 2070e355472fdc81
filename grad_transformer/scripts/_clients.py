"""The list of clients to score, `clients.yaml`: all of it is checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..adapters import LoraAdapter
from ..adapters.recipes import recipe_differences
from ..errors import UsageError
from ..evaluation.clients import ClientCase
from ..evaluation.records import KINDS
from ..evaluation.scoring import check_scorable
from ..finetuning import load_rows
from ..modeling_grad_transformer import GradTransformer


logger = logging.get_logger(__name__)

_REQUIRED, _OPTIONAL = ("id", "adapter", "test_data"), ("llm_adapter", "kind", "task")
_MOST_CHARACTERS = 200


def read_clients(path: str | Path) -> list[dict[str, str]]:
    """The list of clients in a YAML or JSON file.

    Raises:
        [`UsageError`]: it cannot be read, is no list, or an entry has missing or unknown keys, a value that is no
            text, a kind that there is not, or the id of another one.
    """
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as cause:
        raise UsageError("The list of clients cannot be read.", path=path, found=cause) from cause
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError("The list of clients is not a list of mappings.", path=path, expected="- id: ...")
    clients = [_checked(entry, number, path) for number, entry in enumerate(entries, 1)]
    seen: dict[str, int] = {}
    for number, client in enumerate(clients, 1):
        first = seen.setdefault(client["id"], number)
        if first != number:
            raise UsageError(
                "Two clients have the same id.",
                path=path,
                expected="unique ids",
                found=f"entries {first} and {number}",
            )
    return clients


def _checked(entry: Mapping[Any, Any], number: int, path: str | Path) -> dict[str, str]:
    """One entry, whose values are text: a number as an id becomes text, and what is empty is left out."""
    known = (*_REQUIRED, *_OPTIONAL)
    given = {key: value for key, value in entry.items() if value is not None or key not in _OPTIONAL}
    if not given.keys() >= set(_REQUIRED) or given.keys() - set(known):
        raise UsageError(
            f"Entry {number} of the clients has missing or unknown keys.",
            path=path,
            expected=f"{', '.join(_REQUIRED)}; optional {', '.join(_OPTIONAL)}",
            found=ascii(sorted(map(str, entry)))[:_MOST_CHARACTERS],
        )
    client = {}
    for name, value in given.items():
        if type(value) is int and name in ("id", "task"):
            value = str(value)
        if not isinstance(value, str) or not value.isprintable() or not 0 < len(value.strip()) <= _MOST_CHARACTERS * 5:
            raise UsageError(
                f"`{name}` of entry {number} of the clients is no name.",
                path=path,
                expected="text on one line",
                found=f"{ascii(value)[:_MOST_CHARACTERS]} ({type(value).__name__})",
                remedy="quote it, if YAML reads it as something else",
            )
        client[name] = value
    if client.get("kind", "other") not in KINDS:
        raise UsageError(
            f"There is no such kind of client: entry {number}.",
            path=path,
            expected=", ".join(KINDS),
            found=ascii(client["kind"])[:_MOST_CHARACTERS],
        )
    return client


def read_cases(
    clients: Sequence[Mapping[str, str]],
    mapper: GradTransformer,
    *,
    source_model: str | None = None,
    target_model: str | None = None,
) -> list[ClientCase]:
    """Adapters and test rows of clients, read and checked with both tokenizers.

    Args:
        clients (`Sequence[Mapping]`): as from [`read_clients`].
        mapper ([`GradTransformer`]): with its tokenizers.
        source_model, target_model (`str`, *optional*): other places of the base models.

    Raises:
        errors of [`LoraDeltaTokenizer.delta`]: an adapter is refused.
        [`DataError`]: test rows that cannot be read, or be scored by TinyLM and LLM.
    """
    source, target = mapper.tokenizers()
    text_tokenizers = [
        _text_tokenizer(name or side.root.base_model, None if name else side.root.base_revision)
        for name, side in ((source_model, source), (target_model, target))
    ]
    cases = []
    for client in clients:
        adapter, _ = source.read_client(client["adapter"])
        differences = recipe_differences(adapter.metadata, source.recipe, path=client["adapter"])
        if differences:
            logger.warning(f"{client['id']} was fine-tuned by another recipe: {'; '.join(differences)}.")
        rows = list(load_rows(client["test_data"], split="test"))
        for text_tokenizer in text_tokenizers:
            check_scorable(text_tokenizer, rows, path=client["test_data"])
        ceiling, task = client.get("llm_adapter"), client.get("task", "")
        cases.append(
            ClientCase(
                id=client["id"],
                adapter=adapter,
                test_rows=rows,
                llm_adapter=None if ceiling is None else _ceiling(ceiling, mapper),
                kind=client.get("kind", "other"),
                task=task,
                tasks=frozenset({task} if task else ()),
            )
        )
    return cases


def _ceiling(path: str, mapper: GradTransformer) -> LoraAdapter:
    root = mapper.tokenizers()[1].root
    adapter = LoraAdapter.from_pretrained(path, layout=root.layout)
    adapter.check_base_model(root.base_model, path=path)
    return adapter


def _text_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as cause:
        lines = str(cause).strip().splitlines()
        raise UsageError(
            "The tokenizer of a base model cannot be loaded.",
            path=name,
            expected="a base model with its tokenizer, in a folder or on the Hub",
            found=f"{type(cause).__name__}: {lines[0] if lines else ''}",
            remedy="check the name, or give its place with --source_model or --target_model",
        ) from cause
