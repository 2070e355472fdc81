"""The environment of every test: offline, one thread, an empty cache of the Hub, and a way to run commands.

The variables are set before torch or a Hugging Face library is imported; these read them once.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest


_HF_HOME = tempfile.mkdtemp(prefix="grad-transformer-tests-")

os.environ.update(
    {
        "HF_HOME": _HF_HOME,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "MPLBACKEND": "Agg",
        "NO_COLOR": "1",
    }
)
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# A cache, token or verbosity of whoever runs the tests must not decide their outcome.
for _name in (
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "TRANSFORMERS_VERBOSITY",
    "RANK",
    "WORLD_SIZE",
):
    os.environ.pop(_name, None)

# The same examples in every run: a failure is a change of the code.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=50)
hypothesis.settings.register_profile("search", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_sessionfinish() -> None:
    shutil.rmtree(_HF_HOME, ignore_errors=True)


@dataclass(frozen=True)
class CommandOutcome:
    """Exit code and output of one command."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., CommandOutcome]]:
    """Run `grad-transformer ...` in this process: `run_cli("inspect", path, "--json").json`."""
    from grad_transformer.cli import main

    def run(*arguments: object) -> CommandOutcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:  # argparse's own --help
            code = exit_.code if isinstance(exit_.code, int) else 1
        output = capsys.readouterr()
        return CommandOutcome(code, output.out, output.err)

    yield run
