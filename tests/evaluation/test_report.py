"""The report: its JSON is a contract, its words follow from its numbers, its pictures are drawn."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from grad_transformer.adapters.statistics import BlockAgreement, DeltaReproducibility
from grad_transformer.errors import FormatVersionError, IncompleteArtifactError, UsageError
from grad_transformer.evaluation.controls import CONTROLS
from grad_transformer.evaluation.report import (
    ClientReport,
    HeldoutScores,
    Report,
    build_report,
    read_report,
    summary_table,
    write_report,
)
from grad_transformer.evaluation.tables import advice, headline, markdown


def right(count: int, of: int = 20) -> np.ndarray:
    return np.array([1.0] * count + [0.0] * (of - count))


def client(id: str = "c0", kind: str = "seen", *, tinylm: int = 10, llm: int | None = 20, generated: int = 18, **more):
    controls = {"mean_shadow": 0, "nearest_shadow": 17, "ridge": 16, "random": 0, "other_client": 1}
    return ClientReport.from_rows(
        id,
        kind=kind,
        task="copy+add",
        tinylm=right(tinylm),
        llm_base=right(0),
        llm_finetuned=None if llm is None else right(llm),
        generated=right(generated),
        controls={name: right(count) for name, count in controls.items()} | more.pop("controls", {}),
        **more,
    )


def report(**changes) -> Report:
    settings = {
        "preset": "quick",
        "seed": 3,
        "wall_seconds": {"bases": 10.0, "shadows": 20.5},
        "heldout": HeldoutScores(0.6, 0.65, -0.4, 0.7, {"ridge": 0.5}),
        "reproducibility": {
            "tinylm": DeltaReproducibility(0.5, 0.6, 40, 10),
            "llm": DeltaReproducibility(None, None, 0, 0),
        },
        "clients": [
            client(),
            client("c1", "unseen", generated=5, nll={"tinylm": right(10)}),
            client("c2", "mixture", llm=10),
        ],
        "blocks": BlockAgreement([0.9, 0.7], [1.0, 0.8]),
    }
    return build_report(**{**settings, **changes})


TRAINING_LOG = [
    {"loss": 1.0, "step": 10},
    {"eval_loss": 0.9, "eval_r2": 0.1, "eval_r2_ceiling": 0.7, "step": 10},
    {"loss": 0.5, "step": 20},
    {"eval_loss": 0.6, "eval_r2": 0.6, "eval_r2_ceiling": 0.7, "step": 20},
    {"train_runtime": 3.0, "step": 20},
]


def test_report_json_is_the_contract(tmp_path) -> None:
    data = json.loads(write_report(report(), tmp_path).read_text())
    low, high = data["clients"][0].pop("pgr_interval")
    assert low < 80.0 < high
    assert data == {
        "format_version": 1,
        "preset": "quick",
        "seed": 3,
        "wall_seconds": {"bases": 10.0, "shadows": 20.5},
        "heldout": {
            "r2": 0.6,
            "r2_teacher_forced": 0.65,
            "r2_permuted_inputs": -0.4,
            "r2_ceiling": 0.7,
            "controls": {"ridge": 0.5},
        },
        "delta_reproducibility": {"tinylm": 0.5, "llm": None},
        "delta_cosine": {"tinylm": 0.6, "llm": None},
        "blocks": {"cosine": [0.9, 0.7], "norm_ratio": [1.0, 0.8]},
        "clients": [
            {
                "id": "c0",
                "kind": "seen",
                "task": "copy+add",
                "n_test": 20,
                "tinylm": 0.5,
                "llm_base": 0.0,
                "llm_finetuned": 1.0,
                "generated": 0.9,
                "controls": {
                    "mean_shadow": 0.0,
                    "nearest_shadow": 0.85,
                    "ridge": 0.8,
                    "random": 0.0,
                    "other_client": 0.05,
                },
                "pgr": pytest.approx(80.0),
                "gap_too_small": False,
                "nll": {},
                "methods": {},
            },
            data["clients"][1],
            data["clients"][2],
        ],
    }
    assert data["clients"][1]["nll"] == {"tinylm": 0.5}
    assert data["clients"][1]["pgr"] == pytest.approx(-50.0)
    assert (data["clients"][2]["pgr"], data["clients"][2]["pgr_interval"]) == (None, None)
    assert data["clients"][2]["gap_too_small"] is True


def test_the_id_of_a_client_is_one_cell_without_markup() -> None:
    text = markdown(report(clients=[client("<img src=x>|[a](b)\n# evil")]))
    assert "| \\<img src=x\\>\\|\\[a\\](b)" in text and "\n# evil" not in text


def test_methods_beside_the_mapper_have_their_own_columns_and_pgr() -> None:
    refined = client(methods={"refined": right(19), "public_weak_to_strong": right(11)}, nll={"refined": right(1)})
    assert refined.pgr_of("refined") == pytest.approx(90.0)
    again = Report.from_dict(report(clients=[refined]).to_dict())
    assert again.clients[0].methods == {"refined": 0.95, "public_weak_to_strong": 0.55}
    text, table = markdown(again), summary_table(again)
    assert "| refined |" in text and "PGR % refined" in text and "public w2s" in text
    assert "PGR %, refined" in table and "weak-to-strong on public prompts" in table
    assert "refined" not in summary_table(report(clients=[client()]))
    with pytest.raises(UsageError, match="unknown names"):
        report(clients=[client(methods={"magic": right(20)})])


def test_a_report_is_read_back(tmp_path) -> None:
    write_report(report(), tmp_path)
    assert read_report(tmp_path) == report()
    assert read_report(tmp_path / "report.json") == report()


def test_reading_drops_unknown_fields_and_refuses_missing_or_newer_ones(tmp_path) -> None:
    path = write_report(report(), tmp_path)
    data = json.loads(path.read_text())
    data["clients"][0]["colour"] = "blue"
    path.write_text(json.dumps(data))
    assert read_report(path) == report()
    # A report of another version has other controls and methods.
    data["clients"][0]["controls"] = {"ridge": 0.5, "a_later_one": 0.25}
    data["clients"][0]["methods"] = {"later": 0.5}
    path.write_text(json.dumps(data))
    first = read_report(path).clients[0]
    assert first.controls == {"ridge": 0.5, "a_later_one": 0.25} and first.score("mean_shadow") is None
    assert "a_later_one" not in summary_table(read_report(path))
    del data["clients"][0]["tinylm"]
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match="tinylm"):
        read_report(path)
    path.write_text(json.dumps({"format_version": 2}))
    with pytest.raises(FormatVersionError):
        read_report(path)


def test_pictures_are_written_for_what_there_is(tmp_path) -> None:
    write_report(report(), tmp_path, training_log=TRAINING_LOG)
    names = {"accuracy.png", "blocks.png", "pgr_by_client.png", "training.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == names
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    text = (tmp_path / "report.md").read_text()
    assert all(f"]({name})" in text for name in names)

    bare = tmp_path / "bare"
    write_report(report(clients=[], blocks=None), bare)
    assert sorted(path.name for path in bare.iterdir()) == ["report.json", "report.md"]


def test_the_json_is_written_last(tmp_path, monkeypatch) -> None:
    write_report(report(), tmp_path)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("grad_transformer.evaluation.report.write_text_atomic", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(report(), tmp_path)
    with pytest.raises(IncompleteArtifactError):
        read_report(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wall_seconds": {"bases": -1.0}}, "wall_seconds.bases"),
        ({"heldout": HeldoutScores(float("nan"), 0.1, 0.0)}, "heldout.r2"),
        ({"heldout": HeldoutScores(1.5, 0.1, 0.0)}, "heldout.r2"),
        ({"reproducibility": {"llm": DeltaReproducibility(0.5, 0.6, 1, 1)}}, "delta_reproducibility"),
        ({"clients": [client(), client()]}, "same id"),
        ({"clients": [client(kind="new")]}, "kind"),
        ({"clients": [replace(client(), tinylm=70.0)]}, "tinylm"),
        ({"clients": [replace(client(), controls={"ridge": 0.5})]}, "controls"),
        ({"clients": [replace(client(), pgr_interval=(90.0, 10.0))]}, "pgr_interval"),
        ({"clients": [replace(client(), gap_too_small=True)]}, "too small"),
    ],
)
def test_numbers_out_of_range_are_refused(change, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        report(**change)


def test_rows_must_be_the_same_for_all_scores() -> None:
    with pytest.raises(UsageError, match="different test rows"):
        client(controls={"ridge": right(3, of=5)})


def test_a_client_without_fine_tuned_llm_or_a_control_has_none() -> None:
    alone = client(llm=None)
    assert (alone.llm_finetuned, alone.pgr, alone.pgr_interval, alone.gap_too_small) == (None, None, None, False)
    scores = {"mean_shadow": right(1)}
    part = ClientReport.from_rows(
        "c", kind="other", task="t", tinylm=right(1), llm_base=right(1), llm_finetuned=None, generated=right(1),
        controls=scores,
    )  # fmt: skip
    assert part.controls == {**dict.fromkeys(CONTROLS), "mean_shadow": 0.05}
    text = summary_table(report(clients=[part], blocks=None))
    assert next(line for line in text.splitlines() if "the ceiling" in line).split()[-1] == "-"


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (HeldoutScores(0.6, 0.6, -0.4, 0.7), "The mapper reads its input."),
        (HeldoutScores(-0.01, 0.0, -0.01, 0.7), "ignores its input: it is no better"),
        (HeldoutScores(0.1, 0.1, 0.09, 0.7), "ignores its input: with the inputs of other runs"),
        (HeldoutScores(0.6, 0.6, None, 0.7), "was not tested"),
    ],
)
def test_the_verdict_follows_from_the_numbers(scores: HeldoutScores, words: str) -> None:
    verdict = headline(scores)[0]
    assert words in verdict
    assert summary_table(report(heldout=scores)).startswith(verdict)
    assert f"**{verdict}**" in markdown(report(heldout=scores))


def test_the_summary_gives_means_by_kind() -> None:
    clients = [client(f"c{generated}", generated=generated) for generated in (14, 20, 16)]
    lines = summary_table(report(clients=[*clients, client("m", "mixture", llm=10)])).splitlines()
    assert "86 % of its ceiling 0.700" in lines[1]
    table = lines[lines.index("") + 2 :]
    table = table[: table.index("")]
    assert table[0].split() == ["seen", "mixture"]
    seen = [line.removesuffix("gap too small").split()[-1 if line.endswith("small") else -2] for line in table[1:]]
    assert seen == ["3", "0.500", "0.833", "1.000", "0.850", "0.800", "0.000", "0.050", "0.000", "0.000", "67"]
    assert table[-1].endswith("gap too small")
    assert max(map(len, lines)) <= 100


def test_the_limits_follow_from_the_numbers() -> None:
    def limits(generated: int) -> str:
        return markdown(report(clients=[client(generated=generated)])).split("## Limits")[1]

    assert "not worth its training" in limits(12)
    assert "do not show that a mapper is needed" in limits(17)
    assert "more than a look-up" in limits(19)
    assert "frontier" in limits(9)
    assert "frontier" not in limits(12)


def test_the_advice_names_what_does_best_and_what_to_do() -> None:
    ours = report(clients=[client(generated=18), client("c1", generated=19)])
    assert "score 0.93 on these clients, their own TinyLMs 0.50" in advice(ours) and "use them" in advice(ours)
    nearest = report(clients=[client(generated=12)])
    assert "nearest 0.85: take that (generate --method nearest_shadow)" in advice(nearest)
    refined = report(clients=[client(generated=12, methods={"refined": right(19)})])
    assert "refined 0.95: refine them" in advice(refined)
    # What only some clients have does not decide.
    some = report(clients=[client(methods={"refined": right(19)}), client("c1", generated=18)])
    assert "use them" in advice(some)
    assert "better served" in advice(report(clients=[client(tinylm=20, generated=5)]))
    blind = report(heldout=HeldoutScores(-0.1, 0.65, -0.4))
    assert advice(blind).startswith("The mapper ignores its input") and "Do not rely" in advice(blind)
    assert advice(report(clients=[])) == "The mapper reads its input."
