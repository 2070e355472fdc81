"""The bar over runs that train many at a time."""

from __future__ import annotations

import io
from typing import Any

import pytest

from grad_transformer.shadow import progress
from grad_transformer.shadow.progress import BatchProgress, RunBar


class Clock:
    """tqdm's clock, which only this test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    def bar(**options: Any) -> Any:
        made = tqdm(**options, file=io.StringIO(), ncols=100, mininterval=0)
        made._time, made.start_t, made.last_print_t = clock, 0.0, 0.0
        return made

    tqdm = progress.tqdm
    monkeypatch.setattr(progress, "tqdm", bar)
    return clock


def test_the_time_left_is_known_before_the_first_run_has_finished(clock: Clock) -> None:
    with RunBar("runs", total=128) as bar:
        for step in range(1, 6):
            clock.now += 6.0
            bar.at_work(BatchProgress(num_runs=64, step=10 * step, num_steps=100, loss=0.5))
        # 30 s for half of the first half: a minute and a half is left, whatever the first runs' finish says.
        facts = bar._bar.format_dict
        assert facts["n"] == 32
        assert (facts["total"] - facts["n"]) / facts["rate"] == pytest.approx(90, rel=0.01)
        assert "0 of 128 runs, loss 0.500" in str(bar._bar)


def test_runs_that_finish_together_do_not_move_the_bar_twice(clock: Clock) -> None:
    with RunBar("runs", total=12, finished=2) as bar:
        bar.at_work(BatchProgress(num_runs=10, step=100, num_steps=100, loss=0.1))
        for _ in range(10):
            bar.finish()
        assert bar._bar.n == 12
        assert "12 of 12 runs" in str(bar._bar)


def test_runs_without_steps_are_counted(clock: Clock) -> None:
    with RunBar("runs", total=3) as bar:
        bar.finish()
        assert bar._bar.n == 1
