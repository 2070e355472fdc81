"""How far a client's delta lies from the shadow deltas that a mapper has learned from.

A mapper that is fed what no shadow resembles still answers, fluently and wrongly. The report says how far away the
client is, and how much longer than usual any part of its delta is: A and B of each block, for one of them alone can
decide the result. Both are in units that held-out shadow runs define: 1 is what 5 % of them exceed.

Shape legend: N training shadows, M held-out shadows, C clients, X values of a source delta, K leading directions, L
blocks. `_L2`: A and B of each block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..constants import FORMAT_VERSION, SHIFT_NAME, SHIFT_TENSORS_NAME
from ..errors import DeltaDatasetError, GradTransformerError, IncompleteArtifactError, UsageError
from ..schemas import ShiftRecord
from .io import load_tensors, read_record, save_tensors_atomic, write_json_atomic
from .layout import LoraLayout
from .rows import block_inverse_scale, column_chunks, column_mean, evenly_spaced


# Fewer training runs say nothing of what lies between them.
MINIMUM_SHADOWS = 4
ENERGY = 0.95
MAX_DIRECTIONS = 64
QUANTILE = 0.95
# Of fewer held-out runs, one in twenty is less than one.
FEW_RUNS = 20
# Of more training deltas, this many at even spacing give the directions; all of them give everything else.
MAX_ROWS = 4096
_CHUNK_ROWS = 64
# A part that shadows move by less than this share of the usual value is held to that share: nothing may hide in it.
_LEAST_SHARE = 0.05


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
        size (`float`, *optional*): `norm_ratio` over the 95 % quantile of held-out shadow runs. `None` where the
            mapper was trained before it was recorded.
        norm_ratio (`float`, *optional*): the norm of A or B of a block over its usual one (the RMS of the training
            deltas'), where that is largest.
        largest_part (`str`, *optional*): which part that is.
    """

    shift: float
    quantile: float
    distance: float
    mahalanobis: float
    num_heldout: int
    size: float | None = None
    norm_ratio: float | None = None
    largest_part: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """Words, and in brackets the numbers that they follow from."""
        words = [self.place(), "norms by block not checked: the mapper was trained before they were recorded"]
        numbers = f"shift {self.shift:.2f}, {self.num_heldout} held-out shadow runs"
        if self.size is not None:
            words[1] = self.length()
            numbers += f", size {self.size:.2f}"
        return f"{'; '.join(words)} ({numbers})"

    def place(self) -> str:
        """How far it lies from the shadows, in words."""
        if self.quantile >= 1 and self.shift > 1:
            if self.num_heldout < FEW_RUNS:
                return f"farther from the shadows than all {self.num_heldout} held-out runs: the result may be a guess"
            return "farther from the shadows than any held-out run: the result is a guess"
        if self.shift > 1:
            return f"farther from the shadows than {self.quantile:.0%} of held-out runs: the result is doubtful"
        return f"closer to the shadows than {1 - self.quantile:.0%} of held-out runs"

    def length(self) -> str:
        """How its norms compare with the usual ones, in words."""
        if self.size is None or self.size <= 1:
            return "norms as usual"
        return f"{self.largest_part} is {self.norm_ratio:.1f} times its usual norm"


