"""Adapters from strangers: what they must not be able to do. `benchmarks/fuzz` has more."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from benchmarks.fuzz.artifacts import make_tokenizer, write_client
from grad_transformer import LoraAdapter, LoraLayout
from grad_transformer.adapters.header import HeaderError, parse_header
from grad_transformer.adapters.io import member, read_header
from grad_transformer.errors import AdapterFormatError, GradTransformerError, UsageError


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def folder(tmp_path, tokenizer):
    write_client(tmp_path / "stranger", tokenizer)
    return tmp_path / "stranger"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@given(st.binary(max_size=300), st.integers(0, 64))
def test_any_bytes_as_a_header_give_infos_or_a_typed_error(content, data_bytes):
    try:
        infos, _ = parse_header(content, data_bytes)
    except (HeaderError, ValueError, RecursionError):
        return
    assert sum(torch.Size(info.shape).numel() * info.dtype.itemsize for info in infos.values()) == data_bytes


KNOWN = make_tokenizer()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "peft_type"]), JSON
    )
)
def test_any_config_gives_a_layout_or_a_typed_error(changes):
    config = {**KNOWN.root.adapter.config, **changes}
    shapes = {spec.key: spec.shape for spec in KNOWN.layout.tensor_specs()}
    for read in (LoraLayout.from_adapter_config, KNOWN.layout.check_config):
        with contextlib.suppress(GradTransformerError):
            read(config, shapes)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "grad_transformer.json"])
def test_a_link_out_of_the_folder_is_refused(folder, tokenizer, tmp_path, name):
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(AdapterFormatError, match="leads out of its folder"):
        tokenizer.delta(folder)


def test_links_of_a_hub_snapshot_to_its_own_blobs_are_followed_and_no_others(folder, tokenizer, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    tokenizer.delta(snapshot)
    (snapshot / "grad_transformer.json").unlink()
    (snapshot / "grad_transformer.json").symlink_to("/etc/hostname")
    with pytest.raises(AdapterFormatError):
        tokenizer.delta(snapshot)


def test_pipes_devices_and_loops_are_refused_without_reading(folder, tokenizer):
    path = folder / "adapter_config.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(AdapterFormatError, match="not an ordinary file"):
        tokenizer.delta(folder)
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises(AdapterFormatError):
        member(folder, path.name)
        tokenizer.delta(folder)


def test_a_config_that_is_too_large_is_not_parsed(folder, tokenizer):
    (folder / "adapter_config.json").write_text('{"x": "' + "y" * 2**20 + '"}')
    with pytest.raises(AdapterFormatError, match="too large"):
        tokenizer.delta(folder)


def test_nothing_that_a_stranger_names_is_imported_or_downloaded(folder, tokenizer, tmp_path, monkeypatch):
    edit_config(
        folder,
        auto_mapping={"base_model_class": "system", "parent_library": "evil_module_of_a_stranger"},
        base_model_name_or_path="evil/tiny",
    )
    (tmp_path / "evil_module_of_a_stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    monkeypatch.setattr("grad_transformer.hub.revisions.snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    tokenizer.delta(folder)
    LoraAdapter.from_pretrained(folder)


def test_pickles_are_never_opened(folder, tokenizer):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cposix\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(AdapterFormatError, match="not stored as safetensors"):
        tokenizer.delta(folder)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(?=a)a", "a*b*", r"(.)\1", "x" * 300, "(.*a){20}"])
def test_patterns_that_could_take_for_ever_are_refused_at_once(folder, pattern):
    edit_config(folder, rank_pattern={pattern: 2})
    started = time.perf_counter()
    with pytest.raises(AdapterFormatError, match="patterns"):
        LoraAdapter.from_pretrained(folder)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("pattern", ["q_proj", r"layers\.[01]\.self_attn\.q_proj", "^model.layers.0.*q_proj", "q|k"])
def test_patterns_that_people_write_are_read(folder, pattern):
    edit_config(folder, alpha_pattern={pattern: 16})
    assert {spec.scaling for spec in LoraAdapter.from_pretrained(folder).layout.tensor_specs()} >= {4.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_and_norms_that_no_fine_tune_leaves_are_refused(folder, tokenizer, value):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lora_B" in key)
    tensors[key][0, 0] = value
    save_file(tensors, path)
    with pytest.raises(AdapterFormatError, match="NaN|absurdly far"):
        tokenizer.delta(folder)


def test_the_norm_limit_follows_the_training_deltas_where_they_are_known(tokenizer):
    delta_P = torch.randn(tokenizer.layout.numel, generator=torch.Generator().manual_seed(0)) * 1e-3
    tokenizer.scale = "global"
    tokenizer.fit([delta_P[None].repeat(4, 1)])
    near = tokenizer.root.adapter.with_values(tokenizer.root.adapter.flat() + 10 * delta_P)
    far = tokenizer.root.adapter.with_values(tokenizer.root.adapter.flat() + 100 * delta_P)
    tokenizer.delta(near)
    with pytest.raises(AdapterFormatError, match="absurdly far"):
        tokenizer.delta(far)


def test_a_block_that_alone_is_too_long_is_refused_where_lengths_of_blocks_are_known(tokenizer):
    generator = torch.Generator().manual_seed(0)
    shadows_NP = torch.randn(8, tokenizer.layout.numel, generator=generator) * 1e-3
    root_P = tokenizer.root.adapter.flat()
    sent_P = shadows_NP[0].clone()
    sent_P[: tokenizer.layout.widths[0]] *= 14
    sent = tokenizer.root.adapter.with_values(root_P + sent_P)
    for center in (False, True):
        tokenizer.center, tokenizer.scale = center, "global"
        tokenizer.fit([shadows_NP]).delta(sent)
        tokenizer.scale = "block"
        with pytest.raises(AdapterFormatError, match="absurdly far") as caught:
            tokenizer.fit([shadows_NP]).delta(sent)
        assert "the longest block 1" in str(caught.value.found)
        tokenizer.delta(tokenizer.root.adapter.with_values(root_P + shadows_NP[1]))


def test_a_header_whose_tensors_overlap_or_leave_gaps_is_refused(folder):
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    first, second = [key for key in header if key != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(AdapterFormatError, match="not a safetensors file"):
        read_header(path)


def test_a_subfolder_cannot_climb(folder):
    with pytest.raises(UsageError, match="leads out"):
        LoraAdapter.from_pretrained(folder, subfolder="../stranger")
