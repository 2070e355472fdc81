"""What leaves the machine: no token, no signed address, no path, no name of a client, in any kind of file."""

from __future__ import annotations

import json
import re
import struct
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from grad_transformer import push_folder
from grad_transformer.adapters.statistics import BlockAgreement
from grad_transformer.constants import FIGURES
from grad_transformer.errors import IncompleteArtifactError, UsageError
from grad_transformer.evaluation import figures
from grad_transformer.evaluation.public import public_report, without_names
from grad_transformer.evaluation.records import ClientReport, HeldoutScores, Report
from grad_transformer.evaluation.report import read_report, write_report
from grad_transformer.files import write_json_atomic
from grad_transformer.hub.public import public_files
from grad_transformer.hub.scan import find_private
from tests.hub.conftest import PROVIDER
from tests.hub.worlds import client_adapter, tiny_mapper, tiny_roots


TOKEN = "hf_" + "A" * 34
NAMES = ("Bank of Somewhere", "St. Mary's", "acme-corp")
TEXTS = {
    f"see {TOKEN}.": "an access token",
    "AKIA" + "A" * 16: "an access token",
    "glpat-" + "a" * 20: "an access token",
    "AIza" + "a" * 35: "an access token",
    "xoxb-" + "1" * 24: "an access token",
    "-----BEGIN RSA PRIVATE KEY-----": "an access token",
    "s3://bank/private.jsonl?X-Amz-Signature=abc": "a signed address",
    "https://x.blob.example/c?sv=1&sig=abc": "a signed address",
    "https://x.example/rows?token=abc": "a signed address",
    "https://me:secret@x.example/rows": "a signed address",
    "see /home/alice/customers/acme-corp.jsonl": "a path of this machine",
    "rows=/srv/customers/acme": "a path of this machine",
    "from ../../customers/acme-corp.jsonl": "a path of this machine",
    "(./clients/bank)": "a path of this machine",
    "in ~/clients": "a path of this machine",
    r"in C:\clients\bank": "a path of this machine",
    r"in \\server\clients\bank": "a path of this machine",
    "at file:///x": "a path of this machine",
}
FINE = (
    *("org/name", "https://huggingface.co/org/name/tree/v1.0", "a and/or b", "1/2", "</s>", "v1.0", "N/A", "..."),
    *("base_model.model.layers.0.lora_A.weight", "s3://public/rows.parquet", "key=value&x=1", "data/train-*.parquet"),
    *(r"model\.layers\.\d+\.self_attn\.(q|v)_proj", r".*\.(?:q_proj|v_proj)", "{%- if '/' in x %}", "a\tb: 1/2/3"),
)


def refused(name, content):
    with pytest.raises(UsageError, match="would publish") as info:
        public_files({name: content})
    assert TOKEN not in str(info.value) and "acme-corp" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("text", TEXTS)
def test_private_text_is_found_in_every_kind_of_file(text, tmp_path):
    what = TEXTS[text]
    assert find_private(text).startswith(what)
    for name, content in (
        ("a.json", json.dumps({"note": {"deep": [f"x: {text}"]}})),
        ("b.json", json.dumps({text: 1})),
        ("c.json", json.dumps({"note": f"x: {text}"}).replace("/", "\\u002f")),
        ("d.md", f"# A\n\n{text}\n"),
        ("e.yaml", f"a: {text}\n"),
    ):
        assert what in refused(name, content.encode()), name
    save_file({"x": torch.zeros(3)}, tmp_path / "f.safetensors", {"note": text})
    assert what in refused("f.safetensors", tmp_path / "f.safetensors")
    rows = {"task": ["copy"] * 5000 + [text], "tags": [[{"k": "a"}]] * 5000 + [[{"k": text}]], "n": list(range(5001))}
    for dropped in ("task", "tags"):
        table = pa.table({key: values for key, values in rows.items() if key != dropped})
        pq.write_table(table, tmp_path / "g.parquet", compression="zstd")
        assert what in refused("g.parquet", tmp_path / "g.parquet")
    table = pa.table({"n": [1]}).replace_schema_metadata({"note": text})
    pq.write_table(table, tmp_path / "h.parquet")
    assert what in refused("h.parquet", tmp_path / "h.parquet")
    for kind, comment in (
        (b"tEXt", b"Comment\0" + text.encode()),
        (b"zTXt", b"Comment\0\0" + zlib.compress(text.encode())),
        (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(text.encode())),
    ):
        assert what in refused("report/i.png", png((kind, comment)))


