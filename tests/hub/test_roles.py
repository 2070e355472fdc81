"""The four roles over HTTP: separate processes, caches and tokens, each running its example."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import grad_transformer
from grad_transformer import GradTransformer, create_root
from grad_transformer.finetuning import FineTuningRecipe
from grad_transformer.lab import make_lab_tokenizer
from tests.hub.conftest import CLIENT, PROVIDER, TOKENS
from tests.hub.worlds import delta_dataset, tiny_mapper
from tests.hub_server import HubServer
from tests.worlds import lora, tiny_qwen2


ROOT = Path(grad_transformer.__file__).parents[1]
PROMPT = "?1 ?2 123456 >"


def role(hub: HubServer, folder: Path, token: str | None, script: str, *arguments: str) -> str:
    """Run an example as one party: its own folder, home, cache and token."""
    folder.mkdir(exist_ok=True)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "COV_"))},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        **({"HF_TOKEN": token} if token else {}),
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=folder,
        env=environment,
        input="y\n",  # the client is asked before its base model is downloaded
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hf_" not in done.stdout + done.stderr and str(ROOT) not in done.stdout
    return done.stdout


def stored(hub: HubServer, kind: str, name: str, path: str) -> bytes:
    repo = hub.store.repos[(kind, name)]
    return hub.store.path(repo.commit_at(max(repo.tags)).tree[path].oid).read_bytes()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the provider has on its disk: base models, a delta dataset, a mapper."""
    folder = tmp_path_factory.mktemp("roles")
    for name, layers, hidden in (("tinylm", 2, 16), ("llm", 3, 32)):
        tiny_qwen2(folder / "base" / name, layers=layers, hidden=hidden)
        make_lab_tokenizer().save_pretrained(folder / "base" / name)
    return folder


def test_four_roles(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer(tmp_path / "server", TOKENS) as hub:
        api = HfApi(endpoint=hub.url, token=PROVIDER)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        for name in ("tinylm", "llm"):
            api.create_repo(f"acme/{name}")
            api.upload_folder(repo_id=f"acme/{name}", folder_path=world / "base" / name)
        monkeypatch.undo()
        roots = []
        for name in ("tinylm", "llm"):
            root = create_root(world / "base" / name, lora(), output_dir=world / "roots" / name)
            root.base_model = root.adapter.config["base_model_name_or_path"] = f"acme/{name}"
            roots.append(root)
        mapper = tiny_mapper((roots[0], roots[1]))
        recipe = FineTuningRecipe(learning_rate=1e-2, max_steps=4, per_device_batch_size=4, warmup_steps=0)
        mapper.source_tokenizer.recipe = mapper.target_tokenizer.recipe = recipe.to_dict()
        mapper.save_pretrained(tmp_path / "mapper")
        deltas = delta_dataset(tmp_path / "deltas", (roots[0], roots[1]))

        folders = [str(deltas), str(tmp_path / "mapper")]
        role(hub, tmp_path / "provider", PROVIDER, "provider.py", *folders, "acme/deltas", "acme/mapper")
        assert hub.store.repos[("dataset", "acme/deltas")].private

        rows = [{"prompt": "?1 ?2 000000 >", "completion": f"{index:06d}"} for index in range(16)]
        (tmp_path / "client").mkdir()
        (tmp_path / "client" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        hub.seen.clear()
        told = role(hub, tmp_path / "client", CLIENT, "client.py", "acme/mapper@v1.0", "rows.jsonl", "bank/adapter")
        assert "to be downloaded from the Hub, as the mapper names it" in told and "[y/N]" in told
        assert hub.store.repos[("model", "bank/adapter")].private
        asked = {seen.path for seen in hub.seen if seen.token == CLIENT}
        assert not [path for path in asked if "deltas" in path or path.endswith("mapper/model.safetensors")]
        assert not [path for path in asked if "/target/" in path], "the client needs the source root alone"

        # The client lets the provider in.
        hub.store.repos[("model", "bank/adapter")].granted.add("pia")
        arguments = ("acme/mapper@v1.0", "acme/generated", "bank/adapter@v1.0")
        role(hub, tmp_path / "provider", PROVIDER, "generate.py", *arguments)
        made = json.loads(stored(hub, "model", "acme/generated", "grad_transformer.json"))["generated"]
        assert made["mapper"]["sha"] == hub.store.repos[("model", "acme/mapper")].tags["v1.0"]
        assert b"bank" not in stored(hub, "model", "acme/generated", "README.md")

        output = role(hub, tmp_path / "user", None, "use_adapter.py", "acme/llm", "acme/generated", "v1.0", PROMPT)

    # The same on local folders, without a Hub: equal to the last bit.
    local = GradTransformer.from_pretrained(tmp_path / "mapper").generate_adapter(tmp_path / "client" / "adapter")
    local.save_pretrained(tmp_path / "local")
    assert local_scores(world / "base" / "llm", tmp_path / "local") == output


def local_scores(llm: Path, adapter: Path) -> str:
    import torch

    tokenizer = AutoTokenizer.from_pretrained(llm)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llm), str(adapter)).eval()
    with torch.no_grad():
        logits = model(**tokenizer(PROMPT, return_tensors="pt")).logits[0, -1]
    scores = torch.log_softmax(logits.double(), dim=-1)
    return "".join(f"{float(s):.17g} {tokenizer.decode(t)!r}\n" for s, t in zip(*scores.topk(5), strict=True))
