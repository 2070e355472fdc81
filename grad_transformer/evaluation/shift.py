"""How far a client's delta lies from the shadow deltas that a mapper has learned from.

A mapper that is fed what no shadow resembles still answers, fluently and wrongly. The report says how far away the
client is, in units that held-out shadow runs define: a shift of 1 is what 5 % of them exceed.

Shape legend: N training shadows, M held-out shadows, C clients, X values of a source delta, K leading directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters.io import load_tensors, read_record, resolve_folder, save_tensors_atomic, write_json_atomic
from ..adapters.rows import block_inverse_scale, column_chunks, column_mean, evenly_spaced
from ..constants import FORMAT_VERSION, SHIFT_NAME, SHIFT_TENSORS_NAME
from ..errors import DeltaDatasetError, IncompleteArtifactError, UsageError
from ..schemas import ShiftRecord


# Fewer training runs say nothing of what lies between them.
MINIMUM_SHADOWS = 4
ENERGY = 0.95
MAX_DIRECTIONS = 64
QUANTILE = 0.95
# Of more training deltas, this many at even spacing give the directions; all of them give everything else.
MAX_ROWS = 4096
_CHUNK_ROWS = 64


@dataclass(frozen=True)
class ShiftReport:
    """Where one delta lies.

    Args:
        shift (`float`): `distance` over the 95 % quantile of held-out shadow runs: at most about 1 for a delta like
            the shadows'.
        quantile (`float`): share of held-out shadow runs that lie nearer, from 0 to 1.
        distance (`float`): to the nearest training shadow within the leading directions, and to these directions, in
            RMS of the training deltas.
        mahalanobis (`float`): distance to the mean shadow in standard deviations of the leading directions, over the
            square root of their number. Shown beside: it does not see a new task that lies between old ones.
        num_heldout (`int`): held-out runs that the quantile rests on.
    """

    shift: float
    quantile: float
    distance: float
    mahalanobis: float
    num_heldout: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        return (
            f"shift {self.shift:.2f} (farther than {self.quantile:.0%} of {self.num_heldout} held-out shadow runs; "
            f"Mahalanobis distance {self.mahalanobis:.2f})"
        )


class ShiftReference:
    """The training shadows as a client's delta is compared with them.

    Args:
        tensors (`dict[str, torch.Tensor]`): `mean` (X,), `inverse_scale` (X,), `directions` (K, X), `deviations` (K,),
            `shadows` (N, K), `heldout` (M,).

    Build one with [`~ShiftReference.fit`].
    """

    _NAMES = ("mean", "inverse_scale", "directions", "deviations", "shadows", "heldout")

    def __init__(self, tensors: dict[str, torch.Tensor]):
        if set(tensors) != set(self._NAMES):
            raise IncompleteArtifactError(
                "Not a reference of shadow deltas.", expected=sorted(self._NAMES), found=sorted(tensors)
            )
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    @classmethod
    def fit(
        cls, train_NX: torch.Tensor, heldout_MX: torch.Tensor, *, widths: Sequence[int] | None = None
    ) -> ShiftReference:
        """Learn directions from training shadows, and the scale of distances from held-out runs.

        Args:
            train_NX (`torch.Tensor`): TinyLM deltas of the training runs.
            heldout_MX (`torch.Tensor`): those of runs that the mapper was not trained on.
            widths (`Sequence[int]`, *optional*): widths of the blocks, each of which is scaled by its own RMS.

        Raises:
            [`DeltaDatasetError`]: too few runs, or deltas that do not vary.
        """
        if len(train_NX) < MINIMUM_SHADOWS or len(heldout_MX) < 1 or train_NX.shape[1:] != heldout_MX.shape[1:]:
            raise DeltaDatasetError(
                "A shift cannot be measured with so few shadow runs.",
                expected=f"at least {MINIMUM_SHADOWS} training and 1 held-out delta of one size",
                found=f"{tuple(train_NX.shape)}, {tuple(heldout_MX.shape)}",
            )
        mean_X = column_mean(train_NX)
        inverse_X = block_inverse_scale(train_NX, mean_X, widths or [train_NX.shape[1]])
        leading_NX = evenly_spaced(train_NX, MAX_ROWS)
        # The leading directions from the matrix of inner products: rows are few, values of a delta many.
        kernel_NN = torch.zeros(len(leading_NX), len(leading_NX), dtype=torch.float64)
        for columns in column_chunks(leading_NX):
            part_NX = (leading_NX[:, columns].double() - mean_X[columns]) * inverse_X[columns]
            kernel_NN += part_NX @ part_NX.T
        squares, vectors_NN = torch.linalg.eigh(kernel_NN)
        squares, vectors_NN = squares.flip(0).clamp(min=0), vectors_NN.flip(1)
        energy = squares.cumsum(0) / squares.sum()
        if not torch.isfinite(energy[-1]):
            raise DeltaDatasetError("The shadow deltas are all the same.", expected="deltas that vary", found="none")
        # With as many directions as a quarter of the runs, their deviations can still be told from chance.
        count = max(1, min(int((energy < ENERGY).sum()) + 1, MAX_DIRECTIONS, len(train_NX) // 4))
        combinations_KN = vectors_NN[:, :count].T / squares[:count, None].sqrt()
        directions_KX = torch.cat(
            [
                combinations_KN @ ((leading_NX[:, columns].double() - mean_X[columns]) * inverse_X[columns])
                for columns in column_chunks(leading_NX)
            ],
            dim=1,
        )
        reference = cls(
            {
                "mean": mean_X,
                "inverse_scale": inverse_X,
                "directions": directions_KX,
                "deviations": torch.ones(count),
                "shadows": torch.zeros(1, count),
                "heldout": torch.zeros(1),
            }
        )
        shadows_NK = reference._coordinates(train_NX)[0]
        reference.tensors["shadows"] = shadows_NK
        reference.tensors["deviations"] = shadows_NK.std(dim=0).clamp(min=1e-12)
        reference.tensors["heldout"] = reference._distances(heldout_MX)[0].sort().values
        return reference

    def measure(self, deltas_CX: torch.Tensor) -> list[ShiftReport]:
        """A report for each delta, `(C, numel)`.

        Raises:
            [`UsageError`]: deltas of another size.
        """
        if deltas_CX.dim() != 2 or deltas_CX.shape[1] != len(self.tensors["mean"]):
            raise UsageError(
                "The deltas do not fit the shadows.",
                expected=f"(clients, {len(self.tensors['mean'])})",
                found=tuple(deltas_CX.shape),
            )
        heldout_M = self.tensors["heldout"]
        unit = float(heldout_M.quantile(QUANTILE).clamp(min=1e-12))
        distances_C, mahalanobis_C = self._distances(deltas_CX)
        return [
            ShiftReport(
                shift=float(distance) / unit,
                quantile=float((heldout_M < distance).double().mean()),
                distance=float(distance),
                mahalanobis=float(mahalanobis),
                num_heldout=len(heldout_M),
            )
            for distance, mahalanobis in zip(distances_C, mahalanobis_C, strict=True)
        ]

    def _coordinates(self, deltas_CX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Leading coordinates, (C, K), and the norm of the rest, (C,), both in RMS of the training deltas."""
        leading, rest = [], []
        for chunk_BX in deltas_CX.split(_CHUNK_ROWS):
            standard_BX = (chunk_BX.double() - self.tensors["mean"]) * self.tensors["inverse_scale"]
            leading.append(standard_BX @ self.tensors["directions"].T)
            rest.append((standard_BX - leading[-1] @ self.tensors["directions"]).norm(dim=1))
        return torch.cat(leading), torch.cat(rest)

    def _distances(self, deltas_CX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leading_CK, rest_C = self._coordinates(deltas_CX)
        nearest_C = torch.stack([(self.tensors["shadows"] - row_K).norm(dim=1).min() for row_K in leading_CK])
        mahalanobis_C = (leading_CK / self.tensors["deviations"]).norm(dim=1) / leading_CK.shape[1] ** 0.5
        return (nearest_C.square() + rest_C.square()).sqrt(), mahalanobis_C

    # Files

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `shift.safetensors` and, last, `shift.json`, beside a mapper."""
        folder = Path(save_directory)
        save_tensors_atomic(folder / SHIFT_TENSORS_NAME, {name: value.float() for name, value in self.tensors.items()})
        facts = {"num_shadows": len(self.tensors["shadows"]), "num_heldout": len(self.tensors["heldout"])}
        write_json_atomic(folder / SHIFT_NAME, {"format_version": FORMAT_VERSION, **facts})

    @classmethod
    def from_folder(cls, folder: str | Path) -> ShiftReference | None:
        """The reference in a local folder, `None` where there is none (mappers of version 0.1.0).

        Raises:
            [`IncompleteArtifactError`]: a file is missing or damaged, or tensors and counts do not fit together.
        """
        folder = Path(folder)
        if not (folder / SHIFT_NAME).is_file():
            return None
        record = read_record(folder / SHIFT_NAME, ShiftRecord)
        path = folder / SHIFT_TENSORS_NAME
        tensors = load_tensors(path)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        size, count = (tensors[name].numel() if name in tensors else 0 for name in ("mean", "deviations"))
        expected = {
            "mean": (size,),
            "inverse_scale": (size,),
            "directions": (count, size),
            "deviations": (count,),
            "shadows": (record["num_shadows"], count),
            "heldout": (record["num_heldout"],),
        }
        if found != expected or 0 in (size, count) or not bool((tensors["deviations"] > 0).all()):
            raise IncompleteArtifactError(
                "The shift reference does not fit together.",
                path=path,
                expected=f"{expected}, not empty, with deviations above 0",
                found=found,
                remedy="train the mapper again, or download it again",
            )
        return cls(tensors)


def load_shift_reference(mapper: str | Path, **hub_kwargs: Any) -> ShiftReference | None:
    """The reference beside a mapper, in a folder or on the Hub; `None` where there is none.

    Args:
        mapper (`str` or `Path`): the mapper's folder or repository.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.
    """
    return ShiftReference.from_folder(
        resolve_folder(mapper, allow_patterns=(SHIFT_NAME, SHIFT_TENSORS_NAME), **hub_kwargs)
    )


def area_under_roc(inside: Sequence[float], outside: Sequence[float]) -> float:
    """Probability that a value of `outside` exceeds one of `inside`; ties count half."""
    pairs = [(low, high) for low in inside for high in outside]
    return sum(1.0 if high > low else 0.5 if high == low else 0.0 for low, high in pairs) / len(pairs)
