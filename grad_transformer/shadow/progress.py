"""A bar over runs that finish many at a time, which knows how long is left before the first of them has finished."""

from __future__ import annotations

from typing import NamedTuple

from tqdm.auto import tqdm

from ..wording import BAR_FORMAT


class BatchProgress(NamedTuple):
    """How far a batch of adapters has come: `step` of `num_steps`, all of its `num_runs` at once."""

    num_runs: int
    step: int
    num_steps: int
    loss: float


class RunBar:
    """A progress bar in runs to which every optimizer step of the runs at hand adds its share.

    Args:
        description (`str`): what stands before the bar.
        total (`int`): runs in all.
        finished (`int`, *optional*, defaults to 0): runs that were finished before.
    """

    def __init__(self, description: str, total: int, finished: int = 0):
        self._finished, self._total, self._loss = finished, total, ""
        self._bar = tqdm(
            total=total,
            initial=finished,
            desc=description,
            bar_format=BAR_FORMAT,
        )
        self._show(finished)

    def __enter__(self) -> RunBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def at_work(self, batch: BatchProgress) -> None:
        """A batch has taken a step."""
        self._loss = f", loss {batch.loss:.3f}"
        self._show(self._finished + batch.num_runs * batch.step / batch.num_steps)

    def finish(self) -> None:
        """A run is finished and written. The steps of its batch have moved the bar that far already."""
        self._finished += 1
        self._show(max(self._bar.n, self._finished))

    def _show(self, done: float) -> None:
        self._bar.set_postfix_str(f"{self._finished} of {self._total} runs{self._loss}", refresh=False)
        self._bar.update(min(done, self._total) - self._bar.n)