class ShiftReference:
    """The training shadows as a client's delta is compared with them.

    Args:
        tensors (`dict[str, torch.Tensor]`): `mean` (X,), `inverse_scale` (X,), `directions` (K, X), `deviations` (K,),
            `shadows` (N, K), `heldout` (M,). Since version 0.2.0 also `usual_norms` (L, 2), the RMS over the training
            deltas of the norms of A and B of each block, and `heldout_ratios` (M,), how much longer than that the
            longest part of each held-out delta is.
        layout ([`LoraLayout`]): of the deltas.

    Build one with [`~ShiftReference.fit`].

    Raises:
        [`IncompleteArtifactError`]: the tensors do not belong together, or are not those of this layout.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], layout: LoraLayout):
        _check_tensors(tensors, layout)
        self.layout = layout
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    @classmethod
    def fit(cls, train_NX: torch.Tensor, heldout_MX: torch.Tensor, *, layout: LoraLayout) -> ShiftReference:
        """Learn directions from training shadows, and the scale of distances from held-out runs.

        Args:
            train_NX (`torch.Tensor`): TinyLM deltas of the training runs.
            heldout_MX (`torch.Tensor`): those of runs that the mapper was not trained on.
            layout ([`LoraLayout`]): of the TinyLM's adapters; each block is scaled by its own RMS.

        Raises:
            [`DeltaDatasetError`]: too few runs, or deltas that do not vary or are of another size.
        """
        expected = (layout.numel,)
        if (
            len(train_NX) < MINIMUM_SHADOWS
            or len(heldout_MX) < 1
            or not train_NX.shape[1:] == heldout_MX.shape[1:] == expected
        ):
            raise DeltaDatasetError(
                "A shift cannot be measured with such shadow runs.",
                expected=f"at least {MINIMUM_SHADOWS} training and 1 held-out delta of {layout.numel} values",
                found=f"{tuple(train_NX.shape)}, {tuple(heldout_MX.shape)}",
                remedy="hold out at least one run, and train on four or more",
            )
        mean_X = column_mean(train_NX)
        inverse_X = block_inverse_scale(train_NX, mean_X, layout.widths)
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
            raise DeltaDatasetError(
                "The shadow deltas are all the same.",
                expected="deltas that vary",
                found="none",
                remedy="check that the shadow runs changed anything: learning_rate and max_steps of the recipe",
            )
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
        norms_NL2 = _part_norms(train_NX, layout)
        reference = cls(
            {
                "mean": mean_X,
                "inverse_scale": inverse_X,
                "directions": directions_KX,
                "deviations": torch.ones(count),
                "shadows": torch.zeros(1, count),
                "heldout": torch.zeros(1),
                "usual_norms": norms_NL2.square().mean(dim=0).sqrt(),
                "heldout_ratios": torch.zeros(1),
            },
            layout,
        )
        shadows_NK = reference._coordinates(train_NX)[0]
        reference.tensors["shadows"] = shadows_NK
        reference.tensors["deviations"] = shadows_NK.std(dim=0).clamp(min=1e-12)
        reference.tensors["heldout"] = reference._distances(heldout_MX)[0].sort().values
        reference.tensors["heldout_ratios"] = reference._norm_ratios(heldout_MX).flatten(1).amax(dim=1).sort().values
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
        sizes = self._sizes(deltas_CX) if "usual_norms" in self.tensors else [{} for _ in deltas_CX]
        return [
            ShiftReport(
                shift=float(distance) / unit,
                quantile=float((heldout_M < distance).double().mean()),
                distance=float(distance),
                mahalanobis=float(mahalanobis),
                num_heldout=len(heldout_M),
                **size,
            )
            for distance, mahalanobis, size in zip(distances_C, mahalanobis_C, sizes, strict=True)
        ]

    def _sizes(self, deltas_CX: torch.Tensor) -> list[dict[str, Any]]:
        unit = float(self.tensors["heldout_ratios"].quantile(QUANTILE).clamp(min=1e-12))
        found = []
        for ratios_L2 in self._norm_ratios(deltas_CX):
            block, side = divmod(int(ratios_L2.argmax()), 2)
            ratio = float(ratios_L2.max())
            part = f"{'AB'[side]} of {self.layout.blocks[block].name}"
            found.append({"size": ratio / unit, "norm_ratio": ratio, "largest_part": part})
        return found

    def _norm_ratios(self, deltas_CX: torch.Tensor) -> torch.Tensor:
        """Norms of A and B of each block over the usual ones, `(C, L, 2)`."""
        usual_L2 = self.tensors["usual_norms"]
        counts_L2 = _part_sizes(self.layout)
        least_L2 = _LEAST_SHARE * usual_L2.norm() * (counts_L2 / counts_L2.sum()).sqrt()
        # A part that no adapter has, and that the shadows did not move, has ratio 0.
        return _part_norms(deltas_CX, self.layout) / torch.maximum(usual_L2, least_L2).clamp(min=1e-300)

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
    def from_folder(cls, folder: str | Path, layout: LoraLayout) -> ShiftReference | None:
        """The reference in a mapper's folder, `None` where there is none (mappers of version 0.1.0).

        Raises:
            [`IncompleteArtifactError`]: its tensors are missing, broken, or those of another layout.
            [`FormatVersionError`]: written by a newer version.
        """
        folder = Path(folder)
        if not (folder / SHIFT_NAME).is_file():
            return None
        read_record(folder / SHIFT_NAME, ShiftRecord)
        path = folder / SHIFT_TENSORS_NAME
        try:
            return cls(load_tensors(path), layout)
        except GradTransformerError as cause:
            raise IncompleteArtifactError(
                "The mapper's record of its shadows cannot be read.",
                path=path,
                expected=cause.expected or "tensors as `train` writes them",
                found=cause.found or cause.message,
                remedy="train or download the mapper again",
            ) from cause


def _part_norms(deltas_CX: torch.Tensor, layout: LoraLayout) -> torch.Tensor:
    """Norm of A and of B of each block, float64 `(C, L, 2)`."""
    chunks = []
    for chunk_BX in deltas_CX.split(_CHUNK_ROWS):
        squares_BL2 = torch.zeros(len(chunk_BX), layout.num_blocks, 2, dtype=torch.float64)
        start = 0
        for number, block in enumerate(layout.blocks):
            for spec in block.tensors:
                part_BV = chunk_BX[:, start : start + spec.numel].double()
                squares_BL2[:, number, "AB".index(spec.side)] += part_BV.square().sum(dim=1)
                start += spec.numel
        chunks.append(squares_BL2.sqrt())
    return torch.cat(chunks)


def _part_sizes(layout: LoraLayout) -> torch.Tensor:
    """Number of values of A and of B of each block, float64 `(L, 2)`."""
    return torch.tensor(
        [[sum(spec.numel for spec in block.tensors if spec.side == side) for side in "AB"] for block in layout.blocks],
        dtype=torch.float64,
    )


def _check_tensors(tensors: Mapping[str, torch.Tensor], layout: LoraLayout) -> None:
    """What a file must hold; the last two are not in files of version 0.1.0."""
    numbers = {"X": layout.numel, "L": layout.num_blocks, "2": 2}
    shapes = {"mean": "X", "inverse_scale": "X", "directions": "KX", "deviations": "K", "shadows": "NK"}
    shapes |= {"heldout": "M", "usual_norms": "L2", "heldout_ratios": "R"}
    needed = list(shapes)[:6] if not {"usual_norms", "heldout_ratios"} & tensors.keys() else list(shapes)
    fits = set(tensors) == set(needed)
    for name in needed if fits else ():
        tensor = tensors[name]
        expected = [numbers.setdefault(letter, size) for letter, size in zip(shapes[name], tensor.shape, strict=False)]
        fits &= list(tensor.shape) == expected and len(expected) == len(shapes[name]) and tensor.numel() > 0
        fits = bool(fits and tensor.is_floating_point() and torch.isfinite(tensor).all())
    fits = bool(fits and (tensors["deviations"] > 0).all())
    if not fits:
        raise IncompleteArtifactError(
            "Not a record of shadow deltas.",
            expected=f"finite tensors {', '.join(needed)} for deltas of {layout.numel} values",
            found=", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(tensors.items())),
            remedy="train or download the mapper again",
        )


def area_under_roc(inside: Sequence[float], outside: Sequence[float]) -> float:
    """Probability that a value of `outside` exceeds one of `inside`; ties count half."""
    pairs = [(low, high) for low in inside for high in outside]
    return sum(1.0 if high > low else 0.5 if high == low else 0.0 for low, high in pairs) / len(pairs)
