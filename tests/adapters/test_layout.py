"""LoraLayout: reading it off PEFT adapters, ordering, both directions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

from grad_transformer.adapters import LoraLayout
from grad_transformer.errors import AdapterFormatError, LayoutMismatchError


SIZES = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2, "vocab_size": 20}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}


def header(modules, rank=2, in_features=4, out_features=6):
    shapes = {}
    for module in modules:
        shapes[f"base_model.model.{module}.lora_A.weight"] = (rank, in_features)
        shapes[f"base_model.model.{module}.lora_B.weight"] = (out_features, rank)
    return shapes


def layout_of(model, config):
    peft_model = get_peft_model(model, config)
    tensors = get_peft_model_state_dict(peft_model)
    data = peft_model.peft_config["default"].to_dict()
    layout = LoraLayout.from_adapter_config(data, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    return layout, tensors, peft_model


@pytest.mark.parametrize(
    ("config", "target_modules"),
    [
        (Qwen2Config(**SIZES, intermediate_size=32, num_key_value_heads=1), ["q_proj", "v_proj"]),
        (LlamaConfig(**SIZES, intermediate_size=32, num_key_value_heads=2), "all-linear"),
        (GPT2Config(n_embd=16, n_layer=12, n_head=2, vocab_size=20), ["c_attn"]),
        (OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16), ["q_proj", "fc1"]),
    ],
)
def test_any_architecture_gives_one_block_per_layer_in_numeric_order(config, target_modules):
    model = AutoModelForCausalLM.from_config(config)
    layout, tensors, _ = layout_of(
        model, LoraConfig(r=2, lora_alpha=8, target_modules=target_modules, fan_in_fan_out=config.model_type == "gpt2")
    )
    numbers = [int(block.name.rsplit(".", 1)[-1]) for block in layout.blocks]
    assert numbers == list(range(12))
    assert layout.numel == sum(tensor.numel() for tensor in tensors.values())
    assert len(layout.type_widths) == 1


def test_patterns_rslora_and_chosen_layers_give_peft_scalings():
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, intermediate_size=32, num_key_value_heads=1))
    config = LoraConfig(
        r=2,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[1, 3, 10],
        rank_pattern={"layers.3.self_attn.q_proj": 4},
        alpha_pattern={"v_proj": 32},
        use_rslora=True,
    )
    layout, _, peft_model = layout_of(model, config)
    assert [block.name for block in layout.blocks] == ["model.layers.1", "model.layers.3", "model.layers.10"]
    for spec in layout.tensor_specs():
        module = peft_model.base_model.model.get_submodule(spec.module)
        assert math.isclose(spec.scaling, module.scaling["default"])
    assert layout.block_types == (0, 1, 0)
    assert layout.type_widths[1] > layout.type_widths[0]


def test_embedding_comes_first_and_head_last():
    shapes = header(["model.layers.10.mlp.up_proj", "model.layers.9.mlp.up_proj", "lm_head"])
    shapes["base_model.model.model.embed_tokens.lora_embedding_A"] = (2, 20)
    shapes["base_model.model.model.embed_tokens.lora_embedding_B"] = (4, 2)
    layout = LoraLayout.from_adapter_config(CONFIG, shapes)
    names = [block.name for block in layout.blocks]
    assert names == ["model.embed_tokens", "model.layers.9", "model.layers.10", "lm_head"]
    assert layout.block_types == (0, 1, 1, 2)


def test_experts_belong_to_their_layer():
    shapes = header([f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in (0, 1) for expert in (0, 1)])
    layout = LoraLayout.from_adapter_config(CONFIG, shapes)
    assert [len(block.tensors) for block in layout.blocks] == [4, 4]
    assert layout.block_types == (0, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("lora_bias", True),
        ("peft_type", "IA3"),
        ("trainable_token_indices", [1]),
        ("init_lora_weights", "pissa_niter_4"),
    ],
)
def test_what_blocks_cannot_hold_is_refused_by_name(field, value):
    with pytest.raises(AdapterFormatError, match=field) as info:
        LoraLayout.from_adapter_config({**CONFIG, field: value}, header(["layers.0.q"]), path="some/adapter")
    assert info.value.path == "some/adapter"
    assert info.value.remedy


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "no tensors"),
        ({"base_model.model.layers.0.q.lora_A.weight": (2, 4)}, "only one of its two"),
        ({**header(["layers.0.q"]), "base_model.model.layers.0.q.bias": (4,)}, "not the key of a LoRA tensor"),
        (header(["layers.0.q"], rank=3), "contradict its rank"),
        ({"_module.base_model.model.layers.0.q.lora_A.weight": (2, 4)}, "not the key of a LoRA tensor"),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_refused(shapes, message):
    with pytest.raises(AdapterFormatError, match=message):
        LoraLayout.from_adapter_config(CONFIG, shapes)


def test_check_config_never_evaluates_a_strangers_patterns():
    layout = LoraLayout.from_adapter_config(CONFIG, header(["layers.0.q"]))
    evil = {**CONFIG, "rank_pattern": {"(a+)+$": 2}}
    with pytest.raises(LayoutMismatchError, match="rank_pattern"):
        layout.check_config(evil, header(["layers.0.q"]))
    with pytest.raises(LayoutMismatchError, match="lora_alpha"):
        layout.check_config({**CONFIG, "lora_alpha": 16}, header(["layers.0.q"]))
    with pytest.raises(LayoutMismatchError, match="not those of the root"):
        layout.check_config(CONFIG, header(["layers.0.q", "layers.1.q"]))
    with pytest.raises(LayoutMismatchError, match="another shape"):
        layout.check_config(CONFIG, header(["layers.0.q"], in_features=5))
    layout.check_config({**CONFIG, "rank_pattern": {}}, header(["layers.0.q"]))


@st.composite
def layouts(draw):
    """Layers that differ in modules, widths and ranks, with and without a head."""
    shapes, ranks = {}, {}
    for layer in range(draw(st.integers(1, 4))):
        for module in draw(st.lists(st.sampled_from(["q", "v", "mlp.up"]), min_size=1, unique=True)):
            rank = draw(st.sampled_from([1, 2, 3]))
            path = f"layers.{layer}.{module}"
            ranks[path] = rank
            shapes |= header([path], rank, draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    if draw(st.booleans()):
        shapes |= header(["lm_head"])
    return LoraLayout.from_adapter_config({**CONFIG, "rank_pattern": ranks}, shapes)


@given(layouts(), st.integers(0, 2**31), st.sampled_from([(), (3,), (2, 2)]))
def test_flatten_and_blocks_round_trip_bitwise(layout, seed, leading):
    values = torch.randn(*leading, layout.numel, generator=torch.Generator().manual_seed(seed))
    named = layout.unflatten(values)
    assert torch.equal(layout.flatten(named), values)
    blocks = layout.to_blocks(values)
    assert blocks.shape == (*leading, layout.num_blocks, max(layout.widths))
    assert torch.equal(layout.from_blocks(blocks), values)


@given(layouts())
def test_json_round_trip(layout):
    assert LoraLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


def test_flatten_refuses_unknown_and_missing_tensors():
    layout = LoraLayout.from_adapter_config(CONFIG, header(["layers.0.q"]))
    tensors = layout.unflatten(torch.zeros(layout.numel))
    with pytest.raises(LayoutMismatchError, match="not part of the layout"):
        layout.flatten({**tensors, "other": torch.zeros(1)})
    key = next(iter(tensors))
    with pytest.raises(LayoutMismatchError, match="missing or has another shape"):
        layout.flatten({name: tensor for name, tensor in tensors.items() if name != key})
    with pytest.raises(LayoutMismatchError):
        layout.unflatten(torch.zeros(layout.numel + 1))