def png(*chunks):
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in (*chunks, (b"IEND", b"")):
        parts += [struct.pack(">I", len(content)), kind, content, struct.pack(">I", zlib.crc32(kind + content))]
    return b"".join(parts)


def test_harmless_text_stays_as_it_is(tmp_path):
    assert [text for text in FINE if find_private(text)] == []
    content = json.dumps(dict.fromkeys(map(str, range(len(FINE))), None) | {"all": FINE}).encode()
    assert public_files({"a.json": content}) == {"a.json": content}
    picture = png((b"tEXt", b"Software\0Matplotlib version3.10, https://matplotlib.org/"))
    assert public_files({"report/a.png": picture}) == {"report/a.png": picture}


def test_a_path_that_is_a_whole_text_keeps_its_last_part():
    values = {
        "/home/alice/tiny": "tiny",
        "/srv/x and more": "x and more",
        "../models/tiny/": "tiny",
        "./tiny": "tiny",
        "~/models/tiny": "tiny",
        "C:\\models\\tiny": "tiny",
        "file:///x/tiny": "tiny",
    }
    for value, shown in values.items():
        made = public_files({"a.json": json.dumps({"base_model": value, "list": [value]}).encode()})["a.json"]
        assert json.loads(made) == {"base_model": shown, "list": [shown]}
    made = public_files({"a.json": b'{"base_model": "models/small/tiny", "date": "2026/11/27"}'})["a.json"]
    assert json.loads(made) == {"base_model": "tiny", "date": "2026/11/27"}


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_a_token_is_found_at_any_place_of_a_large_file(where, tmp_path, monkeypatch):
    monkeypatch.setattr("grad_transformer.hub.scan._CHUNK", 2**16)
    for token in (TOKEN, PROVIDER, f"{tempfile.gettempdir()}/x.jsonl"):
        monkeypatch.setenv("HF_TOKEN", PROVIDER)
        for shift in (0, 20):
            values = np.zeros(2**20, dtype=np.uint8)
            place = min(int(where * values.size / 2**16) * 2**16 + shift, values.size) - 20 - len(token) // 2
            place = max(place, 0)
            values[place : place + len(token)] = np.frombuffer(token.encode(), dtype=np.uint8)
            save_file({"x": torch.from_numpy(values)}, tmp_path / "a.safetensors")
            refused("a.safetensors", tmp_path / "a.safetensors")
    text = json.dumps({"log_history": [], "a": ["x" * 100] * 15000 + [TOKEN] + ["x" * 100] * 15000})
    assert "access token" in refused("training_log.json", text.encode())


def test_weights_are_searched_fast(tmp_path):
    values = torch.randn(16 * 2**20)
    save_file({"x": values}, tmp_path / "a.safetensors")
    started = time.process_time()
    public_files({"a.safetensors": tmp_path / "a.safetensors"})
    assert 64 / (time.process_time() - started) > 20, "MB of processor time; measured: 180"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"\xff\xfe{}"),
        ("a.json", b'{"a": NaN}'),
        ("a.json", b"[" * 10**6),
        ("a.json", b'{"a": 1, "a": 2}'),
        ("a.json", b"{"),
        ("a.md", "text".encode("utf-16")),
        ("a.safetensors", b"\xff" * 20),
        ("a.safetensors", b"\x02" + b"\0" * 7 + b"[]"),
        ("a.parquet", b"PAR1"),
        ("report/a.png", b"JPEG"),
        ("a.json", Path("missing.json")),
        ("a.parquet", Path("missing.parquet")),
    ],
)
def test_what_cannot_be_searched_is_not_published(name, content):
    with pytest.raises(UsageError, match="cannot be|is not valid JSON"):
        public_files({name: content})


