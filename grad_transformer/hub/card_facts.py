"""From the JSON of a repository to the words of its card. Every sentence follows from a number in the files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from huggingface_hub import EvalResult


LIBRARY = "grad_transformer"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
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
    repo_id: str,
    config: Mapping[str, Any],
    *,
    heldout: Mapping[str, Any],
    report: Mapping[str, Any],
    pictures: Sequence[str] = (),
) -> Facts:
    """Facts of a mapper: both base models, held-out R² beside its tests, and clients beside their controls."""
    source, target = config.get("source_base_model"), config.get("target_base_model")
    origin = config.get("delta_dataset") or {}
    scores = report.get("heldout") or heldout
    clients = report.get("clients") or []
    pgr = [client["pgr"] for client in clients if client.get("pgr") is not None]
    results = []
    dataset = str(origin.get("repo_id") or "delta dataset")
    common: dict[str, Any] = {"task_type": "other", "task_name": "LoRA delta generation", "dataset_name": dataset}
    common |= {"dataset_type": dataset if _HUB_ID.fullmatch(dataset) else LIBRARY}
    if origin.get("sha"):
        common["dataset_revision"] = origin["sha"]
    if scores.get("r2") is not None:
        results.append(
            EvalResult(**common, metric_type="r2", metric_name="held-out R² around the mean shadow",
                       metric_value=round(float(scores["r2"]), 4))
        )  # fmt: skip
    if pgr:
        name = f"performance gap recovered, %, median of {len(pgr)} clients"
        results.append(EvalResult(**common, metric_type="pgr", metric_name=name, metric_value=round(median(pgr), 2)))
    metadata: dict[str, Any] = {
        "library_name": LIBRARY,
        **_base_models(source, target),
        "tags": [LIBRARY, "lora", "peft", "weight-generation"],
    }
    if origin.get("repo_id"):
        metadata["datasets"] = [origin["repo_id"]]
    if results:
        metadata |= {"model_name": repo_id.split("/")[-1], "eval_results": results}
    words = {
        "repo_id": repo_id,
        "source": _name(source),
        "target": _name(target),
        "training": _training(origin),
        "heldout": _heldout_words(scores),
        "controls": _controls_table(clients),
        "picture": "\n".join(f"![{_title(name)}]({name})" for name in _best_pictures(pictures)),
        "limits": _mapper_limits(scores, clients),
    }
    return Facts(metadata, words, _hub_results(origin, scores, pgr))


def delta_dataset_facts(repo_id: str, manifest: Mapping[str, Any]) -> Facts:
    """Facts of a delta dataset: both base models, runs and pairs by split, what its rows hold."""
    roots, splits = manifest.get("roots", {}), manifest.get("splits", {})
    source, target = (roots.get(role, {}).get("base_model") for role in ("source", "target"))
    rows = ["| split | shadow runs | pairs |", "|---|---:|---:|"]
    rows += [f"| {name} | {count['runs']} | {count['pairs']} |" for name, count in splits.items()]
    pairs = sum(count["pairs"] for count in splits.values())
    data_files = [{"split": name, "path": f"data/{name}-*.parquet"} for name in splits]
    public = (manifest.get("data") or {}).get("path")
    metadata: dict[str, Any] = {
        "tags": [LIBRARY, "lora", "peft"],
        "size_categories": [_size_category(pairs)],
        "pretty_name": f"LoRA deltas of {_name(source)} and {_name(target)}",
        "configs": [{"config_name": "default", "data_files": data_files}],
        **({"source_datasets": [public]} if _HUB_ID.fullmatch(str(public)) else {}),
    }
    missing = manifest.get("missing_runs") or []
    words = {
        "repo_id": repo_id,
        "source": _name(source),
        "target": _name(target),
        "table": "\n".join(rows),
        "public_data": f"`{public}`" if public else "not stated",
        "format_version": str(manifest.get("format_version")),
        "missing": f"{len(missing)} planned runs did not finish and are not in it." if missing else "",
    }
    return Facts(metadata, words)


def adapter_facts(repo_id: str, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> Facts:
    """Facts of a client's or a generated adapter."""
    base = config.get("base_model_name_or_path")
    generated = metadata.get("generated") or {}
    mapper = generated.get("mapper") or metadata.get("mapper")
    card: dict[str, Any] = {"library_name": "peft", **_base_models(base), "tags": [LIBRARY, "lora"]}
    clients = generated.get("clients") or []
    lines = [f"- {_origin_words(client)}" for client in clients]
    words = {
        "repo_id": repo_id,
        "base": _name(base),
        "base_id": str(base),
        "rank": str(config.get("r")),
        "mapper": _origin_words(mapper) if mapper else "a mapper that was not on the Hub",
        "examples": _examples_words(metadata.get("num_examples")),
        "privacy": _privacy_words(metadata.get("differential_privacy")),
        "num_clients": str(generated.get("num_clients", 1)),
        "aggregation": str(generated.get("aggregation", "mean")),
        "clients": "\n".join(lines),
        "shift": _shift_words(generated.get("shift")),
        "refinement": _refinement_words(generated.get("refinement")),
        "target": _name(base),
    }
    return Facts(card, words)


