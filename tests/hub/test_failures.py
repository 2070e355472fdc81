"""What goes wrong on the way: busy servers, lost answers, cut bodies, other people, killed processes."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import threading
import time
from email.utils import formatdate
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi

from grad_transformer import LoraAdapter
from grad_transformer.errors import HubError
from grad_transformer.hub import fetch, publish
from grad_transformer.hub.hashes import file_sha256
from tests.hub.conftest import PROVIDER, TOKENS
from tests.hub.killed import push_in_a_process
from tests.hub.worlds import client_adapter, tiny_roots
from tests.hub_server import Fault, HubServer


KILLS = 20


@pytest.fixture
def client(tmp_path):
    return client_adapter(tiny_roots(tmp_path / "roots")[0])


def version(hub, name="acme/client"):
    return hub.store.repos[("model", name)]


ROUTES = {
    "create": "POST /api/repos/create",
    "info": "GET /api/models/acme/client$",
    "refs": "GET .*/refs",
    "tree": "GET .*/tree/",
    "preupload": "POST .*/preupload",
    "lfs": "POST .*lfs/objects/batch",
    "content": "PUT /lfs/",
    "verify": "POST /lfs/.*/verify",
    "commit": "POST .*/commit/",
    "tag": "POST .*/tag/",
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("status", [429, 503])
def test_a_push_waits_where_the_hub_is_busy(hub, client, naps, route, status):
    hub.faults.append(Fault(ROUTES[route], status=status, headers={"Retry-After": "7"}, times=2))
    client.push_to_hub("acme/client")
    repo = version(hub)
    assert list(repo.tags) == ["v1.0"] and len(repo.commits) == 2
    # huggingface_hub's own retries wait for one second more than they are asked to.
    assert naps and all(7 <= nap <= 8 for nap in naps)


def test_a_pull_waits_where_the_hub_is_busy(hub, client, naps):
    client.push_to_hub("acme/client")
    for match in ("GET .*/revision/v1.0", "GET .*/tree/", "HEAD .*/resolve/", "GET /cdn/"):
        hub.faults.append(Fault(match, status=503, times=2))
    again = LoraAdapter.from_pretrained("acme/client@v1.0")
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in client.tensors.items())


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"ratelimit": '"api";r=0;t=42', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}, 42, 42),
        ({"Retry-After": "3"}, 3, 3),
        ({"Retry-After": "a date in 300 s"}, 200, 301),
        ({}, 1, 1),
    ],
)
def test_how_long_a_busy_hub_asks_to_wait(hub, client, naps, headers, low, high):
    if "date" in headers.get("Retry-After", ""):
        headers = {"Retry-After": formatdate(time.time() + 300, usegmt=True)}
    hub.faults.append(Fault("POST /api/repos/create", status=429, headers=headers))
    client.push_to_hub("acme/client")
    assert len(naps) == 1 and low <= naps[0] <= high


def test_a_wait_that_is_too_long_or_never_ends_is_an_error(hub, client, naps):
    hub.faults.append(Fault("POST /api/repos/create", status=429, headers={"Retry-After": "86400"}))
    with pytest.raises(HubError, match="wait for too long"):
        client.push_to_hub("acme/client")
    hub.faults[:] = [Fault("POST /api/repos/create", status=503, times=99)]
    with pytest.raises(HubError, match="does not do what was asked"):
        client.push_to_hub("acme/client")
    assert naps == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("route", ROUTES)
def test_a_lost_answer_does_not_make_a_second_version(hub, client, naps, route):
    hub.faults.append(Fault(ROUTES[route], lost=True))
    published = client.push_to_hub("acme/client")
    repo = version(hub)
    assert repo.tags == {"v1.0": published.sha} and len(repo.commits) == 2


def test_somebody_elses_push_in_between_is_kept(hub, client, naps):
    client.push_to_hub("acme/client")
    card = Path(HfApi().hf_hub_download("acme/client", "README.md")).read_text()

    def interfere(method, path, phase):
        if (method, phase) == ("POST", "arrived") and "/commit/" in path:
            hub.watch = None
            edited = card.replace("## What it comes from", "## Words of a person\n\nMine.\n\n## What it comes from")
            repo = version(hub)
            tree = {**repo.commit_at("main").tree, "README.md": hub.store.put_small(edited.encode())}
            repo.add_commit("main", "by a person", tree)

    hub.watch = interfere
    client.config["lora_dropout"] = 0.5
    published = client.push_to_hub("acme/client")
    tree = version(hub).commit_at(published.revision).tree
    assert published.revision == "v1.1"
    assert "Words of a person" in hub.store.path(tree["README.md"].oid).read_text()


def test_a_cut_download_goes_on_where_it_was(hub, naps, monkeypatch):
    # The client keeps what came in whole chunks.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 2**16)
    content = os.urandom(2**20)
    publish("acme/x", lambda _: {"model.safetensors": content}, owned=lambda _: True)
    hub.faults.append(Fault("GET /cdn/", cut=0.5))
    folder = fetch("acme/x@v1.0", allow_patterns=["*"]).folder
    assert (folder / "model.safetensors").read_bytes() == content
    first, second = hub.requests("GET /cdn/")
    assert first.range is None and int(second.range.removeprefix("bytes=").rstrip("-")) == len(content) // 2


def test_an_interrupted_download_keeps_the_files_that_came(hub, naps):
    files = {f"part-{index}.safetensors": os.urandom(1000) for index in range(4)}
    publish("acme/x", lambda _: files, owned=lambda _: True)
    last = hashlib.sha256(files["part-3.safetensors"]).hexdigest()
    hub.faults.append(Fault(f"GET /cdn/{last}", status=404, times=99))
    with pytest.raises(HubError):
        fetch("acme/x@v1.0", allow_patterns=["*"])
    hub.faults.clear()
    hub.seen.clear()
    fetch("acme/x@v1.0", allow_patterns=["*"])
    assert len(hub.requests("GET /cdn/")) < 4


def test_a_byte_that_changed_on_the_way_is_noticed(hub, client):
    client.push_to_hub("acme/client")
    hub.faults.append(Fault("GET /cdn/", flip=True))
    with pytest.raises(HubError, match="is not the file that the Hub names"):
        LoraAdapter.from_pretrained("acme/client@v1.0")


def test_what_arrived_changed_is_not_tagged(hub, client, monkeypatch):
    real = hub.store.put_small
    monkeypatch.setattr(hub.store, "put_small", lambda content: real(content.replace(b"LORA", b"lora")))
    with pytest.raises(HubError, match="not tagged"):
        client.push_to_hub("acme/client")
    assert version(hub).tags == {}


def test_without_a_connection_the_cached_version_loads_with_a_warning(hub, client, naps, monkeypatch):
    published = client.push_to_hub("acme/client")
    LoraAdapter.from_pretrained("acme/client@v1.0")
    hub._http.shutdown()
    hub._http.server_close()
    huggingface_hub.close_session()
    assert LoraAdapter.from_pretrained("acme/client@v1.0").origin.sha == published.sha
    with pytest.raises(HubError, match="cannot be reached"):
        LoraAdapter.from_pretrained("acme/other")


def test_without_a_network_it_is_given_up_soon(naps, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://no-such-host.invalid")
    with pytest.raises(HubError, match="if a folder was meant"):
        fetch("acme/mistyped", allow_patterns=["*"], cache_dir=tmp_path)
    assert naps == [1]


def test_no_token_or_local_path_in_errors_and_logs(hub, client, naps, caplog, tmp_path):
    logging.getLogger("grad_transformer").setLevel(logging.DEBUG)
    caplog.set_level(logging.DEBUG)
    for match, status in (("POST .*/commit/", 400), ("GET .*/refs", 503), ("POST .*/tag/", 403)):
        hub.faults[:] = [Fault(match, status=status, times=99)]
        with pytest.raises(HubError) as info:
            client.push_to_hub("acme/client", token=PROVIDER)
        text = f"{info.value} {info.value.to_dict()} {info.value.__cause__}"
        assert PROVIDER not in text and str(tmp_path) not in text and str(Path.home()) not in text.replace("acme", "")
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("grad_transformer"))
    assert ours and PROVIDER not in ours and str(tmp_path) not in ours and "acme/client" not in ours


# Killed


def test_a_killed_push_leaves_no_tag_and_the_next_one_completes_it(tmp_path, monkeypatch):
    """At 20 random points: between and inside requests, and inside bodies."""
    random_ = random.Random(0)
    environment = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.hub.killed"])
    points: list[tuple[str, str]] = []
    with HubServer(tmp_path / "server", TOKENS, multipart_bytes=2**19) as hub:
        for kill in range(-1, KILLS):
            folder = tmp_path / f"version-{kill}"
            folder.mkdir()
            for number in range(3):
                (folder / f"part-{number}.safetensors").write_bytes(random_.randbytes(2**18 + number * 2**19))
            (folder / "config.json").write_text(f'{{"kill": {kill}}}')
            process = context.Process(target=push_in_a_process, args=(hub.url, str(folder), PROVIDER))
            process.start()
            # The first push runs through and counts its steps; the others die at a random one of them.
            at = random_.randrange(len(points)) if kill >= 0 else None
            counter, lock = iter(range(10**9)), threading.Lock()

            def watch(method, path, phase, process=process, at=at, counter=counter, lock=lock):
                with lock:
                    step = next(counter)
                if at is None:
                    points.append((method, phase))
                elif step == at:
                    os.kill(process.pid, signal.SIGKILL)
                    # Not `join`: the test's own thread reads the exit code.
                    multiprocessing.connection.wait([process.sentinel])

            hub.watch = watch
            process.join(300)
            hub.watch = None
            assert process.exitcode == (0 if at is None else -signal.SIGKILL)
            time.sleep(0.05)
            wanted = {path.name: file_sha256(path) for path in folder.iterdir()}
            repo = hub.store.repos.get(("model", "acme/killed"))
            with hub.store.lock:
                tagged = {} if repo is None else dict(repo.tags)
            for sha in tagged.values():
                assert whole(hub, repo, sha), "a tag names an incomplete version"
            again = context.Process(target=push_in_a_process, args=(hub.url, str(folder), PROVIDER))
            again.start()
            again.join(300)
            assert again.exitcode == 0
            repo = hub.store.repos[("model", "acme/killed")]
            newest = repo.commit_at("main")
            assert newest.sha in repo.tags.values() and wanted.items() >= large(newest).items()
            assert len(repo.tags) == kill + 2, "each content is one version"
            assert len(repo.commits) == kill + 3, "and one commit"


def large(commit):
    return {name: entry.oid for name, entry in commit.tree.items() if entry.large}


def whole(hub, repo, sha):
    tree = repo.commit_at(sha).tree
    return len(large(repo.commit_at(sha))) == 3 and all(hub.store.path(entry.oid).is_file() for entry in tree.values())
