"""What an adapter says of its differential privacy: facts, the words for them, and how several clients' add up.

A statement is a claim of whoever made the adapter. Nothing here, or anywhere, can verify it from the adapter alone;
but its epsilon is computed again from its other facts, and where it claims less than these give, theirs counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterFormatError
from .accounting import epsilon_of_mechanism


STATEMENT_KEY = "differential_privacy"

# Terms of a fine-tune that a client had to accept, since they are not what is usual: code, and what a card says.
UNUSUAL_TERMS = {
    "many_steps": "a very large number of steps",
    "large_batch": "a very large number of rows in each step",
    "large_learning_rate": "a very large learning rate",
    "long_rows": "very long rows",
    "few_steps": "so few noisy steps that each weighs heavily",
    "whole_batch": "half or more of all rows in each noisy step",
    "spent_before": "budget that earlier fine-tunes into the same folder had spent",
    "unbounded_before": "an earlier adapter without a bound in the same folder, whose rows may be the same",
}
# Accountants' answers differ by this much; a claim below that is replaced by what its facts give.
_CLAIM_TOLERANCE = 0.98
_GENERATOR_WORDS = {
    "aes-256-ctr": "an AES-256 keystream keyed by the operating system (each value half the sum of four Gaussians in "
    "float64)",
    "torch.Generator": "torch's generator, whose stream can be guessed by trying all of its seeds",
}
_UNIT_WORDS = {
    "add_or_remove_one_example": ("one example (one row of prompt and completion)", "one given row was", "example"),
    "add_or_remove_one_group": (
        "one group (all rows that share one value of a column that the client chose, such as a patient's)",
        "the rows of one given group were",
        "group",
    ),
}
_ONE_ROW = (
    "Several examples of one person: the unit is one row. Someone with k rows has k times epsilon, and a larger delta."
)
_ONE_GROUP = "Someone whose rows are in several groups: with k of them, k times epsilon, and a larger delta."
_GUESSABLE = (
    "Whoever tries the four billion streams of torch's generator, from which the noise was drawn: to them the noise "
    "is known, and the bound is void. Fine-tune again with this version."
)
_NOT_COVERED = (
    "Choices made by looking at the private rows before or between runs: trying several learning rates, clipping "
    "norms, numbers of steps or models and keeping the best spends budget that is not counted here.",
    "Other releases from the same rows: each further adapter, score or statistic adds its own epsilon and delta.",
    "The number of rows: batch size and sampling rate reveal it, to within a tenth.",
    "What public data or the base model already reveal, and what is true of a group whether or not a row is used.",
    "Attacks on the machine that the fine-tune ran on, and on the rounding of the clipped gradients themselves.",
)
_EARLY_STOPPING = (
    "Early stopping on private rows: when to stop, or which step to keep, was decided by scores on private rows to "
    "which no noise was added. The bound does not cover those rows."
)


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """(epsilon, delta)-differential privacy of one fine-tune with DP-SGD.

    Args:
        epsilon, delta (`float`): the bound, for the steps that were taken and what was spent before.
        accountant (`str`): `"prv"` or `"rdp"`, by which epsilon was computed.
        epsilon_rdp (`float`, *optional*): epsilon by Rényi accounting, as a cross-check; a looser bound.
        noise_multiplier (`float`): standard deviation of the noise over the clipping norm.
        max_grad_norm (`float`): clipping norm of one example's (or group's) gradient over all LoRA parameters.
        sample_rate (`float`): probability with which each example (or group) is in a step's batch, independently.
        expected_batch_size (`float`): the fixed number that the noisy sum is divided by.
        steps (`int`): noisy optimizer steps taken, resumed runs included.
        planned_steps (`int`): steps that the noise was chosen for.
        target_epsilon (`float`, *optional*): what was asked for; `None` where the noise was given.
        gradients (`str`): how per-example gradients were clipped: `"hooks"` or `"ghost"`.
        early_stopping_on_private_data (`bool`): whether private rows decided when to stop.
        adjacency (`str`): `"add_or_remove_one_example"` or `"add_or_remove_one_group"`.
        max_rows_per_group (`int`, *optional*): rows of a group that one step reads at most.
        sampling (`str`): `"poisson"`.
        random_generator (`str`): where noise and batches were drawn from; statements that do not say it are from when
            that was torch's generator.
        earlier_epsilon, earlier_delta (`float`): what earlier fine-tunes into the same folder had spent; included in
            `epsilon` and `delta`.
        unusual_terms (`tuple[str, ...]`): which of [`UNUSUAL_TERMS`] the client accepted.
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
    max_rows_per_group: int | None = None
    sampling: str = "poisson"
    random_generator: str = "torch.Generator"
    earlier_epsilon: float = 0.0
    earlier_delta: float = 0.0
    unusual_terms: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The facts, what they mean in words, and what they do not cover."""
        facts = {**dataclasses.asdict(self), "unusual_terms": list(self.unusual_terms)}
        return {**facts, "statement": self.statement(), "not_covered": list(self.not_covered())}

    @classmethod
    def from_dict(cls, data: Any, *, path: str | None = None) -> PrivacyStatement:
        """The inverse of [`~PrivacyStatement.to_dict`]; the words are made anew, never taken over.

        Raises:
            [`AdapterFormatError`]: a fact is missing, of another type, or out of range.
        """
        if not isinstance(data, Mapping):
            raise _malformed("an object", type(data).__name__, path)
        facts: dict[str, Any] = {}
        for spec in dataclasses.fields(cls):
            value = data.get(spec.name, spec.default)
            value = tuple(value) if isinstance(value, list) else value
            if not _fits(str(spec.type), value):
                raise _malformed(f"`{spec.name}` of type {spec.type}", repr(value)[:80], path)
            facts[spec.name] = value
        for name, (holds, expected) in _RANGES.items():
            if facts[name] is not None and not holds(facts[name]):
                raise _malformed(f"`{name}` {expected}", repr(facts[name])[:80], path)
        if facts["earlier_epsilon"] >= facts["epsilon"] or facts["earlier_delta"] >= facts["delta"]:
            raise _malformed("a total above what was spent before", facts["epsilon"], path)
        if data.get("known_seed") is not None:
            raise _malformed("noise that nobody knows", "a known seed", path)
        return cls(**facts)

    @property
    def unit(self) -> str:
        """What is added or removed: an `"example"` or a `"group"`."""
        return _UNIT_WORDS[self.adjacency][2]

    def supported_epsilon(self) -> float:
        """The epsilon that may be passed on: as stated, unless the mechanism that is stated spends more."""
        own_delta = self.delta - self.earlier_delta
        own = epsilon_of_mechanism(self.noise_multiplier, self.sample_rate, self.steps, own_delta)
        supported = own + self.earlier_epsilon
        return self.epsilon if self.epsilon >= _CLAIM_TOLERANCE * supported else supported

    def statement(self) -> str:
        """One paragraph that says what was done and what it guarantees."""
        asked = "" if self.target_epsilon is None else f" ({self.target_epsilon:g} was asked for)"
        check = "" if self.epsilon_rdp is None else f"; Rényi accounting gives {self.epsilon_rdp:.4g}"
        unit, given, name = _UNIT_WORDS[self.adjacency]
        clipped = "the gradient of each example's own mean completion loss"
        if self.unit == "group":
            clipped = (
                f"the gradient of each group's mean loss (over its examples, at most {self.max_rows_per_group} of "
                "them, drawn anew)"
            )
        words = (
            f"This adapter was fine-tuned with DP-SGD and satisfies ({self.epsilon:.4g}, {self.delta:g})-differential "
            f"privacy{asked} with respect to adding or removing {unit} of its "
            f"training data: whoever sees the adapter, with any other knowledge, can tell whether {given} "
            f"used only as well as this bound allows. Each of {self.steps} steps (planned: {self.planned_steps}) drew "
            f"every {name} independently with probability {self.sample_rate:.6g} (Poisson sampling), clipped "
            f"{clipped} to norm {self.max_grad_norm:g} over the LoRA "
            f"parameters, which alone were trained, summed these, added Gaussian noise of standard deviation "
            f"{self.noise_multiplier:.6g} x {self.max_grad_norm:g}, and divided by {self.expected_batch_size:g}. "
            f"Noise and batches were drawn from {_GENERATOR_WORDS[self.random_generator]}. "
            f"Epsilon is for the steps really taken, by the {self.accountant.upper()} accountant{check}. "
        )
        if self.earlier_epsilon:
            words += (
                f"Of the bound, ({self.earlier_epsilon:.4g}, {self.earlier_delta:g}) was spent by earlier fine-tunes "
                "into the same folder (budgets add up). "
            )
        if self.unusual_terms:
            listed = "; ".join(UNUSUAL_TERMS[code] for code in self.unusual_terms)
            words += f"The client accepted unusual terms: {listed}. "
        return (
            f"{words}Whatever is computed from the adapter alone, such as an adapter for another model, has the same "
            f"guarantee (post-processing)."
        )

    def not_covered(self) -> tuple[str, ...]:
        """What the bound says nothing about, one sentence each."""
        said = [_GUESSABLE] if self.random_generator == "torch.Generator" else []
        said += [_EARLY_STOPPING] if self.early_stopping_on_private_data else []
        return (*said, *_NOT_COVERED, _ONE_GROUP if self.unit == "group" else _ONE_ROW)

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
            ("noise and batches from", self.random_generator),
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
    and delta hold for all. Data that may overlap compose in sequence: epsilons and deltas add up. A client's epsilon
    is [`~PrivacyStatement.supported_epsilon`]: what it states, but never less than its stated mechanism spends.

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
    epsilons = [None if statement is None else statement.supported_epsilon() for statement in statements]
    epsilon = float(combine(value for value in epsilons if value is not None)) if complete else None
    delta = float(combine(statement.delta for statement in made)) if complete else None
    words = _composed_words(len(statements), len(made), epsilon, delta, parallel, _common_unit(made))
    guessable = sum(statement.random_generator == "torch.Generator" for statement in made)
    if guessable:
        words += (
            f" The noise of {guessable} of them came from torch's generator: whoever tries all of its streams knows "
            "it, and to them there is no bound."
        )
    return {
        "epsilon": epsilon,
        "delta": delta,
        "composition": "parallel" if parallel else "sequential",
        "disjoint_clients": disjoint_clients,
        "num_clients": len(statements),
        "clients": [
            None
            if statement is None
            else {
                "epsilon": value,
                "claimed_epsilon": statement.epsilon,
                "delta": statement.delta,
                "steps": statement.steps,
                "accountant": statement.accountant,
            }
            for statement, value in zip(statements, epsilons, strict=True)
        ],
        "statement": words,
    }


def _common_unit(statements: Sequence[PrivacyStatement]) -> str:
    """A bound for groups holds for single examples too; so the unit is a group only where it is for all."""
    return "group" if all(statement.unit == "group" for statement in statements) else "example"


def _composed_words(
    clients: int, stated: int, epsilon: float | None, delta: float | None, parallel: bool, unit: str
) -> str:
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
        f"({epsilon:.4g}, {delta:g})-differential privacy with respect to adding or removing one {unit}, from "
        f"{reason}. Aggregating and mapping adapters is post-processing and costs no budget. The clients' bounds are "
        "their own statements, checked against the mechanisms that they state; that these were run was not verified."
    )


# What each fact may be, and how that is said. What lies outside is no mechanism that anybody runs.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epsilon": (lambda value: 0 < value <= 1e6, "above 0, at most 1e6"),
    "epsilon_rdp": (lambda value: 0 < value <= 1e6, "above 0, at most 1e6"),
    "target_epsilon": (lambda value: 0 < value <= 1e6, "above 0, at most 1e6"),
    "delta": (lambda value: 1e-15 <= value <= 0.1, "between 1e-15 and 0.1"),
    "noise_multiplier": (lambda value: 1e-3 <= value <= 1e7, "between 0.001 and 1e7"),
    "max_grad_norm": (lambda value: 0 < value <= 1e9, "above 0, at most 1e9"),
    "sample_rate": (lambda value: 1e-12 <= value <= 1, "above 0, at most 1"),
    "expected_batch_size": (lambda value: 0 < value <= 1e12, "above 0"),
    "steps": (lambda value: 1 <= value <= 10**9, "of at least 1"),
    "planned_steps": (lambda value: 1 <= value <= 10**9, "of at least 1"),
    "max_rows_per_group": (lambda value: 1 <= value <= 10**9, "of at least 1"),
    "accountant": (lambda value: value in ("prv", "rdp"), "prv or rdp"),
    "gradients": (lambda value: value in ("hooks", "ghost"), "hooks or ghost"),
    "adjacency": (lambda value: value in _UNIT_WORDS, f"one of {', '.join(_UNIT_WORDS)}"),
    "sampling": (lambda value: value == "poisson", "poisson"),
    "random_generator": (lambda value: value in _GENERATOR_WORDS, f"one of {', '.join(_GENERATOR_WORDS)}"),
    "unusual_terms": (
        lambda value: len(set(value)) == len(value) and set(value) <= UNUSUAL_TERMS.keys(),
        "of this version's codes",
    ),
}


def _fits(kind: str, value: Any) -> bool:
    if value is None:
        return kind.endswith("| None")
    kind = kind.removesuffix(" | None")
    if kind == "tuple[str, ...]":
        return isinstance(value, tuple) and all(_fits("str", item) for item in value)
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