def _refinement_words(refinements: Any) -> str:
    if not refinements:
        return "Not refined: as it was generated."
    words = []
    for facts in refinements:
        history = facts["agreement_by_round"]
        ending = f"refined to {history[-1]:.2f}" if len(history) > 1 else "left as it was"
        shadows = ", ".join(f"`{name}`" for name in facts.get("annotators", []))
        ending += f" towards what shadows of {shadows} say in the client's words" if shadows else ""
        words.append(f"`{facts['candidate']}`, whose agreement with the TinyLM was {history[0]:.2f}, {ending}")
    return (
        "Refined on public prompts that the TinyLM with the client's adapter completed: " + "; ".join(words) + ". No "
        "private row was used, so this is post-processing, and keeps whatever the client's adapter guarantees."
    )


def _base_models(*names: Any) -> dict[str, Any]:
    """Only ids of the Hub: a folder's name is nobody's model there."""
    found = [str(name) for name in names if name and _HUB_ID.fullmatch(str(name))]
    return {"base_model": found, "base_model_relation": "adapter"} if found else {}


def _name(value: Any) -> str:
    return f"`{value}`" if value else "an unnamed base model"


def _origin_words(origin: Mapping[str, Any]) -> str:
    if origin.get("repo_id"):
        version = f" {origin['revision']}" if origin.get("revision") else ""
        return (
            f"[`{origin['repo_id']}`](https://huggingface.co/{origin['repo_id']}){version}, commit `{origin['sha']}`"
        )
    return f"not named, SHA-256 of its values `{origin.get('sha256', 'unknown')}`"


def _training(origin: Mapping[str, Any]) -> str:
    return f"Trained on {_origin_words(origin)}." if origin.get("repo_id") else "Its delta dataset is not on the Hub."


def _heldout_words(scores: Mapping[str, Any]) -> str:
    if scores.get("r2") is None:
        return "No held-out figures: whether this mapper reads its input was not measured."
    rows = [
        ("mapper, free-running", scores["r2"]),
        ("the same, inputs permuted among runs", scores.get("r2_permuted_inputs")),
        ("ceiling: the true task mean", scores.get("r2_ceiling")),
        ("teacher-forced", scores.get("r2_teacher_forced")),
        *((f"control: {name.removeprefix('r2_')}", value) for name, value in _control_scores(scores).items()),
    ]
    table = ["| R² around the mean shadow, held-out runs | |", "|---|---:|"]
    table += [f"| {name} | {value:.3f} |" for name, value in rows if value is not None]
    return "\n".join(table)


def _control_scores(scores: Mapping[str, Any]) -> dict[str, float]:
    known = ("r2", "r2_teacher_forced", "r2_permuted_inputs", "r2_ceiling")
    flat = {name: value for name, value in scores.items() if name.startswith("r2_") and name not in known}
    return {**flat, **(scores.get("controls") or {})}


