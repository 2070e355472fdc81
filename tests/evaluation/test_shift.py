"""The shift report: near for what the shadows show, far for what lies between or beyond them."""

from __future__ import annotations

import pytest
import torch

from grad_transformer.errors import DeltaDatasetError, UsageError
from grad_transformer.evaluation import shift as shift_module
from grad_transformer.evaluation.shift import ShiftReference, area_under_roc, load_shift_reference


WIDTHS = [20, 10]


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
    return ShiftReference.fit(clusters(seen, 8, 1), clusters(seen, 2, 2), widths=WIDTHS)


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
    assert load_shift_reference(tmp_path) is None
    reference.save_pretrained(tmp_path)
    deltas = clusters(centres[0], 1, 5)
    loaded = load_shift_reference(tmp_path)
    assert loaded is not None
    for ours, theirs in zip(reference.measure(deltas), loaded.measure(deltas), strict=True):
        assert ours.shift == pytest.approx(theirs.shift, rel=1e-4)
    assert "held-out shadow runs" in loaded.measure(deltas)[0].describe()


def test_blocks_are_scaled_alike(centres):
    seen = centres[~torch.eye(5, dtype=torch.bool)]
    scale = torch.cat([torch.full((20,), 1000.0), torch.ones(10)])
    plain = ShiftReference.fit(clusters(seen, 8, 1), clusters(seen, 2, 2), widths=WIDTHS)
    scaled = ShiftReference.fit(clusters(seen, 8, 1) * scale, clusters(seen, 2, 2) * scale, widths=WIDTHS)
    delta = clusters(centres[0], 1, 6)
    assert plain.measure(delta)[0].shift == pytest.approx(scaled.measure(delta * scale)[0].shift, rel=1e-6)


def test_too_few_runs_and_other_sizes_are_refused(reference):
    with pytest.raises(DeltaDatasetError):
        ShiftReference.fit(torch.zeros(2, 30), torch.zeros(1, 30))
    with pytest.raises(DeltaDatasetError):
        ShiftReference.fit(torch.ones(8, 30), torch.ones(1, 30))
    with pytest.raises(UsageError):
        reference.measure(torch.zeros(1, 29))


def test_roc_counts_ties_half():
    assert area_under_roc([0.0, 1.0], [1.0, 2.0]) == 0.875


def test_many_shadows_give_directions_by_a_part_of_them_and_distances_by_all(centres, reference, monkeypatch):
    monkeypatch.setattr(shift_module, "MAX_ROWS", 40)
    monkeypatch.setattr(shift_module, "_CHUNK_ROWS", 7)
    eye = torch.eye(5, dtype=torch.bool)
    part = ShiftReference.fit(clusters(centres[~eye], 8, 1), clusters(centres[~eye], 2, 2), widths=WIDTHS)
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
