"""What others wrote reaches a card as letters, is taken for what it is by type, and never as an origin."""

from __future__ import annotations

import copy
import json

import pytest
from huggingface_hub import ModelCard

from grad_transformer import GradTransformer, LoraAdapter, push_folder
from grad_transformer.errors import GradTransformerError, HubError, UsageError
from grad_transformer.files import write_json_atomic
from grad_transformer.hub import Origin, pull_folder
from grad_transformer.hub.cards import card_files, merge_text
from grad_transformer.hub.fields import Fields, code
from grad_transformer.hub.kinds import KINDS
from tests import manifests
from tests.hub.worlds import client_adapter, tiny_mapper, tiny_roots


OPEN, CLOSE = "<!-- grad_transformer: facts -->", "<!-- /grad_transformer: facts -->"
HOSTILE = (
    f'x`\n{CLOSE}\n\n## Endorsed\n\n<img src=//evil.example>\n---\nlicense: evil\n---\n{OPEN}\n"); run("\x1b[2J\u202e'
)
MADE = ("grad_transformer.json",)
ORIGIN = {"repo_id": "acme/mapper", "revision": "v1.0", "sha": "a" * 40}
STATEMENT = {
    "epsilon": 8.0,
    "delta": 1e-5,
    "accountant": "prv",
    "noise_multiplier": 0.9,
    "max_grad_norm": 1.0,
    "sample_rate": 0.1,
    "steps": 20,
    "adjacency": "add_or_remove_one_example",
}
CONFIG = {"base_model_name_or_path": "org/tiny", "r": 2}
METADATA = {
    "format_version": 1,
    "mapper": ORIGIN,
    "root": {"fingerprint": "f"},
    "num_examples": 12,
    "differential_privacy": STATEMENT,
}
GENERATED = {
    "format_version": 1,
    "differential_privacy": {"epsilon": 8.0, "delta": 1e-5, "composition": "parallel", "num_clients": 2},
    "generated": {
        "mapper": ORIGIN,
        "num_clients": 2,
        "clients": [{"sha256": "0" * 64}, {**ORIGIN, "repo_id": "bank/adapter"}],
        "aggregation": "mean",
        "shift": [{"shift": 0.5}],
        "refinement": [{"candidate": "ridge", "agreement_by_round": [0.5, 0.6], "annotators": ["copy"]}],
    },
}
MAPPER = {"source_base_model": "org/tiny", "target_base_model": "org/large", "delta_dataset": ORIGIN}
HELDOUT = {"r2": 0.6, "r2_teacher_forced": 0.7, "r2_permuted_inputs": -0.3, "r2_ridge": 0.5}
REPORT = {
    "format_version": 1,
    "heldout": {**HELDOUT, "controls": {"ridge": 0.4}},
    "clients": [
        {
            "id": "seen-0",
            "kind": "seen",
            "generated": 0.5,
            "pgr": 50.0,
            "controls": {"ridge": 0.4},
            "tinylm": 0.1,
            "llm_base": 0.0,
        }
    ],
}
DATASET = {
    **manifests.DELTA_DATASET,
    "roots": {
        "source": {**manifests.ROOT_FACTS, "base_model": "org/tiny"},
        "target": {**manifests.ROOT_FACTS, "base_model": "org/large"},
    },
    "splits": {"train": {"runs": 3, "pairs": 9}},
    "data": {"path": "org/rows"},
    "missing_runs": ["a"],
}
CARDS = {
    "client_adapter": {"adapter_config.json": CONFIG, "grad_transformer.json": METADATA},
    "generated_adapter": {"adapter_config.json": CONFIG, "grad_transformer.json": GENERATED},
    "mapper": {"config.json": MAPPER, "heldout.json": HELDOUT, "report/report.json": REPORT},
    "delta_dataset": {"delta_dataset.json": DATASET},
}


def card(kind, files, **kwargs):
    content = {name: json.dumps(data).encode() for name, data in files.items()}
    return card_files(KINDS[kind], content, repo_id="acme/x", **kwargs)["README.md"].decode()


