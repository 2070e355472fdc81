"""Shadows as annotators of public prompts: what they say, with their words renamed as the client's TinyLM bears out.

A client's task is seldom one of the shadows', but it may be one of them *in other words*: the same reading of the
prompt, another name for each answer. An LLM with a shadow's adapter is then an annotator in the sense of Dawid and
Skene (1979, "Maximum likelihood estimation of observer error-rates using the EM algorithm"): its words go through a
channel, a table that says which word of the client's stands for each of its own. The TinyLM is the only evidence of
the truth. It is weak at each token, but a channel has few entries and a public prompt costs nothing, so a thousand
weak tokens decide it. What the best annotators then say is a whole skill, not the TinyLM's words place by place.

Shape legend: K clients, A annotators, P values of an LLM adapter, M tokens of one client's completions, T tokens kept
of a distribution, U words that a channel renames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..adapters.rows import CHUNK_VALUES, Deltas, evenly_spaced
from ..shadow import DeltaDataset
from .arguments import RefinementArguments
from .completions import LEAST_PROBABILITY, Completions, TopTokens, spread
from .student import Student


# Words of either model that a channel can rename: its frequent ones. Every other word stands for itself.
_MOST_WORDS = 128
# A word that makes up less than this share of what is said is not among them.
_RARE = 1e-3
# Probability that a word has beside all evidence, so that nothing is impossible.
_FLOOR = 1e-3
# How often, before any evidence, a word has been seen to stand for itself.
_SELF_COUNT = 0.5
_EM_STEPS = 10
# Tokens that it is fitted on, at even spacing: its entries are few.
_MOST_TOKENS = 2**15
_SINKHORN_STEPS = 5
# An annotator that is more than this share as unsure of its words as the TinyLM cannot show that the TinyLM hedges.
_SURER = 0.5
# Annotators whose testimony is taken together: at most so many, and none that tells so much less than the best.
MOST_TOGETHER, _NATS_BEHIND = 5, 0.1


@dataclass(frozen=True)
class Panel:
    """The LLM with the adapters of shadows, to be asked.

    Args:
        deltas (`Mapping[str, torch.Tensor]`): LLM deltas `(P,)` by name, one or more.
        student ([`Student`]): the LLM.
        top_tokens (`int`): see [`RefinementArguments`].
        say (`Callable`): called with a few words as the work goes on.
    """

    deltas: Mapping[str, torch.Tensor]
    student: Student
    top_tokens: int
    say: Callable[[str], None]

    def read(self, names: Sequence[str], completions: Sequence[Completions]) -> list[TopTokens]:
        """What the shadow of each name says at each token of the client beside it."""
        values_KP = self.student.root.adapter.flat() + torch.stack([self.deltas[name] for name in names])
        return self.student.read(values_KP, completions, top_tokens=self.top_tokens)


@dataclass(frozen=True)
class Screening:
    """What all annotators say to some of a client's prompts.

    Args:
        teacher ([`Completions`]): what the client's TinyLM says to all prompts.
        few ([`Completions`]): and to these.
        heard (`dict[str, torch.Tensor]`): what each says of the TinyLM's own tokens, `(M, T)` in float16.
        channels (`dict[str, Channel]`): and which words of the client's its words stand for.
        root_nats (`float`, *optional*, defaults to 0.0): what the LLM without an adapter tells, see [`told_by_root`].
    """

    teacher: Completions
    few: Completions
    heard: dict[str, torch.Tensor]
    channels: dict[str, Channel]
    root_nats: float = 0.0

    @property
    def best(self) -> list[str]:
        """Annotators, the one that tells most first."""
        return sorted(self.channels, key=lambda name: -self.channels[name].nats)

    @property
    def told(self) -> float:
        """See [`Testimony`]."""
        return _told(self.channels[self.best[0]], self.few, self.root_nats)

    @property
    def surplus(self) -> float:
        """What the best one tells over what can be told: by one right as often as the TinyLM's probabilities say, or
        by the LLM without an adapter, whichever tells more. Far more than 1 of a TinyLM that hedges; at most 1 where
        the annotator is hardly surer of its words than the TinyLM, and can be no witness of that."""
        return _surplus(self.channels[self.best[0]], self.few, self.root_nats)


@dataclass(frozen=True)
class Testimony:
    """What the best annotators of one client say at each of its M tokens, in its words.

    Args:
        tokens ([`TopTokens`]): their geometric mean.
        annotators (`list[str]`): which they are, the best first.
        told (`float`): what the best one tells of the TinyLM's words (the mean log ratio of how likely they are with
            its testimony and without), as a share of what one would tell that is right as often as the TinyLM's
            probabilities say, both beyond what the LLM tells without an adapter. 0 for one that knows nothing more,
            about 1 for one that knows all, more where the TinyLM hedges among several tasks: it is less sure of each
            than it has reason to be.
    """

    tokens: TopTokens
    annotators: list[str]
    told: float


def annotator_deltas(target_NP: Deltas, tasks: Sequence[str | None], most: int) -> dict[str, torch.Tensor]:
    """LLM deltas `(P,)` to ask, by task: the mean of each; where a task is unknown, single pairs at even spacing.

    Args:
        target_NP (`torch.Tensor` or [`DeltaRows`]): the LLM's deltas of training pairs.
        tasks (`Sequence[str | None]`): the task of each.
        most (`int`): of more tasks, this many at even spacing; with 0 there are none.
    """
    if most == 0:
        return {}
    if None in tasks:
        rows_by_name = {f"pair {row}": [row] for row in range(len(tasks))}
    else:
        rows_by_name = {str(task): [] for task in sorted(set(tasks), key=str)}
        for row, task in enumerate(tasks):
            rows_by_name[str(task)].append(row)
    names = list(rows_by_name)
    chosen = [names[place] for place in spread(len(names), most)]
    return {name: _mean(target_NP, rows_by_name[name]) for name in chosen}


def _mean(target_NP: Deltas, rows: list[int]) -> torch.Tensor:
    """Of some rows, of which a few are held at a time."""
    sum_P = torch.zeros(target_NP.shape[1], dtype=torch.float64)
    step = max(1, CHUNK_VALUES // target_NP.shape[1])
    for start in range(0, len(rows), step):
        sum_P += target_NP[rows[start : start + step]].to(torch.float64).sum(0)
    return (sum_P / len(rows)).to(torch.float32)


def shadow_annotators(deltas: DeltaDataset, arguments: RefinementArguments) -> dict[str, torch.Tensor]:
    """[`annotator_deltas`] of a delta dataset's training pairs."""
    train = deltas.pairs("train")
    return annotator_deltas(train.target, train.tasks, arguments.annotators)


