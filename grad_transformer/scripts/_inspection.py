"""What `grad-transformer inspect` says of each kind of folder: facts for machines, sentences, and the next step.

Names and texts in a folder may be a stranger's: they are shown as one shortened line each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters import LoraAdapter, Root
from ..adapters.io import read_record
from ..adapters.privacy import statement_of
from ..constants import HELDOUT_NAME, ROOT_FOLDER, ROOT_NAME, RUNS_FOLDER, SOURCE_FOLDER, TARGET_FOLDER
from ..errors import GradTransformerError
from ..evaluation.records import HeldoutScores
from ..evaluation.report import read_report, summary_table
from ..evaluation.tables import headline
from ..schemas import HeldoutRecord, RootRecord
from ..wording import describe_seconds, one_line


# Beyond these, numbers and lists in a foreign file mean nothing.
_MOST, _MOST_ENTRIES = 10**15, 16


@dataclass(frozen=True)
class Inspection:
    """What a folder holds.

    Args:
        facts (`Mapping[str, Any]`): for machines.
        sentences (`tuple[str, ...]`): for people; a text that is laid out already may stand among them.
        next_step (`str`, *optional*): what to do with it.
    """

    facts: Mapping[str, Any]
    sentences: tuple[str, ...]
    next_step: str | None = None


def inspect_folder(kind: str, folder: Path, manifest: Mapping[str, Any], shown: str) -> Inspection:
    """
    Args:
        kind (`str`): one of `KINDS`.
        folder (`Path`), manifest (`Mapping[str, Any]`): where it lies, and the file that names its kind.
        shown (`str`): what the user calls it.

    Raises:
        [`GradTransformerError`]: an adapter or a root that is not whole.
    """
    return KINDS[kind](folder, manifest, one_line(shown))


def _root(folder: Path, manifest: Mapping[str, Any], shown: str) -> Inspection:
    root = Root.from_pretrained(folder)
    return Inspection(
        {**root.facts(), "seed": root.seed, **adapter_facts(root.adapter)},
        (
            f"The LoRA adapter of {one_line(root.base_model)} that every shadow run and every client starts from.",
            f"{_size(root.adapter)} Fingerprint {root.fingerprint}: what was fine-tuned from it names this.",
            "`shadow`, `train` and `client` find it beside the plan and in the mapper.",
        ),
    )


def _adapter(folder: Path, manifest: Mapping[str, Any], shown: str) -> Inspection:
    adapter = LoraAdapter.from_pretrained(folder)
    base, metadata = one_line(adapter.base_model), adapter.metadata
    sentences, next_step = [f"A PEFT adapter of {base}."], None
    if metadata.get("generated"):
        clients = metadata["generated"].get("clients") if isinstance(metadata["generated"], dict) else None
        number = f" from {_count(len(clients), 'client adapter')}" if isinstance(clients, list) else ""
        sentences = [f"A PEFT adapter for the LLM {base}, generated{number} by a mapper."]
        next_step = f"PeftModel.from_pretrained(llm, {shown!r}), with plain peft."
    elif metadata.get("root"):
        sentences = [f"A client's adapter of {base}, fine-tuned from a mapper's root."]
        next_step = f"grad-transformer generate --mapper mapper --adapters {shown} --output_dir llm-adapter"
    else:
        sentences.append(
            "It names no root: a mapper reads only what `grad-transformer client` fine-tuned from its root."
        )
        next_step = f"PeftModel.from_pretrained(model, {shown!r}), with plain peft."
    sentences.append(_size(adapter))
    statement = statement_of(metadata, path=str(folder))
    if statement is not None:
        sentences.append(
            f"Privacy: its maker claims ({statement.epsilon:.4g}, {statement.delta:g})-differential privacy for each "
            f"row; nobody can verify that from the adapter."
        )
    elif metadata.get("root"):
        sentences.append("Privacy: no guarantee is claimed. An adapter can reveal rows that it was fine-tuned on.")
    return Inspection(adapter_facts(adapter), tuple(sentences), next_step)


def _delta_dataset(folder: Path, manifest: Mapping[str, Any], shown: str) -> Inspection:
    splits = {name: _mapping(count) for name, count in _mapping(manifest.get("splits")).items()}
    counts = [
        f"{_count(count.get('pairs'), 'pair')} of {_count(count.get('runs'), 'run')} for {one_line(name, 40)}"
        for name, count in list(splits.items())[:_MOST_ENTRIES]
    ]
    roots = _mapping(manifest.get("roots"))
    sentences = [f"Pairs of deltas, TinyLM {_base_of(roots, 'source')} and LLM {_base_of(roots, 'target')}."]
    sentences.append(f"It has {', '.join(counts)}." if counts else "It says nothing of its splits.")
    missing = manifest.get("missing_runs")
    if isinstance(missing, list) and missing:
        sentences.append(f"{_count(len(missing), 'run')} of the plan were not finished, and are left out.")
    if splits and "test" not in splits:
        sentences.append("No runs are held out as a test: nothing will say whether a mapper reads its input.")
    facts = {**manifest_facts(manifest), "splits": splits}
    return Inspection(facts, tuple(sentences), f"grad-transformer train --dataset {shown} --output_dir mapper")


def _mapper(folder: Path, manifest: Mapping[str, Any], shown: str) -> Inspection:
    roots = {
        role: read_record(path, RootRecord)
        for role in (SOURCE_FOLDER, TARGET_FOLDER)
        if (path := folder / role / ROOT_FOLDER / ROOT_NAME).is_file()
    }
    heldout = read_record(folder / HELDOUT_NAME, HeldoutRecord) if (folder / HELDOUT_NAME).is_file() else {}
    sentences = [
        f"Maps deltas of the TinyLM {_base_of(roots, 'source')} to deltas of the LLM {_base_of(roots, 'target')}."
    ]
    scores = _heldout_scores(heldout)
    sentences += (
        ["How well it does on held-out runs is not known: nothing was held out."]
        if scores is None
        else headline(scores)
    )
    good = scores is not None and scores.r2 > 0
    next_step = (
        f"grad-transformer client --mapper {shown} --data private.jsonl --output_dir client-adapter"
        if good
        else "more shadow runs, or longer training (grad-transformer train): do not use it before R² is above 0."
    )
    bases = {f"{role}_base_model": _mapping(root).get("base_model") for role, root in roots.items()}
    return Inspection({**manifest_facts(manifest), **bases, "heldout": heldout}, tuple(sentences), next_step)


def _delta_tokenizer(folder: Path, manifest: Mapping[str, Any], shown: str) -> Inspection:
    return Inspection(
        manifest_facts(manifest), ("One side of a mapper: how adapters become blocks of numbers and back.",)
    )


def _plan(folder: Path, manifest: Mapping[str, Any], shown: str) -> Inspection:
    planned = manifest.get("runs")
    number = len(planned) if isinstance(planned, list) else 0
    runs = run_files(folder / RUNS_FOLDER, folder)
    finished = {role: runs.get(f"{RUNS_FOLDER}/{role}", 0) for role in ("source", "target")}
    sides = {role: _mapping(_mapping(manifest.get(role)).get("root")) for role in finished}
    sentences = [
        f"A plan of {_count(number, 'shadow run')} for each of TinyLM {_base_of(sides, 'source')} and LLM "
        f"{_base_of(sides, 'target')}.",
        f"Finished: {finished['source']} of {number} TinyLM runs, {finished['target']} of {number} LLM runs.",
    ]
    done = number > 0 and min(finished.values()) >= number
    next_step = f"grad-transformer build {shown} --output_dir deltas" if done else f"grad-transformer shadow {shown}"
    return Inspection({**manifest_facts(manifest), "runs": runs, "finished": finished}, tuple(sentences), next_step)


def _runs(folder: Path, manifest: Mapping[str, Any], shown: str) -> Inspection:
    base = folder / RUNS_FOLDER if (folder / RUNS_FOLDER).is_dir() else folder
    runs = run_files(base, folder)
    sentence = (
        f"{_count(sum(runs.values()), 'file')} of runs or weights, without the plan.json that says what they are."
    )
    return Inspection({"runs": runs}, (sentence,), "put the plan's plan.json and roots back beside them.")


def _report(folder: Path, manifest: Mapping[str, Any], shown: str) -> Inspection:
    try:
        text = summary_table(read_report(folder))
    except GradTransformerError as error:
        text = f"It cannot be read in full. {one_line(error.message)}"
    return Inspection(manifest_facts(manifest), (text,), f"read {shown}/report.md, which has every client.")


def _demo(folder: Path, manifest: Mapping[str, Any], shown: str) -> Inspection:
    seconds = {one_line(name, 40): value for name, value in _numbers(manifest.get("seconds")).items()}
    stages = ", ".join(f"{name} ({describe_seconds(value)})" for name, value in seconds.items())
    preset = one_line(manifest.get("preset"), 40)
    return Inspection(
        manifest_facts(manifest),
        (f"A demo that has not come to its end. Stages so far: {stages or 'none'}.",),
        f"grad-transformer demo --output_dir {shown} --preset {preset} goes on with it.",
    )


def _study(folder: Path, manifest: Mapping[str, Any], shown: str) -> Inspection:
    names = ", ".join(one_line(name, 40) for name in list(_mapping(manifest.get("experiments")))[:_MOST_ENTRIES])
    return Inspection(
        manifest_facts(manifest), (f"A study's results. Experiments: {names or 'none'}.",), f"read {shown}/study.md."
    )


def _base_model(folder: Path, manifest: Mapping[str, Any], shown: str) -> Inspection:
    model_type = one_line(manifest.get("model_type") or "of no named type", 60)
    names = manifest.get("architectures")
    classes = ", ".join(one_line(name, 60) for name in names[:_MOST_ENTRIES]) if isinstance(names, list) else ""
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return Inspection(
        manifest_facts(manifest),
        (
            f"This is a transformers model ({model_type}{f', {classes}' if classes else ''}), not something that this "
            "library wrote.",
            *(() if weights else ("Here is its config alone, without weights.",)),
        ),
        f"grad-transformer plan --source_model {shown}, or --target_model, takes a causal language model.",
    )


KINDS: dict[str, Callable[[Path, Mapping[str, Any], str], Inspection]] = {
    "root": _root,
    "adapter": _adapter,
    "delta dataset": _delta_dataset,
    "mapper": _mapper,
    "delta tokenizer": _delta_tokenizer,
    "shadow plan": _plan,
    "shadow runs": _runs,
    "report": _report,
    "demo": _demo,
    "study": _study,
    "base model": _base_model,
}


def adapter_facts(adapter: LoraAdapter) -> dict[str, Any]:
    """Facts of an adapter, with one entry per block."""
    blocks = []
    for block in adapter.layout.blocks:
        tensors = [adapter.tensors[spec.key] for spec in block.tensors]
        blocks.append(
            {
                "name": block.name,
                "tensors": len(tensors),
                "width": block.width,
                "rank": sorted({spec.shape[0] for spec in block.tensors if spec.side == "A"}),
                "scaling": sorted({spec.scaling for spec in block.tensors}),
                "dtype": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
                "norm": sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5,
            }
        )
    targets = adapter.config.get("target_modules")
    return {
        "base_model": adapter.base_model,
        "target_modules": sorted(targets) if isinstance(targets, list | set) else targets,
        "numel": adapter.layout.numel,
        "norm": sum(block["norm"] ** 2 for block in blocks) ** 0.5,
        "metadata": adapter.metadata,
        "blocks": blocks,
    }


def manifest_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says in single values; of lists and objects inside it, how many entries they have."""
    facts: dict[str, Any] = {}
    for key, value in manifest.items():
        items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
        small = items is None or (len(items) <= 8 and not any(isinstance(item, list | dict) for item in items))
        facts[key] = value if small else f"{len(value)} entries"
    return facts


