"""A loopback Hub for each test, and a client in this process that talks to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from tests.hub_server import Account, HubServer


TOKENS = {
    "hf_" + "p" * 34: Account("pia", orgs=("acme",)),
    "hf_" + "c" * 34: Account("carl", orgs=("bank",)),
    "hf_" + "r" * 34: Account("rita", orgs=("acme",), write=False),
}
PROVIDER, CLIENT, READER = TOKENS


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server; this process is logged in as the provider, with an empty cache."""
    constants = huggingface_hub.constants
    with HubServer(tmp_path / "hub-server", TOKENS) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", PROVIDER)
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited for, without waiting."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found
