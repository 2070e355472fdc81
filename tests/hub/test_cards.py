"""Cards hold the facts of the files, pass the Hub's own classes, keep what people wrote, and never ask the network.

The public files of every kind are a contract: other people's code reads them by name.
"""

from __future__ import annotations

import json
import re
import socket
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import DatasetCard, EvalResultEntry, ModelCard
from safetensors import safe_open
from safetensors.torch import save_file

from grad_transformer import push_delta_dataset, push_folder
from grad_transformer.constants import FIGURES
from grad_transformer.errors import UsageError
from grad_transformer.evaluation.public import public_report
from grad_transformer.evaluation.report import Report, write_report
from grad_transformer.files import write_json_atomic
from grad_transformer.hub.cards import card_files, merge_text
from grad_transformer.hub.kinds import KINDS
from tests.hub.conftest import TOKENS
from tests.hub.worlds import client_adapter, delta_dataset, tiny_mapper, tiny_roots


CONTRACT = json.loads((Path(__file__).parents[1] / "contract" / "hub_files.json").read_text())
CONTROLS = {"mean_shadow": 0.0, "nearest_shadow": 0.9, "ridge": 0.5, "random": 0.0, "other_client": 0.1}
SCORES = {"tinylm": 0.5, "llm_base": 0.0, "llm_finetuned": 1.0, "n_test": 20, "gap_too_small": False}
HELDOUT = {"r2": 0.6, "r2_teacher_forced": 0.7, "r2_permuted_inputs": -0.3, "r2_ceiling": 0.65}


def client_report(name, *, kind="seen", generated=0.8, pgr=60.0):
    return {"id": name, "kind": kind, "task": "t", "generated": generated, "pgr": pgr, "controls": CONTROLS, **SCORES}


def report(*clients):
    return {"format_version": 1, "heldout": {**HELDOUT, "controls": {"ridge": 0.4}}, "clients": list(clients)}


def facts(report=None, **config):
    base = {"model_type": "grad_transformer", "source_base_model": "org/tiny", "target_base_model": "org/large"}
    files = {"config.json": json.dumps({**base, **config}).encode(), "heldout.json": json.dumps(HELDOUT).encode()}
    if report is not None:
        pictures = dict.fromkeys((f"report/{name}" for name in FIGURES), b"")
        files |= {"report/report.json": json.dumps(report).encode(), **pictures}
    return files


ORIGIN = {"repo_id": "acme/deltas", "revision": "v1.0", "sha": "a" * 40}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a card asked the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_metadata_of_a_mapper(no_network):
    files = facts(report(client_report("seen-0"), client_report("seen-1", pgr=40.0)), delta_dataset=ORIGIN)
    made = card_files(KINDS["mapper"], files, repo_id="acme/mapper", license="apache-2.0")
    data = ModelCard(made["README.md"].decode()).data
    assert (data.library_name, data.license, data.datasets) == ("grad_transformer", "apache-2.0", ["acme/deltas"])
    assert data.base_model == ["org/tiny", "org/large"] and data.to_dict()["base_model_relation"] == "adapter"
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {"r2": 0.6, "pgr": 50.0}
    entries = yaml.safe_load(made[".eval_results/grad_transformer.yaml"])
    assert [(entry["dataset"]["task_id"], entry["value"]) for entry in entries] == [("heldout_r2", 0.6), ("pgr", 50.0)]
    for entry in entries:
        EvalResultEntry(entry["dataset"]["id"], entry["dataset"]["task_id"], entry["value"], notes=entry["notes"])


def test_the_card_of_a_mapper_shows_controls_picture_and_limits(no_network):
    files = facts(report(client_report("seen-0"), client_report("unseen-0", kind="unseen", generated=0.2, pgr=-60.0)))
    text = card_files(KINDS["mapper"], files, repo_id="acme/mapper")["README.md"].decode()
    assert "| control: nearest shadow | 0.900 | 0.900 |" in text
    assert "| **PGR of the generated adapter** | 60 % | -60 % |" in text
    assert "![pgr by client](report/pgr_by_client.png)" in text and "blocks.png" not in text
    assert "For 2 of 2 clients nearest shadow does as well or better" in text
    assert 'GradTransformer.from_pretrained("acme/mapper")' in text


@pytest.mark.parametrize(
    ("heldout", "words"),
    [({"r2": -0.1}, "ignores its input"), ({"r2": 0.5, "r2_permuted_inputs": 0.4}, "hardly reads its input")],
)
def test_a_mapper_that_does_not_read_its_input_says_so_on_its_card(heldout, words):
    files = {**facts(), "heldout.json": json.dumps(heldout).encode()}
    assert words in card_files(KINDS["mapper"], files, repo_id="acme/mapper")["README.md"].decode()


def test_local_folders_are_no_base_models():
    files = facts(source_base_model="tinylm", target_base_model="llm")
    data = ModelCard(card_files(KINDS["mapper"], files, repo_id="acme/mapper")["README.md"].decode()).data
    assert data.base_model is None