def run_files(runs_folder: Path, folder: Path) -> dict[str, int]:
    """How many finished files lie in each folder of runs; hidden files are not whole."""
    counts: dict[str, int] = {}
    for path in sorted(runs_folder.rglob("*.safetensors")):
        if not path.name.startswith("."):
            name = path.parent.relative_to(folder).as_posix()
            counts[name] = counts.get(name, 0) + 1
    return counts


def _heldout_scores(heldout: Mapping[str, Any]) -> HeldoutScores | None:
    numbers = _numbers(heldout)
    if not {"r2", "r2_teacher_forced"} <= numbers.keys():
        return None
    own = ("r2", "r2_teacher_forced", "r2_permuted_inputs", "r2_ceiling")
    return HeldoutScores(
        r2=numbers["r2"],
        r2_teacher_forced=numbers["r2_teacher_forced"],
        r2_permuted_inputs=numbers.get("r2_permuted_inputs"),
        r2_ceiling=numbers.get("r2_ceiling"),
        controls={one_line(name.removeprefix("r2_"), 40): value for name, value in numbers.items() if name not in own},
    )


def _size(adapter: LoraAdapter) -> str:
    layout = adapter.layout
    norm = float(adapter.flat().double().norm())
    return f"{layout.numel:,} values in {_count(layout.num_blocks, 'block')}, of norm {norm:.4g} together."


def _base_of(sides: Mapping[str, Any], role: str) -> str:
    name = _mapping(sides.get(role)).get("base_model")
    return one_line(name, 100) if isinstance(name, str) else "of unknown name"


def _count(number: Any, noun: str) -> str:
    if not isinstance(number, int) or not 0 <= number < _MOST:
        return f"an unknown number of {noun}s"
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _numbers(value: Any) -> dict[str, float]:
    """The entries of a mapping that are numbers of a size that can be meant; the first few."""
    return {
        name: float(number)
        for name, number in list(_mapping(value).items())[:_MOST_ENTRIES]
        if isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < _MOST
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
