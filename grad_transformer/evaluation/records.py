"""What a report says, as dataclasses: validated, and JSON in both directions (`report.json`, format version 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..adapters.statistics import BlockAgreement
from ..constants import FORMAT_VERSION
from ..errors import UsageError
from ..files import check_record
from .controls import CONTROLS
from .metrics import gap_too_small, performance_gap_recovered, pgr_interval


# "other": a client of one's own, of which the provider does not know whether the shadows cover it.
KINDS = ("seen", "mixture", "unseen", "other")
# Beside the mapper's own adapter: the best of several candidates, that one refined on public prompts, and the LLM
# trained from the root on the same prompts as the TinyLM completes them.
METHODS = ("candidate", "refined", "public_weak_to_strong")


@dataclass(frozen=True)
class HeldoutScores:
    """R² around the mean shadow on held-out shadow runs.

    Args:
        r2 (`float`): of the mapper, free-running: each predicted block is fed back.
        r2_teacher_forced (`float`): the same, each block predicted from the true ones before it.
        r2_permuted_inputs (`float` or `None`): free-running, with every input taken from another run; `None` with
            fewer than two runs.
        r2_ceiling (`float` or `None`): of the true task mean; `None` where tasks are unknown.
        controls (`dict[str, float]`): R² of controls, by name.
    """

    r2: float
    r2_teacher_forced: float
    r2_permuted_inputs: float | None
    r2_ceiling: float | None = None
    controls: dict[str, float] = field(default_factory=dict)

    @property
    def reads_its_input(self) -> bool:
        """Tested, better than the mean shadow, and more than half of that lost when the inputs are permuted."""
        return self.r2_permuted_inputs is not None and self.r2 > 0 and self.r2_permuted_inputs < self.r2 / 2


@dataclass(frozen=True)
class ClientReport:
    """Scores of one client's test rows, all in [0, 1]; PGR in percent.

    Args:
        id (`str`): unique in the report.
        kind (`str`): one of `KINDS`.
        task (`str`): name of its task, or of its mixture.
        n_test (`int`): test rows.
        tinylm, llm_base, llm_finetuned, generated (`float`): mean scores of the fine-tuned TinyLM, the LLM without a
            delta, the fine-tuned LLM (`None` where nobody fine-tuned one) and the LLM with the generated adapter.
        controls (`dict[str, float | None]`): mean score with the delta of each of `CONTROLS`; `None`: not computed. A
            report of another version may lack some, or have more.
        pgr (`float` or `None`), pgr_interval (`tuple[float, float]` or `None`): `None` where they mean nothing.
        gap_too_small (`bool`): LLM minus TinyLM is below 3 points, so that there is no PGR.
        methods (`dict[str, float]`): mean score with each of `METHODS` that was tried.
        nll (`dict[str, float]`): mean negative log-likelihood of the completions, nats per token, by the same names.
    """

    id: str
    kind: str
    task: str
    n_test: int
    tinylm: float
    llm_base: float
    llm_finetuned: float | None
    generated: float
    controls: dict[str, float | None]
    pgr: float | None = None
    pgr_interval: tuple[float, float] | None = None
    gap_too_small: bool = False
    nll: dict[str, float] = field(default_factory=dict)
    methods: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_rows(
        cls,
        id: str,
        *,
        kind: str,
        task: str,
        tinylm: np.ndarray,
        llm_base: np.ndarray,
        llm_finetuned: np.ndarray | None,
        generated: np.ndarray,
        controls: Mapping[str, np.ndarray],
        methods: Mapping[str, np.ndarray] | None = None,
        nll: Mapping[str, np.ndarray | float] | None = None,
        seed: int = 0,
    ) -> ClientReport:
        """From the scores of each test row, as `RowScores.per_row` holds them, all of the same rows.

        Raises:
            [`UsageError`]: arrays of different lengths, or no rows.
        """
        arrays = {"tinylm": tinylm, "llm_base": llm_base, "generated": generated, **controls, **(methods or {})}
        if llm_finetuned is not None:
            arrays["llm_finetuned"] = llm_finetuned
        lengths = {name: len(values) for name, values in arrays.items()}
        if len(set(lengths.values())) != 1 or not len(tinylm):
            raise UsageError(f"Client {id}: scores of different test rows.", expected="equal lengths", found=lengths)
        means = {name: float(np.mean(values)) for name, values in arrays.items()}
        pgr, interval, small = None, None, False
        if llm_finetuned is not None:
            pgr = performance_gap_recovered(means["generated"], means["tinylm"], means["llm_finetuned"])
            interval = pgr_interval(generated, tinylm, llm_finetuned, seed=seed)
            small = gap_too_small(means["tinylm"], means["llm_finetuned"])
        return cls(
            id=id,
            kind=kind,
            task=task,
            n_test=len(tinylm),
            tinylm=means["tinylm"],
            llm_base=means["llm_base"],
            llm_finetuned=means.get("llm_finetuned"),
            generated=means["generated"],
            controls={name: means.get(name) if name in controls else None for name in CONTROLS},
            pgr=pgr,
            pgr_interval=interval,
            gap_too_small=small,
            nll={name: float(np.mean(values)) for name, values in (nll or {}).items()},
            methods={name: means[name] for name in methods or {}},
        )

    def score(self, name: str) -> float | None:
        """Mean score by its name, of references, controls and methods; `None` where it was not computed."""
        if name in CONTROLS:
            return self.controls.get(name)
        return self.methods.get(name) if name in METHODS else getattr(self, name)

    def pgr_of(self, name: str) -> float | None:
        """The PGR that a score by its name amounts to; `None` where it is not computed or means nothing."""
        score = self.score(name)
        if score is None or self.llm_finetuned is None:
            return None
        return performance_gap_recovered(score, self.tinylm, self.llm_finetuned)


def pooled_pgr(clients: Sequence[ClientReport], name: str = "generated") -> float | None:
    """PGR of the mean scores of the clients that have a ceiling; `None` without any, or where the gap is too small."""
    known = [client for client in clients if client.llm_finetuned is not None and client.score(name) is not None]
    if not known:
        return None
    scores = [[client.score(key) for client in known] for key in (name, "tinylm", "llm_finetuned")]
    return performance_gap_recovered(*(float(np.mean(np.array(values, dtype=float))) for values in scores))


@dataclass(frozen=True)
class Report:
    """One run, from shadow runs to scored clients. `to_dict` is what `report.json` holds.

    Args:
        preset (`str`), seed (`int`): what was run.
        wall_seconds (`dict[str, float]`): seconds by stage, in the order in which they ran.
        heldout ([`HeldoutScores`]): the first numbers to read.
        delta_reproducibility (`dict[str, float | None]`): leave-one-out R² of same-task deltas, `tinylm` and `llm`.
        delta_cosine (`dict[str, float | None]`): centred cosine of same-task deltas, by the same names.
        clients (`list[ClientReport]`).
        blocks ([`BlockAgreement`], *optional*): predicted against true held-out deltas by block.
    """

    preset: str
    seed: int
    wall_seconds: dict[str, float]
    heldout: HeldoutScores
    delta_reproducibility: dict[str, float | None]
    clients: list[ClientReport]
    delta_cosine: dict[str, float | None] = field(default_factory=dict)
    blocks: BlockAgreement | None = None

    def to_dict(self) -> dict[str, Any]:
        data = {"format_version": FORMAT_VERSION, **asdict(self)}
        for client in data["clients"]:
            client["pgr_interval"] = None if client["pgr_interval"] is None else list(client["pgr_interval"])
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_dict` was called on; fields that this version does not know are dropped.

        Raises:
            [`UsageError`]: a field is missing, of another type, or out of its range.
            [`FormatVersionError`]: it is newer than this version.
        """
        report = check_record(dict(data), cls, error=UsageError)
        report.validate()
        return report

    def validate(self) -> None:
        """Raises [`UsageError`] where a number is not finite or out of its range, or names do not fit."""
        for stage, seconds in self.wall_seconds.items():
            _check_number(f"wall_seconds.{stage}", seconds, low=0.0)
        heldout = {**asdict(self.heldout), **self.heldout.controls}
        del heldout["controls"]
        for name, value in heldout.items():
            _check_number(f"heldout.{name}", value, high=1.0, optional=name in ("r2_ceiling", "r2_permuted_inputs"))
        _check_names("delta_reproducibility", self.delta_reproducibility, ("tinylm", "llm"))
        for name, value in [*self.delta_reproducibility.items(), *self.delta_cosine.items()]:
            _check_number(f"delta_reproducibility.{name}", value, high=1.0 + 1e-9, optional=True)
        ids = [client.id for client in self.clients]
        if len(set(ids)) != len(ids):
            raise UsageError("Two clients of the report have the same id.", expected="unique ids", found=ids)
        for client in self.clients:
            _validate_client(client)

    def check_names(self) -> None:
        """Raises [`UsageError`] where a client lacks a control of this version, or has one or a method beside them."""
        for client in self.clients:
            where = f"clients[{client.id}]"
            _check_names(f"{where}.controls", client.controls, CONTROLS)
            if not set(client.methods) <= set(METHODS):
                raise UsageError(f"{where}.methods has unknown names.", expected=METHODS, found=list(client.methods))


