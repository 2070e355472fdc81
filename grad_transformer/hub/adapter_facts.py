"""From an adapter's config and metadata to the words of its card."""

from __future__ import annotations

from .card_facts import LIBRARY, Facts, base_models, model_name, origin_words
from .fields import Fields, code
from .names import is_repo_id


_MAX_CLIENTS = 20
_CLIENT_INTRO = (
    "A PEFT adapter, fine-tuned from a mapper's source root on data that stayed with its owner. It is meant to be "
    "mapped to an adapter of a larger model."
)
_PLAIN_INTRO = "A PEFT adapter."
_PLAIN_ROOT = (
    "No record of its fine-tune came with it: which root it started from is not known, and a mapper takes it only if "
    "its values show that it started from the mapper's own."
)
_NO_BOUND = (
    "Only differential privacy bounds what an adapter reveals of the rows that it was trained on: that the rows "
    "themselves stayed with their owner is no privacy guarantee."
)
_NOT_COVERED = (
    "Not covered: choices made by looking at the private rows, other releases from the same rows, and people who are "
    "in the data more than once, unless their rows were bounded together. The statement in full is in "
    "`grad_transformer.json`. It is what the owner says: nobody can verify it from the adapter."
)
_UNITS = {
    "add_or_remove_one_example": "adding or removing one example",
    "add_or_remove_one_group": "adding or removing one group of examples, such as those of one person",
}
_GUESSABLE = (
    " **The noise came from a generator whose streams can all be tried**: to whoever does, there is no bound. A "
    "fine-tune with a newer version mends that."
)


def adapter_facts(repo_id: str, config: Fields, metadata: Fields) -> Facts:
    """Facts of a client's or a generated adapter.

    Raises:
        [`UsageError`]: a field that the card shows is not of the type that it must have.
    """
    base = config.text("base_model_name_or_path")
    generated = metadata.child("generated")
    mapper = (generated if generated.has("mapper") else metadata).child("mapper").origin()
    made_with = "a mapper that was not on the Hub" if mapper is None else origin_words(mapper)
    plain = not metadata.has("root") and not metadata.has("mapper")
    words = {
        "repo_id": repo_id,
        "base": model_name(base),
        "base_id": base if is_repo_id(base) else "path/to/its/base-model",
        "target": model_name(base),
        "rank": str(config.count("r") or "not stated"),
        "intro": _PLAIN_INTRO if plain else _CLIENT_INTRO,
        "root": _PLAIN_ROOT if plain else f"Root: that of {made_with}.",
        "mapper": made_with,
        "examples": _examples_words(metadata.count("num_examples")),
        "privacy": _privacy_words(metadata),
        "num_clients": str(generated.count("num_clients") or 1),
        "aggregation": generated.word("aggregation") or "mean",
        "clients": _client_lines(generated.children("clients")),
        "shift": _shift_words(generated.children("shift")),
        "refinement": _refinement_words(generated.children("refinement")),
    }
    return Facts({"library_name": "peft", **base_models(base), "tags": [LIBRARY, "lora"]}, words)


def _client_lines(clients: list[Fields]) -> str:
    lines = []
    for client in clients[:_MAX_CLIENTS]:
        origin, digest = client.origin(), code(client.word("sha256") or "unknown")
        lines.append(f"- {origin_words(origin) if origin else f'not named, SHA-256 of its values {digest}'}")
    if len(clients) > _MAX_CLIENTS:
        lines.append(f"- and {len(clients) - _MAX_CLIENTS} more, in `grad_transformer.json`")
    return "\n".join(lines)


def _examples_words(count: int | None) -> str:
    return f"{count} examples." if count is not None else "Their number is not stated."


def _privacy_words(metadata: Fields) -> str:
    """From the facts of the statement; its own words, which anybody could have written, stay in the file."""
    statement = metadata.child("differential_privacy")
    if not statement.data:
        without = "differential_privacy" in metadata.data
        said = "Made **without differential privacy**" if without else "States **no differential privacy**"
        return f"{said}. {_NO_BOUND} This adapter can reveal them."
    epsilon, delta = statement.number("epsilon"), statement.number("delta")
    stated = epsilon is not None and delta is not None and epsilon > 0 and 0 < delta < 1
    if not stated or statement.has("known_seed"):
        return f"**No bound by differential privacy**: not all of its sources state one. {_NO_BOUND}"
    adjacency = statement.word("adjacency") or "add_or_remove_one_example"
    words = (
        f"Differential privacy, as stated by the data's owner: epsilon {epsilon:.4g} and delta {delta:.2g}, with "
        f"respect to {_UNITS.get(adjacency, adjacency.replace('_', ' '))}"
    )
    if statement.has("composition"):
        clients = statement.count("num_clients") or 1
        how = "the largest of their bounds" if statement.word("composition") == "parallel" else "the sums of theirs"
        words += f"; {clients} clients, {how}" if clients > 1 else ""
    else:
        words += (
            f", by DP-SGD with noise multiplier {statement.number('noise_multiplier') or 0.0:.4g}, clipping norm "
            f"{statement.number('max_grad_norm') or 0.0:.4g} and {statement.count('steps') or 0} steps, by the "
            f"{(statement.word('accountant') or 'unnamed').upper()} accountant"
        )
        guessable = (statement.text("random_generator") or "torch.Generator") == "torch.Generator"
        return f"{words}.{_GUESSABLE if guessable else ''}\n  - {_NOT_COVERED}"
    return f"{words}.\n  - {_NOT_COVERED}"


def _shift_words(shifts: list[Fields]) -> str:
    """From the shift reports of the clients: 1 is what one in twenty held-out shadow runs exceeds."""
    known = [value for value in (shift.number("shift") for shift in shifts) if value is not None]
    if not known:
        return "not measured."
    listed = ", ".join(f"{value:.2f}" for value in known[:_MAX_CLIENTS]) + (", …" if len(known) > _MAX_CLIENTS else "")
    return f"shift {listed}; 1 is what one in twenty held-out shadow runs exceeds; far above it, it guesses."


def _refinement_words(refinements: list[Fields]) -> str:
    words = []
    for facts in refinements[:_MAX_CLIENTS]:
        history = facts.numbers("agreement_by_round")
        ending = f"refined to {history[-1]:.2f}" if len(history) > 1 else "left as it was"
        shadows = ", ".join(code(name) for name in facts.items("annotators")[:_MAX_CLIENTS])
        ending += f" towards what shadows of {shadows} say in the client's words" if shadows else ""
        agreement = f"whose agreement with the TinyLM was {history[0]:.2f}" if history else "of unknown agreement"
        words.append(f"{code(facts.word('candidate') or 'unnamed')}, {agreement}, {ending}")
    if not words:
        return "Not refined: as it was generated."
    return (
        "Refined on public prompts that the TinyLM with the client's adapter completed: " + "; ".join(words) + ". No "
        "private row was used, so this is post-processing, and keeps whatever the client's adapter guarantees."
    )
