"""What an adapter says of its differential privacy: facts, the words for them, and how several clients' add up.

A statement is a claim of whoever made the adapter. Nothing here, or anywhere, can verify it from the adapter alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterFormatError


STATEMENT_KEY = "differential_privacy"

_NOT_COVERED = (
    "Choices made by looking at the private rows before or between runs: trying several learning rates, clipping "
    "norms, numbers of steps or models and keeping the best spends budget that is not counted here.",
    "Other releases from the same rows: each further adapter, score or statistic adds its own epsilon and delta.",
    "Several examples of one person: the unit is one row. Someone with k rows has k times epsilon, "
    "and a larger delta.",
    "The number of rows: batch size and sampling rate reveal it.",
    "What public data or the base model already reveal, and what is true of a group whether or not a row is used.",
    "Attacks on floating-point arithmetic or on the machine: noise comes from an ordinary generator, seeded by the "
    "operating system.",
)
_EARLY_STOPPING = (
    "Early stopping on private rows: when to stop, or which step to keep, was decided by scores on private rows to "
    "which no noise was added. The bound does not cover those rows."
)


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """(epsilon, delta)-differential privacy of one fine-tune with DP-SGD.

    Args:
        epsilon, delta (`float`): the bound, for the steps that were taken.
        accountant (`str`): `"prv"` or `"rdp"`, by which epsilon was computed.
        epsilon_rdp (`float`, *optional*): epsilon by Rényi accounting, as a cross-check; a looser bound.
        noise_multiplier (`float`): standard deviation of the noise over the clipping norm.
        max_grad_norm (`float`): clipping norm of one example's gradient over all LoRA parameters.
        sample_rate (`float`): probability with which each example is in a step's batch, independently.
        expected_batch_size (`float`): the fixed number that the noisy sum is divided by.
        steps (`int`): noisy optimizer steps taken, resumed runs included.
        planned_steps (`int`): steps that the noise was chosen for.
        target_epsilon (`float`, *optional*): what was asked for; `None` where the noise was given.
        gradients (`str`): how per-example gradients were clipped: `"hooks"` or `"ghost"`.
        early_stopping_on_private_data (`bool`): whether private rows decided when to stop.
        adjacency (`str`), sampling (`str`): the neighbouring relation and the sampling of batches.
    """

    epsilon: float
    delta: float
    accountant: str
    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    expected_batch_size: float
    steps: int
    planned_steps: int
    epsilon_rdp: float | None = None
    target_epsilon: float | None = None
    gradients: str = "hooks"
    early_stopping_on_private_data: bool = False
    adjacency: str = "add_or_remove_one_example"
    sampling: str = "poisson"

    def to_dict(self) -> dict[str, Any]:
        """The facts, what they mean in words, and what they do not cover."""
        facts = dataclasses.asdict(self)
        return {**facts, "statement": self.statement(), "not_covered": list(self.not_covered())}

    @classmethod
    def from_dict(cls, data: Any, *, path: str | None = None) -> PrivacyStatement:
        """The inverse of [`~PrivacyStatement.to_dict`]; the words are made anew, never taken over.

        Raises:
            [`AdapterFormatError`]: a fact is missing, of another type, or out of range.
        """
        if not isinstance(data, Mapping):
            raise _malformed("an object", type(data).__name__, path)
        facts = {}
        for spec in dataclasses.fields(cls):
            value = data.get(spec.name, spec.default)
            if not _fits(str(spec.type), value):
                raise _malformed(f"`{spec.name}` of type {spec.type}", repr(value)[:80], path)
            facts[spec.name] = value
        if not facts["epsilon"] > 0 or not 0 < facts["delta"] < 1 or not 0 < facts["sample_rate"] <= 1:
            found = {name: facts[name] for name in ("epsilon", "delta", "sample_rate")}
            raise _malformed("epsilon > 0, 0 < delta < 1, 0 < sample_rate <= 1", found, path)
        return cls(**facts)

    def statement(self) -> str:
        """One paragraph that says what was done and what it guarantees."""
        asked = "" if self.target_epsilon is None else f" ({self.target_epsilon:g} was asked for)"
        check = "" if self.epsilon_rdp is None else f"; Rényi accounting gives {self.epsilon_rdp:.4g}"
        return (
            f"This adapter was fine-tuned with DP-SGD and satisfies ({self.epsilon:.4g}, {self.delta:g})-differential "
            f"privacy{asked} with respect to adding or removing one example (one row of prompt and completion) of its "
            f"training data: whoever sees the adapter, with any other knowledge, can tell whether one given row was "
            f"used only as well as this bound allows. Each of {self.steps} steps (planned: {self.planned_steps}) drew "
            f"every example independently with probability {self.sample_rate:.6g} (Poisson sampling), clipped the "
            f"gradient of each example's own mean completion loss to norm {self.max_grad_norm:g} over the LoRA "
            f"parameters, which alone were trained, summed these, added Gaussian noise of standard deviation "
            f"{self.noise_multiplier:.6g} x {self.max_grad_norm:g}, and divided by {self.expected_batch_size:g}. "
            f"Epsilon is for the steps really taken, by the {self.accountant.upper()} accountant{check}. "
            f"Whatever is computed from the adapter alone, such as an adapter for another model, has the same "
            f"guarantee (post-processing)."
        )

    def not_covered(self) -> tuple[str, ...]:
        """What the bound says nothing about, one sentence each."""
        return (_EARLY_STOPPING, *_NOT_COVERED) if self.early_stopping_on_private_data else _NOT_COVERED

    def to_markdown(self) -> str:
        """The statement as a section for a card."""
        rows = [
            ("epsilon", f"{self.epsilon:.6g}"),
            ("delta", f"{self.delta:g}"),
            ("adjacency", self.adjacency.replace("_", " ")),
            ("accountant", self.accountant.upper()),
            ("epsilon by Rényi accounting", "-" if self.epsilon_rdp is None else f"{self.epsilon_rdp:.6g}"),
            ("sampling", f"{self.sampling}, rate {self.sample_rate:.6g}"),
            ("steps taken / planned", f"{self.steps} / {self.planned_steps}"),
            ("clipping norm", f"{self.max_grad_norm:g}"),
            ("noise multiplier", f"{self.noise_multiplier:.6g}"),
            ("per-example gradients", self.gradients),
        ]
        table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
        limits = "\n".join(f"- {line}" for line in self.not_covered())
        return f"## Differential privacy\n\n{self.statement()}\n\n{table}\n\nNot covered:\n\n{limits}\n"


def statement_of(metadata: Mapping[str, Any], *, path: str | None = None) -> PrivacyStatement | None:
    """The statement in an adapter's metadata, `None` where it makes none.

    Raises:
        [`AdapterFormatError`]: there is one, but not such a statement.
    """
    data = metadata.get(STATEMENT_KEY)
    return None if data is None else PrivacyStatement.from_dict(data, path=path)


def compose_statements(
    statements: Sequence[PrivacyStatement | None], *, disjoint_clients: bool = False
) -> dict[str, Any] | None:
    """What holds for an adapter made from several clients' adapters.

    Clients whose data are disjoint compose in parallel: one row is in one client's data only, so the largest epsilon
    and delta hold for all. Data that may overlap compose in sequence: epsilons and deltas add up.

    Args:
        statements (`Sequence`): one per client, `None` where a client makes none.
        disjoint_clients (`bool`, *optional*, defaults to `False`): whether no row, and nobody's data, is in two
            clients' data. Only the clients can know; for one client it means nothing.

    Returns:
        `dict` for the metadata of the aggregated or generated adapter, `None` where no client makes a statement. With
        a client that makes none there is no bound: `epsilon` and `delta` are `None`.
    """
    made = [statement for statement in statements if statement is not None]
    if not made:
        return None
    parallel = disjoint_clients or len(statements) == 1
    combine = max if parallel else sum
    complete = len(made) == len(statements)
    epsilon = float(combine(statement.epsilon for statement in made)) if complete else None
    delta = float(combine(statement.delta for statement in made)) if complete else None
    names = {"epsilon": "epsilon", "delta": "delta", "steps": "steps", "accountant": "accountant"}
    return {
        "epsilon": epsilon,
        "delta": delta,
        "composition": "parallel" if parallel else "sequential",
        "disjoint_clients": disjoint_clients,
        "num_clients": len(statements),
        "clients": [
            None if statement is None else {name: getattr(statement, source) for name, source in names.items()}
            for statement in statements
        ],
        "statement": _composed_words(len(statements), len(made), epsilon, delta, parallel),
    }


def _composed_words(clients: int, stated: int, epsilon: float | None, delta: float | None, parallel: bool) -> str:
    if epsilon is None:
        return (
            f"No bound: {clients - stated} of {clients} clients state no differential privacy. Each of the others has "
            "its own bound for its own rows."
        )
    reason = "one client"
    if clients > 1:
        reason = (
            f"{clients} clients who declare that their data are disjoint (parallel composition: the largest of their "
            "bounds)"
            if parallel
            else f"{clients} clients whose data may overlap (sequential composition: the sums of their bounds)"
        )
    return (
        f"({epsilon:.4g}, {delta:g})-differential privacy with respect to adding or removing one example, from "
        f"{reason}. Aggregating and mapping adapters is post-processing and costs no budget. The clients' bounds are "
        "their own statements; they were not verified."
    )


def _fits(kind: str, value: Any) -> bool:
    if value is None:
        return kind.endswith("| None")
    kind = kind.removesuffix(" | None")
    if kind == "str":
        return isinstance(value, str) and len(value) <= 64
    if kind == "bool":
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, int if kind == "int" else int | float):
        return False
    # Beyond float's range an integer of JSON has no meaning here.
    return abs(value) < 2**63 and math.isfinite(value) and value >= 0


def _malformed(expected: object, found: object, path: str | None) -> AdapterFormatError:
    return AdapterFormatError(
        "The adapter's statement of differential privacy cannot be read.",
        path=path,
        expected=expected,
        found=found,
        remedy=f"write it again with this library, or remove `{STATEMENT_KEY}` from the adapter's metadata",
    )
