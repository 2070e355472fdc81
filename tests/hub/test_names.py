"""Names: ids, versions, addresses from a browser, paths, and files of strangers' repositories."""

from __future__ import annotations

import time

import pytest

from grad_transformer import LoraAdapter
from grad_transformer.errors import HubError, UsageError
from grad_transformer.hub import fetch, pull_folder, split_revision
from grad_transformer.hub.names import check_file_names, is_repo_id, is_revision, looks_like_path
from tests.hub.worlds import client_adapter, tiny_roots


PAGE = "https://huggingface.co"


@pytest.mark.parametrize(
    ("address", "repo_id", "revision"),
    [
        (f"{PAGE}/org/name", "org/name", None),
        (f"{PAGE}/org/name/", "org/name", None),
        (f"{PAGE}/org/name/tree/v1.0", "org/name", "v1.0"),
        (f"{PAGE}/org/name/tree/refs%2Fpr%2F1?x=1#y", "org/name", "refs/pr/1"),
        (f"{PAGE}/org/name/commit/{'a' * 40}", "org/name", "a" * 40),
        (f"{PAGE}/models/org/name", "org/name", None),
        ("huggingface.co/org/name", "org/name", None),
        ("http://hf.co/org/name/tree/main", "org/name", "main"),
        ("hf://org/name@v2.0", "org/name", "v2.0"),
        (" https:/huggingface.co/org/name ", "org/name", None),
    ],
)
def test_the_address_of_a_page_is_a_name_of_its_repository(address, repo_id, revision):
    assert split_revision(address, repo_type="model") == (repo_id, revision)


def test_addresses_of_data_sets_lead_to_data_sets():
    assert split_revision(f"{PAGE}/datasets/org/name/tree/v1.0", repo_type="dataset") == ("org/name", "v1.0")
    for address, repo_type in (
        (f"{PAGE}/datasets/org/name", "model"),
        (f"{PAGE}/org/name", "dataset"),
        (f"{PAGE}/spaces/org/name", "model"),
        (f"{PAGE}/org/name/blob/main/config.json", "model"),
        (f"{PAGE}/org/name/tree/main/folder", "model"),
        (f"{PAGE}/org", "model"),
        (PAGE, "model"),
        (f"{PAGE}/org/na me", "model"),
        ("https://evil.example/org/name", "model"),
        ("https://huggingface.co.evil.example/org/name", "model"),
        ("s3://bucket/org/name", "model"),
    ):
        with pytest.raises(UsageError, match="does not lead"):
            split_revision(address, repo_type=repo_type)


def test_a_pasted_address_loads_and_is_pulled(hub, tmp_path):
    published = client_adapter(tiny_roots(tmp_path / "roots")[0]).push_to_hub("acme/client")
    assert LoraAdapter.from_pretrained(published.url).origin.sha == published.sha
    _, origin = pull_folder(published.url, tmp_path / "pulled", kind="client_adapter")
    assert origin == {"repo_id": "acme/client", "revision": "v1.0", "sha": published.sha}


def test_what_ids_and_versions_can_be():
    assert all(map(is_repo_id, ["org/name", "gpt2", "Qwen/Qwen2.5-0.5B", "a_b/c.d-e"]))
    odd = [
        "",
        "a/b/c",
        "../b",
        "a/..",
        "a--b/c",
        "-a/b",
        "a/b.git",
        "a/b\n",
        "a/b c",
        "a/`b`",
        "ä/b",
        None,
        5,
        "a/" + "b" * 97,
    ]
    assert not any(map(is_repo_id, odd))
    assert all(map(is_revision, ["v1.0", "main", "refs/pr/1", "a" * 40, "v1.0+cpu"]))
    assert not any(map(is_revision, ["", "/etc/passwd", "a/../b", "-x", "v1\n", "a b", 1.1, None, "x" * 300]))


@pytest.mark.parametrize(
    "name",
    [
        "./a",
        "../a/b",
        "/a/b",
        "~/a",
        "a\\b",
        "C:\\a",
        "a/b/c",
        "rows.jsonl",
        "org/rows.csv",
        "demo_outptu",
        "a/b/",
    ],
)
def test_a_mistyped_path_is_refused_without_asking_the_hub(hub, name):
    started = time.monotonic()
    assert looks_like_path(name)
    with pytest.raises(UsageError, match="Neither a folder nor"):
        fetch(name, allow_patterns=["*"])
    assert hub.seen == [] and time.monotonic() - started < 1


def test_a_revision_cannot_lead_out_of_the_cache(hub):
    for revision in ("/etc/hostname", "../../x", "v1 0"):
        with pytest.raises(UsageError, match="no version of a repository"):
            fetch("acme/x", allow_patterns=["*"], revision=revision)
    assert hub.seen == []


ODD = [
    "../x",
    "a/../../x",
    "/x",
    "C:\\x",
    "C:/x",
    "a\\b",
    "a//b",
    "a/./b",
    "a\nb",
    "a\x1b[2J",
    "\u202ea",
    "",
    " a",
    "a" * 201,
]


@pytest.mark.parametrize("name", ODD)
def test_names_that_lead_out_or_hide_are_refused(name):
    with pytest.raises(HubError, match="not safe to write") as info:
        check_file_names(["fine.json", name], path="org/x")
    assert info.value.found.isascii() and "\n" not in info.value.found


def test_a_file_that_is_also_a_folder_is_refused():
    check_file_names(["a/b.json", "a/c-1.json", ".eval_results/x.yaml"], path="org/x")
    with pytest.raises(HubError, match="also a folder"):
        check_file_names(["a", "a/b/c"], path="org/x")


@pytest.fixture
def stranger(hub):
    """Puts files into a repository as they are, past every check of a client."""

    def put(name, files):
        repo = hub.store.create("model", name, False)
        repo.add_commit("main", "x", {path: hub.store.put_small(content) for path, content in files.items()})

    return put


def test_a_listing_is_checked_before_anything_is_downloaded(hub, stranger, tmp_path):
    stranger("evil/names", {"data/../../../../ESCAPED.json": b"{}", "fine.json": b"{}"})
    with pytest.raises(HubError, match="not safe to write"):
        fetch("evil/names", allow_patterns=["*.json"])
    assert hub.requests("/resolve/") == []
    assert fetch("evil/names", allow_patterns=["fine.json"]).folder.joinpath("fine.json").is_file()


def test_sizes_are_checked_before_anything_is_downloaded(hub, stranger, monkeypatch):
    stranger("evil/large", {"model.bin": b"x" * 1000, "config.json": b"{}" * 600})
    with pytest.raises(HubError, match="larger than") as info:
        fetch("evil/large", allow_patterns=["model.bin"], max_bytes=999)
    assert "1,000 bytes" in info.value.found and "hf download" in info.value.remedy
    monkeypatch.setattr("grad_transformer.hub.revisions.MAX_JSON_BYTES", 1000)
    with pytest.raises(HubError, match="larger than"):
        fetch("evil/large", allow_patterns=["*.json"])
    assert hub.requests("/resolve/") == []
    assert fetch("evil/large", allow_patterns=["model.bin"], max_bytes=1000).origin.private is False
