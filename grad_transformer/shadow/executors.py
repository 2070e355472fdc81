"""Shadow runs on several processes or machines: groups of runs are handed to workers, and handed out again if lost.

A worker loads a base model once and fine-tunes one group of runs after the other. What it finishes lies in the plan's
folder, one whole file for each run, so a lost worker costs at most the runs of its own group: whoever gets the group
next does those that have no file yet. All workers must see the plan's folder, the base models and the public data.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, Protocol

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from .. import errors
from ..errors import GradTransformerError, UsageError, WorkerLostError
from ..wording import first_line


logger = logging.get_logger(__name__)

ExecutorName = Literal["local", "ray"]


@dataclass(frozen=True)
class Group:
    """Runs that one worker does at a time.

    Args:
        role (`str`): which of the two models.
        shadow_ids (`tuple[str, ...]`): runs, as many as train at once.
        attempts (`int`, *optional*, defaults to 0): how often a worker was lost on them.
    """

    role: str
    shadow_ids: tuple[str, ...]
    attempts: int = 0


# Does a group with the options of `run_shadows`; None, or what went wrong as `GradTransformerError.to_dict` has it.
DoGroup = Callable[[str, str, Sequence[str], Mapping[str, Any]], dict[str, str | None] | None]


class Workers(Protocol):
    """Where groups are done. A slot is one worker's place: a lost worker is replaced in it."""

    def submit(self, slot: int, group: Group) -> None:
        """Hand a group to the worker in a slot, which is idle or not there yet."""

    def next_done(self) -> tuple[int, bool, dict[str, str | None] | None]:
        """Wait for one slot to end: the slot, whether its worker was lost, and what went wrong otherwise.

        A worker may also be lost while it has no group.
        """

    def close(self) -> None:
        """End all workers."""


def spread(groups: Sequence[Group], workers: Workers, *, num_workers: int, retries: int) -> None:
    """Have all groups done.

    Args:
        groups (`Sequence[Group]`): what to do, in this order.
        workers ([`Workers`]): closed at the end, also on an error.
        num_workers (`int`): slots.
        retries (`int`): how often a group may be handed out again because its worker was lost.

    Raises:
        [`WorkerLostError`]: a group was lost more often than that.
        [`GradTransformerError`]: what a worker raised; it would raise it again, so nothing is tried twice.
    """
    waiting, running = deque(groups), dict[int, Group]()
    try:
        with tqdm(total=len(groups), desc="groups of runs", unit="group", smoothing=0) as bar:
            while waiting or running:
                for slot in range(num_workers):
                    if waiting and slot not in running:
                        running[slot] = waiting.popleft()
                        workers.submit(slot, running[slot])
                slot, lost, failure = workers.next_done()
                group = running.pop(slot, None)
                if group is None:  # a worker without a group was lost, and nothing with it
                    continue
                if failure is not None:
                    raise _rebuilt(failure)
                if lost:
                    waiting.appendleft(_again(group, retries))
                else:
                    bar.update()
    finally:
        workers.close()


def _again(group: Group, retries: int) -> Group:
    first, last = group.shadow_ids[0], group.shadow_ids[-1]
    if group.attempts >= retries:
        raise WorkerLostError(
            f"Workers were lost on {group.role} runs {first} to {last}.",
            expected=f"at most {retries} times",
            found=group.attempts + 1,
            remedy="look for what ended them (memory, for instance: fewer adapters_per_batch), and run again: "
            "finished runs are kept",
        )
    logger.warning(f"A worker was lost on {group.role} runs {first} to {last}: those not finished are done again.")
    return Group(group.role, group.shadow_ids, group.attempts + 1)


def _rebuilt(failure: Mapping[str, str | None]) -> GradTransformerError:
    """The error that a worker raised, as its own type."""
    kind = getattr(errors, str(failure["error"]), GradTransformerError)
    fields = {name: failure[name] for name in ("path", "expected", "found", "remedy")}
    return kind(str(failure["message"]), **fields)