def test_what_people_wrote_survives_the_next_push():
    first = card_files(KINDS["mapper"], facts(), repo_id="acme/mapper", license="mit")["README.md"].decode()
    edited = first.replace("## Limits", "## Written by a person\n\nKept.\n\n## Limits").replace(
        "tags:\n", "language: de\ntags:\n- finance\n"
    )
    edited = edited.replace("Clients\nfine-tune the small model", "Clients (of ours) fine-tune the small model")
    files = facts(report(client_report("seen-0")))
    second = card_files(KINDS["mapper"], files, repo_id="acme/mapper", previous=edited.encode())["README.md"].decode()
    assert "Written by a person\n\nKept." in second and "Clients (of ours)" in second
    assert "0.900" in second and "No client was scored" not in second, "facts are renewed"
    data = ModelCard(second).data.to_dict()
    assert (data["language"], data["license"]) == ("de", "mit") and {"finance", "lora"} <= set(data["tags"])
    third = card_files(KINDS["mapper"], files, repo_id="acme/mapper", previous=second.encode())["README.md"].decode()
    assert third == second


def test_passages_that_a_card_never_had_come_at_its_end():
    new = "# T\n\n<!-- grad_transformer: a -->\n1\n<!-- /grad_transformer: a -->\n"
    assert merge_text("My own words.\n", new).startswith("My own words.\n\n<!-- grad_transformer: a -->\n1")
    assert merge_text("", new) == new


def test_a_card_that_cannot_be_read_is_an_error():
    with pytest.raises(UsageError, match="metadata cannot be read"):
        card_files(KINDS["mapper"], facts(), repo_id="acme/mapper", previous=b"---\n- a\n- b\n---\n")


def test_the_card_of_a_client_says_what_the_client_allows():
    config, base = {"base_model_name_or_path": "org/tiny", "r": 2}, {"mapper": ORIGIN}
    for more, words in (
        ({}, "Their number is not stated"),
        ({"num_examples": 300}, "300 examples"),
        ({"differential_privacy": None}, "**without differential privacy**"),
        ({"differential_privacy": {"epsilon": 8.0, "delta": 1e-5}}, "epsilon 8 and delta 1e-05"),
    ):
        metadata = {"grad_transformer.json": json.dumps({**base, **more}).encode()}
        files = {"adapter_config.json": json.dumps(config).encode(), **metadata}
        text = card_files(KINDS["client_adapter"], files, repo_id="bank/a")["README.md"].decode()
        assert words in text
        assert ModelCard(text).data.base_model == ["org/tiny"]


@pytest.fixture
def published(hub, tmp_path):
    """One repository of each kind, with everything that it can hold."""
    roots = tiny_roots(tmp_path / "roots")
    mapper = tiny_mapper(roots)
    mapper.config.delta_dataset = ORIGIN
    mapper.save_pretrained(tmp_path / "mapper")
    write_json_atomic(tmp_path / "mapper" / "heldout.json", HELDOUT)
    write_json_atomic(tmp_path / "mapper" / "training_log.json", {"log_history": []})
    write_json_atomic(tmp_path / "mapper" / "shift.json", {"format_version": 1, "num_shadows": 8, "num_heldout": 2})
    save_file({"mean": torch.zeros(1)}, tmp_path / "mapper" / "shift.safetensors")
    told = report(client_report("Bank of Somewhere"))
    told |= {"preset": "own", "seed": 0, "wall_seconds": {}, "delta_reproducibility": {"tinylm": None, "llm": None}}
    write_report(Report.from_dict(told), tmp_path / "report")
    push_delta_dataset(delta_dataset(tmp_path / "deltas", roots), "acme/delta_dataset")
    push_folder(tmp_path / "mapper", "acme/mapper", report=public_report(tmp_path / "report"))
    client = client_adapter(roots[0])
    client.push_to_hub("acme/client_adapter")
    mapper.generate_adapter(client).push_to_hub("acme/generated_adapter")
    return hub


def files_of(hub, kind):
    tree = hub.store.repos[(KINDS[kind].repo_type, f"acme/{kind}")].commit_at("v1.0").tree
    return {name: hub.store.path(entry.oid) for name, entry in tree.items() if name != ".gitattributes"}


def test_public_files_are_the_contract_and_hold_nothing_private(published):
    secrets = [*TOKENS, str(Path.home()) + "/", tempfile.gettempdir() + "/", "Bank of Somewhere", "/data/private"]
    for kind, names in CONTRACT.items():
        files = files_of(published, kind)
        assert sorted(files) == names, kind
        for name, path in files.items():
            content = path.read_bytes()
            assert not re.search(rb"hf_[A-Za-z0-9]{20}", content), name
            for secret in secrets:
                assert not re.search(rb"(?<![\w.-])" + re.escape(secret.encode()), content), (kind, name, secret)
            # A pickle begins with its protocol, a zip of pickles with PK.
            assert not content.startswith((b"\x80", b"PK\x03\x04")), name
            if name.endswith(".safetensors"):
                safe_open(path, framework="pt").keys()
        card = (DatasetCard if kind == "delta_dataset" else ModelCard)(files["README.md"].read_text())
        assert card.data.tags
        manifest = json.loads(files[KINDS[kind].manifest].read_text())
        assert manifest["format_version"] == 1, f"{kind}: the manifest carries the format version"