# Reports


def client(name, *, kind="other", task="summaries"):
    controls = {"mean_shadow": 0.1, "nearest_shadow": 0.3, "ridge": 0.2, "other_client": 0.1, "random": 0.0}
    return ClientReport(name, kind, task, 20, 0.4, 0.1, 0.9, 0.7, controls, pgr=60.0, pgr_interval=(40.0, 70.0))


def named_report():
    clients = [client(NAMES[0]), client(NAMES[1], kind="seen"), client(NAMES[2], task="acme-corp mail", kind="seen")]
    blocks = BlockAgreement([0.5, 0.6], [0.9, 0.8])
    scores = HeldoutScores(0.6, 0.7, -0.3)
    nothing = {"tinylm": None, "llm": None}
    return Report("own", 0, {}, scores, nothing, [*clients, client("unseen-7", kind="unseen")], blocks=blocks)


def hold_names(content):
    return [name for name in (*NAMES, "unseen-7") if name.encode() in content]


def test_a_published_report_is_drawn_anew_from_records_without_names(tmp_path, monkeypatch):
    log = [{"step": 1, "loss": 1.0, "eval_r2": 0.1}]
    write_report(named_report(), tmp_path / "report", training_log=log)
    drawn = []
    for function in ("draw_pgr", "draw_accuracy"):
        real = getattr(figures, function)
        monkeypatch.setattr(figures, function, lambda clients, real=real: (drawn.extend(clients), real(clients))[1])
    files = public_report(tmp_path / "report", training_log=log)
    assert (
        sorted(files)
        == sorted(["report.json", *FIGURES])
        == sorted(path.name for path in (tmp_path / "report").iterdir() if path.suffix != ".md")
    )
    ids = {"other-0", "seen-0", "seen-1", "unseen-0"}
    assert {one.id for one in drawn} == ids and {one.task for one in drawn} == {"other", "summaries"}
    for name, content in files.items():
        assert hold_names(content) == [], name
        for _, comment in re.findall(rb"(tEXt|zTXt|iTXt)([^\0]*)\0", content):
            assert comment == b"Software"
    assert {one["id"] for one in json.loads(files["report.json"])["clients"]} == ids
    # The picture with the names differs from the one without: it was not copied.
    assert files["pgr_by_client.png"] != (tmp_path / "report" / "pgr_by_client.png").read_bytes()
    assert without_names(read_report(tmp_path / "report")) == replace(
        named_report(), clients=list(without_names(named_report()).clients)
    )


def test_no_task_name_tells_a_client_in_another_spelling_or_beside_another_client():
    tasks = {"Bank-A": "loans of bank_a", "M\u00fcller": "Mu\u0308ller", "acme": "summaries", "x-1": "ACME and x 1"}
    clients = [client(name, kind="seen", task=task) for name, task in tasks.items()]
    public = without_names(replace(named_report(), clients=clients))
    assert [one.task for one in public.clients] == ["other", "other", "summaries", "other"]


@pytest.mark.parametrize("inside", [False, True])
def test_a_push_never_uploads_a_picture_that_lies_in_a_folder(hub, tmp_path, run_cli, inside):
    mapper = tmp_path / "mapper"
    tiny_mapper(tiny_roots(tmp_path / "roots")).save_pretrained(mapper)
    report = mapper / "report" if inside else tmp_path / "report"
    write_json_atomic(report / "report.json", named_report().to_dict())
    for name in (*FIGURES, "secret.png"):
        (report / name).write_bytes(png((b"tEXt", NAMES[0].encode())))
    arguments = [] if inside else ["--report_dir", report]
    assert run_cli("push", mapper, "acme/mapper", *arguments).code == 0
    tree = hub.store.repos[("model", "acme/mapper")].commit_at("v1.0").tree
    pictures = sorted(name for name in tree if name.endswith(".png"))
    assert pictures == ["report/accuracy.png", "report/blocks.png", "report/pgr_by_client.png"]
    for name, entry in tree.items():
        assert hold_names(hub.store.path(entry.oid).read_bytes()) == [], name
    assert "![pgr by client](report/pgr_by_client.png)" in hub.store.path(tree["README.md"].oid).read_text()
    # Without a report nothing of the folder is taken either.
    push_folder(mapper, "acme/other")
    other = hub.store.repos[("model", "acme/other")].commit_at("v1.0").tree
    assert not [name for name in other if name.startswith("report/")]