class LocalWorkers:
    """Processes of this machine, started fresh (`spawn`).

    Args:
        plan_dir (`str`): the plan's folder.
        options (`Mapping`): options of `run_shadows`.
        do_group (`DoGroup`): what a process does with a group.
        threads (`int`): CPU threads of each process.
    """

    def __init__(self, plan_dir: str, options: Mapping[str, Any], do_group: DoGroup, *, threads: int):
        self._arguments = (plan_dir, dict(options), do_group, threads)
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[int, tuple[Any, Connection]] = {}

    def submit(self, slot: int, group: Group) -> None:
        if slot not in self._processes:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(theirs, slot, *self._arguments), daemon=True, name=f"shadow-worker-{slot}"
            )
            process.start()
            theirs.close()  # so that the pipe ends where the process does
            self._processes[slot] = (process, ours)
        try:
            self._processes[slot][1].send((group.role, group.shadow_ids))
        except OSError:
            logger.debug("The worker is gone; reading from its pipe will say so.")

    def next_done(self) -> tuple[int, bool, dict[str, str | None] | None]:
        slots = {pipe: slot for slot, (_, pipe) in self._processes.items()}
        pipe = next(iter(wait(list(slots))))
        assert isinstance(pipe, Connection)
        slot = slots[pipe]
        try:
            return slot, False, pipe.recv()
        except (EOFError, OSError):
            process, _ = self._processes.pop(slot)
            pipe.close()
            process.join()
            logger.warning(f"Worker {slot} ended with exit code {process.exitcode}.")
            return slot, True, None

    def close(self) -> None:
        for process, pipe in self._processes.values():
            pipe.close()
            process.terminate()
            process.join()
        self._processes.clear()


def _serve(
    pipe: Connection, slot: int, plan_dir: str, options: dict[str, Any], do_group: DoGroup, threads: int
) -> None:
    """A worker's life: groups come in, and None or an error goes out."""
    # Ctrl-C reaches every process of a terminal: the parent alone says what then happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    if options.get("device") is None and torch.cuda.is_available():
        options["device"] = f"cuda:{slot % torch.cuda.device_count()}"
    while True:
        try:
            role, shadow_ids = pipe.recv()
        except EOFError:  # the parent has ended
            return
        pipe.send(do_group(plan_dir, role, shadow_ids, options))


class RayWorkers:
    """Ray actors, on whatever machines its cluster has (`RAY_ADDRESS`); without a cluster one is started here.

    Args:
        plan_dir, options, do_group: as for [`LocalWorkers`].
        cpus, gpus (`float`): what each worker reserves; Ray shows it the GPUs that are its own.
    """

    def __init__(self, plan_dir: str, options: Mapping[str, Any], do_group: DoGroup, *, cpus: float, gpus: float):
        import ray

        self._ray, self._started = ray, not ray.is_initialized()
        if self._started:
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        self._arguments = (plan_dir, dict(options), do_group, max(1, int(cpus)))
        self._actor = ray.remote(num_cpus=cpus, num_gpus=gpus)(_RayWorker)
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, int] = {}

    def submit(self, slot: int, group: Group) -> None:
        if slot not in self._actors:
            self._actors[slot] = self._actor.remote(*self._arguments)
        self._pending[self._actors[slot].do.remote(group.role, group.shadow_ids)] = slot

    def next_done(self) -> tuple[int, bool, dict[str, str | None] | None]:
        (done,), _ = self._ray.wait(list(self._pending), num_returns=1)
        slot = self._pending.pop(done)
        try:
            return slot, False, self._ray.get(done)
        except self._ray.exceptions.RayActorError as cause:
            del self._actors[slot]
            logger.warning(f"Worker {slot} was lost: {first_line(cause)}")
            return slot, True, None

    def close(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()


class _RayWorker:
    """What lives in a Ray actor."""

    def __init__(self, plan_dir: str, options: dict[str, Any], do_group: DoGroup, threads: int):
        torch.set_num_threads(threads)
        self._plan_dir, self._options, self._do_group = plan_dir, options, do_group

    def do(self, role: str, shadow_ids: Sequence[str]) -> dict[str, str | None] | None:
        return self._do_group(self._plan_dir, role, shadow_ids, self._options)


def make_workers(
    executor: ExecutorName,
    plan_dir: str,
    options: Mapping[str, Any],
    do_group: DoGroup,
    *,
    num_workers: int,
    cpus_per_worker: float | None,
    gpus_per_worker: float | None,
) -> Workers:
    """The workers of an executor.

    Args:
        cpus_per_worker (`float`, *optional*): default: the CPUs of this machine divided by the workers, at least 1.
        gpus_per_worker (`float`, *optional*): for Ray; default: 1 where this machine has GPUs, and 0 elsewhere.

    Raises:
        [`UsageError`]: `executor="ray"` without Ray.
    """
    cpus = cpus_per_worker or max(1, (os.cpu_count() or 1) // num_workers)
    if executor == "local":
        return LocalWorkers(plan_dir, options, do_group, threads=max(1, int(cpus)))
    gpus = float(torch.cuda.is_available()) if gpus_per_worker is None else gpus_per_worker
    try:
        return RayWorkers(plan_dir, options, do_group, cpus=cpus, gpus=gpus)
    except ImportError as cause:
        raise UsageError(
            "Ray is not installed.",
            expected="the package ray",
            found=str(cause),
            remedy='pip install "grad-transformer[ray]", or --executor local',
        ) from cause
