"""Groups of runs on several workers: each is done, a lost worker's again, and nothing else twice."""

from __future__ import annotations

import errno
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from grad_transformer.errors import OutputError, RecipeError, UsageError, WorkerLostError
from grad_transformer.locks import sole_writer
from grad_transformer.shadow import ShadowPlan, missing_runs, run_shadows
from grad_transformer.shadow.executors import Group, spread
from grad_transformer.shadow.run import do_group
from tests.shadow.test_resume import finished, make_plan


GROUPS = [Group("source", (f"run-{index}",)) for index in range(6)]
Outcome = tuple[bool, dict[str, str | None] | None]


class ScriptedWorkers:
    """Ends groups in the order they were handed out, as a script says; with `idle_die` a worker that has nothing to
    do is lost, before any other ends."""

    def __init__(self, outcome: Callable[[Group], Outcome], *, idle_die: bool = False):
        self._outcome, self._idle_die = outcome, idle_die
        self._idle: list[int] = []
        self.handed_out: list[tuple[int, Group]] = []
        self.most_at_once = 0
        self.closed = False
        self._running: list[tuple[int, Group]] = []

    def submit(self, slot: int, group: Group) -> None:
        assert slot not in dict(self._running)
        self._running.append((slot, group))
        self.handed_out.append((slot, group))
        self.most_at_once = max(self.most_at_once, len(self._running))

    def next_done(self) -> tuple[int, bool, dict[str, str | None] | None]:
        running = dict(self._running)
        idle = [slot for slot in self._idle if slot not in running]
        if self._idle_die and idle:
            self._idle.remove(idle[0])
            return idle[0], True, None
        slot, group = self._running.pop(0)
        self._idle.append(slot)
        return slot, *self._outcome(group)

    def close(self) -> None:
        self.closed = True


def test_a_group_is_handed_out_again_where_its_worker_was_lost() -> None:
    workers = ScriptedWorkers(lambda group: (group.shadow_ids == ("run-2",) and group.attempts < 2, None))
    spread(GROUPS, workers, num_workers=3, retries=2)
    assert workers.most_at_once == 3
    assert workers.closed
    times = [sum(group.shadow_ids == other.shadow_ids for _, other in workers.handed_out) for group in GROUPS]
    assert times == [1, 1, 3, 1, 1, 1]


def test_a_worker_that_is_lost_while_it_has_no_group_takes_none_with_it() -> None:
    workers = ScriptedWorkers(lambda group: (False, None), idle_die=True)
    spread(GROUPS, workers, num_workers=4, retries=0)
    assert sorted(group.shadow_ids for _, group in workers.handed_out) == sorted(g.shadow_ids for g in GROUPS)
    assert workers.closed


def test_workers_that_are_always_lost_are_given_up() -> None:
    workers = ScriptedWorkers(lambda group: (group.shadow_ids == ("run-1",), None))
    with pytest.raises(WorkerLostError, match="source runs run-1 to run-1"):
        spread(GROUPS, workers, num_workers=2, retries=1)
    assert workers.closed


def test_what_a_worker_raises_is_raised_with_its_type_and_not_tried_again() -> None:
    error = RecipeError("Run 3 diverged.", expected="finite values", found="nan", remedy="lower learning_rate")
    workers = ScriptedWorkers(lambda group: (False, error.to_dict() if group.shadow_ids == ("run-3",) else None))
    with pytest.raises(RecipeError) as caught:
        spread(GROUPS, workers, num_workers=2, retries=5)
    assert str(caught.value) == str(error)
    assert len(workers.handed_out) <= 5
    assert workers.closed


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    plan_dir = make_plan(tmp_path, 4)
    for options in ({"num_workers": 0}, {"executor": "slurm"}):
        with pytest.raises(UsageError, match="do not go together"):
            run_shadows(plan_dir, **options)  # type: ignore[arg-type]


