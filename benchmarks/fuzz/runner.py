"""Many inputs in worker processes: what raises untyped, crashes, takes too long or too much memory is written down."""

from __future__ import annotations

import multiprocessing
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

from grad_transformer.errors import GradTransformerError

from .kinds import Kind
from .mutations import mutate_file


# Of one input: processor seconds, wall seconds for what waits without computing, and MiB.
MAX_SECONDS, MAX_WALL_SECONDS, MAX_GROWTH = 5, 60, 200
# What a bomb may ask for before it is refused, instead of taking the machine with it.
_MORE_ADDRESSES = 4 * 2**30


@dataclass
class Tally:
    """What came of the inputs of one kind."""

    kind: str
    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0
    found: list[dict[str, Any]] = field(default_factory=list)

    def count(self, name: str) -> int:
        return sum(found["what"] == name for found in self.found)

    def row(self) -> list[str]:
        typed = self.inputs - self.outcomes["accepted"] - len(self.found)
        problems = [self.count(name) for name in ("untyped", "crash", "hang", "growth")]
        numbers = [self.inputs, self.outcomes["accepted"], max(0, typed), *problems]
        return [self.kind, *(f"{number:,}" for number in numbers), f"{self.slowest_seconds:.2f}"]


def make_input(kind: Kind, seed: int, number: int, valid: Path, folder: Path, outside: Path) -> None:
    """Input `number` of a seed: the valid files with one to four mutations, the same each time."""
    rng = random.Random(f"{kind.name}-{seed}-{number}")
    shutil.copytree(valid, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        mutate_file(rng.choice(files), rng, outside)
    kind.after(folder, rng)


def read_input(kind: Kind, folder: Path) -> tuple[str, str]:
    """What came of reading it: `accepted`, the names of typed errors, or `untyped` with the traceback."""
    outcomes = []
    for read in kind.readings(folder):
        try:
            read()
            outcomes.append("accepted")
        except GradTransformerError as error:
            str(error)
            outcomes.append(type(error).__name__)
        except SystemExit as error:
            return "untyped", f"SystemExit: {error}"
        # Everything else is what is looked for.
        except Exception:  # noqa: BLE001
            return "untyped", traceback.format_exc()
    return "accepted" if set(outcomes) == {"accepted"} else ", ".join(sorted(set(outcomes) - {"accepted"})), ""


def run_inputs(kind: Kind, valid: Path, *, seed: int, numbers: Iterable[int]) -> Tally:
    """Inputs in this process, for tests."""
    tally = Tally(kind.name)
    with tempfile.TemporaryDirectory() as temporary:
        folder, outside = Path(temporary) / "input", Path(temporary) / "outside"
        shutil.copytree(valid, outside)
        for number in numbers:
            make_input(kind, seed, number, valid, folder, outside)
            peak, started = _peak(), time.process_time()
            outcome, details = read_input(kind, folder)
            seconds, growth = time.process_time() - started, _peak() - peak
            _add(tally, number, outcome, details, seconds, growth)
            shutil.rmtree(folder)
    return tally


def run_in_workers(kind: Kind, valid: Path, *, seed: int, inputs: int, workers: int, found_dir: Path) -> Tally:
    """Inputs in processes that are replaced when one dies or is stopped."""
    tally = Tally(kind.name)
    context = multiprocessing.get_context("fork")
    share = -(-inputs // workers)
    waiting = [range(start, min(start + share, inputs)) for start in range(0, inputs, share)]
    running: list[_Worker] = []
    with tempfile.TemporaryDirectory() as temporary:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(_Worker(context, kind, valid, seed, waiting.pop(), Path(temporary)))
            wait([worker.receiver for worker in running], timeout=0.05)
            for worker in list(running):
                rest = worker.step(tally)
                if rest is not None:
                    running.remove(worker)
                    if len(rest):
                        waiting.append(rest)
        for found in tally.found:
            _keep(kind, seed, found, valid, found_dir, Path(temporary))
    return tally


class _Worker:
    """One process with a range of inputs; it says when it begins one, and what came of it."""

    def __init__(self, context: Any, kind: Kind, valid: Path, seed: int, numbers: range, temporary: Path):
        self.numbers, self.current, self.began = numbers, numbers.start - 1, time.monotonic()
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(sender, kind, valid, seed, numbers, temporary))
        self.process.start()
        sender.close()

    def step(self, tally: Tally) -> range | None:
        """Take what messages there are; the inputs that are left once the process has ended, `None` before."""
        try:
            while self.receiver.poll():
                message = self.receiver.recv()
                self.began = time.monotonic()
                if message[0] == "begin":
                    self.current = message[1]
                else:
                    _add(tally, *message[1:])
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            if code != 0 and self.current >= self.numbers.start:
                what = "hang" if code == -signal.SIGPROF else "crash"
                _add(tally, self.current, what, f"exit code {code}", 0.0, 0.0)
            return range(self.current + 1, self.numbers.stop) if code != 0 else range(0)
        # A worker that has not begun yet builds nothing, but may wait for a processor.
        if self.current >= self.numbers.start and time.monotonic() - self.began > MAX_WALL_SECONDS:
            self.process.kill()
            self.process.join()
            _add(tally, self.current, "hang", f"waits for more than {MAX_WALL_SECONDS} s", 0.0, 0.0)
            return range(self.current + 1, self.numbers.stop)
        return None


def _work(sender: Connection, kind: Kind, valid: Path, seed: int, numbers: range, temporary: Path) -> None:
    place = Path(tempfile.mkdtemp(dir=temporary))
    folder, outside = place / "input", place / "outside"
    limit = psutil.Process().memory_info().vms + _MORE_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    shutil.copytree(valid, outside)
    # What is loaded once is no growth of an input.
    shutil.copytree(valid, folder)
    for read in kind.readings(folder):
        read()
    shutil.rmtree(folder)
    for number in numbers:
        make_input(kind, seed, number, valid, folder, outside)
        sender.send(("begin", number))
        peak, started = _peak(), time.process_time()
        # Its signal ends the process, also where it sits in a library's own code.
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        outcome, details = read_input(kind, folder)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sender.send(("end", number, outcome, details, time.process_time() - started, _peak() - peak))
        shutil.rmtree(folder)
    shutil.rmtree(place)
    sender.close()


def _add(tally: Tally, number: int, outcome: str, details: str, seconds: float, growth: float) -> None:
    tally.inputs += 1
    tally.slowest_seconds = max(tally.slowest_seconds, seconds)
    what = outcome if outcome in ("untyped", "crash", "hang") else None
    if what is None and growth > MAX_GROWTH:
        what, details = "growth", f"{growth:.0f} MiB"
    if what is None:
        tally.outcomes[outcome] += 1
    else:
        tally.found.append({"number": number, "what": what, "details": details})


def _keep(kind: Kind, seed: int, found: dict[str, Any], valid: Path, found_dir: Path, temporary: Path) -> None:
    """The input as it was read, with what came of it."""
    folder = found_dir / f"{kind.name}-{seed}-{found['number']}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    outside = temporary / "outside"
    if not outside.is_dir():
        shutil.copytree(valid, outside)
    make_input(kind, seed, found["number"], valid, folder, outside)
    (folder / "found.txt").write_text(f"{found['what']}\n{found['details']}\n", errors="replace")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
