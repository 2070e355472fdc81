"""Base models: one door, through which no code, no pickle and nothing half comes in; and what tells two apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, T5Config, T5Model

from grad_transformer.adapters import bases, create_root, fingerprints
from grad_transformer.adapters.bases import (
    check_device,
    check_dtype,
    load_backbone,
    load_causal_lm,
    load_config,
    load_tokenizer,
    make_backbone,
    outline_causal_lm,
)
from grad_transformer.adapters.fingerprints import fingerprint_base_model, has_fingerprint
from grad_transformer.errors import GradTransformerError, UsageError
from grad_transformer.lab import make_lab_tokenizer
from tests.worlds import lora, tiny_qwen2, tiny_root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_qwen2(tmp_path_factory.mktemp("whole") / "base")
    make_lab_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(whole, tmp_path / "base"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value for name, value in tensors.items() if value is not None}, path, {"format": "pt"})


# Code


@pytest.mark.parametrize("model_type", ["evil", "qwen2"])
def test_code_of_a_repository_never_runs_whatever_a_terminal_answers(
    base: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    (base / "evil.py").write_text("raise SystemExit('code ran')\n")
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(base, model_type=model_type, auto_map=classes)
    path = base / "tokenizer_config.json"
    settings = {"tokenizer_class": "Evil" if model_type == "evil" else "Qwen2Tokenizer"}
    settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_HUB_TRUST_REMOTE_CODE", "1")
    for load in (load_config, load_causal_lm, load_tokenizer, outline_causal_lm):
        if model_type == "qwen2":  # which transformers knows itself
            load(base)
            continue
        with pytest.raises(UsageError, match="never run"):
            load(base)


def test_compiled_code_that_a_config_names_is_not_fetched(base: Path) -> None:
    edit_config(base, attn_implementation="evil/kernel", experts_implementation="evil/kernel")
    assert load_config(base)._attn_implementation is None
    assert load_causal_lm(base).config._attn_implementation in ("sdpa", "eager")
    edit_config(base, text_config={"attn_implementation": "evil/kernel"})
    with pytest.raises(UsageError, match="compiled code"):
        load_config(base)
    with pytest.raises(UsageError, match="compiled code"):
        make_backbone(T5Config(d_model=8, num_layers=1, attn_implementation="evil/kernel"))


def test_pickles_are_refused(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(UsageError, match="not stored as safetensors") as info:
        load_causal_lm(base)
    assert info.value.found == "pytorch_model.bin"


# What is there


def test_a_mistyped_path_is_known_without_the_hub(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grad_transformer.adapters.base_files.fetch", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(UsageError, match="no such folder") as info:
        create_root(base.with_name("bace"), lora(), output_dir=base.with_name("root"))
    assert info.value.remedy == f"did you mean {base}?"
    monkeypatch.chdir(base.parent)
    for name in ("./bace", "~/nowhere/bace", "a/b/c", "C:\\models\\tiny", "\0", "x" * 5000, str(base / "config.json")):
        with pytest.raises(UsageError):
            load_config(name)


def test_an_adapter_is_no_base_model(base: Path, tmp_path: Path) -> None:
    create_root(base, lora(), output_dir=tmp_path / "adapter")
    shutil.copy(base / "tokenizer.json", tmp_path / "adapter")
    for load in (load_causal_lm, load_tokenizer, outline_causal_lm):
        with pytest.raises(UsageError, match="PEFT adapter") as info:
            load(tmp_path / "adapter")
        assert "merge" in str(info.value.remedy)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda base: edit_config(base, quantization_config={"quant_method": "bitsandbytes"}), "quantised"),
        (lambda base: (base / "config.json").write_text("{"), "not valid JSON"),
        (lambda base: (base / "config.json").unlink(), "no model in the format"),
        (lambda base: edit_config(base, model_type="t5"), "cannot be loaded"),
        (lambda base: edit_config(base, num_hidden_layers=10**9), "absurd"),
        (lambda base: edit_config(base, max_position_embeddings=10**12), "absurd"),
        (lambda base: edit_config(base, hidden_size=2**24, num_attention_heads=4), "cannot hold the weights"),
        (lambda base: edit_config(base, hidden_size="x"), "cannot be loaded"),
        (lambda base: (base / "model.safetensors").write_bytes(b"\x08" + bytes(99)), "cannot be loaded"),
        (lambda base: edit_weights(base, model__norm__weight=None), "lacks weights"),
        (lambda base: edit_weights(base, model__norm__weight=torch.ones(3)), "cannot be loaded"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_a_typed_error(base: Path, spoil: Any, message: str) -> None:
    spoil(base)
    with pytest.raises(UsageError, match=message) as info:
        load_causal_lm(base)
    assert str(info.value.path).startswith(str(base))


def test_a_model_without_tokenizer_files_says_so(base: Path) -> None:
    (base / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="no tokenizer"):
        load_tokenizer(base)
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_tokenizer(base)


def test_devices_and_dtypes_that_are_not_there_are_refused() -> None:
    assert check_device().type in ("cpu", "cuda")
    assert check_device("cpu") == torch.device("cpu")
    assert check_dtype("bfloat16") == torch.bfloat16
    for device in ("cuda:77", "nonsense", "meta"):
        with pytest.raises(UsageError):
            check_device(device)
    for dtype in ("int8", "nonsense", torch.int64):
        with pytest.raises(UsageError, match="no such dtype"):
            check_dtype(dtype)


def test_a_backbone_comes_through_the_same_door(tmp_path: Path) -> None:
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=4)
    T5Model(config).save_pretrained(tmp_path / "t5")
    assert isinstance(load_backbone(tmp_path / "t5", dtype="bfloat16"), T5Model)
    edit_config(tmp_path / "t5", num_layers=10**8)
    with pytest.raises(UsageError, match="absurd"):
        load_backbone(tmp_path / "t5")
    with pytest.raises(GradTransformerError, match="absurd"):
        make_backbone(T5Config(num_layers=10**8))


# Fingerprints


def test_every_value_counts(whole: Path) -> None:
    model = load_causal_lm(whole)
    before = fingerprint_base_model(model)
    weight = model.get_input_embeddings().weight
    assert len(before) == len("v2:") + 64
    for place in (1, 2, weight.numel() - 1):
        kept = weight.detach().reshape(-1)[place].clone()
        with torch.no_grad():
            weight.view(-1)[place] += 0.5
        assert fingerprint_base_model(model) != before
        with torch.no_grad():
            weight.view(-1)[place] = kept
    assert fingerprint_base_model(model) == before


def test_a_base_with_values_between_the_sampled_ones_changed_is_refused(whole: Path, tmp_path: Path) -> None:
    root = create_root(whole, lora(), output_dir=tmp_path / "root")
    model = load_causal_lm(whole)
    with torch.no_grad():
        for parameter in model.parameters():
            step = max(1, parameter.numel() // 64)
            sampled = torch.zeros(parameter.numel(), dtype=torch.bool)
            sampled[torch.arange(0, parameter.numel(), step)[:64]] = True
            parameter[~sampled.reshape(parameter.shape)] = 0.0
    with pytest.raises(GradTransformerError, match="not the one that the root was made for"):
        root.check_base(model)


def test_what_an_earlier_version_recorded_is_still_checked(whole: Path, tmp_path: Path) -> None:
    model = load_causal_lm(whole)
    recorded = fingerprints._sampled_fingerprint(model)
    assert has_fingerprint(model, recorded)
    assert not has_fingerprint(load_causal_lm(tiny_qwen2(tmp_path, seed=1)), recorded)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_a_checkpoint_has_one_fingerprint_in_every_dtype(base: Path, dtype: str) -> None:
    # Nothing is known of a copy's files yet.
    model = load_causal_lm(base, dtype=dtype)
    assert model.dtype == bases.DTYPES[dtype]
    stored = load_causal_lm(base)
    assert fingerprint_base_model(model) == fingerprint_base_model(stored)
    assert has_fingerprint(model, fingerprints._sampled_fingerprint(stored))


def hashes(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tensors that are hashed from now on."""
    seen: list[torch.Tensor] = []
    hash_values = fingerprints._hash_values
    monkeypatch.setattr(fingerprints, "_hash_values", lambda tensor: seen.append(tensor) or hash_values(tensor))
    return seen


