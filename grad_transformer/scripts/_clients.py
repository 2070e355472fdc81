"""The list of clients to score, `clients.yaml`: all of it is checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..adapters import LoraAdapter
from ..adapters.bases import load_tokenizer
from ..adapters.recipes import recipe_differences
from ..errors import UsageError
from ..evaluation.clients import ClientCase
from ..evaluation.scoring import check_scorable
from ..files import read_yaml
from ..finetuning import load_rows
from ..modeling_grad_transformer import GradTransformer
from ..schemas import ClientList
from ..wording import looks_like


logger = logging.get_logger(__name__)


def read_clients(path: str | Path) -> list[dict[str, str]]:
    """The list of clients in a YAML or JSON file; what is empty is left out.

    Raises:
        [`UsageError`]: it cannot be read, is no list, or an entry has missing or unknown keys, a value that is no
            text, a kind that there is not, or an id that looks like that of another one.
    """
    entries = read_yaml(path, ClientList)
    clients = [{name: str(value) for name, value in entry.items() if value is not None} for entry in entries]
    seen: dict[str, int] = {}
    for number, client in enumerate(clients, 1):
        first = seen.setdefault(looks_like(client["id"]), number)
        if first != number:
            raise UsageError(
                "Two clients have the same id.",
                path=path,
                expected="ids that can be told apart",
                found=f"entries {first} and {number}",
                remedy="give each client an id of its own",
            )
    return clients


def read_cases(
    clients: Sequence[Mapping[str, str]],
    mapper: GradTransformer,
    columns: Mapping[str, Any],
    *,
    source_model: str | None = None,
    target_model: str | None = None,
) -> list[ClientCase]:
    """Adapters and test rows of clients, read and checked with both tokenizers.

    Args:
        clients (`Sequence[Mapping]`): as from [`read_clients`].
        mapper ([`GradTransformer`]): with its tokenizers.
        columns (`Mapping`): names of the rows' columns, as [`load_rows`] takes them.
        source_model, target_model (`str`, *optional*): other places of the base models.

    Raises:
        errors of [`LoraDeltaTokenizer.delta`]: an adapter is refused.
        [`DataError`]: test rows that cannot be read, or be scored by TinyLM and LLM.
    """
    source, target = mapper.tokenizers()
    text_tokenizers = [
        load_tokenizer(name or side.root.base_model, revision=None if name else side.root.base_revision)
        for name, side in ((source_model, source), (target_model, target))
    ]
    cases = []
    for client in clients:
        adapter, _ = source.read_client(client["adapter"])
        differences = recipe_differences(adapter.metadata, source.recipe, path=client["adapter"])
        if differences:
            logger.warning(f"{client['id']} was fine-tuned by another recipe: {'; '.join(differences)}.")
        rows = list(load_rows(client["test_data"], split="test", **columns))
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
    root.check_descends(adapter, path=path)
    return adapter
