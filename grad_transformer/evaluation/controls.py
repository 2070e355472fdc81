"""Controls: what a generated LLM delta must beat before the mapper deserves credit.

Mean shadow, nearest shadow and ridge regression all predict a weighted sum of the training LLM deltas, Y. They differ
in the weights only, so none of them ever forms a Dx × Dy matrix: `weights` gives W (M, N), `predict` streams W · Y.

Shape legend: N training pairs, M deltas to predict for, X source (TinyLM) values, Y target (LLM) values, C clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import torch
from transformers.utils import logging

from ..adapters.rows import block_inverse_scale, column_chunks, column_mean, evenly_spaced
from ..errors import DeltaDatasetError, UsageError


logger = logging.get_logger(__name__)

CONTROLS = ("mean_shadow", "nearest_shadow", "ridge", "random", "other_client")
RIDGE_STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-8, 7))
# Where there are too few pairs to choose on: as much penalty as the mean direction has variance.
_DEFAULT_STRENGTH = 1.0

# Values of training rows that one pass of the nearest shadow holds: they stay in the processor's cache.
_CHUNK_VALUES = 2**17


class ShadowPredictor(ABC):
    """Predicts LLM deltas from TinyLM deltas. State is plain tensors: `state` out, `from_state` in.

    Args:
        source_widths (`Sequence[int]`, *optional*): widths of the source blocks. With them each block is divided by
            its own RMS around the mean, so that blocks count alike; without, one global RMS divides all.
    """

    _STATE: ClassVar[tuple[str, ...]]
    source: torch.Tensor
    target: torch.Tensor
    source_mean: torch.Tensor
    source_inverse_scale: torch.Tensor

    def __init__(self, *, source_widths: Sequence[int] | None = None):
        self.source_widths = None if source_widths is None else list(source_widths)

    @abstractmethod
    def fit(self, source_NX: torch.Tensor, target_NY: torch.Tensor) -> ShadowPredictor:
        """Fit on training pairs and return `self`. Keeps references to them, no copies."""

    @abstractmethod
    def weights(self, source_MX: torch.Tensor) -> torch.Tensor:
        """Weight of each kept target row, (M, N), float64."""

    def predict(self, source_MX: torch.Tensor) -> torch.Tensor:
        """LLM deltas (M, Y) in float32 for TinyLM deltas (M, X)."""
        weights_MN = self.weights(source_MX)
        shape = (len(weights_MN), self.target.shape[1])
        predicted_MY = torch.empty(shape, dtype=torch.float32, device=self.target.device)
        for columns in column_chunks(self.target):
            predicted_MY[:, columns] = (weights_MN @ self.target[:, columns].to(torch.float64)).to(torch.float32)
        return predicted_MY

    def state(self) -> dict[str, torch.Tensor]:
        """All that `predict` needs, by name."""
        return {name: getattr(self, name) for name in self._STATE}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> ShadowPredictor:
        """The fitted predictor that `state` came from.

        Raises:
            [`UsageError`]: other tensors than those that `state` gives.
        """
        if set(state) != set(cls._STATE):
            raise UsageError(f"Not the state of a {cls.__name__}.", expected=sorted(cls._STATE), found=sorted(state))
        predictor = cls()
        for name in cls._STATE:
            setattr(predictor, name, state[name])
        return predictor

    def _fit_scale(self, source_NX: torch.Tensor) -> None:
        self.source_mean = column_mean(source_NX)
        widths = self.source_widths or [source_NX.shape[1]]
        if sum(widths) != source_NX.shape[1]:
            raise UsageError(
                "`source_widths` do not fit the source deltas.", expected=source_NX.shape[1], found=sum(widths)
            )
        self.source_inverse_scale = block_inverse_scale(source_NX, self.source_mean, widths)

    def _standardise(self, source_MX: torch.Tensor) -> torch.Tensor:
        return (source_MX.to(torch.float64) - self.source_mean) * self.source_inverse_scale


class MeanShadow(ShadowPredictor):
    """The mean training LLM delta, whatever the input."""

    _STATE = ("target",)

    def fit(self, source_NX: torch.Tensor, target_NY: torch.Tensor) -> MeanShadow:
        _check_pairs(source_NX, target_NY)
        self.target = column_mean(target_NY)[None].to(torch.float32)
        return self

    def weights(self, source_MX: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(source_MX), 1, dtype=torch.float64, device=self.target.device)


class NearestShadow(ShadowPredictor):
    """The LLM delta of the training pair whose TinyLM delta is nearest: Euclidean, centred and scaled by RMS."""

    _STATE = ("source", "target", "source_mean", "source_inverse_scale")

    def fit(self, source_NX: torch.Tensor, target_NY: torch.Tensor) -> NearestShadow:
        _check_pairs(source_NX, target_NY)
        self._fit_scale(source_NX)
        self.source, self.target = source_NX, target_NY
        return self

    def nearest(self, source_MX: torch.Tensor) -> torch.Tensor:
        """Row of the nearest training pair, (M,), int64; the first of equals."""
        deltas_MX = self._standardise(source_MX)
        distances_MN = deltas_MX.new_empty(len(source_MX), len(self.source))
        start = 0
        for rows in self.source.split(max(1, _CHUNK_VALUES // self.source.shape[1])):
            chunk_BX = self._standardise(rows)
            difference_BX = torch.empty_like(chunk_BX)
            for number, delta_X in enumerate(deltas_MX):
                # Differences, not inner products, so that a training delta finds itself exactly.
                torch.sub(chunk_BX, delta_X, out=difference_BX)
                distances_MN[number, start : start + len(rows)] = difference_BX.square_().sum(1)
            start += len(rows)
        return distances_MN.argmin(dim=1)

    def weights(self, source_MX: torch.Tensor) -> torch.Tensor:
        rows_M = self.nearest(source_MX)
        return torch.nn.functional.one_hot(rows_M, len(self.source)).to(torch.float64)

    def predict(self, source_MX: torch.Tensor) -> torch.Tensor:
        return self.target[self.nearest(source_MX)].to(torch.float32)


class RidgeRegression(ShadowPredictor):
    """Linear regression from TinyLM delta to LLM delta, with an intercept, in its dual form.

    The penalty is `strength` times the mean eigenvalue of the centred kernel, so one grid serves every pair of models.

    Args:
        source_widths (`Sequence[int]`, *optional*): as in [`ShadowPredictor`].
        strengths (`Sequence[float]`, *optional*): grid to choose from; a single value needs no validation pairs.
        max_rows (`int`, *optional*, defaults to 4096): of more training pairs, at most this many at even spacing are
            used; time grows with their cube, memory with their square.
    """

    _STATE = ("source", "target", "source_mean", "source_inverse_scale", "inverse_kernel", "strength")

    def __init__(
        self,
        *,
        source_widths: Sequence[int] | None = None,
        strengths: Sequence[float] = RIDGE_STRENGTHS,
        max_rows: int = 4096,
    ):
        super().__init__(source_widths=source_widths)
        self.strengths, self.max_rows = tuple(strengths), max_rows
        self.validation_r2: dict[float, float] = {}

    def fit(
        self,
        source_NX: torch.Tensor,
        target_NY: torch.Tensor,
        *,
        validation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> RidgeRegression:
        """Solve in float64, and choose the strength with the highest R² on `validation`, pairs of other shadow runs.

        Raises:
            [`UsageError`]: several strengths and no validation pairs, or a strength that is not positive.
            [`DeltaDatasetError`]: pairs that do not fit.
        """
        _check_pairs(source_NX, target_NY)
        if not self.strengths or min(self.strengths) <= 0:
            raise UsageError("Ridge strengths must be positive.", expected="> 0", found=list(self.strengths))
        if validation is None and len(self.strengths) > 1:
            raise UsageError(
                "The ridge strength is chosen on validation runs, and there are none.",
                expected="`validation=(source, target)`, or one strength",
                found=f"{len(self.strengths)} strengths",
            )
        if len(source_NX) > self.max_rows:
            logger.warning(f"Ridge regression uses at most {self.max_rows} of {len(source_NX)} training pairs.")
            source_NX, target_NY = (evenly_spaced(rows, self.max_rows) for rows in (source_NX, target_NY))
        self._fit_scale(source_NX)
        self.source, self.target = source_NX, target_NY
        kernel_NN = self._kernel(source_NX)
        # With no variation at all the kernel is 0, and any unit gives the mean.
        unit = float(kernel_NN.diagonal().mean()) or 1.0
        eigenvalues_N, vectors_NN = torch.linalg.eigh(kernel_NN)
        eigenvalues_N = eigenvalues_N.clamp(min=0.0)

        strength = self.strengths[0]
        if validation is not None:
            self.validation_r2 = self._validate(eigenvalues_N / unit, vectors_NN, unit, *validation)
            strength = max(self.strengths, key=lambda candidate: self.validation_r2[candidate])
        self.inverse_kernel = (vectors_NN / (eigenvalues_N + strength * unit)) @ vectors_NN.T
        self.strength = torch.tensor(strength, dtype=torch.float64)
        return self

    def weights(self, source_MX: torch.Tensor) -> torch.Tensor:
        coefficients_MN = self._kernel(source_MX) @ self.inverse_kernel
        # The targets are centred by their mean: what the coefficients leave of 1 goes to every row alike.
        return coefficients_MN + (1.0 - coefficients_MN.sum(1, keepdim=True)) / len(self.source)

    def _kernel(self, source_MX: torch.Tensor) -> torch.Tensor:
        kernel_MN = torch.zeros(len(source_MX), len(self.source), dtype=torch.float64, device=self.source.device)
        for columns in column_chunks(self.source):
            mean, scale = self.source_mean[columns], self.source_inverse_scale[columns]
            left = (source_MX[:, columns].to(torch.float64) - mean) * scale
            kernel_MN += left @ ((self.source[:, columns].to(torch.float64) - mean) * scale).T
        return kernel_MN

    def _validate(
        self,
        eigenvalues_N: torch.Tensor,
        vectors_NN: torch.Tensor,
        unit: float,
        source_MX: torch.Tensor,
        target_MY: torch.Tensor,
    ) -> dict[float, float]:
        """R² of every strength from Gram matrices of the targets, so that no prediction is formed."""
        _check_pairs(source_MX, target_MY)
        size = len(self.target)
        gram_NN = torch.zeros(size, size, dtype=torch.float64, device=self.target.device)
        cross_NM = torch.zeros(size, len(target_MY), dtype=torch.float64, device=self.target.device)
        total = 0.0
        for columns in column_chunks(self.target):
            train = self.target[:, columns].to(torch.float64)
            mean = train.mean(0)
            train, held_out = train - mean, target_MY[:, columns].to(torch.float64) - mean
            gram_NN += train @ train.T
            cross_NM += train @ held_out.T
            total += float(held_out.square().sum())
        if total == 0:
            raise DeltaDatasetError("The validation deltas all equal the mean shadow: no strength can be chosen.")
        projected_MN = self._kernel(source_MX) @ vectors_NN / unit
        scores = {}
        for strength in self.strengths:
            coefficients_MN = (projected_MN / (eigenvalues_N + strength)) @ vectors_NN.T
            square = ((coefficients_MN @ gram_NN) * coefficients_MN).sum()
            scores[strength] = float((2 * (coefficients_MN * cross_NM.T).sum() - square) / total)
        return scores


def fit_controls(
    source_NX: torch.Tensor,
    target_NY: torch.Tensor,
    *,
    validation: tuple[torch.Tensor, torch.Tensor] | None,
    source_widths: Sequence[int] | None = None,
) -> dict[str, ShadowPredictor]:
    """The three controls that learn from the training pairs, fitted, by their names in the report.

    Args:
        source_NX, target_NY (`torch.Tensor`): training TinyLM and LLM deltas.
        validation (`tuple[torch.Tensor, torch.Tensor]`, *optional*): pairs of held-out runs, which choose the ridge
            strength; where none were held out, the last fifth of the training pairs does, and is learned from after.
        source_widths (`Sequence[int]`, *optional*): as in [`ShadowPredictor`].
    """
    return {
        "mean_shadow": MeanShadow().fit(source_NX, target_NY),
        "nearest_shadow": NearestShadow(source_widths=source_widths).fit(source_NX, target_NY),
        "ridge": _fit_ridge(source_NX, target_NY, validation, source_widths),
    }


def _fit_ridge(
    source_NX: torch.Tensor,
    target_NY: torch.Tensor,
    validation: tuple[torch.Tensor, torch.Tensor] | None,
    source_widths: Sequence[int] | None,
) -> RidgeRegression:
    if validation is not None:
        return RidgeRegression(source_widths=source_widths).fit(source_NX, target_NY, validation=validation)
    strength = _DEFAULT_STRENGTH
    # Snapshots of one run lie together: of a stretch at the end, at most one run is on both sides.
    end = len(source_NX) - len(source_NX) // 5
    if 2 <= end < len(source_NX):
        trial = RidgeRegression(source_widths=source_widths)
        trial.fit(source_NX[:end], target_NY[:end], validation=(source_NX[end:], target_NY[end:]))
        strength = float(trial.strength)
    return RidgeRegression(source_widths=source_widths, strengths=[strength]).fit(source_NX, target_NY)


def random_delta_like(delta: torch.Tensor, seed: int, *, widths: Sequence[int] | None = None) -> torch.Tensor:
    """A delta of random direction, uniform on the sphere, with the norm of `delta`.

    Args:
        delta (`torch.Tensor`): shape (D,).
        seed (`int`): the same seed gives the same direction.
        widths (`Sequence[int]`, *optional*): keep the norm of each block of these widths, not only the whole norm.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(delta.shape, generator=generator, dtype=torch.float64).to(delta.device)
    sizes = [delta.shape[0]] if widths is None else list(widths)
    parts = zip(noise.split(sizes), delta.to(torch.float64).split(sizes), strict=True)
    return torch.cat([part / part.norm() * reference.norm() for part, reference in parts]).to(delta.dtype)