def test_a_checkpoint_is_hashed_once_until_its_files_change(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint_base_model(load_causal_lm(base))
    seen = hashes(monkeypatch)
    assert fingerprint_base_model(load_causal_lm(base, dtype="bfloat16")) == first
    assert not seen
    edit_weights(base, model__norm__weight=torch.full((16,), 3.0))
    assert fingerprint_base_model(load_causal_lm(base)) != first
    assert seen


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"full": 3}', b'{"full": "v2:0", "sampled": "0"}', b"\xff"])
def test_a_kept_fingerprint_that_is_broken_is_taken_again(
    base: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    first = fingerprint_base_model(load_causal_lm(base))
    fingerprints._cache_file(base).write_bytes(content)
    seen = hashes(monkeypatch)
    assert fingerprint_base_model(load_causal_lm(base)) == first
    assert seen


def test_a_merged_model_is_another_one(whole: Path) -> None:
    """Merging writes past autograd, into the `data` of parameters."""
    model: PreTrainedModel = load_causal_lm(whole)
    before = fingerprint_base_model(model)
    for parameter in model.parameters():
        parameter.data += 0.1
    assert fingerprint_base_model(model) != before


def test_a_disk_on_which_nothing_can_be_kept_stops_nobody(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fingerprints, "write_json_atomic", refuse)
    assert fingerprint_base_model(load_causal_lm(base)).startswith("v2:")


# Roots


def test_a_root_records_where_its_base_model_is_whatever_folder_it_was_made_from(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    assert create_root("base", lora(), output_dir="root").base_model == str(base)
    assert create_root(load_causal_lm("base"), lora(), output_dir="root").base_model == str(base)


def test_patterns_that_no_reader_takes_are_written_as_what_they_came_to(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {r".*layers.*q_proj": 3}, "alpha_pattern": {r".*1.*v_proj": 4}}
    root = tiny_root(tmp_path, **patterns)
    again = type(root).from_pretrained(tmp_path / "root")
    assert again.layout == root.layout
    ranks = {spec.module: spec.shape[0] for spec in again.layout.tensor_specs() if spec.side == "A"}
    assert {module.rsplit(".", 1)[-1]: rank for module, rank in ranks.items()} == {"q_proj": 3, "v_proj": 2}
    scalings = {spec.scaling for spec in again.layout.tensor_specs() if ".1." in spec.module and "v_proj" in spec.key}
    assert scalings == {2.0}
