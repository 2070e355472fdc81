from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from grad_transformer.errors import IncompleteArtifactError, UsageError
from grad_transformer.finetuning import FineTuningRecipe
from grad_transformer.lab import PRESETS, LabWorld, make_base_model, make_lab_tokenizer, pretrain_base_models
from grad_transformer.lab.pretrain import pretrain


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_both_base_models_load_with_the_auto_classes(tmp_path: Path, mini_world: LabWorld):
    paths = pretrain_base_models(mini_world, tmp_path / "bases")
    assert [path.name for path in paths] == ["tinylm", "llm"]
    row = mini_world.public_rows(1)[0]
    for path, preset in zip(paths, (mini_world.preset.tinylm, mini_world.preset.llm), strict=True):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        assert isinstance(model, Qwen2ForCausalLM) and model.config.hidden_size == preset.hidden_size
        encoded = tokenizer(row["prompt"], return_tensors="pt")
        assert model(**encoded).logits.shape == (1, 9, 27)
        manifest = json.loads((path / "base.json").read_text())
        assert manifest["world"] == mini_world.to_dict()
        assert manifest["preset"]["pretraining_steps"] == preset.pretraining_steps
        assert manifest["final_loss"] > 0 and 0 <= manifest["skill_accuracy"] <= 1
    assert sorted(path.name for path in (tmp_path / "bases").iterdir()) == ["llm", "tinylm"]


def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_state_alone(tmp_path: Path, mini_world: LabWorld):
    torch.manual_seed(1)
    first = pretrain_base_models(mini_world, tmp_path / "first")
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    second = pretrain_base_models(mini_world, tmp_path / "second")
    assert [weights(path) for path in first] == [weights(path) for path in second]
    other = pretrain_base_models(LabWorld(1, mini_world.preset), tmp_path / "other")
    assert all(weights(a) != weights(b) for a, b in zip(first, other, strict=True))


def test_an_interrupted_run_leaves_nothing_that_looks_finished_and_goes_on_where_it_stopped(
    tmp_path: Path, mini_world: LabWorld, monkeypatch: pytest.MonkeyPatch
):
    save = Qwen2ForCausalLM.save_pretrained

    def save_then_die(self: Qwen2ForCausalLM, folder: Path, **kwargs: object) -> None:
        save(self, folder, **kwargs)
        if self.config.hidden_size == mini_world.preset.llm.hidden_size:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Qwen2ForCausalLM, "save_pretrained", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            pretrain_base_models(mini_world, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tinylm"]
    before = (tmp_path / "tinylm" / "model.safetensors").stat().st_mtime_ns
    tinylm, llm = pretrain_base_models(mini_world, tmp_path)
    assert (tinylm / "model.safetensors").stat().st_mtime_ns == before
    assert (llm / "base.json").is_file()


def test_base_models_of_another_world_are_neither_used_nor_overwritten(tmp_path: Path, mini_world: LabWorld):
    tinylm, _ = pretrain_base_models(mini_world, tmp_path)
    before = weights(tinylm)
    with pytest.raises(UsageError, match="another seed or preset"):
        pretrain_base_models(LabWorld(1, mini_world.preset), tmp_path)
    assert weights(tinylm) == before
    (tinylm / "base.json").unlink()
    with pytest.raises(IncompleteArtifactError, match="no finished base model"):
        pretrain_base_models(mini_world, tmp_path)


def test_pretraining_lowers_the_loss(mini_world: LabWorld):
    preset = mini_world.preset.tinylm
    model = make_base_model(preset, seed=0)
    preset = type(preset)(**{**vars(preset), "pretraining_steps": 60, "pretraining_batch_size": 64})
    losses = pretrain(model, mini_world, preset, rng=np.random.default_rng(0), description="test")
    assert len(losses) == 60
    # ln 27 is 3.3; knowing that answers are digits gives 2.0 (the end of the text is always right).
    assert np.mean(losses[:3]) > 2.6 and np.mean(losses[-10:]) < 2.2
    assert len(make_lab_tokenizer()) == model.config.vocab_size


def test_recipe_arguments_name_each_base_models_own_steps():
    preset = PRESETS["full"]
    tinylm, llm = (preset.recipe_arguments(model) for model in (preset.tinylm, preset.llm))
    assert (tinylm["max_steps"], llm["max_steps"]) == (120, 80)
    assert (tinylm["learning_rate"], llm["learning_rate"]) == (0.03, 0.06)
    FineTuningRecipe.from_dict(FineTuningRecipe(**llm).to_dict())
    assert (PRESETS["full"].shadow_runs, PRESETS["quick"].shadow_runs) == (560, 140)