def _validate_client(client: ClientReport) -> None:
    where = f"clients[{client.id}]"
    if client.kind not in KINDS:
        raise UsageError(f"{where}.kind is unknown.", expected=KINDS, found=client.kind)
    _check_number(f"{where}.n_test", client.n_test, low=1)
    for name in ("tinylm", "llm_base", "generated", "llm_finetuned"):
        _check_number(f"{where}.{name}", getattr(client, name), low=0.0, high=1.0, optional=name == "llm_finetuned")
    # Reports of a version with other controls or methods stay readable: names are open, values are not.
    for name, value in client.controls.items():
        _check_number(f"{where}.controls.{name}", value, low=0.0, high=1.0, optional=True)
    for name, value in client.methods.items():
        _check_number(f"{where}.methods.{name}", value, low=0.0, high=1.0)
    for name, value in client.nll.items():
        _check_number(f"{where}.nll.{name}", value, low=0.0)
    _check_number(f"{where}.pgr", client.pgr, optional=True)
    if client.pgr_interval is not None:
        low, high = client.pgr_interval
        _check_number(f"{where}.pgr_interval[0]", low)
        _check_number(f"{where}.pgr_interval[1]", high, low=low)
    if client.gap_too_small and client.pgr is not None:
        raise UsageError(f"{where} has a PGR over a gap that is too small.", expected=None, found=client.pgr)


def _check_number(
    name: str, value: float | None, *, low: float = -math.inf, high: float = math.inf, optional: bool = False
) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UsageError(f"{name} is no finite number.", found=repr(value))
    if not low <= value <= high:
        raise UsageError(f"{name} is out of its range.", expected=f"from {low} to {high}", found=value)


def _check_names(where: str, found: Mapping[str, object], expected: Sequence[str]) -> None:
    if set(found) != set(expected):
        raise UsageError(f"{where} has other names than it must have.", expected=list(expected), found=list(found))
