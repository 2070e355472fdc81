"""What the process does that is killed; kept apart, so that it starts fast."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants

from grad_transformer.hub import publish


def push_in_a_process(url: str, folder: str, token: str) -> None:
    """The other variables were in the environment before huggingface_hub was imported."""
    constants.ENDPOINT = url
    paths = {path.name: path for path in sorted(Path(folder).iterdir())}
    publish("acme/killed", lambda _: paths, owned=lambda _: True, token=token)
