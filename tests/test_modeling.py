"""GradTransformer: backbones, loss, generation, files."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    DynamicCache,
    Qwen2Config,
    T5Config,
    T5GemmaConfig,
)

from grad_transformer import GradTransformer, GradTransformerConfig, LoraDeltaTokenizer
from grad_transformer.errors import FormatVersionError, LayoutMismatchError, UsageError
from grad_transformer.modeling_decoding import FewRowsLinear, roomy_cache
from tests.worlds import moved, tiny_root


def t5(**overrides):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    return T5Config(**{**sizes, "dropout_rate": 0.0, **overrides})


def bart():
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIDE.items()}
    return BartConfig(d_model=32, vocab_size=50, dropout=0.0, **sizes)


SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}


def t5gemma():
    side = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 50,
    }
    return T5GemmaConfig(encoder=side, decoder={**side, "cross_attention_hidden_size": 32}, dropout_rate=0.0)


BACKBONES = {"t5": t5, "bart": bart, "t5gemma": t5gemma}


@pytest.fixture
def tokenizers(tmp_path):
    source = LoraDeltaTokenizer(tiny_root(tmp_path / "tiny", layers=3), role="source", scale="block")
    target_root = tiny_root(tmp_path / "large", layers=5, hidden=32, layers_to_transform=[0, 1, 2, 3])
    target = LoraDeltaTokenizer(target_root, role="target", center=True, scale="global")
    for tokenizer in (source, target):
        tokenizer.fit([0.1 * torch.randn(16, tokenizer.layout.numel, generator=torch.Generator().manual_seed(0))])
    return source, target


def inputs(tokenizers, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    source, target = (
        tokenizer.standardize(0.1 * torch.randn(batch, tokenizer.layout.numel, generator=generator))
        for tokenizer in tokenizers
    )
    return source, target


def build(tokenizers, backbone="t5", **kwargs):
    torch.manual_seed(0)
    # Not the small default, so that differences between paths through the model would show.
    return GradTransformer.from_backbone(BACKBONES[backbone](), *tokenizers, initializer_range=0.5, **kwargs).eval()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("position_embeddings", [True, False])
def test_cached_generation_equals_the_uncached_loop_and_teacher_forcing(tokenizers, backbone, position_embeddings):
    model = build(tokenizers, backbone, position_embeddings=position_embeddings)
    source, _ = inputs(tokenizers)
    cached = model.generate_blocks(source)
    assert cached.shape == (3, 4, tokenizers[1].layout.widths[0])
    torch.testing.assert_close(model.generate_blocks(source, use_cache=False), cached, rtol=1e-5, atol=1e-5)
    # Fed its own predictions, the training path gives them again: start block and shift are the same in both.
    torch.testing.assert_close(model(source, labels=cached).blocks, cached, rtol=1e-5, atol=1e-5)


@pytest.fixture
def two_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (4, 1), (3, 12), (5, 60), (0, 1)])
@pytest.mark.parametrize("outputs", [6, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_read_with_every_core_is_a_linear_layer(two_cores, shape, outputs, bias, monkeypatch):
    torch.manual_seed(0)
    layer, values = FewRowsLinear(48, outputs, bias=bias), torch.randn(*shape, 48)
    expected = torch.nn.functional.linear(values, layer.weight, layer.bias)
    assert torch.equal(layer(values), expected)
    parts = []
    multiply = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda first, second: parts.append(len(first)) or multiply(first, second))
    with torch.no_grad():
        torch.testing.assert_close(layer(values), expected, rtol=1e-5, atol=1e-5)
        assert parts == ([2] if 0 < shape[0] * shape[1] <= 256 else [])
        # Neither in other precisions nor where the cores cannot share the rows.
        layer.bfloat16()(values.bfloat16())
        FewRowsLinear(48, 7)(values)
    assert len(parts) <= 1


def test_a_cache_with_room_holds_what_the_growing_one_holds():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = roomy_cache(t5()).self_attention_cache, DynamicCache()
    for length in (1, 1, 30, 1, 3, 40, 1):
        states = torch.randn(2, 3, 4, length, 5, generator=generator)
        for layer in (0, 1):
            given = [part * (layer + 1) for part in states]
            for mine, other in zip(ours.update(*given, layer), theirs.update(*given, layer), strict=True):
                assert torch.equal(mine, other)
            assert ours.get_seq_length(layer) == theirs.get_seq_length(layer)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_generation_with_several_cores_equals_generation_with_one(tokenizers, backbone, two_cores):
    model = build(tokenizers, backbone)
    source, _ = inputs(tokenizers, batch=1)
    several = model.generate_blocks(source)
    torch.testing.assert_close(model.generate_blocks(source, use_cache=False), several, rtol=1e-5, atol=1e-5)
    torch.set_num_threads(1)
    torch.testing.assert_close(model.generate_blocks(source), several, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bfloat16_generation_is_near_the_uncached_loop_and_float32(tokenizers, backbone):
    # The usual small weights: with the others, rounding grows from block to block.
    model = GradTransformer.from_backbone(BACKBONES[backbone](), *tokenizers, initializer_range=0.1).eval()
    source, _ = inputs(tokenizers)
    exact = model.generate_blocks(source)
    model.bfloat16()
    cached, whole = model.generate_blocks(source), model.generate_blocks(source, use_cache=False)
    scale = float(exact.square().mean().sqrt())
    for values in (whole, exact):
        assert float((cached.float() - values.float()).square().mean().sqrt()) < 0.03 * scale


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_every_parameter_is_trained_and_none_belongs_to_a_vocabulary(tokenizers, backbone, decoding, tmp_path):
    model = build(tokenizers, backbone, decoding=decoding)
    source, target = inputs(tokenizers)
    model(source, labels=target).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.save_pretrained(tmp_path / "mapper")
    with safe_open(tmp_path / "mapper" / "model.safetensors", framework="pt") as file:
        assert not [key for key in file.keys() if "shared" in key or "embed_tokens" in key or "lm_head" in key]  # noqa: SIM118


@pytest.mark.parametrize("backbone", BACKBONES)
def test_loading_gives_the_same_mapper_with_its_tokenizers(tokenizers, backbone, tmp_path):
    model = build(tokenizers, backbone)
    source, _ = inputs(tokenizers)
    model.save_pretrained(tmp_path / "mapper")
    for loaded in (
        GradTransformer.from_pretrained(tmp_path / "mapper"),
        AutoModel.from_pretrained(tmp_path / "mapper"),
    ):
        assert isinstance(loaded, GradTransformer)
        torch.testing.assert_close(loaded.eval().generate_blocks(source), model.generate_blocks(source))
        assert loaded.source_tokenizer.root.fingerprint == tokenizers[0].root.fingerprint
        assert loaded.target_tokenizer.center
    half = GradTransformer.from_pretrained(tmp_path / "mapper", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.generate_blocks(source).dtype == torch.bfloat16
    names = {path.name for path in (tmp_path / "mapper").rglob("*") if path.is_file()}
    assert all(name.endswith((".json", ".safetensors")) for name in names)


def test_auto_classes_know_the_model_in_a_fresh_process(tokenizers, tmp_path):
    build(tokenizers).save_pretrained(tmp_path / "mapper")
    code = (
        "import sys, grad_transformer; from transformers import AutoConfig, AutoModel\n"
        "for auto in (AutoConfig, AutoModel): print(type(auto.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "mapper")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["GradTransformerConfig", "GradTransformer"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_pretrained_backbone_weights_are_taken(tokenizers, backbone, tmp_path):
    original = AutoModel.from_config(BACKBONES[backbone]())
    original.save_pretrained(tmp_path / "backbone")
    model = GradTransformer.from_backbone(tmp_path / "backbone", *tokenizers)
    expected = original.state_dict()
    taken = model.backbone.state_dict()
    assert taken
    assert all(torch.equal(expected[name], value) for name, value in taken.items())
    assert not (tmp_path / "backbone" / "source").exists()


def test_loss_is_the_mean_squared_error_over_real_values(tokenizers):
    model = build(tokenizers)
    source, target = inputs(tokenizers)
    output = model(source, labels=target)
    torch.testing.assert_close(output.loss, (output.blocks - target).square().mean())
    assert model(source).loss is None


def test_blocks_of_different_widths_have_their_own_projections(tmp_path):
    source_root = tiny_root(tmp_path / "tiny", layers=3, rank_pattern={"layers.1.self_attn.q_proj": 4})
    target_root = tiny_root(tmp_path / "large", layers=2, target_modules=["q_proj", "lm_head"])
    pair = [LoraDeltaTokenizer(source_root), LoraDeltaTokenizer(target_root, role="target")]
    assert len(pair[0].layout.type_widths) == 2
    assert len(pair[1].layout.type_widths) == 2
    model = build(pair)
    source, target = inputs(pair)
    output = model(source, labels=target)
    widths = pair[1].layout.widths
    real = torch.cat([(output.blocks - target)[:, i, :width].flatten() for i, width in enumerate(widths)])
    torch.testing.assert_close(output.loss, real.square().mean())
    cached = model.generate_blocks(source)
    torch.testing.assert_close(model.generate_blocks(source, use_cache=False), cached, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(source, labels=cached).blocks, cached, rtol=1e-5, atol=1e-5)


def test_padding_blocks_change_nothing(tokenizers):
    model = build(tokenizers)
    source, _ = inputs(tokenizers)
    padded = torch.nn.functional.pad(source, (0, 0, 0, 2), value=3.0)
    mask = torch.ones(padded.shape[:2], dtype=torch.int64)
    mask[:, -2:] = 0
    torch.testing.assert_close(
        model.generate_blocks(padded, mask), model.generate_blocks(source), rtol=1e-5, atol=1e-5
    )


def test_output_depends_on_every_source_block_and_not_on_the_rest_of_the_batch(tokenizers):
    model = build(tokenizers)
    source, _ = inputs(tokenizers)
    before = model.generate_blocks(source)
    for index in range(source.shape[1]):
        changed = source.clone()
        changed[0, index] += 1
        after = model.generate_blocks(changed)
        assert (after[0] - before[0]).abs().max() > 1e-4
        torch.testing.assert_close(after[1:], before[1:], rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(tokenizers):
    source, target = inputs(tokenizers)
    gradients = []
    for checkpointing in (False, True):
        model = build(tokenizers).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(source, labels=target).loss.backward()
        gradients.append(model.source_embedding.projections[0].weight.grad)
    torch.testing.assert_close(*gradients)


def test_generated_adapter_is_root_plus_mapped_mean_delta_and_loads_in_peft(tokenizers, tmp_path):
    model = build(tokenizers)
    source_root, target_root = (tokenizer.root for tokenizer in tokenizers)
    clients = [moved(source_root, seed=seed) for seed in range(2)]
    adapter = model.generate_adapter(clients)
    mean = torch.stack([tokenizers[0].delta(client) for client in clients]).mean(dim=0)
    expected = model.generate_deltas(mean[None])[0]
    torch.testing.assert_close(adapter.flat() - target_root.adapter.flat(), expected, rtol=1e-4, atol=1e-6)
    adapter.save_pretrained(tmp_path / "generated")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "large" / "base")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "generated"))
    state = {name.replace(".default", ""): value for name, value in loaded.named_parameters() if "lora_" in name}
    assert all(torch.equal(state[key], tensor) for key, tensor in adapter.tensors.items())


def test_a_mapper_without_tokenizers_says_what_to_do():
    with pytest.raises(UsageError, match="from_pretrained"):
        GradTransformer(GradTransformerConfig()).generate_adapter("somewhere")


def test_tokenizers_of_another_pair_are_refused(tokenizers, tmp_path):
    build(tokenizers).save_pretrained(tmp_path / "mapper")
    tokenizers[1].save_pretrained(tmp_path / "mapper" / "source")
    with pytest.raises(LayoutMismatchError, match="source tokenizer does not fit"):
        GradTransformer.from_pretrained(tmp_path / "mapper")


def test_configs_that_cannot_work_are_refused(tokenizers):
    with pytest.raises(UsageError, match="not an encoder-decoder"):
        GradTransformer.from_backbone(Qwen2Config(), *tokenizers)
    with pytest.raises(FormatVersionError):
        GradTransformer(GradTransformerConfig(format_version=99))
    for wrong in ({"source_block_types": [0, 2]}, {"target_type_widths": [0]}, {"decoding": "sideways"}):
        with pytest.raises(Exception, match="block_types|decoding"):
            GradTransformerConfig(**wrong)


def test_config_round_trip_keeps_both_base_models(tokenizers, tmp_path):
    config = build(tokenizers).config
    config.save_pretrained(tmp_path)
    again = GradTransformerConfig.from_pretrained(tmp_path)
    assert again.source_base_model == tokenizers[0].root.base_model
    assert again.backbone_config.d_model == 32
    assert again.format_version == 1