def screen(
    completions: Sequence[Completions], panel: Panel, prompts: int, *, root_nats: Sequence[float]
) -> list[Screening]:
    """Ask all annotators about this many prompts of each of K clients; `root_nats` as in [`Screening`]."""
    found = [
        Screening(each, each.some(prompts), {}, {}, nats) for each, nats in zip(completions, root_nats, strict=True)
    ]
    few = [each.few for each in found]
    for number, name in enumerate(panel.deltas):
        panel.say(f"shadow {number + 1} of {len(panel.deltas)} testifies")
        for each, said in zip(found, panel.read([name] * len(few), few), strict=True):
            each.heard[name] = said.probabilities_of(each.few.tokens.ids_MT).half()
            each.channels[name] = Channel.fit(each.few, said)
    return found


def hear_best(screenings: Sequence[Screening], panel: Panel) -> list[Testimony]:
    """Ask the best annotators of each of K clients about all prompts."""
    heard: list[dict[str, tuple[Channel, TopTokens]]] = [{} for _ in screenings]
    most = min(MOST_TOGETHER, len(panel.deltas))
    for place in range(most if screenings else 0):
        panel.say(f"the best shadows testify on all prompts, {place + 1} of {most}")
        names = [each.best[place] for each in screenings]
        read = panel.read(names, [each.teacher for each in screenings])
        for index, (each, name, said) in enumerate(zip(screenings, names, read, strict=True)):
            heard[index][name] = (Channel.fit(each.teacher, said, start=each.channels[name]), said)
    return [_together(each.teacher, found, each.root_nats) for each, found in zip(screenings, heard, strict=True)]


