from __future__ import annotations

import dataclasses

import pytest

from grad_transformer.lab import PRESETS, LabPreset, LabWorld


@pytest.fixture(scope="session")
def mini_preset() -> LabPreset:
    """Seconds instead of minutes: both base models tiny and hardly trained, few clients and rows."""
    base = dataclasses.replace(PRESETS["quick"].tinylm, pretraining_steps=6, pretraining_batch_size=16)
    return dataclasses.replace(
        PRESETS["quick"],
        name="mini",
        tinylm=base,
        llm=dataclasses.replace(base, hidden_size=32, pretraining_steps=4),
        runs_per_task=1,
        rows_per_subset=64,
        test_rows=64,
    )


@pytest.fixture(scope="session")
def mini_world(mini_preset: LabPreset) -> LabWorld:
    return LabWorld(0, mini_preset)
