"""From the JSON of a repository to the words of its card. Every sentence follows from a number in the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeGuard

from huggingface_hub import EvalResult

from ..constants import ACCURACY_FIGURE, BLOCKS_FIGURE, PGR_FIGURE, TRAINING_FIGURE
from .fields import Fields, code
from .names import is_repo_id
from .origins import Origin


LIBRARY = "grad_transformer"
_ROWS = {
    "tinylm": "TinyLM, fine-tuned",
    "generated": "**LLM, generated adapter**",
    "llm_finetuned": "LLM, fine-tuned",
    "nearest_shadow": "control: nearest shadow",
    "ridge": "control: ridge regression",
    "mean_shadow": "control: mean shadow",
    "other_client": "control: another client's delta",
    "random": "control: random delta of the same norm",
    "llm_base": "LLM, no delta",
}


@dataclass(frozen=True)
class Facts:
    """Metadata for the YAML head, words for the template's places, and evaluation results in the Hub's form."""

    metadata: dict[str, Any]
    words: dict[str, str]
    eval_results: list[dict[str, Any]] = field(default_factory=list)


def mapper_facts(
    repo_id: str, config: Fields, *, heldout: Fields, report: Fields, pictures: Sequence[str] = ()
) -> Facts:
    """Facts of a mapper: both base models, held-out R² beside its tests, and clients beside their controls.

    Raises:
        [`UsageError`]: a field that the card shows is not of the type that it must have.
    """
    source, target = config.text("source_base_model"), config.text("target_base_model")
    origin = config.child("delta_dataset").origin()
    scores = report.child("heldout") if report.has("heldout") else heldout
    clients = report.children("clients")
    pgr = [value for value in (client.number("pgr") for client in clients) if value is not None]
    r2 = scores.number("r2")
    results = []
    common: dict[str, Any] = {"task_type": "other", "task_name": "LoRA delta generation"}
    common |= {"dataset_name": "delta dataset", "dataset_type": LIBRARY}
    if origin is not None:
        common |= {"dataset_name": origin.repo_id, "dataset_type": origin.repo_id, "dataset_revision": origin.sha}
    if r2 is not None:
        name = "held-out R² around the mean shadow"
        results.append(EvalResult(**common, metric_type="r2", metric_name=name, metric_value=round(r2, 4)))
    if pgr:
        name = f"performance gap recovered, %, median of {len(pgr)} clients"
        results.append(EvalResult(**common, metric_type="pgr", metric_name=name, metric_value=round(median(pgr), 2)))
    metadata: dict[str, Any] = {
        "library_name": LIBRARY,
        **base_models(source, target),
        "tags": [LIBRARY, "lora", "peft", "weight-generation"],
    }
    if origin is not None:
        metadata["datasets"] = [origin.repo_id]
    if results:
        metadata |= {"model_name": repo_id.split("/")[-1], "eval_results": results}
    words = {
        "repo_id": repo_id,
        "source": model_name(source),
        "target": model_name(target),
        "training": "Its delta dataset is not on the Hub."
        if origin is None
        else f"Trained on {origin_words(origin)}.",
        "heldout": _heldout_words(scores),
        "controls": _controls_table(clients),
        "picture": "\n".join(f"![{_title(name)}]({name})" for name in _best_pictures(pictures)),
        "limits": _mapper_limits(scores, clients),
    }
    return Facts(metadata, words, _hub_results(origin, r2, pgr))


def delta_dataset_facts(repo_id: str, manifest: Fields) -> Facts:
    """Facts of a delta dataset: both base models, runs and pairs by split, what its rows hold.

    Raises:
        [`UsageError`]: a field that the card shows is not of the type that it must have.
    """
    source, target = (manifest.child("roots").child(role).text("base_model") for role in ("source", "target"))
    splits = manifest.child("splits")
    counts = {name: splits.child(name) for name in splits.words()}
    rows = ["| split | shadow runs | pairs |", "|---|---:|---:|"]
    rows += [
        f"| {name} | {count.count('runs') or 0} | {count.count('pairs') or 0} |" for name, count in counts.items()
    ]
    pairs = sum(count.count("pairs") or 0 for count in counts.values())
    data_files = [{"split": name, "path": f"data/{name}-*.parquet"} for name in counts]
    data = manifest.child("data")
    public = data.data.get("path")
    metadata: dict[str, Any] = {
        "tags": [LIBRARY, "lora", "peft"],
        "size_categories": [_size_category(pairs)],
        "pretty_name": f"LoRA deltas of {model_name(source)} and {model_name(target)}",
        "configs": [{"config_name": "default", "data_files": data_files}],
        **({"source_datasets": [public]} if _is_hub_id(public) else {}),
    }
    missing = manifest.items("missing_runs")
    words = {
        "repo_id": repo_id,
        "source": model_name(source),
        "target": model_name(target),
        "table": "\n".join(rows),
        "public_data": code(public) if public else "not stated",
        "format_version": str(manifest.count("format_version")),
        "missing": f"{len(missing)} planned runs did not finish and are not in it." if missing else "",
    }
    return Facts(metadata, words)


def base_models(*names: str | None) -> dict[str, Any]:
    """Only ids of the Hub: a folder's name is nobody's model there."""
    found = [name for name in names if _is_hub_id(name)]
    return {"base_model": found, "base_model_relation": "adapter"} if found else {}


def model_name(value: str | None) -> str:
    return code(value) if value else "an unnamed base model"


def origin_words(origin: Origin) -> str:
    """A link to the repository, with version and commit: each was validated when the origin was made."""
    version = f" {origin.revision}" if origin.revision else ""
    return f"[`{origin.repo_id}`](https://huggingface.co/{origin.repo_id}){version}, commit `{origin.sha}`"


def _is_hub_id(value: object) -> TypeGuard[str]:
    return is_repo_id(value) and "/" in value


def _heldout_words(scores: Fields) -> str:
    if not scores.has("r2"):
        return "No held-out figures: whether this mapper reads its input was not measured."
    rows = [
        ("mapper, free-running", scores.number("r2")),
        ("the same, inputs permuted among runs", scores.number("r2_permuted_inputs")),
        ("ceiling: the true task mean", scores.number("r2_ceiling")),
        ("teacher-forced", scores.number("r2_teacher_forced")),
        *((f"control: {name.removeprefix('r2_')}", value) for name, value in _control_scores(scores).items()),
    ]
    table = ["| R² around the mean shadow, held-out runs | |", "|---|---:|"]
    table += [f"| {name} | {value:.3f} |" for name, value in rows if value is not None]
    return "\n".join(table)


def _control_scores(scores: Fields) -> dict[str, float | None]:
    """Of the controls, in either of their forms: `r2_NAME` beside the others, or by name in `controls`."""
    known = ("r2", "r2_teacher_forced", "r2_permuted_inputs", "r2_ceiling")
    flat = {name: scores.number(name) for name in scores.words() if name.startswith("r2_") and name not in known}
    controls = scores.child("controls")
    return {**flat, **{name: controls.number(name) for name in controls.words()}}


def _controls_table(clients: Sequence[Fields]) -> str:
    if not clients:
        return "No client was scored."
    groups: dict[str, list[Fields]] = {}
    for client in clients:
        groups.setdefault(client.word("kind") or "other", []).append(client)
    lines = ["| median score | " + " | ".join(f"{kind} ({len(group)})" for kind, group in groups.items()) + " |"]
    lines.append("|---|" + "---:|" * len(groups))
    for name, label in _ROWS.items():
        cells = [_median([_score(client, name) for client in group], "{:.3f}") for group in groups.values()]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    cells = [_median([client.number("pgr") for client in group], "{:.0f} %") for group in groups.values()]
    lines.append("| **PGR of the generated adapter** | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _score(client: Fields, name: str) -> float | None:
    controls = client.child("controls")
    return controls.number(name) if name in controls.data else client.number(name)


def _median(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(median(known)) if known else "-"


def _mapper_limits(scores: Fields, clients: Sequence[Fields]) -> str:
    lines = []
    r2, permuted = scores.number("r2"), scores.number("r2_permuted_inputs")
    if r2 is not None and r2 <= 0:
        lines.append("- Held-out R² is not above 0: **this mapper ignores its input**.")
    elif r2 is not None and permuted is not None and permuted >= r2 / 2:
        lines.append("- With the inputs of other runs it is nearly as good: **this mapper hardly reads its input**.")
    for name in ("nearest_shadow", "ridge"):
        pairs = [(client.number("generated"), client.child("controls").number(name)) for client in clients]
        known = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
        behind = sum(theirs >= ours for ours, theirs in known)
        if behind:
            label = _ROWS[name].removeprefix("control: ")
            lines.append(f"- For {behind} of {len(known)} clients {label} does as well or better.")
    small = sum(client.data.get("gap_too_small") is True for client in clients)
    if small:
        lines.append(f"- {small} of {len(clients)} clients have too small a gap for a PGR.")
    if clients:
        lines.append(f"- {len(clients)} clients, one seed: no statement on other tasks, seeds or base models.")
    return "\n".join(lines) or "- Nothing was measured on clients."


def _hub_results(origin: Origin | None, r2: float | None, pgr: Sequence[float]) -> list[dict[str, Any]]:
    """Entries of `.eval_results/*.yaml`; the form asks for a dataset on the Hub."""
    if origin is None:
        return []
    dataset = {"id": origin.repo_id, "revision": origin.sha}
    entries = []
    if r2 is not None:
        entry = {"dataset": {**dataset, "task_id": "heldout_r2"}, "value": round(r2, 4)}
        entries.append({**entry, "notes": "R2 around the mean shadow delta, held-out shadow runs, free-running"})
    if pgr:
        entry = {"dataset": {**dataset, "task_id": "pgr"}, "value": round(median(pgr), 2)}
        entries.append({**entry, "notes": f"performance gap recovered in percent, median of {len(pgr)} clients"})
    return entries


def _best_pictures(pictures: Sequence[str]) -> list[str]:
    order = (PGR_FIGURE, ACCURACY_FIGURE, TRAINING_FIGURE, BLOCKS_FIGURE)
    ranked = sorted(pictures, key=lambda name: order.index(_file(name)) if _file(name) in order else len(order))
    return ranked[:1]


def _file(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _title(name: str) -> str:
    return _file(name).removesuffix(".png").replace("_", " ")


def _size_category(rows: int) -> str:
    for limit, label in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")):
        if rows < limit:
            return label
    return "n>1M"