@dataclass(frozen=True)
class Channel:
    """For U words, which word of the client's stands for each of the annotator's.

    Args:
        words_U (`torch.Tensor`): their token ids, ascending.
        table_UU (`torch.Tensor`): probabilities, a row for each of the annotator's words; rows sum to 1.
        nats (`float`): the mean log ratio of how likely the TinyLM's words are with it and without.
        doubt (`float`): how unsure the annotator is of its words, as a share of how unsure the TinyLM is.
    """

    words_U: torch.Tensor
    table_UU: torch.Tensor
    nats: float
    doubt: float

    @classmethod
    def fit(cls, teacher: Completions, said: TopTokens, *, start: Channel | None = None) -> Channel:
        """The channel under which the annotator's words make the TinyLM's likeliest, by expectation maximisation.

        With p what the annotator says at a place, q what the TinyLM says there and π what it says on average, the
        TinyLM's evidence for a word is q / π, and the channel S maximises the mean of log(p S (q / π)). Words are
        renamed one to one as far as the evidence allows (Sinkhorn's scaling after each step).
        """
        q, p = _heard(teacher, teacher.tokens), _heard(teacher, said)
        words_U = torch.cat([_words(q), _words(p)]).unique() if start is None else start.words_U
        q_MU, p_MU = q.of_words(words_U), p.of_words(words_U)
        evidence_MU = _evidence(q_MU)
        own_U, theirs_U = p_MU.mean(0) > _RARE, q_MU.mean(0) > _RARE
        identity_UU = _SELF_COUNT * torch.eye(len(words_U))
        table_UU = _rows_to_one(p_MU.T @ q_MU + identity_UU) if start is None else start.table_UU
        for step in range(_EM_STEPS):
            likely_M = _likely(p_MU, table_UU, evidence_MU)
            table_UU = _rows_to_one(table_UU * ((p_MU / likely_M[:, None]).T @ evidence_MU) + identity_UU)
            # From the start it would make one to one what is only a guess.
            if step >= 2 or start is not None:
                table_UU = _one_to_one(table_UU, own_U, theirs_U)
        nats = float(_likely(p_MU, table_UU, evidence_MU).log().mean())
        doubt = (1 - p.confidence_M).mean() / (1 - q.confidence_M).mean().clamp(min=1e-6)
        return cls(words_U, table_UU, nats, float(doubt))

    def rename(self, said: TopTokens, words_V: torch.Tensor) -> torch.Tensor:
        """Probabilities `(M, V)` of the client's words, ascending; a word that the channel does not know is itself."""
        renamed_MU = said.of_words(self.words_U) @ self.table_UU
        places_V = torch.searchsorted(self.words_U, words_V).clamp(max=len(self.words_U) - 1)
        return torch.where(self.words_U[places_V] == words_V, renamed_MU[:, places_V], said.of_words(words_V))


def told_by_root(teacher: Completions, said: TopTokens) -> float:
    """What the LLM tells of the TinyLM's words without an adapter, in its own words: nats as in [`Channel`], or 0."""
    q, p = _heard(teacher, teacher.tokens), _heard(teacher, said)
    words_U = torch.cat([_words(q), _words(p)]).unique()
    likely_M = _likely(p.of_words(words_U), torch.eye(len(words_U)), _evidence(q.of_words(words_U)))
    return max(0.0, float(likely_M.log().mean()))


def _told(channel: Channel, teacher: Completions, root_nats: float) -> float:
    """See [`Testimony`]."""
    possible = _possible(teacher)
    if possible <= root_nats:
        # The LLM tells as much without an adapter: only what is beyond that counts.
        return channel.nats / root_nats - 1 if root_nats > 0 else 0.0
    # Where little is left to tell, a small excess over all that is known must not be made a large one.
    told = min(channel.nats / possible, (channel.nats - root_nats) / (possible - root_nats))
    return told if channel.doubt < _SURER else min(told, 1.0)


