"""The shift report: near for what the shadows show, far for what lies between or beyond them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from grad_transformer.adapters import BlockSpec, LoraLayout, TensorSpec
from grad_transformer.adapters import shift as shift_module
from grad_transformer.adapters.shift import ShiftReference, area_under_roc
from grad_transformer.constants import SHIFT_TENSORS_NAME
from grad_transformer.errors import DeltaDatasetError, IncompleteArtifactError, UsageError


def block(layer: int, a: tuple[int, int], b: tuple[int, int]) -> BlockSpec:
    key = f"base_model.model.layers.{layer}.q_proj.lora_{{}}.weight"
    return BlockSpec(f"layers.{layer}", (TensorSpec(key.format("A"), a, 1.0), TensorSpec(key.format("B"), b, 1.0)))


# Blocks of 20 and 10 values: A 12 and B 8, A 6 and B 4.
LAYOUT = LoraLayout((block(0, (2, 6), (4, 2)), block(1, (1, 6), (4, 1))))


def clusters(centres: torch.Tensor, runs: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(centres) * runs, 30, generator=generator) * 0.05
    return centres.repeat_interleave(runs, dim=0) + noise


@pytest.fixture(scope="module")
def centres() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    firsts, seconds = torch.randn(2, 5, 30, generator=generator)
    # Compositions: task (i, j) lies at first[i] + second[j]; the diagonal is left out, and lies among the others.
    return firsts[:, None] + seconds[None]


@pytest.fixture(scope="module")
def reference(centres) -> ShiftReference:
    seen = centres[~torch.eye(5, dtype=torch.bool)]
    return ShiftReference.fit(clusters(seen, 8, 1), clusters(seen, 2, 2), layout=LAYOUT)


def test_unseen_compositions_are_told_from_seen_ones_where_mahalanobis_fails(centres, reference):
    eye = torch.eye(5, dtype=torch.bool)
    inside = reference.measure(clusters(centres[~eye], 2, 3))
    outside = reference.measure(clusters(centres[eye], 4, 4))
    assert area_under_roc([r.shift for r in inside], [r.shift for r in outside]) > 0.99
    assert area_under_roc([r.mahalanobis for r in inside], [r.mahalanobis for r in outside]) < 0.9
    assert sum(report.shift <= 1 for report in inside) >= 0.8 * len(inside)
    assert min(report.quantile for report in outside) == 1.0


def test_what_lies_outside_all_leading_directions_is_far(centres, reference):
    delta = centres[0, 1].clone()
    generator = torch.Generator().manual_seed(9)
    assert reference.measure((delta + 3 * torch.randn(30, generator=generator))[None])[0].shift > 3


def test_the_report_survives_a_folder_and_an_older_mapper_has_none(reference, centres, tmp_path):
    assert ShiftReference.from_folder(tmp_path, LAYOUT) is None
    reference.save_pretrained(tmp_path)
    deltas = clusters(centres[0], 1, 5)
    loaded = ShiftReference.from_folder(tmp_path, LAYOUT)
    assert loaded is not None
    for ours, theirs in zip(reference.measure(deltas), loaded.measure(deltas), strict=True):
        assert ours.shift == pytest.approx(theirs.shift, rel=1e-4)
        assert ours.size == pytest.approx(theirs.size, rel=1e-4)
    assert "held-out shadow runs" in loaded.measure(deltas)[0].describe()


def test_blocks_are_scaled_alike(centres):
    seen = centres[~torch.eye(5, dtype=torch.bool)]
    scale = torch.cat([torch.full((20,), 1000.0), torch.ones(10)])
    plain = ShiftReference.fit(clusters(seen, 8, 1), clusters(seen, 2, 2), layout=LAYOUT)
    scaled = ShiftReference.fit(clusters(seen, 8, 1) * scale, clusters(seen, 2, 2) * scale, layout=LAYOUT)
    delta = clusters(centres[0], 1, 6)
    assert plain.measure(delta)[0].shift == pytest.approx(scaled.measure(delta * scale)[0].shift, rel=1e-6)


def test_too_few_runs_and_other_sizes_are_refused(reference):
    with pytest.raises(DeltaDatasetError):
        ShiftReference.fit(torch.zeros(2, 30), torch.zeros(1, 30), layout=LAYOUT)
    with pytest.raises(DeltaDatasetError):
        ShiftReference.fit(torch.ones(8, 30), torch.ones(1, 30), layout=LAYOUT)
    with pytest.raises(DeltaDatasetError, match="such shadow runs"):
        ShiftReference.fit(torch.rand(8, 31), torch.rand(1, 31), layout=LAYOUT)
    with pytest.raises(UsageError):
        reference.measure(torch.zeros(1, 29))


def test_roc_counts_ties_half():
    assert area_under_roc([0.0, 1.0], [1.0, 2.0]) == 0.875


def test_many_shadows_give_directions_by_a_part_of_them_and_distances_by_all(centres, reference, monkeypatch):
    monkeypatch.setattr(shift_module, "MAX_ROWS", 40)
    monkeypatch.setattr(shift_module, "_CHUNK_ROWS", 7)
    eye = torch.eye(5, dtype=torch.bool)
    part = ShiftReference.fit(clusters(centres[~eye], 8, 1), clusters(centres[~eye], 2, 2), layout=LAYOUT)
    assert len(part.tensors["shadows"]) == 160
    deltas = torch.cat([clusters(centres[~eye], 1, 3), clusters(centres[eye], 1, 4)])
    assert torch.equal(part.tensors["mean"], reference.tensors["mean"])
    for ours, theirs in zip(part.measure(deltas), reference.measure(deltas), strict=True):
        assert (ours.shift > 1.2) == (theirs.shift > 1.2)


def test_directions_are_the_leading_singular_vectors(centres, reference):
    eye = torch.eye(5, dtype=torch.bool)
    rows = clusters(centres[~eye], 8, 1).double()
    standard = (rows - reference.tensors["mean"]) * reference.tensors["inverse_scale"]
    directions = reference.tensors["directions"]
    _, _, expected = torch.linalg.svd(standard, full_matrices=False)
    assert torch.allclose(
        (directions @ expected[: len(directions)].T).abs(), torch.eye(len(directions)).double(), atol=1e-6
    )


def test_a_part_that_is_too_long_is_named_and_an_ordinary_one_is_not(centres, reference):
    ordinary = clusters(centres[0, 1][None], 1, 7)[0]
    a_of_0, b_of_0, a_of_1, b_of_1 = (slice(*bounds) for bounds in ((0, 12), (12, 20), (20, 26), (26, 30)))
    for part, name in ((a_of_0, "A of layers.0"), (b_of_0, "B of layers.0"), (b_of_1, "B of layers.1")):
        delta = ordinary.clone()
        usual = float(reference.tensors["usual_norms"].flatten()[[a_of_0, b_of_0, a_of_1, b_of_1].index(part)])
        delta[part] *= 10 * usual / delta[part].norm()
        (report,) = reference.measure(delta[None])
        assert report.largest_part == name and report.norm_ratio == pytest.approx(10)
        assert report.size > 3 and f"{name} is 10.0 times its usual norm" in report.describe()
    (report,) = reference.measure(ordinary[None])
    assert report.size < 1.3
    heldout = reference.tensors["heldout_ratios"]
    assert float((heldout > heldout.quantile(0.95)).double().mean()) <= 0.05


def test_nothing_hides_in_a_block_that_no_shadow_moved(centres):
    still = clusters(centres.flatten(0, 1), 2, 1)
    still[:, 20:] = 0
    reference = ShiftReference.fit(still, still[:10], layout=LAYOUT)
    delta = still[0].clone()
    delta[20:] = 5.0
    (report,) = reference.measure(delta[None])
    # Standardised, that block counts nowhere: only its norm gives it away.
    assert report.shift < 1 < report.size and str(report.largest_part).endswith("layers.1")


def test_an_older_file_is_read_and_what_it_cannot_tell_is_said(centres, reference, tmp_path):
    reference.save_pretrained(tmp_path)
    path = tmp_path / SHIFT_TENSORS_NAME
    whole = load_file(path)
    save_file({name: whole[name] for name in whole if name not in ("usual_norms", "heldout_ratios")}, path)
    older = ShiftReference.from_folder(tmp_path, LAYOUT)
    (report,) = older.measure(clusters(centres[0, 1][None], 1, 7))
    assert report.size is None and "norms by block not checked" in report.describe()


@pytest.mark.parametrize(
    "broken",
    [
        {"mean": torch.zeros(29)},
        {"heldout": torch.zeros(0)},
        {"deviations": torch.ones(3, 3)},
        {"shadows": torch.ones(5)},
        {"usual_norms": torch.ones(3, 2)},
        {"heldout_ratios": None},
        {"inverse_scale": torch.full((30,), float("nan"))},
        {"mean": torch.zeros(30, dtype=torch.int64)},
        {"more": torch.zeros(1)},
    ],
)
def test_files_that_hold_something_else_are_refused(reference, tmp_path, broken):
    reference.save_pretrained(tmp_path)
    path = tmp_path / SHIFT_TENSORS_NAME
    tensors = {**load_file(path), **broken}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(IncompleteArtifactError) as caught:
        ShiftReference.from_folder(tmp_path, LAYOUT)
    assert caught.value.path == str(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(IncompleteArtifactError):
        ShiftReference.from_folder(tmp_path, LAYOUT)
    path.unlink()
    with pytest.raises(IncompleteArtifactError):
        ShiftReference.from_folder(tmp_path, LAYOUT)


def test_words_follow_from_the_numbers():
    def words(shift: float, quantile: float, size: float = 1.0, runs: int = 20) -> str:
        return shift_module.ShiftReport(shift, quantile, 1.0, 1.0, runs, size, 2.5, "B of layers.0").describe()

    assert words(0.3, 0.05).startswith("closer to the shadows than 95% of held-out runs; norms as usual")
    assert "farther from the shadows than 97% of held-out runs: the result is doubtful" in words(1.1, 0.97)
    assert "farther from the shadows than any held-out run: the result is a guess" in words(1.5, 1.0)
    assert "farther from the shadows than all 2 held-out runs: the result may be a guess" in words(1.5, 1.0, runs=2)
    assert "B of layers.0 is 2.5 times its usual norm" in words(0.3, 0.05, 1.4)
