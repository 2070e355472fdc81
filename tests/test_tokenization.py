"""LoraDeltaTokenizer: adapters to blocks and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grad_transformer import LoraDeltaTokenizer, LoraLayout, create_root
from grad_transformer.errors import IncompleteArtifactError, LayoutMismatchError, RootMismatchError, UsageError
from tests.worlds import lora, moved, synthetic_root, tiny_root


@pytest.fixture
def root(tmp_path):
    return tiny_root(tmp_path)


def deltas(layout, count=8, seed=0):
    return torch.randn(count, layout.numel, generator=torch.Generator().manual_seed(seed))


@st.composite
def roots(draw):
    """Roots of random layouts, ranks and dtypes, A on a grid of 1/16 as root and adapter values below are."""
    shapes, ranks = {}, {}
    for layer in range(draw(st.integers(1, 4))):
        for module in draw(st.lists(st.sampled_from(["q", "v", "up"]), min_size=1, unique=True)):
            path, rank = f"layers.{layer}.{module}", draw(st.integers(1, 3))
            ranks[path] = rank
            shapes[f"base_model.model.{path}.lora_A.weight"] = (rank, draw(st.integers(1, 6)))
            shapes[f"base_model.model.{path}.lora_B.weight"] = (draw(st.integers(1, 6)), rank)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": ranks}
    layout = LoraLayout.from_adapter_config(config, shapes)
    return synthetic_root(layout, dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


@given(roots(), st.integers(0, 2**31))
def test_decode_inverts_encode_bitwise_without_standardisation(root, seed):
    generator = torch.Generator().manual_seed(seed)
    values = root.adapter.flat(dtype=torch.float64)
    # As fine-tuning leaves it: B anything, A within a factor of two of the root (where float32 differences are exact).
    factor = 0.75 + torch.rand(root.layout.numel, generator=generator, dtype=torch.float64)
    fresh = torch.randn(root.layout.numel, generator=generator, dtype=torch.float64)
    adapter = root.adapter.with_values(torch.where(values == 0, fresh, values * factor))
    tokenizer = LoraDeltaTokenizer(root)
    decoded = tokenizer.decode(tokenizer.encode(adapter))
    for key, tensor in adapter.tensors.items():
        assert decoded.tensors[key].dtype == tensor.dtype
        assert torch.equal(decoded.tensors[key], tensor)


@given(roots(), st.integers(0, 2**31))
def test_deltas_of_any_values_round_trip_bitwise_without_standardisation(root, seed):
    tokenizer = LoraDeltaTokenizer(root)
    values = deltas(root.layout, seed=seed)
    assert torch.equal(tokenizer.unstandardize(tokenizer.standardize(values)), values)


@given(
    roots(),
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from(["none", "global", "block"]),
    st.floats(1e-6, 1e4),
)
@settings(max_examples=100)
def test_standardised_round_trip_within_1e_6_relative(root, seed, center, scale, magnitude):
    values = deltas(root.layout, seed=seed) * magnitude
    tokenizer = LoraDeltaTokenizer(root, center=center, scale=scale).fit([values])
    again = tokenizer.unstandardize(tokenizer.standardize(values))
    assert (again - values).norm() <= 1e-6 * values.norm()


def test_statistics_do_not_depend_on_how_the_deltas_are_chunked(root):
    values = deltas(root.layout, 50) * 3 + 2
    whole = LoraDeltaTokenizer(root, center=True, scale="block").fit([values])
    chunked = LoraDeltaTokenizer(root, center=True, scale="block").fit(iter(values.split(7)))
    torch.testing.assert_close(chunked.mean_P, whole.mean_P)
    torch.testing.assert_close(chunked.scale_L, whole.scale_L)
    blocks = whole.standardize(values)
    assert blocks.mean(dim=0).abs().max() < 1e-5
    torch.testing.assert_close(blocks.square().mean(dim=(0, 2)), torch.ones(root.layout.num_blocks))


def test_global_scale_keeps_the_proportions_of_blocks(root):
    values = deltas(root.layout, 50)
    values[:, : root.layout.widths[0]] *= 10
    blocks = LoraDeltaTokenizer(root, scale="global").fit([values]).standardize(values)
    rms = blocks.square().mean(dim=(0, 2)).sqrt()
    torch.testing.assert_close(rms[0] / rms[1], torch.tensor(10.0), rtol=0.1, atol=0)


def test_a_block_that_never_moves_survives(root):
    values = deltas(root.layout)
    values[:, : root.layout.widths[0]] = 0
    tokenizer = LoraDeltaTokenizer(root, scale="block").fit([values])
    assert torch.isfinite(tokenizer.standardize(values)).all()


def test_call_gives_named_batches_masks_and_array_types(root, tmp_path):
    folder = moved(root).save_pretrained(tmp_path / "client")
    tokenizer = LoraDeltaTokenizer(root, role="source")
    length, width = root.layout.num_blocks, root.layout.widths[0]
    one = tokenizer(folder)
    assert one["source_blocks"].shape == (1, length, width)
    assert one["attention_mask"].tolist() == [[1] * length]
    many = tokenizer(
        [str(folder), moved(root, seed=1)], padding="max_length", max_length=length + 2, return_tensors="np"
    )
    assert isinstance(many["source_blocks"], np.ndarray)
    assert many["source_blocks"].shape == (2, length + 2, width)
    assert many["attention_mask"].tolist() == [[1] * length + [0, 0]] * 2
    assert list(LoraDeltaTokenizer(root, role="target")(folder)) == ["target_blocks", "attention_mask"]
    with pytest.raises(UsageError, match="never cut off"):
        tokenizer(folder, padding="max_length", max_length=1)
    with pytest.raises(UsageError, match="nothing to encode"):
        tokenizer([])


def test_decode_of_a_batch_gives_adapters_that_name_their_root(root):
    tokenizer = LoraDeltaTokenizer(root)
    adapters = tokenizer.decode(torch.zeros(2, root.layout.num_blocks, root.layout.widths[0]))
    assert len(adapters) == 2
    assert adapters[0].metadata["root"]["fingerprint"] == root.fingerprint
    assert all(torch.equal(adapters[0].tensors[key], tensor) for key, tensor in root.adapter.tensors.items())


def test_a_client_that_started_elsewhere_is_refused(root, tmp_path):
    stranger = create_root(tmp_path / "base", lora(), output_dir=tmp_path / "elsewhere", seed=9)
    folder = moved(stranger).save_pretrained(tmp_path / "client")
    with pytest.raises(RootMismatchError):
        LoraDeltaTokenizer(root)(folder)
    wider = create_root(tmp_path / "base", lora(r=4), output_dir=tmp_path / "wider")
    with pytest.raises(LayoutMismatchError, match="`r` differs"):
        LoraDeltaTokenizer(root)(moved(wider).save_pretrained(tmp_path / "wide client"))


def test_save_and_load(root, tmp_path):
    values = deltas(root.layout)
    recipe = {"learning_rate": 0.01}
    tokenizer = LoraDeltaTokenizer(root, role="target", center=True, scale="global", recipe=recipe).fit([values])
    files = tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert all(path.endswith((".json", ".safetensors")) for path in files)
    again = LoraDeltaTokenizer.from_pretrained(tmp_path, subfolder="tokenizer")
    assert torch.equal(again.standardize(values), tokenizer.standardize(values))
    assert (again.role, again.recipe, again.root.fingerprint) == ("target", recipe, root.fingerprint)
    (tmp_path / "tokenizer" / "statistics.safetensors").unlink()
    with pytest.raises(IncompleteArtifactError, match="statistics"):
        LoraDeltaTokenizer.from_pretrained(tmp_path / "tokenizer")


def test_standardising_without_statistics_is_refused(root):
    with pytest.raises(UsageError, match="was not fitted"):
        LoraDeltaTokenizer(root, center=True).standardize(deltas(root.layout))
    with pytest.raises(UsageError):
        LoraDeltaTokenizer(root).fit([])
    with pytest.raises(UsageError):
        LoraDeltaTokenizer(root, role="both")


def test_repr_is_one_line_of_facts(root):
    facts = json.loads(repr(LoraDeltaTokenizer(root)).split(" ", 1)[1])
    assert facts["blocks"] == root.layout.num_blocks