def _surplus(channel: Channel, teacher: Completions, root_nats: float) -> float:
    """See [`Screening`]."""
    known = max(_possible(teacher), root_nats)
    surplus = channel.nats / known if known > 0 else 0.0
    return surplus if channel.doubt < _SURER else min(surplus, 1.0)


def _possible(teacher: Completions) -> float:
    """Nats that an annotator tells that is right as often as the TinyLM's probabilities say."""
    q = _heard(teacher, teacher.tokens)
    q_MU = q.of_words(_words(q))
    return max(0.0, float((q_MU * _evidence(q_MU).log()).sum(1).mean()))


def _evidence(q_MU: torch.Tensor) -> torch.Tensor:
    """How much likelier the TinyLM makes each word at a place than it does on average."""
    return (q_MU + _FLOOR) / (q_MU.mean(0) + _FLOOR)


def _together(teacher: Completions, heard: Mapping[str, tuple[Channel, TopTokens]], root_nats: float) -> Testimony:
    """Geometric mean of the annotators that tell about as much as the best."""
    order = sorted(heard, key=lambda name: -heard[name][0].nats)
    most_telling, best = heard[order[0]]
    most, words_U = most_telling.nats, most_telling.words_U
    kept = [name for name in order if heard[name][0].nats > most - _NATS_BEHIND]
    # Beside the words that are renamed, those that TinyLM and best annotator name, each once.
    others_MT = torch.cat([teacher.tokens.ids_MT, best.ids_MT], dim=1).sort(dim=1).values
    named_MT = torch.nn.functional.pad(others_MT[:, 1:] == others_MT[:, :-1], (1, 0)) | torch.isin(others_MT, words_U)
    sum_MW = torch.zeros(len(others_MT), len(words_U) + others_MT.shape[1])
    for name in kept:
        channel, said = heard[name]
        renamed = [channel.rename(said, words_U), said.probabilities_of(others_MT)]
        sum_MW += torch.cat(renamed, dim=1).clamp(min=LEAST_PROBABILITY).log()
    mean_MW = sum_MW / len(kept)
    mean_MW[:, len(words_U) :].masked_fill_(named_MT, -torch.inf)
    top = mean_MW.log_softmax(dim=1).topk(min(teacher.tokens.ids_MT.shape[1], mean_MW.shape[1]), dim=1)
    ids_MW = torch.cat([words_U.expand(len(others_MT), -1), others_MT], dim=1)
    tokens = TopTokens(ids_MW.gather(1, top.indices), top.values)
    return Testimony(tokens, kept, _told(most_telling, teacher, root_nats))


def _heard(teacher: Completions, said: TopTokens) -> TopTokens:
    places = teacher.counted_M.nonzero()[:, 0]
    return said.where(evenly_spaced(places, _MOST_TOKENS))


def _words(said: TopTokens) -> torch.Tensor:
    return said.frequent(_MOST_WORDS, _RARE)


def _likely(p_MU: torch.Tensor, table_UU: torch.Tensor, evidence_MU: torch.Tensor) -> torch.Tensor:
    """Likelihood ratio of each token, `(M,)`. What the annotator says beyond the words is no evidence either way."""
    return ((p_MU @ table_UU) * evidence_MU).sum(1) + (1 - p_MU.sum(1)).clamp(min=1e-6)


def _rows_to_one(table_UU: torch.Tensor) -> torch.Tensor:
    return table_UU / table_UU.sum(dim=1, keepdim=True)


def _one_to_one(table_UU: torch.Tensor, own_U: torch.Tensor, theirs_U: torch.Tensor) -> torch.Tensor:
    """Scale the frequent words' part so that no two of the annotator's stand for one of the client's."""
    if not (own_U.any() and theirs_U.any()):
        return table_UU
    rows, columns = own_U.nonzero(), theirs_U.nonzero().T
    part = table_UU[rows, columns] + 1e-6
    for _ in range(_SINKHORN_STEPS):
        part = _rows_to_one(part / part.sum(dim=0, keepdim=True))
    scaled_UU = table_UU.clone()
    scaled_UU[rows, columns] = part * table_UU[rows, columns].sum(dim=1, keepdim=True)
    return scaled_UU
