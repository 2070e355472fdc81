"""The eight kinds of files that are read: how valid ones are made, and what reading them means."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import yaml

from grad_transformer import GradTransformer, LoraAdapter
from grad_transformer.adapters.privacy import statement_of
from grad_transformer.constants import DELTA_DATASET_NAME
from grad_transformer.evaluation.public import public_report
from grad_transformer.evaluation.report import read_report
from grad_transformer.finetuning import load_rows
from grad_transformer.hub import push_folder
from grad_transformer.scripts import inspect, study
from grad_transformer.scripts._clients import read_clients
from grad_transformer.shadow import ShadowPlan, load_delta_dataset, read_run
from grad_transformer.shadow.run import load_plan_root

from . import artifacts


Reading = Callable[[], Any]


class Kind:
    """One kind of files."""

    name = ""

    def make(self, folder: Path) -> None:
        """Write valid files."""
        raise NotImplementedError

    def readings(self, folder: Path) -> list[Reading]:
        """What is done with such files."""
        raise NotImplementedError

    def after(self, folder: Path, rng: random.Random) -> None:
        """Mend checksums over what was changed, now and then, so that what lies behind them is reached."""


class Adapters(Kind):
    name = "adapters"

    def make(self, folder: Path) -> None:
        artifacts.write_client(folder, artifacts.make_tokenizer())
        self.tokenizer = artifacts.make_tokenizer()

    def readings(self, folder: Path) -> list[Reading]:
        def as_generate() -> None:
            statement_of(self.tokenizer.read_client(folder)[0].metadata)

        return [as_generate, lambda: LoraAdapter.from_pretrained(folder), inspecting(folder), pushing(folder)]


class Mappers(Kind):
    name = "mappers"

    def make(self, folder: Path) -> None:
        artifacts.write_mapper(folder)
        self.client = folder.parent / "client"
        artifacts.write_client(self.client, artifacts.make_tokenizer())

    def readings(self, folder: Path) -> list[Reading]:
        def as_generate() -> None:
            mapper = GradTransformer.from_pretrained(folder)
            mapper.generate_adapter(self.client)
            if mapper.shift_reference is not None:
                mapper.shift_reference.measure(mapper.tokenizers()[0].delta(self.client)[None])

        return [as_generate, inspecting(folder), pushing(folder)]


class DeltaDatasets(Kind):
    name = "delta_datasets"

    def make(self, folder: Path) -> None:
        artifacts.write_delta_dataset(folder, folder.parent / "plan-of-it")

    def readings(self, folder: Path) -> list[Reading]:
        def whole() -> None:
            deltas = load_delta_dataset(folder)
            deltas.pairs(*deltas.splits)

        def streamed() -> None:
            deltas = load_delta_dataset(folder, streaming=True)
            for rows in deltas.splits.values():
                list(itertools.islice(rows, 4))

        return [whole, streamed, inspecting(folder), pushing(folder)]

    def after(self, folder: Path, rng: random.Random) -> None:
        path = folder / DELTA_DATASET_NAME
        if rng.random() < 0.3 or not path.is_file():
            return
        try:
            manifest = json.loads(path.read_text())
            for name in manifest["files"]:
                if (folder / name).is_file():
                    manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            manifest.pop("fingerprint", None)
            path.write_text(json.dumps(manifest))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return


class Plans(Kind):
    name = "plans"

    def make(self, folder: Path) -> None:
        artifacts.write_plan(folder)

    def readings(self, folder: Path) -> list[Reading]:
        def read() -> None:
            plan = ShadowPlan.load(folder)
            plan.describe()
            for role in ("source", "target"):
                root = load_plan_root(plan, folder, role)
                for run in plan.runs:
                    read_run(plan, folder, role, run.shadow_id, layout=root.layout)

        return [read, inspecting(folder)]


class Reports(Kind):
    """Reports, and cards made from reports and from generated adapters."""

    name = "reports"

    def make(self, folder: Path) -> None:
        artifacts.write_report_file(folder / "report")
        artifacts.write_generated(folder / "generated", artifacts.make_tokenizer("target"))
        self.mapper = folder.parent / "mapper-of-it"
        artifacts.write_mapper(self.mapper)

    def readings(self, folder: Path) -> list[Reading]:
        report = folder / "report"
        return [
            lambda: read_report(report),
            pushing(self.mapper, report_dir=report),
            inspecting(report),
            inspecting(folder / "generated"),
            pushing(folder / "generated"),
        ]


class CommandYaml(Kind):
    name = "command_yaml"

    def make(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for command, arguments in artifacts.COMMAND_YAML.items():
            (folder / f"{command}.yaml").write_text(yaml.safe_dump(arguments, sort_keys=False))
        (folder / "clients.yaml").write_text(artifacts.CLIENTS)

    def readings(self, folder: Path) -> list[Reading]:
        def parse(command: str) -> Reading:
            script = importlib.import_module(f"grad_transformer.scripts.{command}")
            return lambda: script.make_parser().parse_command(["--config", str(folder / f"{command}.yaml")])

        return [
            *(parse(name) for name in artifacts.COMMAND_YAML if changed(folder / f"{name}.yaml", self.valid(name))),
            lambda: read_clients(folder / "clients.yaml"),
        ]

    def valid(self, name: str) -> str:
        return yaml.safe_dump(artifacts.COMMAND_YAML[name], sort_keys=False)


class StudyYaml(Kind):
    name = "study_yaml"

    def make(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lab.yaml").write_text(artifacts.STUDY)
        (folder / "text.yaml").write_text(artifacts.TEXT_STUDY)

    def readings(self, folder: Path) -> list[Reading]:
        def plan(path: Path) -> Reading:
            def read() -> None:
                arguments = ["--config", str(path), "--output_dir", str(folder / "out"), "--dry_run"]
                own, _ = study.make_parser().parse_command(arguments)
                study.main(*own)

            return read

        texts = {"lab.yaml": artifacts.STUDY, "text.yaml": artifacts.TEXT_STUDY}
        return [plan(folder / name) for name, text in texts.items() if changed(folder / name, text)]


class ClientData(Kind):
    name = "client_data"

    def make(self, folder: Path) -> None:
        artifacts.write_rows(folder)
        self.contents = {path.name: path.read_bytes() for path in folder.iterdir()}

    def readings(self, folder: Path) -> list[Reading]:
        def load(name: str) -> Reading:
            def read() -> None:
                with no_cache():
                    load_rows(folder / name)

            return read

        return [load(name) for name, content in self.contents.items() if changed(folder / name, content)]


KINDS: dict[str, type[Kind]] = {
    kind.name: kind for kind in (Adapters, Mappers, DeltaDatasets, Plans, Reports, CommandYaml, StudyYaml, ClientData)
}


def inspecting(folder: Path) -> Reading:
    """What `inspect` says of a folder."""
    return lambda: inspect.main(inspect.InspectArguments(path=str(folder)))


def pushing(folder: Path, *, report_dir: Path | None = None) -> Reading:
    """Everything that `push` does up to the network."""

    def publish(repo_id: str, make_files: Any, **_: Any) -> mock.Mock:
        make_files(None)
        return mock.Mock(revision="v1.0")

    def read() -> None:
        report = None if report_dir is None else public_report(report_dir)
        with mock.patch("grad_transformer.hub.push.publish", publish):
            push_folder(folder, "acme/pushed", report=report)

    return read


def changed(path: Path, valid: str | bytes) -> bool:
    """Whether a file is not the valid one any more: what is valid need not be read again and again."""
    content = valid.encode() if isinstance(valid, str) else valid
    return not path.is_file() or path.stat().st_size != len(content) or path.read_bytes() != content


@contextmanager
def no_cache() -> Iterator[None]:
    """Nothing of one input is there for the next."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(datasets.config, "HF_DATASETS_CACHE", Path(folder)),
        mock.patch.dict(os.environ, {"HF_DATASETS_CACHE": folder}),
    ):
        yield
