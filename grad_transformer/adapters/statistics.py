"""What can be said about sets of deltas: explained variance, its ceiling, and how far same-task deltas agree.

Sums run in float64 over chunks of rows, so that a set of N deltas is never copied whole. Where `Deltas` are taken, the
set may also stay on disk: see [`DeltaRows`].

Shape legend: N deltas, D values of a delta, T tasks.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..errors import DeltaDatasetError
from .rows import CHUNK_VALUES, Deltas


@dataclass(frozen=True)
class DeltaReproducibility:
    """How much of a delta its task decides; what no task decides, no mapper can predict.

    Args:
        leave_one_out_r2 (`float` or `None`): R² around the grand mean when each delta is predicted by the mean of the
            other deltas of its task. `None` where no task has two deltas.
        centred_cosine (`float` or `None`): mean cosine over all pairs of same-task deltas, the grand mean subtracted.
        num_deltas (`int`): deltas whose task has at least two; only these are counted.
        num_tasks (`int`): tasks with at least two deltas.
    """

    leave_one_out_r2: float | None
    centred_cosine: float | None
    num_deltas: int
    num_tasks: int


@dataclass(frozen=True)
class BlockAgreement:
    """Predicted against true deltas, block by block (see [`block_cosine_and_norm`])."""

    cosine: list[float]
    norm_ratio: list[float]


class RunningR2:
    """R² around a mean, of all values and of each block, from chunks of rows that come one after the other.

    Args:
        mean_D (`torch.Tensor`): mean of the *training* deltas.
    """

    def __init__(self, mean_D: torch.Tensor):
        self.mean_D = mean_D.to(torch.float64)
        self._residual_D = torch.zeros_like(self.mean_D)
        self._total_D = torch.zeros_like(self.mean_D)

    def add(self, predicted_ND: torch.Tensor, true_ND: torch.Tensor) -> None:
        """Count rows of predicted and true deltas, of any floating dtype."""
        # By columns, so that little is held in float64.
        step = max(1, CHUNK_VALUES // max(1, len(true_ND)))
        for start in range(0, true_ND.shape[1], step):
            columns = slice(start, start + step)
            true_NC = true_ND[:, columns].to(torch.float64)
            self._residual_D[columns] += (predicted_ND[:, columns].to(torch.float64) - true_NC).square().sum(dim=0)
            self._total_D[columns] += (true_NC - self.mean_D[columns]).square().sum(dim=0)

    def value(self) -> float:
        """1 - sum |predicted - true|² / sum |true - mean|²; at most 1, and 0 for predicting the mean every time.

        Raises:
            [`DeltaDatasetError`]: true deltas that do not vary around the mean.
        """
        return 1.0 - float(self._residual_D.sum()) / _variation(float(self._total_D.sum()))

    def block_errors(self, widths: Sequence[int]) -> list[float]:
        """Squared error of each block over its variation around the mean: 0 perfect, 1 the mean every time."""
        parts = zip(self._residual_D.split(list(widths)), self._total_D.split(list(widths)), strict=True)
        return [float(residual.sum() / total.sum()) for residual, total in parts]


def r2_around_mean(predicted_ND: torch.Tensor, true_ND: torch.Tensor, mean_D: torch.Tensor) -> float:
    """[`RunningR2`] of deltas that lie in memory.

    Args:
        predicted_ND, true_ND (`torch.Tensor`): deltas, one per row, of any floating dtype.
        mean_D (`torch.Tensor`): mean of the *training* deltas.

    Raises:
        [`DeltaDatasetError`]: shapes that do not fit, or true deltas that do not vary around the mean.
    """
    _check_shapes(true_ND, predicted_ND=predicted_ND.shape, mean_D=(true_ND.shape[0], *mean_D.shape))
    running = RunningR2(mean_D)
    for rows in _row_chunks(true_ND):
        running.add(predicted_ND[rows], true_ND[rows])
    return running.value()


def task_mean_ceiling(
    true_ND: Deltas,
    tasks: Sequence[Hashable | None] | None,
    train_ND: Deltas,
    train_tasks: Sequence[Hashable | None] | None,
    mean_D: torch.Tensor,
) -> float | None:
    """R² of predicting each held-out delta by the mean of the training deltas of its task.

    Fine-tuning noise cannot be predicted, so this is what a mapper that recognises every task could reach. It is
    taken over the same rows as [`r2_around_mean`]: a delta whose task is unknown, or has no training delta, counts as
    predicted by `mean_D`.

    Args:
        true_ND, train_ND (`torch.Tensor` or [`DeltaRows`]): held-out and training deltas.
        tasks, train_tasks (`Sequence`, *optional*): their tasks; an entry may be `None`.
        mean_D (`torch.Tensor`): mean of the training deltas.

    Returns:
        `float`, or `None` where no held-out delta has a task that training shows.

    Raises:
        [`DeltaDatasetError`]: lengths that do not fit, or true deltas that do not vary around the mean.
    """
    if tasks is None or train_tasks is None:
        return None
    _check_length(tasks, true_ND)
    _check_length(train_tasks, train_ND)
    train_rows = _rows_by_task(train_tasks)
    residual = total = 0.0
    known = False
    mean_D = mean_D.to(torch.float64)
    for task, rows in _rows_by_task(tasks, keep_unknown=True).items():
        prediction_D = mean_D
        if task is not None and task in train_rows:
            prediction_D = _sum_of_rows(train_ND, train_rows[task]) / len(train_rows[task])
            known = True
        for row in rows:
            true_D = true_ND[row].to(torch.float64)
            residual += float((prediction_D - true_D).square().sum())
            total += float((true_D - mean_D).square().sum())
    return 1.0 - residual / _variation(total) if known else None


def delta_reproducibility(
    deltas_ND: Deltas, tasks: Sequence[Hashable | None] | None, *, run_ids: Sequence[Hashable] | None = None
) -> DeltaReproducibility:
    """How far deltas of the same task agree. Near 0 there is nothing that a mapper could learn.

    Args:
        deltas_ND (`torch.Tensor` or [`DeltaRows`]): deltas of one base model.
        tasks (`Sequence`, *optional*): task of each; deltas without one (`None`) are left out.
        run_ids (`Sequence`, *optional*): shadow run of each. Snapshots of one run resemble each other whatever the
            task, so only the last row of each run is counted. Without it, give one delta per run.

    Raises:
        [`DeltaDatasetError`]: lengths that do not fit, or deltas that are all the same.
    """
    if tasks is None:
        return DeltaReproducibility(None, None, 0, 0)
    _check_length(tasks, deltas_ND)
    counted: Sequence[int] = range(len(tasks))
    if run_ids is not None:
        _check_length(run_ids, deltas_ND)
        counted = sorted({run: row for row, run in enumerate(run_ids)}.values())
    groups = {task: rows for task, rows in _rows_by_task(tasks, counted).items() if len(rows) > 1}
    if not groups:
        return DeltaReproducibility(None, None, 0, 0)
    included = [row for rows in groups.values() for row in rows]
    mean_D = _sum_of_rows(deltas_ND, included) / len(included)

    residual = total = cosine = pairs = 0.0
    for rows in groups.values():
        count, task_mean_D = len(rows), _sum_of_rows(deltas_ND, rows) / len(rows)
        direction_D = torch.zeros_like(mean_D)
        num_directions = 0
        for row in rows:
            delta_D = deltas_ND[row].to(torch.float64)
            # x - (mean of the others) = n/(n-1) · (x - mean of all n)
            residual += (count / (count - 1)) ** 2 * float((delta_D - task_mean_D).square().sum())
            centred_D = delta_D - mean_D
            norm = float(centred_D.norm())
            total += norm**2
            if norm > 0:
                direction_D += centred_D / norm
                num_directions += 1
        # |sum of unit vectors|² is their number plus the cosines of all ordered pairs.
        cosine += float(direction_D.square().sum()) - num_directions
        pairs += num_directions * (num_directions - 1)
    return DeltaReproducibility(
        leave_one_out_r2=1.0 - residual / _variation(total),
        centred_cosine=cosine / pairs if pairs else None,
        num_deltas=len(included),
        num_tasks=len(groups),
    )


def permutation_without_fixed_run(run_ids: Sequence[Hashable], seed: int) -> torch.Tensor:
    """A permutation of the rows that gives every row the place of a row of a *different* run.

    For the input test: a mapper that reads its input must fail on `source[permutation]`.

    Args:
        run_ids (`Sequence`): shadow run of each row.
        seed (`int`): the same seed gives the same permutation.

    Returns:
        `torch.Tensor` of shape (N,), int64: `run_ids[permutation[i]] != run_ids[i]` for every i.

    Raises:
        [`DeltaDatasetError`]: one run holds more than half of the rows, so that no such permutation exists.
    """
    rows_of: dict[Hashable, list[int]] = {}
    for row, run in enumerate(run_ids):
        rows_of.setdefault(run, []).append(row)
    longest = max((len(rows) for rows in rows_of.values()), default=0)
    if longest * 2 > len(run_ids):
        raise DeltaDatasetError(
            "The rows cannot be permuted among runs.",
            expected="no run with more than half of the rows",
            found=f"a run with {longest} of {len(run_ids)}",
            remedy="hold out at least two runs of equal length",
        )
    generator = random.Random(seed)
    groups = list(rows_of.values())
    generator.shuffle(groups)
    for rows in groups:
        generator.shuffle(rows)
    # Rows of a run stand together and none stands for more than `longest` places: a shift by that leaves every run.
    order = [row for rows in groups for row in rows]
    permutation = torch.empty(len(order), dtype=torch.int64)
    permutation[order] = torch.tensor(order[longest:] + order[:longest], dtype=torch.int64)
    return permutation


def block_cosine_and_norm(
    predicted_ND: torch.Tensor, true_ND: torch.Tensor, widths: Sequence[int], *, mean_D: torch.Tensor | None = None
) -> BlockAgreement:
    """Mean cosine and norm ratio of centred deltas, block by block.

    Args:
        predicted_ND, true_ND (`torch.Tensor`): deltas.
        widths (`Sequence[int]`): width of each block; they sum to D.
        mean_D (`torch.Tensor`, *optional*): what is subtracted from both; default: the mean of `true_ND`.

    Returns:
        [`BlockAgreement`]: `cosine` averaged over rows; `norm_ratio` sqrt(sum |predicted|² / sum |true|²), both 0 for
        a block whose true deltas do not vary.

    Raises:
        [`DeltaDatasetError`]: shapes that do not fit.
    """
    _check_shapes(true_ND, predicted_ND=predicted_ND.shape, widths=(true_ND.shape[0], sum(widths)))
    if mean_D is None:
        mean_D = _sum_of_rows(true_ND, range(true_ND.shape[0])) / true_ND.shape[0]
    cosines, ratios = [], []
    blocks = zip(
        predicted_ND.split(list(widths), 1), true_ND.split(list(widths), 1), mean_D.split(list(widths)), strict=True
    )
    for predicted_NB, true_NB, mean_B in blocks:
        cosine = predicted_square = true_square = 0.0
        for rows in _row_chunks(true_NB):
            predicted = predicted_NB[rows].to(torch.float64) - mean_B.to(torch.float64)
            true = true_NB[rows].to(torch.float64) - mean_B.to(torch.float64)
            norms = predicted.norm(dim=1) * true.norm(dim=1)
            cosine += float(((predicted * true).sum(1) / norms.where(norms > 0, 1.0)).sum())
            predicted_square += float(predicted.square().sum())
            true_square += float(true.square().sum())
        cosines.append(cosine / true_NB.shape[0])
        ratios.append((predicted_square / true_square) ** 0.5 if true_square > 0 else 0.0)
    return BlockAgreement(cosines, ratios)


def _row_chunks(deltas_ND: torch.Tensor) -> Iterator[slice]:
    step = max(1, CHUNK_VALUES // max(1, deltas_ND.shape[1]))
    for start in range(0, deltas_ND.shape[0], step):
        yield slice(start, start + step)


def _rows_by_task(
    tasks: Sequence[Hashable | None], rows: Sequence[int] | None = None, *, keep_unknown: bool = False
) -> dict[Hashable | None, list[int]]:
    groups: dict[Hashable | None, list[int]] = {}
    for row in range(len(tasks)) if rows is None else rows:
        if keep_unknown or tasks[row] is not None:
            groups.setdefault(tasks[row], []).append(row)
    return groups


def _sum_of_rows(deltas_ND: Deltas, rows: Sequence[int]) -> torch.Tensor:
    total_D = torch.zeros(deltas_ND.shape[1], dtype=torch.float64, device=deltas_ND.device)
    for row in rows:
        total_D += deltas_ND[row]
    return total_D


def _variation(total: float) -> float:
    if total > 0:
        return total
    raise DeltaDatasetError(
        "The deltas are all the same: nothing varies around their mean, so nothing can be predicted.",
        expected="deltas of different shadow runs",
        found="a sum of squares of 0",
        remedy="check that each run was read from its own file and trained on its own subset",
    )


def _check_shapes(true_ND: torch.Tensor, **shapes: Sequence[int]) -> None:
    for name, shape in shapes.items():
        if true_ND.ndim != 2 or tuple(shape) != tuple(true_ND.shape):
            raise DeltaDatasetError(
                f"`{name}` does not fit the true deltas.", expected=tuple(true_ND.shape), found=tuple(shape)
            )


def _check_length(labels: Sequence[object], deltas_ND: Deltas) -> None:
    if len(labels) != deltas_ND.shape[0]:
        raise DeltaDatasetError("Not one label per delta.", expected=deltas_ND.shape[0], found=len(labels))
