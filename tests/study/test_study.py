"""A study of a very small lab: planned, run, interrupted, resumed, reported."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from grad_transformer.errors import UsageError
from grad_transformer.study.builders import StudyBuilder
from grad_transformer.study.experiments import EXPERIMENTS, experiments_of
from grad_transformer.study.runner import run_stages
from grad_transformer.study.schema import check_study
from grad_transformer.study.spec import StudySpec
from grad_transformer.study.stages import Stage, in_order
from grad_transformer.study.summary import TIMINGS, write_study
from grad_transformer.study.tables import verdicts
from grad_transformer.study.work import WORK


TINY = {"hidden_size": 8, "pretraining_steps": 2, "pretraining_batch_size": 8, "intermediate_size": 8}
SPEC: dict[str, Any] = {
    "seeds": [0],
    "experiments": ["single_client", "refinement", "privacy", "partitions", "forcing"],
    "tinylms": {"M": TINY},
    "llms": {"S": {**TINY, "hidden_size": 16, "num_hidden_layers": 3}},
    "recipe": {"warmup_steps": 1, "per_device_batch_size": 4},
    "tinylm_recipe": {"max_steps": 3},
    "llm_recipe": {"max_steps": 3},
    "shadows": {
        "num_runs": 10,
        "rows_per_run": 8,
        "checkpoints": 2,
        "public_rows": 12,
        "validation_fraction": 0.2,
        "test_fraction": 0.2,
        "adapters_per_batch": 4,
    },
    "mapper": {"d_model": 8, "d_ff": 8, "num_layers": 1},
    "training": {
        "max_steps": 4,
        "eval_steps": 2,
        "save_steps": 2,
        "warmup_steps": 1,
        "per_device_train_batch_size": 4,
    },
    "clients": {"rows": 8, "test_rows": 8, "single": 1, "unseen": 1},
    "privacy": {"rows": 16, "batch_size": 8, "clients": 1},
    "ablations": {"epsilons": [8.0]},
    "refinement": {"num_prompts": 6, "rounds": 1, "steps": 2, "top_tokens": 3},
}


def spec(**changes: Any) -> StudySpec:
    return StudySpec(**{**copy.deepcopy(SPEC), **changes}).filled(list(EXPERIMENTS))


def stages_of(filled: StudySpec) -> list[Stage]:
    return in_order(
        stage
        for experiment in experiments_of(filled.experiments)
        for seed in filled.seeds
        for line in experiment.build(StudyBuilder(filled, seed))
        for stage in line.stages
    )


def run(filled: StudySpec, folder: Path) -> dict[str, Any]:
    run_stages(stages_of(filled), folder)
    return write_study(filled, experiments_of(filled.experiments), folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("study")
    return folder, run(spec(), folder)


# Planning


def test_every_experiment_of_the_paper_is_planned() -> None:
    assert {experiment.paper for experiment in EXPERIMENTS.values()} == {
        "Table 1",
        "Table 2",
        "Table 3",
        "Table 4",
        "Table 7",
        "Tables 8 and 9",
        "Figure 5",
        "Figure 8",
        "Figures 4 and 7",
        "ours",
    }
    filled = spec(experiments=["all"])
    for experiment in experiments_of(["all"]):
        lines = experiment.build(StudyBuilder(filled, 0))
        assert lines and all(line.stages for line in lines), experiment.name
        references = {"tinylm", "llm_finetuned", "llm_base", "generated"}
        assert all(references <= line.cells.keys() for line in lines) or experiment.name == "forcing"


def test_experiments_share_what_they_need_alike() -> None:
    together = stages_of(spec(experiments=["all"]))
    alone = sum(len(stages_of(spec(experiments=[name]))) for name in EXPERIMENTS)
    assert len({stage.key for stage in together}) == len(together) < 0.6 * alone
    kinds = [stage.kind for stage in together]
    # One TinyLM and one LLM: pretrained once; shadow runs once for each number of rows (256 and two more).
    assert kinds.count("lab_base") == 2 and kinds.count("shadows") == 2 * 3
    assert stages_of(spec(seeds=[0, 1]))[0].key == stages_of(spec(seeds=[0]))[0].key


def test_a_key_is_of_all_that_decides_the_result_and_of_nothing_else() -> None:
    builder = StudyBuilder(spec(), 0)
    key = builder.mapper().key
    assert StudyBuilder(spec(shadows={**SPEC["shadows"], "adapters_per_batch": 64}), 0).mapper().key == key
    assert StudyBuilder(spec(clients={"rows": 4}), 0).mapper().key == key
    for other in (
        StudyBuilder(spec(), 1),
        StudyBuilder(spec(llm_recipe={"max_steps": 4}), 0),
        StudyBuilder(spec(shadows={**SPEC["shadows"], "rows_per_run": 6}), 0),
        StudyBuilder(spec(mapper={**SPEC["mapper"], "d_ff": 16}), 0),
        StudyBuilder(spec(llms={"S": {**TINY, "hidden_size": 24}}), 0),
    ):
        assert other.mapper().key != key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiments": ["table_1"]}, "no such experiment"),
        ({"shadows": {"runs": 3}}, "`shadows` of the study has an unknown key"),
        ({"tinylm": "XL"}, "no such tinylm"),
        ({"world": "text"}, "needs tasks"),
        ({"world": "text", "tasks": ["drop"]}, "`M.model`: field required"),
    ],
)
def test_a_spec_that_cannot_be_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_study(spec(**changes))


def test_a_dry_run_shows_the_cost_and_runs_nothing(run_cli, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SPEC))
    arguments = ("study", "--config", tmp_path / "study.yaml", "--output_dir", tmp_path / "out", "--dry_run")
    outcome = run_cli(*arguments, "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["stages"] == len(stages_of(spec()))
    assert outcome.json["hours"] > 0 and outcome.json["disk_gib"] > 0 and outcome.json["memory_gib"] > 0
    assert not (tmp_path / "out").exists()
    text = run_cli(*arguments, "--gpu", "H100").stdout
    assert "Table 1" in text and "of one H100" in text and "Nothing was run" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "no such device" in run_cli(*arguments, "--gpu", "abacus").stderr


# Running


def test_the_report_has_every_line_with_its_scores(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, study = finished
    assert json.loads((folder / "study.json").read_text()) == json.loads(json.dumps(study))
    main = study["experiments"]["single_client"]
    assert [line["group"] for line in main["lines"]] == ["seen", "unseen"]
    methods = set(main["lines"][0]["mean"]["scores"])
    assert {"w2s", "conf", "vissup", "w2s_public", "generated", "ridge", "random", "other_client"} <= methods
    text = (folder / "study.md").read_text()
    for part in ("## Main table", "Table 1", "Table 4", "W2S, public inputs", "epsilon 8", "processor"):
        assert part in text
    assert (folder / "study_ablations.png").stat().st_size > 10_000
    labels = [line["label"] for line in study["experiments"]["partitions"]["lines"]]
    assert labels[::2] == [
        "block",
        "query and value in separate mappers",
        "reversed order, in training too",
        "reversed order, only at use",
    ]
    assert study[TIMINGS]["kinds"]["mapper"]["stages"] == 4


def test_interrupted_at_random_points_it_ends_in_the_same_study(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, ticks, stops = torch.autograd.backward, [0], [0]
    rng = np.random.default_rng(0)

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        ticks[0] += 1
        if ticks[0] == stops[0]:
            raise KeyboardInterrupt
        return backward(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", interrupt)
    interruptions = 0
    while True:
        ticks[0], stops[0] = 0, int(rng.integers(1, 40))
        try:
            study = run(spec(), tmp_path)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions >= 3
    expected = dict(finished[1])
    assert {**study, TIMINGS: None} == {**expected, TIMINGS: None}


def test_finished_stages_are_not_run_again(finished: tuple[Path, dict[str, Any]], monkeypatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("a finished stage was run again")

    monkeypatch.setattr("grad_transformer.study.runner.run_stage", fail)
    assert run(spec(), finished[0])["experiments"] == finished[1]["experiments"]


def test_workers_run_every_stage_after_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads instead of processes, which would import everything anew; a stage whose input is missing would fail.
    monkeypatch.setattr(
        "grad_transformer.study.runner.ProcessPoolExecutor", lambda count, **_: ThreadPoolExecutor(count)
    )
    order: list[str] = []
    monkeypatch.setitem(WORK, "hub_base", lambda stage, *_: order.append(stage.params["model"]) or dict(stage.params))
    bases = [Stage("hub_base", {"model": f"model-{index}", "revision": None}) for index in range(3)]
    last = Stage("hub_base", {"model": "last", "revision": None}, {str(i): base for i, base in enumerate(bases)})
    run_stages(in_order([last]), tmp_path, num_workers=2)
    assert last.result(tmp_path) == {"model": "last", "revision": None}
    assert sorted(order[:3]) == ["model-0", "model-1", "model-2"] and order[3:] == ["last"]


# Saying who wins


def test_losing_is_said_plainly() -> None:
    def group(**pgr: float | None) -> dict[str, Any]:
        return {"mean": {"pgr": pgr}}

    found = {
        "groups": {
            "seen": group(generated=90.0, w2s=40.0, nearest_shadow=92.0, ridge=60.0),
            "unseen": group(generated=-50.0, w2s=20.0, conf=35.0, ridge=-80.0),
            "mixture": group(generated=None, w2s=None),
        }
    }
    assert verdicts(found) == [
        "On seen clients the generated adapter recovers 90 % of the gap; within 5 points are nearest shadow (92).",
        "On unseen clients the generated adapter recovers -50 % of the gap; we lose to Conf (35), W2S (20).",
        "There the TinyLM that the client already has is better than what is generated.",
        "On mixture clients the gap between TinyLM and LLM is too small for a PGR.",
    ]