def test_a_report_with_names_is_refused_even_if_handed_over(hub, tmp_path):
    tiny_mapper(tiny_roots(tmp_path / "roots")).save_pretrained(tmp_path / "mapper")
    report = {"report.json": json.dumps(named_report().to_dict()).encode()}
    with pytest.raises(UsageError, match="names its clients"):
        push_folder(tmp_path / "mapper", "acme/mapper", report=report)
    with pytest.raises(UsageError, match="other files"):
        push_folder(tmp_path / "mapper", "acme/mapper", report={"../x.png": b""})
    adapter = client_adapter(tiny_roots(tmp_path / "more")[0]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match="Only a mapper"):
        push_folder(adapter, "acme/adapter", report=report)
    assert hub.requests("POST") == []


# Repositories and folders


@pytest.mark.parametrize("private", [None, True])
def test_a_client_adapter_never_goes_into_a_public_repository_unasked(hub, tmp_path, private):
    client_adapter(tiny_roots(tmp_path / "roots")[0]).save_pretrained(tmp_path / "adapter")
    repo = hub.store.create("model", "acme/public", False)
    with pytest.raises(UsageError, match="everybody can see it") as info:
        push_folder(tmp_path / "adapter", "acme/public", private=private)
    assert "--private false" in info.value.remedy and len(repo.commits) == 1 and repo.tags == {}
    assert push_folder(tmp_path / "adapter", "acme/public", private=False).new
    hub.store.create("model", "acme/hidden", True)
    push_folder(tmp_path / "adapter", "acme/hidden", private=private)
    assert hub.store.repos[("model", "acme/hidden")].private


def test_a_repository_that_was_opened_since_is_noticed(hub, tmp_path):
    roots = tiny_roots(tmp_path / "roots")
    client_adapter(roots[0]).push_to_hub("acme/client")
    hub.store.repos[("model", "acme/client")].private = False
    with pytest.raises(UsageError, match="everybody can see it"):
        client_adapter(roots[0], seed=2).push_to_hub("acme/client")


def test_a_plain_peft_adapter_is_published_and_says_what_is_known(hub, tmp_path):
    adapter = client_adapter(tiny_roots(tmp_path / "roots")[0])
    adapter.metadata = {}
    folder = adapter.save_pretrained(tmp_path / "peft")
    assert not (folder / "grad_transformer.json").exists()
    (folder / "training_args.bin").write_bytes(b"\x80pickle")
    (folder / "README.md").write_text("peft's own card")
    push_folder(folder, "acme/peft")
    repo = hub.store.repos[("model", "acme/peft")]
    tree = repo.commit_at("v1.0").tree
    assert repo.private and sorted(set(tree) - {".gitattributes"}) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "grad_transformer.json"),
    ]
    text = hub.store.path(tree["README.md"].oid).read_text()
    assert "No record of its fine-tune" in text and "States **no differential privacy**" in text
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(IncompleteArtifactError, match="not whole") as info:
        push_folder(folder, "acme/peft")
    assert (info.value.expected, info.value.found) == ("adapter_model.safetensors", "adapter_model.bin")


def test_a_link_that_leads_out_of_the_folder_is_not_followed(hub, tmp_path):
    folder = client_adapter(tiny_roots(tmp_path / "roots")[0]).save_pretrained(tmp_path / "adapter")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "grad_transformer.json").unlink()
    (folder / "grad_transformer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UsageError, match="leads out"):
        push_folder(folder, "acme/client")
    assert hub.requests("POST") == []
