"""A report in words and tables, for `report.md` and for the terminal. Every sentence follows from its numbers."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from statistics import fmean

from ..wording import describe_seconds, one_line
from .records import KINDS, METHODS, ClientReport, HeldoutScores, Report, pooled_pgr


_LABELS = {
    "tinylm": "TinyLM ft",
    "generated": "generated",
    "candidate": "candidate",
    "refined": "refined",
    "llm_finetuned": "LLM ft",
    "nearest_shadow": "nearest",
    "ridge": "ridge",
    "public_weak_to_strong": "public w2s",
    "mean_shadow": "mean",
    "other_client": "other client",
    "random": "random",
    "llm_base": "LLM base",
}
# The same as rows for the terminal, in the order of `_LABELS`.
_SUMMARY_LABELS = {
    "tinylm": "TinyLM, fine-tuned by the client",
    "generated": "LLM with the generated adapter",
    "candidate": "LLM with the best candidate",
    "refined": "LLM with that, refined on public prompts",
    "llm_finetuned": "LLM, fine-tuned on the client's rows: the ceiling",
    "nearest_shadow": "control: nearest shadow",
    "ridge": "control: ridge regression",
    "public_weak_to_strong": "control: weak-to-strong on public prompts",
    "mean_shadow": "control: mean shadow",
    "other_client": "control: another client's delta",
    "random": "control: random delta of the same norm",
    "llm_base": "LLM without an adapter",
}
_WIDTH = 100
# Two scores that differ by less are called equal.
_SAME = 0.02


def headline(heldout: HeldoutScores) -> list[str]:
    """The verdict on the mapper and the numbers it follows from, one sentence each."""
    numbers = f"Held-out R² around the mean shadow: {heldout.r2:.3f}"
    if heldout.r2_ceiling is None:
        numbers += " (no ceiling: tasks unknown)"
    elif heldout.r2_ceiling > 0:
        share = 100 * heldout.r2 / heldout.r2_ceiling
        numbers += f", {share:.0f} % of its ceiling {heldout.r2_ceiling:.3f} (the true task mean)"
    else:
        numbers += f"; its ceiling, the true task mean, is {heldout.r2_ceiling:.3f}: there was nothing to learn"
    if heldout.r2_permuted_inputs is not None:
        numbers += f"; with permuted inputs {heldout.r2_permuted_inputs:.3f}"
    numbers += f"; teacher-forced {heldout.r2_teacher_forced:.3f}."
    if heldout.reads_its_input:
        verdict = "The mapper reads its input."
    elif heldout.r2 <= 0:
        verdict = "The mapper ignores its input: it is no better than the mean shadow."
    elif heldout.r2_permuted_inputs is None:
        verdict = "Whether the mapper reads its input was not tested: that takes two held-out runs."
    else:
        verdict = "The mapper ignores its input: with the inputs of other runs it is nearly as good."
    lines = [verdict, numbers]
    if heldout.controls:
        others = ", ".join(f"{_LABELS.get(name, name)} {value:.3f}" for name, value in heldout.controls.items())
        lines.append(f"R² of controls on the same runs: {others}.")
    return lines


def advice(report: Report) -> str:
    """What to do with the mapper, and with these clients, in a sentence or two."""
    verdict = headline(report.heldout)[0]
    if not report.heldout.reads_its_input:
        return f"{verdict} Do not rely on what it generates: train it longer, or on more shadow runs."
    names = ("generated", "refined", "candidate", "nearest_shadow", "ridge", "public_weak_to_strong", "tinylm")
    scores = {name: _mean(report.clients, name) for name in names if _scores_all(report.clients, name)}
    known = {name: score for name, score in scores.items() if score is not None}
    if not known:
        return verdict
    generated, best = known["generated"], max(known, key=lambda name: known[name])
    if generated >= known[best] - _SAME:
        return (
            f"{verdict} Its adapters score {generated:.2f} on these clients, their own TinyLMs {known['tinylm']:.2f}, "
            "and nothing else tried here does better: use them."
        )
    against = (
        f"{verdict} But its adapters score {generated:.2f} on these clients, and {_LABELS[best]} {known[best]:.2f}"
    )
    return f"{against}: {_DO_INSTEAD[best]}."


_DO_INSTEAD = {
    "refined": "refine them on public prompts (generate --method best --refine_data)",
    "candidate": "let public prompts choose the way (generate --method best --refine_data)",
    "nearest_shadow": "take that (generate --method nearest_shadow)",
    "ridge": "take that (generate --method ridge)",
    "public_weak_to_strong": "train the LLM on public prompts instead",
    "tinylm": "the clients are better served by the TinyLMs that they have",
}


def _scores_all(clients: Sequence[ClientReport], name: str) -> bool:
    return bool(clients) and all(client.score(name) is not None for client in clients)


def summary_table(report: Report) -> str:
    """Plain text for the terminal, of at most 100 columns: the headline, and means by kind of client."""
    lines = _wrapped(headline(report.heldout))
    grouped = _by_kind(report.clients)
    if grouped:
        names = _known_names(report.clients)
        labels = ["number of clients", *(_SUMMARY_LABELS[name] for name in names)]
        labels += ["PGR %, generated", *(f"PGR %, {name}" for name in _methods_with_pgr(names))]
        columns = [[kind, *_kind_row(kind, clients, names)[1:]] for kind, clients in grouped]
        lines += ["", "Mean scores by kind of client, and the PGR of these means:"]
        lines += _aligned([["", *labels], *columns])
    last = [f"Delta reproducibility: {_reproducibility(report)}", f"Wall time: {_wall_time(report)}"]
    return "\n".join([*lines, "", *_wrapped(last)])


def _wrapped(sentences: Iterable[str]) -> list[str]:
    return [line for sentence in sentences for line in textwrap.wrap(sentence, _WIDTH)]


def _aligned(columns: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table given by columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for first, *others in zip(*columns, strict=True):
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def markdown(report: Report, *, figures: Sequence[str] = ()) -> str:
    """`report.md`.

    Args:
        report ([`Report`]).
        figures (`Sequence[str]`, *optional*): names of pictures in the same folder.
    """
    verdict, *numbers = headline(report.heldout)
    sections = [
        f"# Report: preset `{report.preset}`, seed {report.seed}",
        "\n".join([f"**{verdict}** {numbers[0]}", *numbers[1:]]),
        f"Delta reproducibility: {_reproducibility(report)}",
    ]
    grouped = _by_kind(report.clients)
    if grouped:
        sections += ["## Clients", _client_table(grouped), _CLIENT_NOTES]
        nll = _nll_table(grouped)
        if nll:
            sections += ["## Negative log-likelihood of the completions, nats per token", nll]
    sections += [f"![{_picture_title(name)}]({name})" for name in figures]
    sections += ["## Wall time", _wall_time(report), "## Limits", " ".join(limits(report))]
    return "\n\n".join(sections) + "\n"


_CLIENT_NOTES = (
    "Scores from 0 to 1 on each client's test rows; *ft*: fine-tuned on the client's own rows; *nearest*, *ridge*, "
    "*mean*, *other client*, *random*: the LLM with the delta of that control; *LLM base*: without any. Where tried, "
    "*candidate* is the best of mapper, nearest shadow and regressions by agreement with the TinyLM on public "
    "prompts, *refined* that one refined on these prompts, and *public w2s* the LLM trained on them from its "
    "root. PGR in percent, its interval a bootstrap over test rows; no PGR where the fine-tuned LLM is less than 3 "
    "points above the fine-tuned TinyLM (*gap too small*). The PGR of a kind is that of its mean scores: every client "
    "counts, also those whose own gap is too small."
)


def limits(report: Report) -> list[str]:
    """What the numbers do not show, one sentence each."""
    sentences = []
    for kind, clients in _by_kind(report.clients):
        generated = fmean(client.generated for client in clients)
        tinylm = fmean(client.tinylm for client in clients)
        names = (("nearest_shadow", "retrieval (the nearest shadow)"), ("ridge", "ridge regression"))
        rivals = [(value, label) for name, label in names if (value := _mean(clients, name)) is not None]
        if rivals:
            value, label = max(rivals)
            against = f"on {kind} clients {label} reaches {value:.2f} and the mapper {generated:.2f}"
            if value >= generated + _SAME:
                sentences.append(f"{_upper(against)}: there the mapper is not worth its training.")
            elif value >= generated - _SAME:
                sentences.append(f"{_upper(against)}: these clients do not show that a mapper is needed.")
            else:
                sentences.append(f"{_upper(against)}: more than a look-up or a linear map gives.")
        refined = _mean(clients, "refined")
        if refined is not None and refined >= tinylm > generated:
            sentences.append(
                f"On {kind} clients generation alone ({generated:.2f}) stays below the TinyLM that the client already "
                f"has ({tinylm:.2f}); refinement on public prompts takes it to {refined:.2f}."
            )
        elif generated < tinylm:
            sentences.append(
                f"On {kind} clients the generated adapter ({generated:.2f}) stays below the TinyLM that the client "
                f"already has ({tinylm:.2f}): that is the frontier."
            )
    small = sum(client.gap_too_small for client in report.clients)
    if small:
        sentences.append(f"{small} of {len(report.clients)} clients have a gap too small for a PGR.")
    if report.heldout.r2_ceiling is None:
        sentences.append(
            "Without known tasks R² has no ceiling to be held against: part of 1 - R² is fine-tuning noise."
        )
    sentences.append(
        f"All of this is one seed ({report.seed}) and {len(report.clients)} client(s); intervals cover the choice of "
        "test rows, not another seed, other shadow runs or other base models."
    )
    return sentences


def _client_table(grouped: Sequence[tuple[str, list[ClientReport]]]) -> str:
    names = _known_names([client for _, clients in grouped for client in clients])
    first, *others = _pgr_labels(names)
    header = ["client", "kind", "test rows", *(_LABELS[name] for name in names), f"{first} (95 %)", *others]
    lines = [_row(header), _row(["---", "---", *["---:"] * (len(header) - 2)])]
    for kind, clients in grouped:
        for client in clients:
            scores = [_number(client.score(name)) for name in names]
            pgrs = [_pgr(client), *(_percent(client.pgr_of(name), client) for name in _methods_with_pgr(names))]
            lines.append(_row([_named(client.id), kind, str(client.n_test), *scores, *pgrs]))
        means = _kind_row(kind, clients, names)
        lines.append(_row([f"**mean of {means[1]}**", f"**{kind}**", "", *(f"**{c}**" for c in means[2:])]))
    return "\n".join(lines)


def _nll_table(grouped: Iterable[tuple[str, list[ClientReport]]]) -> str | None:
    clients = [client for _, group in grouped for client in group if client.nll]
    if not clients:
        return None
    found = {name for client in clients for name in client.nll}
    names = [name for name in _LABELS if name in found] + sorted(found - set(_LABELS))
    lines = [_row(["client", "kind", *(_LABELS.get(name, name) for name in names)])]
    lines.append(_row(["---", "---", *["---:"] * len(names)]))
    for client in clients:
        lines.append(_row([_named(client.id), client.kind, *(_number(client.nll.get(name)) for name in names)]))
    return "\n".join(lines)


def _kind_row(kind: str, clients: Sequence[ClientReport], names: Sequence[str]) -> list[str]:
    known = any(client.llm_finetuned is not None for client in clients)
    cells = []
    for name in ("generated", *_methods_with_pgr(names)):
        pgr = pooled_pgr(clients, name)
        cells.append(f"{pgr:.0f}" if pgr is not None else "gap too small" if known else "-")
    return [kind, str(len(clients)), *(_number(_mean(clients, name)) for name in names), *cells]


def _known_names(clients: Sequence[ClientReport]) -> list[str]:
    """What the columns are: methods only where somebody tried them."""
    tried = {name for client in clients for name in client.methods}
    return [name for name in _LABELS if name not in METHODS or name in tried]


def _methods_with_pgr(names: Sequence[str]) -> list[str]:
    return [name for name in ("refined",) if name in names]


def _pgr_labels(names: Sequence[str]) -> list[str]:
    return ["PGR %", *(f"PGR % {_LABELS[name]}" for name in _methods_with_pgr(names))]


def _by_kind(clients: Sequence[ClientReport]) -> list[tuple[str, list[ClientReport]]]:
    groups = [(kind, [client for client in clients if client.kind == kind]) for kind in KINDS]
    return [(kind, group) for kind, group in groups if group]


def _mean(clients: Sequence[ClientReport], name: str) -> float | None:
    values = [value for client in clients if (value := client.score(name)) is not None]
    return fmean(values) if values else None


def _pgr(client: ClientReport) -> str:
    if client.pgr is None:
        return _percent(None, client)
    if client.pgr_interval is None:
        return f"{client.pgr:.0f} (unbounded)"
    return f"{client.pgr:.0f} ({client.pgr_interval[0]:.0f} to {client.pgr_interval[1]:.0f})"


def _percent(pgr: float | None, client: ClientReport) -> str:
    if pgr is None:
        return "gap too small" if client.gap_too_small else "-"
    return f"{pgr:.0f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _reproducibility(report: Report) -> str:
    parts = []
    for name, label in (("tinylm", "TinyLM"), ("llm", "LLM")):
        value, cosine = report.delta_reproducibility[name], report.delta_cosine.get(name)
        text = "unknown" if value is None else f"leave-one-out R² {value:.2f}"
        parts.append(f"{label} {text}" + (f", centred cosine {cosine:.2f}" if cosine is not None else ""))
    return "; ".join(parts) + " (same-task deltas)."


def _wall_time(report: Report) -> str:
    if not report.wall_seconds:
        return "not measured."
    stages = ", ".join(f"{stage} {describe_seconds(seconds)}" for stage, seconds in report.wall_seconds.items())
    return f"{describe_seconds(sum(report.wall_seconds.values()))} in all: {stages}."


def _named(client: str) -> str:
    """An id in a cell of a table: one line, and no markup."""
    return re.sub(r"[\\`<>\[\]]", lambda match: f"\\{match.group()}", one_line(client, 80))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _upper(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _picture_title(name: str) -> str:
    return name.removesuffix(".png").replace("_", " ")