def places(value, path=()):
    """Paths of all values in a JSON object."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def put(data, path, value):
    changed = copy.deepcopy(data)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize("kind", CARDS)
def test_a_field_of_any_other_type_makes_a_typed_error_or_an_honest_card(kind):
    whole = CARDS[kind]
    card(kind, whole)
    odd = (None, True, -1, 1e300, 0.5, 10**400, "x y", HOSTILE, "", [], [None], [[]], {}, {"a": [1]}, {HOSTILE: 1})
    for path in places(whole):
        if len(path) < 2:
            continue
        for value in odd:
            try:
                text = card(kind, put(whole, path, value))
            except GradTransformerError as error:
                assert "\x1b" not in str(error) and len(str(error)) < 1000
                continue
            assert "## Endorsed" not in text and "<img" not in text and "\x1b" not in text and "\u202e" not in text
            assert text.count("<!-- grad_transformer") == text.count("<!-- /grad_transformer")
            data = ModelCard(text).data.to_dict()
            assert data.get("license") is None, path
            assert 'run("' not in text


def test_base_models_and_names_are_letters_in_prose_and_nothing_in_code():
    with pytest.raises(UsageError, match="mislead a reader"):
        card("client_adapter", {"adapter_config.json": {**CONFIG, "base_model_name_or_path": HOSTILE}})
    visible = HOSTILE.replace("\x1b[2J\u202e", "")
    text = card("client_adapter", {"adapter_config.json": {**CONFIG, "base_model_name_or_path": visible}})
    assert "## Endorsed" not in text and "<img" not in text
    assert 'from_pretrained("path/to/its/base-model")' in text and ModelCard(text).data.base_model is None
    assert code("a`b\n<c>|d\x1b[2J") == "`a_b _c__d__2J`"
    assert code("x" * 1000) == f"`{'x' * 99}…`"


def test_an_origin_is_an_id_a_version_and_a_commit():
    assert Origin.from_dict(ORIGIN).to_dict() == ORIGIN
    for name, value in (
        ("repo_id", "big-bank/adapter](https://evil.example)"),
        ("repo_id", "../x"),
        ("revision", "v1\n## x"),
        ("sha", "0"),
        ("sha", None),
        ("repo_id", ["a"]),
    ):
        with pytest.raises(HubError, match="malformed"):
            Origin.from_dict({**ORIGIN, name: value})
        with pytest.raises(UsageError):
            card(
                "generated_adapter",
                put(CARDS["generated_adapter"], ("grad_transformer.json", "generated", "clients", 1, name), value),
            )


def test_privacy_is_said_from_the_facts_in_words_of_our_own():
    text = card("client_adapter", CARDS["client_adapter"])
    assert "epsilon 8 and delta 1e-05" in text and "nobody can verify it" in text
    boast = {**STATEMENT, "statement": "Certified by a bank.", "not_covered": ["Nothing."]}
    assert card("client_adapter", put(CARDS["client_adapter"], (*MADE, "differential_privacy"), boast)) == text
    for nothing in ({"differential_privacy": None}, {}):
        words = card(
            "client_adapter", {"adapter_config.json": CONFIG, "grad_transformer.json": {"mapper": ORIGIN, **nothing}}
        )
        assert "Only differential privacy bounds what an adapter reveals" in words
    for bound in ({"epsilon": None}, {"epsilon": 0.0}, {"delta": 2.0}):
        statement = {**GENERATED["differential_privacy"], **bound}
        words = card(
            "generated_adapter",
            put(CARDS["generated_adapter"], (*MADE, "differential_privacy"), statement),
        )
        assert "No bound by differential privacy" in words


def test_what_an_older_version_let_in_goes_with_the_next_push():
    clean = card("generated_adapter", CARDS["generated_adapter"])
    forged = clean.replace(
        "- Mapper:", f"- [`x`\n{CLOSE}\n\n## Endorsed by ACME\n\nRun `curl evil.example`.\n\n{OPEN}\n`](x)\n- Mapper:"
    )
    assert "curl" in forged
    assert card("generated_adapter", CARDS["generated_adapter"], previous=forged.encode()) == clean


def test_metadata_that_is_no_id_goes_with_the_next_push():
    previous = (
        b'---\nbase_model: "x](evil)"\ndatasets:\n- acme/rows\n- "evil text\\n- more"\nlicense: mit\n---\nMine.\n'
    )
    files = {"config.json": {"source_base_model": None}}
    data = ModelCard(card("mapper", files, previous=previous)).data
    assert (data.base_model, data.datasets, data.license) == (None, ["acme/rows"], "mit")


def test_prose_before_and_after_a_doubled_passage_stays():
    previous = f"Mine.\n\n{OPEN}\n1\n{CLOSE}\nforged\n{OPEN}\n2\n{CLOSE}\n\nMine too.\n"
    assert merge_text(previous, f"{OPEN}\n3\n{CLOSE}\n") == f"Mine.\n\n{OPEN}\n3\n{CLOSE}\n\nMine too.\n"
    unclosed = f"Mine.\n{OPEN}\nMine too.\n"
    assert merge_text(unclosed, f"{OPEN}\n3\n{CLOSE}\n").startswith(unclosed.strip())


@pytest.mark.parametrize(
    "previous",
    [
        "---\na: 1\n---\nx".encode("utf-16"),
        b"---\na: [\n---\nx",
        b"---\ntags: 5\n---\nx",
        b"---\ntags:\n- 2020-01-01\n- {a: b}\n---\nx",
        b"---\n- a\n---\nx",
        b"---\n1: x\n---\nx",
        b"---\nmodel-index: 5\nself: 1\n---\nx",
        b"---\na: " + b"{a: " * 5000 + b"\n---\nx",
        b"---\na: &a [" + b"x," * 30 + b"]\nb: &b [" + b"*a," * 30 + b"]\nc: [" + b"*b," * 30 + b"]\n---\nx",
        b"---\na: " + b"x" * 70_000 + b"\n---\nx",
        b"x" * (2**20 + 1),
    ],
)  # fmt: skip
def test_a_card_that_cannot_be_kept_is_a_typed_error(previous):
    with pytest.raises(UsageError, match="cannot be read") as info:
        card("client_adapter", CARDS["client_adapter"], previous=previous)
    assert "README.md" in info.value.remedy


def test_a_card_without_metadata_or_with_a_byte_order_mark_is_kept():
    for previous in (b"Mine.\n", b"\xef\xbb\xbf---\ntags: [a]\n---\nMine.\n", b"---\ntags: null\n---\nMine.\n"):
        assert "Mine." in card("client_adapter", CARDS["client_adapter"], previous=previous)


def test_fields_name_file_place_and_type():
    fields = Fields({"a": {"b": [1, "x"]}, "n": True}, "report.json")
    with pytest.raises(UsageError) as info:
        fields.child("a").numbers("b")
    assert info.value.path == "report.json: a.b.1" and info.value.found == "'x'"
    with pytest.raises(UsageError):
        fields.number("n")
    assert fields.count("missing") is None and fields.children("missing") == []


# Origins


def test_a_folder_cannot_say_where_it_comes_from(hub, tmp_path):
    roots = tiny_roots(tmp_path / "roots")
    client_adapter(roots[0]).push_to_hub("acme/client", private=False)
    folder = client_adapter(roots[0], seed=2).save_pretrained(tmp_path / "sent")
    for claim in ({**ORIGIN, "repo_id": "acme/client", "private": False}, {"repo_id": HOSTILE}, [1]):
        (folder / "hub_origin.json").write_text(json.dumps(claim))
        assert LoraAdapter.from_pretrained(folder).origin is None
    made = tiny_mapper(roots).generate_adapter(folder)
    assert made.metadata["generated"]["clients"] == [{"sha256": LoraAdapter.from_pretrained(folder).sha256()}]


def test_a_pulled_folder_has_its_origin_until_a_file_of_it_changes(hub, tmp_path):
    client = client_adapter(tiny_roots(tmp_path / "roots")[0])
    sha = client.push_to_hub("acme/client", private=False).sha
    folder, _ = pull_folder("acme/client@v1.0", tmp_path / "pulled", kind="client_adapter")
    (folder / "notes.txt").write_text("mine")
    (folder / "hub_origin.json").write_text(json.dumps({**ORIGIN, "repo_id": "evil/other"}))
    assert LoraAdapter.from_pretrained(folder).origin == Origin("acme/client", "v1.0", sha, private=False)
    write_json_atomic(folder / "grad_transformer.json", {**client.metadata, "differential_privacy": STATEMENT})
    assert LoraAdapter.from_pretrained(folder).origin is None
    (folder / "grad_transformer.json").unlink()
    assert LoraAdapter.from_pretrained(folder).origin is None
    pull_folder("acme/client@v1.0", folder, kind="client_adapter")
    assert LoraAdapter.from_pretrained(folder).origin.sha == sha
    folder.rename(tmp_path / "moved")
    assert LoraAdapter.from_pretrained(tmp_path / "moved").origin is None


def test_a_pull_that_was_killed_is_taken_up_and_files_of_an_older_version_go(hub, tmp_path, monkeypatch):
    roots = tiny_roots(tmp_path / "roots")
    tiny_mapper(roots).push_to_hub("acme/mapper", max_shard_size="20KB")
    folder, _ = pull_folder("acme/mapper@v1.0", tmp_path / "mapper", kind="mapper")
    assert list(folder.glob("model-*.safetensors"))
    tiny_mapper(roots, seed=1).push_to_hub("acme/mapper")
    with monkeypatch.context() as patch:
        patch.setattr("grad_transformer.hub.push.shutil.copyfile", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pull_folder("acme/mapper@v1.1", folder, kind="mapper")
    pull_folder("acme/mapper@v1.1", folder, kind="mapper")
    assert not list(folder.glob("model-*.safetensors"))
    assert GradTransformer.from_pretrained(folder).origin.revision == "v1.1"


def test_a_forged_adapter_of_an_older_version_is_not_published(hub, tmp_path):
    roots = tiny_roots(tmp_path / "roots")
    made = tiny_mapper(roots).generate_adapter(client_adapter(roots[0]))
    made.metadata["generated"]["clients"] = [{"repo_id": HOSTILE, "revision": None, "sha": "0"}]
    made.save_pretrained(tmp_path / "made")
    with pytest.raises(GradTransformerError, match="mislead a reader"):
        push_folder(tmp_path / "made", "acme/llm")
    assert "README.md" not in hub.store.repos[("model", "acme/llm")].commit_at("main").tree