def test_runs_of_one_role_are_done_by_one_process_at_a_time(tmp_path: Path) -> None:
    plan_dir = make_plan(tmp_path, 2)
    with sole_writer(plan_dir / "runs" / "source"):
        with pytest.raises(OutputError, match="Another process"):
            run_shadows(plan_dir)
        assert finished(plan_dir) == {}
        # The other role is nobody's.
        assert run_shadows(plan_dir, roles=["target"]) == {"target": 2}
    assert run_shadows(plan_dir) == {"source": 2, "target": 0}
    with sole_writer(plan_dir / "runs" / "source"):
        assert run_shadows(plan_dir) == {"source": 0, "target": 0}


def test_a_group_does_only_what_is_missing_and_reports_errors_as_data(tmp_path: Path) -> None:
    plan_dir = make_plan(tmp_path, 4)
    plan = ShadowPlan.load(plan_dir)
    ids = missing_runs(plan, plan_dir, "source")
    options = {"engine": "batched", "adapters_per_batch": 4, "dtype": "auto", "device": None}
    assert do_group(str(plan_dir), "source", ids[:2], options) is None
    before = finished(plan_dir)
    assert do_group(str(plan_dir), "source", ids, options) is None
    assert len(finished(plan_dir)) == 4
    assert {name: finished(plan_dir)[name] for name in before} == before
    (tmp_path / "public.jsonl").write_text('{"prompt": "1", "completion": "2"}\n')
    failure = do_group(str(plan_dir), "target", ids, options)
    assert failure is not None
    assert failure["error"] == "PlanError"


def test_a_full_disk_of_a_worker_is_told_and_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plan_dir = make_plan(tmp_path, 2)
    monkeypatch.setattr("grad_transformer.shadow.run.write_run", full)
    options = {"engine": "batched", "adapters_per_batch": 2, "dtype": "auto", "device": None}
    failure = do_group(str(plan_dir), "source", ["shadow-00000"], options)
    assert failure is not None
    assert (failure["error"], failure["found"]) == ("OutputError", os.strerror(errno.ENOSPC))


def kill_when(condition: Callable[[], bool], process_id: Callable[[], int], killed: list[int]) -> threading.Thread:
    """Once a condition holds, kill a process."""

    def watch() -> None:
        deadline = time.monotonic() + 300
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.005)
        killed.append(process_id())
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def check_killed_in_the_middle(tmp_path: Path, process_id: Callable[[], int], **options: Any) -> None:
    """A worker is killed after some runs: none is lost, none that was finished is done again."""
    num_runs = 40
    plan_dir = make_plan(tmp_path, num_runs)
    seen: dict[str, tuple[int, str]] = {}

    def some_are_done() -> bool:
        seen.update(finished(plan_dir) if (plan_dir / "runs" / "source").is_dir() else {})
        return len(seen) >= 4

    killed: list[int] = []
    thread = kill_when(some_are_done, process_id, killed)
    done = run_shadows(plan_dir, roles=["source"], adapters_per_batch=2, num_workers=2, **options)
    thread.join()
    assert len(killed) == 1
    assert 4 <= len(seen) < num_runs, "it was killed too late"
    assert done == {"source": num_runs}
    after = finished(plan_dir)
    assert len(after) == num_runs
    assert {name: after[name] for name in seen} == seen
    # A worker's run is what this process would have made of it.
    redone = plan_dir / "runs" / "source" / sorted(after)[-1]
    tensors = load_file(redone)
    redone.unlink()
    run_shadows(plan_dir, roles=["source"], adapters_per_batch=2)
    for key, value in load_file(redone).items():
        torch.testing.assert_close(value, tensors[key], rtol=1e-4, atol=1e-6)


def test_a_local_worker_killed_in_the_middle_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def worker() -> int:
        return next(child.pid or 0 for child in multiprocessing.active_children() if "shadow-worker" in child.name)

    check_killed_in_the_middle(tmp_path, worker)
    assert sum("A worker was lost" in message for message in caplog.messages) <= 1


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_a_ray_worker_killed_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    def worker() -> int:
        processes = psutil.Process().children(recursive=True)
        return next(process.pid for process in processes if "_RayWorker" in " ".join(process.cmdline()))

    check_killed_in_the_middle(tmp_path, worker, executor="ray", cpus_per_worker=1)


def test_without_ray_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"grad-transformer\[ray\]"):
        run_shadows(make_plan(tmp_path, 2), executor="ray")
