"""Deltas on disk: the rows of a matrix, without the matrix."""

from __future__ import annotations

import pickle  # only to see what a data-loading process is sent
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grad_transformer.adapters import rows as rows_module
from grad_transformer.adapters.rows import DeltaRows, block_inverse_scale, column_mean, evenly_spaced
from grad_transformer.adapters.statistics import delta_reproducibility, task_mean_ceiling


COUNT, SIZE = 23, 5
# What this process has mapped, where the system tells.
MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A split of several record batches on disk, and its values."""
    values_NP = np.random.default_rng(0).standard_normal((COUNT, SIZE)).astype(np.float32)
    features = datasets.Features({"blocks": datasets.List(datasets.Value("float32"), length=SIZE)})
    parts = [
        datasets.Dataset.from_dict({"blocks": part}, features=features) for part in np.split(values_NP, [4, 5, 15])
    ]
    path = tmp_path_factory.mktemp("rows")
    datasets.concatenate_datasets(parts).save_to_disk(path)
    return datasets.load_from_disk(path), torch.from_numpy(values_NP)


@given(st.lists(st.integers(-COUNT, COUNT - 1), max_size=40))
def test_any_rows_are_those_of_the_matrix(split, rows):
    deltas, values_NP = DeltaRows(split[0], "blocks"), split[1]
    assert torch.equal(deltas[rows], values_NP[rows])
    assert torch.equal(deltas[torch.tensor(rows, dtype=torch.int64)], values_NP[rows])
    for row in rows:
        assert torch.equal(deltas[row], values_NP[row])


@given(st.integers(-30, 30), st.integers(-30, 30), st.integers(1, 5))
def test_slices_are_those_of_the_matrix(split, start, stop, step):
    assert torch.equal(DeltaRows(split[0], "blocks")[start:stop:step], split[1][start:stop:step])


def test_rows_beyond_the_end_are_refused_and_what_is_read_is_a_copy(split):
    deltas = DeltaRows(split[0], "blocks")
    assert deltas.shape == (COUNT, SIZE)
    with pytest.raises(IndexError):
        deltas[[0, COUNT]]
    deltas[0].zero_()
    assert torch.equal(deltas[0], split[1][0])


def test_selected_rows_are_read_as_selected(split):
    assert torch.equal(DeltaRows(split[0].select([7, 1, 20]), "blocks")[:], split[1][[7, 1, 20]])


def test_another_process_gets_the_file_not_the_values(split):
    deltas = DeltaRows(split[0], "blocks")
    before = deltas[:]
    sent = pickle.dumps(deltas)
    assert before.numpy().tobytes() not in sent and len(sent) < 10_000
    assert torch.equal(pickle.loads(sent)[:], before)


def test_statistics_are_the_same_from_disk_as_from_memory(split):
    deltas, values_NP = DeltaRows(split[0], "blocks"), split[1]
    tasks = [f"task-{row % 4}" for row in range(COUNT)]
    assert delta_reproducibility(deltas, tasks) == delta_reproducibility(values_NP, tasks)
    held_out = values_NP[:8] + 0.1
    mean_D = values_NP.mean(dim=0)
    expected = task_mean_ceiling(held_out, tasks[:8], values_NP, tasks, mean_D)
    assert task_mean_ceiling(held_out, tasks[:8], deltas, tasks, mean_D) == expected


def test_a_whole_column_is_a_matrix_in_a_file_of_its_own(split, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    matrix_NP = DeltaRows(split[0], "blocks").to_tensor()
    assert torch.equal(matrix_NP, split[1])
    assert list((tmp_path / "cache").iterdir()) == []
    address = matrix_NP.data_ptr()
    if MAPS.exists():
        spans = [line.split() for line in MAPS.read_text().splitlines()]
        bounds = [[int(bound, 16) for bound in span[0].split("-")] for span in spans]
        (mapped,) = (span for span, (low, high) in zip(spans, bounds, strict=True) if low <= address < high)
        assert str(tmp_path / "cache") in " ".join(mapped)
    matrix_NP.zero_()
    assert torch.equal(DeltaRows(split[0], "blocks").to_tensor(), split[1])
    assert DeltaRows(split[0].select([]), "blocks").to_tensor().shape == (0, SIZE)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100])
def test_evenly_spaced_rows_are_at_most_as_many_and_no_copy(count):
    rows_NP = torch.arange(2.0 * count).view(count, 2)
    some = evenly_spaced(rows_NP, 8)
    assert 1 <= len(some) <= 8 and some.data_ptr() == rows_NP.data_ptr()
    assert torch.equal(some[:, 0].diff().unique(), some[:, 0].diff()[:1])


def test_means_and_scales_in_chunks_are_those_of_the_matrix(monkeypatch):
    monkeypatch.setattr(rows_module, "_COLUMN_CHUNK_VALUES", 20)
    rows_NP = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    rows_NP[:, 6:8] = 3.0
    mean_P = column_mean(rows_NP)
    assert torch.allclose(mean_P, rows_NP.double().mean(0))
    inverse_P = block_inverse_scale(rows_NP, mean_P, [6, 2, 3])
    centred_NP = rows_NP.double() - mean_P
    assert torch.allclose(inverse_P[:6], 1 / centred_NP[:, :6].square().mean().sqrt())
    assert torch.equal(inverse_P[6:8], torch.zeros(2, dtype=torch.float64))
    assert torch.allclose(inverse_P[8:], 1 / centred_NP[:, 8:].square().mean().sqrt())