def _controls_table(clients: Sequence[Mapping[str, Any]]) -> str:
    if not clients:
        return "No client was scored."
    kinds = list(dict.fromkeys(str(client["kind"]) for client in clients))
    groups = {kind: [client for client in clients if client["kind"] == kind] for kind in kinds}
    lines = ["| median score | " + " | ".join(f"{kind} ({len(groups[kind])})" for kind in kinds) + " |"]
    lines.append("|---|" + "---:|" * len(kinds))
    for name, label in _ROWS.items():
        cells = [_median([_score(client, name) for client in groups[kind]], "{:.3f}") for kind in kinds]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    cells = [_median([client.get("pgr") for client in groups[kind]], "{:.0f} %") for kind in kinds]
    lines.append("| **PGR of the generated adapter** | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _score(client: Mapping[str, Any], name: str) -> float | None:
    value = client["controls"].get(name) if name in client.get("controls", {}) else client.get(name)
    return None if value is None else float(value)


def _median(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(median(known)) if known else "-"


def _mapper_limits(scores: Mapping[str, Any], clients: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    r2, permuted = scores.get("r2"), scores.get("r2_permuted_inputs")
    if r2 is not None and r2 <= 0:
        lines.append("- Held-out R² is not above 0: **this mapper ignores its input**.")
    elif r2 is not None and permuted is not None and permuted >= r2 / 2:
        lines.append("- With the inputs of other runs it is nearly as good: **this mapper hardly reads its input**.")
    for name in ("nearest_shadow", "ridge"):
        pairs = [(client["generated"], client["controls"].get(name)) for client in clients]
        known = [(ours, theirs) for ours, theirs in pairs if theirs is not None]
        behind = sum(theirs >= ours for ours, theirs in known)
        if behind:
            label = _ROWS[name].removeprefix("control: ")
            lines.append(f"- For {behind} of {len(known)} clients {label} does as well or better.")
    small = sum(bool(client.get("gap_too_small")) for client in clients)
    if small:
        lines.append(f"- {small} of {len(clients)} clients have too small a gap for a PGR.")
    if clients:
        lines.append(f"- {len(clients)} clients, one seed: no statement on other tasks, seeds or base models.")
    return "\n".join(lines) or "- Nothing was measured on clients."


def _hub_results(origin: Mapping[str, Any], scores: Mapping[str, Any], pgr: Sequence[float]) -> list[dict[str, Any]]:
    """Entries of `.eval_results/*.yaml`; the form asks for a dataset on the Hub."""
    if not origin.get("repo_id"):
        return []
    dataset = {"id": origin["repo_id"], "revision": origin["sha"]}
    entries = []
    if scores.get("r2") is not None:
        entry = {"dataset": {**dataset, "task_id": "heldout_r2"}, "value": round(float(scores["r2"]), 4)}
        entries.append({**entry, "notes": "R2 around the mean shadow delta, held-out shadow runs, free-running"})
    if pgr:
        entry = {"dataset": {**dataset, "task_id": "pgr"}, "value": round(median(pgr), 2)}
        entries.append({**entry, "notes": f"performance gap recovered in percent, median of {len(pgr)} clients"})
    return entries


def _best_pictures(pictures: Sequence[str]) -> list[str]:
    order = ("pgr.png", "accuracy.png", "training.png", "blocks.png")
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


def _examples_words(count: Any) -> str:
    return f"{count} examples." if count is not None else "Their number is not stated."


def _privacy_words(statement: Any) -> str:
    if not isinstance(statement, Mapping):
        return (
            "Made **without differential privacy**. That only the adapter left its owner is no privacy guarantee: an "
            "adapter can reveal rows it was trained on."
        )
    lines = [f"Differential privacy: {statement.get('statement', 'stated without words')}"]
    lines += [f"  - Not covered: {words}" for words in statement.get("not_covered") or ()]
    return "\n".join(lines)


def _shift_words(shifts: Any) -> str:
    """From the shift reports of the clients: 1 is what one in twenty held-out shadow runs exceeds."""
    known = [float(shift["shift"]) for shift in shifts or ()]
    if not known:
        return "not measured."
    listed = ", ".join(f"{shift:.2f}" for shift in known)
    return f"shift {listed}; 1 is what one in twenty held-out shadow runs exceeds; far above it, it guesses."