def other_client(tasks: Sequence[str | Collection[str] | None]) -> list[int | None]:
    """For each client the next one, in cyclic order, that shares no task with it; `None` where there is no such one.

    Args:
        tasks (`Sequence`): task of each client, or several for a mixture; `None` (unknown) differs from all others.
    """
    sets = [
        {index} if task is None else {task} if isinstance(task, str) else set(task) for index, task in enumerate(tasks)
    ]
    count = len(sets)
    return [
        next((j % count for j in range(i + 1, i + count) if sets[i].isdisjoint(sets[j % count])), None)
        for i in range(count)
    ]


def control_deltas(
    generated_CY: torch.Tensor,
    source_CX: torch.Tensor,
    tasks: Sequence[str | Collection[str] | None],
    predictors: Mapping[str, ShadowPredictor],
    *,
    target_widths: Sequence[int],
    seed: int = 0,
) -> list[dict[str, torch.Tensor]]:
    """The LLM delta (Y,) that each control gives each client.

    Args:
        generated_CY (`torch.Tensor`): LLM deltas that the mapper generated.
        source_CX (`torch.Tensor`): the clients' TinyLM deltas.
        tasks (`Sequence`): as in [`other_client`].
        predictors (`Mapping[str, ShadowPredictor]`): as from [`fit_controls`].
        target_widths (`Sequence[int]`): widths of the LLM's blocks; the random delta keeps the norm of each.
        seed (`int`, *optional*, defaults to 0): of the random deltas, a different one for each client.

    Returns:
        `list[dict[str, torch.Tensor]]`: one per client, in the order of `CONTROLS`; `other_client` is left out where
        every other client shares a task.
    """
    if not len(generated_CY) == len(source_CX) == len(tasks):
        found = (len(generated_CY), len(source_CX), len(tasks))
        raise UsageError("Each client needs a generated delta, a source delta and a task.", found=found)
    predicted = {name: predictor.predict(source_CX) for name, predictor in predictors.items()}
    controls = []
    for client, other in enumerate(other_client(tasks)):
        deltas = {name: rows_CY[client] for name, rows_CY in predicted.items()}
        # Seeds of clients must not overlap between reports that differ by one.
        deltas["random"] = random_delta_like(generated_CY[client], 1_000_003 * seed + client, widths=target_widths)
        if other is not None:
            deltas["other_client"] = generated_CY[other]
        controls.append(deltas)
    return controls


def _check_pairs(source_NX: torch.Tensor, target_NY: torch.Tensor) -> None:
    if source_NX.ndim != 2 or target_NY.ndim != 2 or len(source_NX) != len(target_NY) or len(source_NX) == 0:
        raise DeltaDatasetError(
            "Source and target deltas are no pairs.",
            expected="(N, Dx) and (N, Dy), N at least 1",
            found=(tuple(source_NX.shape), tuple(target_NY.shape)),
        )
