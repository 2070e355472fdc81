"""DP-SGD: gradients, noise, sampling and epsilon against slow or independent computations; refusals; resuming."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch
from datasets import Dataset
from dp_accounting.pld import pld_privacy_accountant
from opacus.accountants import PRVAccountant
from transformers import AutoConfig, AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from grad_transformer import LoraAdapter, LoraDeltaTokenizer, create_root
from grad_transformer.adapters.privacy import statement_of
from grad_transformer.client import finetune_client
from grad_transformer.client.groups import Units, physical_batches, rows_by_group
from grad_transformer.client.mechanism import (
    PerExampleClipping,
    PoissonBatchSampler,
    check_trainable,
    coarse_rate,
    epsilon_of,
    noise_multiplier_for,
    plan_noise,
)
from grad_transformer.client.private import finetune_client_privately
from grad_transformer.client.secure_random import SecureRandom
from grad_transformer.client.trainer import PrivacyArguments, PrivateSFTTrainer, example_losses
from grad_transformer.errors import DataError, IncompleteArtifactError, RecipeError, UsageError
from grad_transformer.finetuning import FineTuningRecipe, attach_root, read_adapter_tensors
from grad_transformer.lab import make_lab_tokenizer
from tests.worlds import lora, moved, tiny_qwen2, tiny_root


TOKENIZER = make_lab_tokenizer()
RECIPE = FineTuningRecipe(max_steps=4, warmup_steps=0, learning_rate=1e-2, per_device_batch_size=4, max_length=32)
NO_NOISE = {"delta": 1e-5, "noise_multiplier": 0.0, "known_seed": 0}


@pytest.fixture
def root(tmp_path):
    return tiny_root(tmp_path)


@pytest.fixture
def model(root, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64).requires_grad_(False)
    peft_model = attach_root(base, root).double()
    values = root.layout.unflatten(moved(root).flat())
    peft_model.load_state_dict(
        {name.replace(".weight", ".default.weight"): v for name, v in values.items()}, strict=False
    )
    return peft_model


def make_batch(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Examples of different lengths, with different numbers of completion tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 12, (count,), generator=generator)
    ids = torch.randint(2, 32, (count, 12), generator=generator)
    mask = (torch.arange(12)[None] < lengths[:, None]).long()
    starts = torch.randint(1, 4, (count,), generator=generator)
    labels = ids.masked_fill((mask == 0) | (torch.arange(12)[None] < starts[:, None]), -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels, "unit": torch.arange(count)}


def make_rows(count: int) -> Dataset:
    batch = make_batch(count)
    rows = [
        {"input_ids": ids[mask > 0].tolist(), "labels": labels[mask > 0].tolist()}
        for ids, mask, labels, _ in zip(*batch.values(), strict=True)
    ]
    return Dataset.from_list(rows)


def make_trainer(model: Any, folder: Path, rows: Dataset | None = None, **changes: Any) -> PrivateSFTTrainer:
    privacy = changes.pop("privacy", PrivacyArguments(**{"batch_size": 4, **NO_NOISE}))
    settings = {"per_device_train_batch_size": 4, "max_grad_norm": 0.0, "gradient_accumulation_steps": 1}
    own = ("callbacks", "eval_dataset", "groups")
    trainer_arguments = {name: changes.pop(name) for name in own if name in changes}
    args = RECIPE.to_sft_config(folder, seed=0, **{**settings, **changes})
    rows = make_rows(16) if rows is None else rows
    return PrivateSFTTrainer(
        model, args, train_dataset=rows, processing_class=TOKENIZER, privacy=privacy, **trainer_arguments
    )


# Gradients


def clipped_sum_by_a_loop(model: Any, batch: dict[str, torch.Tensor], max_norm: float) -> list[torch.Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for index in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][index].sum())
        example = {name: value[index : index + 1, :length] for name, value in batch.items() if name != "unit"}
        gradients = torch.autograd.grad(example_losses(model, example).sum(), parameters)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        for part, gradient in zip(total, gradients, strict=True):
            # Opacus adds 1e-6 to the norm: it clips to a little less than the clipping norm, never to more.
            part += gradient * min(1.0, max_norm / (float(norm) + 1e-6))
    return total


@pytest.mark.parametrize("physical", [1, 3, 7, 100])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_clipped_gradients_equal_a_loop_of_single_examples_for_any_split(model, tmp_path, mode, physical, max_norm):
    batch = make_batch(7)
    expected = clipped_sum_by_a_loop(model, batch, max_norm)
    privacy = PrivacyArguments(**NO_NOISE, max_grad_norm=max_norm, gradients=mode)
    trainer = make_trainer(model, tmp_path / "t", per_device_train_batch_size=physical, privacy=privacy)
    trainer._clipping = PerExampleClipping(model, mode=mode, max_grad_norm=max_norm)
    trainer.noise = dataclasses.replace(trainer.noise, expected_batch_size=1)
    model.enable_input_require_grads()
    optimizer = trainer.create_optimizer()
    trainer.training_step(model, batch)
    optimizer.pre_step()
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7 * max(float(theirs.abs().max()), 1e-9) + 1e-9)


def test_the_loss_of_an_example_does_not_depend_on_the_others(model):
    batch = make_batch(5)
    alone = [example_losses(model, {name: value[i : i + 1] for name, value in batch.items()}) for i in range(5)]
    torch.testing.assert_close(example_losses(model, batch), torch.cat(alone))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_noise_has_its_nominal_variance_also_on_an_empty_batch(model, tmp_path, mode):
    privacy = PrivacyArguments(
        delta=1e-5, noise_multiplier=1.7, max_grad_norm=0.3, batch_size=8, gradients=mode, known_seed=0
    )
    trainer = make_trainer(model, tmp_path / "t", privacy=privacy)
    trainer._clipping = PerExampleClipping(model, mode=mode, max_grad_norm=0.3)
    optimizer = trainer.create_optimizer()
    empty = {name: value[:0] for name, value in make_batch(1).items()}
    noise = []
    for _ in range(100):
        trainer.training_step(model, empty)
        optimizer.pre_step()
        noise += [parameter.grad.flatten().clone() for parameter in model.parameters() if parameter.requires_grad]
    measured = torch.cat(noise) * 8
    assert len(measured) > 20_000
    assert float(measured.var()) == pytest.approx((1.7 * 0.3) ** 2, rel=0.02)
    assert abs(float(measured.mean())) < 0.02
    assert trainer.history == [(1.7, 0.5, 100)]


def test_one_example_moves_the_sum_by_no_more_than_the_clipping_norm(model, tmp_path):
    trainer = make_trainer(model, tmp_path / "t", privacy=PrivacyArguments(**NO_NOISE, max_grad_norm=0.02))
    trainer._clipping = PerExampleClipping(model, mode="hooks", max_grad_norm=0.02)
    trainer.noise = dataclasses.replace(trainer.noise, expected_batch_size=1)
    model.enable_input_require_grads()
    optimizer = trainer.create_optimizer()
    sums = []
    for batch in (make_batch(6), {name: value[:5] for name, value in make_batch(6).items()}):
        trainer.training_step(model, batch)
        optimizer.pre_step()
        sums.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert 0 < float((sums[0] - sums[1]).norm()) <= 0.02 * (1 + 1e-6)


def test_a_whole_group_moves_the_sum_by_no_more_than_the_clipping_norm(model, tmp_path):
    groups = [[0, 1, 2], [3], [4, 5, 6, 7], [8, 9]]
    privacy = PrivacyArguments(**NO_NOISE, max_grad_norm=0.02, group_column="patient", batch_size=1)
    trainer = make_trainer(
        model, tmp_path / "t", rows=make_rows(10), privacy=privacy, groups=groups, per_device_train_batch_size=4
    )
    trainer._clipping = PerExampleClipping(model, mode="hooks", max_grad_norm=0.02)
    model.enable_input_require_grads()
    optimizer = trainer.create_optimizer()

    def clipped_sum(chosen):
        trainer.training_step(model, trainer._collate([trainer._units[index] for index in chosen]))
        optimizer.pre_step()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    whole = clipped_sum([0, 1, 2, 3])
    for left_out in range(4):
        moved_by = float((whole - clipped_sum([index for index in range(4) if index != left_out])).norm())
        assert 0.02 * 0.99 < moved_by <= 0.02 * (1 + 1e-6)


def test_a_step_reads_no_more_rows_of_a_group_than_it_may_and_draws_them_anew():
    rows = Dataset.from_dict({"row": list(range(10))})
    units = Units(rows, [list(range(8)), [8, 9]], max_rows=3, random=SecureRandom())
    seen = [[row["row"] for row in units[0]] for _ in range(60)]
    assert all(len(set(drawn)) == 3 for drawn in seen) and {row for drawn in seen for row in drawn} == set(range(8))
    assert [row["row"] for row in units[1]] == [8, 9]


def test_groups_are_never_cut_and_single_rows_fill_physical_batches():
    assert physical_batches(torch.arange(7), 3) == [(0, 3), (3, 6), (6, 7)]
    assert physical_batches(torch.tensor([0, 0, 1, 2, 2, 2, 2, 3]), 3) == [(0, 3), (3, 7), (7, 8)]
    assert physical_batches(torch.tensor([], dtype=torch.int64), 3) == []


def test_rows_without_a_group_are_refused():
    rows = [{"patient": "a"}, {"patient": None}]
    with pytest.raises(DataError, match="Row 1 belongs to no group"):
        rows_by_group(rows, "patient")
    with pytest.raises(DataError, match="no such column"):
        rows_by_group(rows, "person")
    assert rows_by_group([{"patient": p} for p in "abac"], "patient") == [[0, 2], [1], [3]]
    for nobody in (float("nan"), "", " \t"):
        with pytest.raises(DataError, match="Row 0 belongs to no group"):
            rows_by_group([{"patient": nobody}], "patient")


def test_a_person_spelled_in_two_ways_that_look_the_same_is_one_group():
    names = ["Am\u00e9lie", "Ame\u0301lie", " Am\u00e9lie ", "Am\u00e9lia", 7, "7"]
    assert rows_by_group([{"patient": name} for name in names], "patient") == [[0, 1, 2], [3], [4, 5]]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_base_model_whose_rows_depend_on_the_longest_of_the_batch_is_refused(tmp_path, kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0, 1.0], "long_factor": [4.0, 4.0], "original_max_position_embeddings": 8}
    base = tiny_qwen2(tmp_path / "base", rope_parameters=rope, initializer_range=0.5)
    root = create_root(base, lora(), output_dir=tmp_path / "root", seed=0)
    config = AutoConfig.from_pretrained(base)
    config.max_position_embeddings = 8
    model = attach_root(AutoModelForCausalLM.from_pretrained(base, config=config), root)
    batch = {name: value[:, :12] for name, value in make_batch(2).items() if name != "unit"}
    batch["attention_mask"][0, 6:] = 0
    batch["labels"][0, 6:] = -100
    short = {name: value[:1, :6] for name, value in batch.items()}
    # What is refused: a second, longer row changes the loss of the first.
    with torch.no_grad():
        apart = float(example_losses(model, batch)[0] - example_losses(model, short)[0])
    assert abs(apart) > 1e-4
    with pytest.raises(RecipeError, match="differently when one of them is long"):
        make_trainer(model, tmp_path / "t")
    make_trainer(model, tmp_path / "t", max_length=8)


def test_mixed_precision_is_refused(model, tmp_path):
    with pytest.raises(UsageError, match="`fp16` does not fit"):
        make_trainer(model, tmp_path / "t", fp16=True)


def test_dropout_is_off_since_masks_would_go_by_the_place_in_the_batch(tmp_path):
    root = tiny_root(tmp_path, lora_dropout=0.5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64).requires_grad_(False)
    model = attach_root(base, root).double()
    trainer = make_trainer(model, tmp_path / "t")
    trainer._clipping = PerExampleClipping(model, mode="hooks", max_grad_norm=1.0)
    model.enable_input_require_grads()
    optimizer = trainer.create_optimizer()
    sums = []
    for _ in range(2):
        trainer.training_step(model, make_batch(4))
        optimizer.pre_step()
        sums.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(sums[0], sums[1]) and sums[0].norm() > 0


# Sampling and accounting


def test_batches_are_poisson_samples_and_some_are_empty():
    sampler = PoissonBatchSampler(50, 0.04, 4000, SecureRandom(known_seed=0))
    batches = list(sampler)
    sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
    assert float(sizes.mean()) == pytest.approx(2.0, rel=0.05)
    assert float(sizes.var()) == pytest.approx(50 * 0.04 * 0.96, rel=0.1)
    assert float((sizes == 0).double().mean()) == pytest.approx(0.96**50, rel=0.15)
    counts = torch.bincount(torch.tensor([row for batch in batches for row in batch]), minlength=50)
    assert counts.min() > 100 and counts.max() < 230


@pytest.mark.parametrize(("noise", "rate", "steps"), [(0.8, 0.0625, 120), (1.1, 0.01, 1000)])
def test_epsilon_equals_opacus_and_an_independent_accountant_within_one_percent(noise, rate, steps):
    ours = epsilon_of([(noise, rate, steps)], 1e-5)
    opacus = PRVAccountant()
    opacus.history = [(noise, rate, steps)]
    independent = pld_privacy_accountant.PLDAccountant()
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    independent.compose(event, steps)
    assert ours == pytest.approx(opacus.get_epsilon(1e-5), rel=0.01, abs=0.01)
    assert ours == pytest.approx(independent.get_epsilon(1e-5), rel=0.01)
    assert ours <= epsilon_of([(noise, rate, steps)], 1e-5, "rdp")


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_the_noise_spends_the_budget_and_no_more(accountant):
    noise = noise_multiplier_for(6.0, 1e-5, sample_rate=0.1, steps=10, accountant=accountant)
    assert 6.0 * 0.985 < epsilon_of([(noise, 0.1, 10)], 1e-5, accountant) <= 6.0


# The trainer


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_physical_batches_and_modes_train_the_same_adapter_and_leave_no_hooks(root, model, tmp_path, mode):
    results = []
    for number, physical in enumerate((2, 16)):
        model.load_state_dict(
            {k.replace(".weight", ".default.weight"): v.double() for k, v in root.adapter.tensors.items()},
            strict=False,
        )
        privacy = PrivacyArguments(
            delta=1e-5, noise_multiplier=0.9, max_grad_norm=0.1, batch_size=3, gradients=mode, known_seed=5
        )
        trainer = make_trainer(model, tmp_path / str(number), per_device_train_batch_size=physical, privacy=privacy)
        trainer.train()
        results.append(root.layout.flatten(read_adapter_tensors(model, root=root), dtype=torch.float64))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-8)
    assert (results[0] - root.adapter.flat(dtype=torch.float64)).norm() > 0
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert not any(hasattr(parameter, "grad_sample") for parameter in model.parameters())


def test_epsilon_is_for_the_steps_really_taken_also_after_an_interruption(root, model, tmp_path):
    privacy = PrivacyArguments(delta=1e-5, noise_multiplier=1.0, batch_size=4, accountant="rdp")

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    folder = tmp_path / "checkpoints"
    saving = {"save_strategy": "steps", "save_steps": 1, "privacy": privacy}
    trainer = make_trainer(model, folder, callbacks=[Interrupt()], **saving)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.privacy_statement().steps == 3
    checkpoint = get_last_checkpoint(folder)
    assert checkpoint is not None and checkpoint.endswith("checkpoint-2")
    assert not list(folder.rglob("training_args.bin"))
    resumed = make_trainer(model, folder, **saving)
    resumed.train(resume_from_checkpoint=checkpoint)
    statement = resumed.privacy_statement()
    assert (statement.steps, statement.planned_steps) == (4, 4)
    assert statement.epsilon == pytest.approx(epsilon_of([(1.0, 0.25, 4)], 1e-5, "rdp"))
    (Path(checkpoint) / "privacy_accounting.json").unlink()
    with pytest.raises(IncompleteArtifactError):
        make_trainer(model, folder, **saving).train(resume_from_checkpoint=checkpoint)


def test_early_stopping_on_private_rows_is_refused_unless_told(model, tmp_path):
    with pytest.raises(UsageError, match="not covered by the privacy bound"):
        make_trainer(model, tmp_path / "a", callbacks=[EarlyStoppingCallback(1)])
    trainer = make_trainer(model, tmp_path / "b")
    with pytest.raises(UsageError):
        trainer.add_callback(EarlyStoppingCallback)
    told = PrivacyArguments(
        delta=1e-5, noise_multiplier=1.0, batch_size=4, allow_early_stopping=True, accountant="rdp"
    )
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    trainer = make_trainer(
        model,
        tmp_path / "c",
        privacy=told,
        callbacks=[EarlyStoppingCallback(1, 100.0)],
        eval_dataset=make_rows(4),
        **settings,
    )
    trainer.train()
    statement = trainer.privacy_statement()
    assert statement.steps < statement.planned_steps
    assert "Early stopping on private rows" in statement.to_markdown()


@pytest.mark.parametrize(
    "wrong", [{"max_grad_norm": 1.0}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}]
)
def test_settings_that_would_change_the_mechanism_are_refused(model, tmp_path, wrong):
    with pytest.raises(UsageError, match="does not fit DP-SGD"):
        make_trainer(model, tmp_path / "t", **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"delta": 1e-5},
        {"delta": 1e-5, "epsilon": 1.0, "noise_multiplier": 1.0},
        {"delta": 0.0, "epsilon": 1.0},
        {"delta": 1e-5, "epsilon": -1.0},
        {"delta": 1e-5, "epsilon": 1.0, "max_grad_norm": 0.0},
        {"delta": 1e-5, "epsilon": 1000.0},
        {"delta": 1e-5, "epsilon": 1e-3},
        {"delta": 0.1, "epsilon": 1.0},
        {"delta": 1e-15, "epsilon": 1.0},
        {"delta": 1e-5, "noise_multiplier": 0.0},
        {"delta": 1e-5, "epsilon": 1.0, "group_column": "patient", "gradients": "ghost"},
    ],
)
def test_privacy_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        PrivacyArguments(**wrong)


@pytest.mark.parametrize(("epsilon", "delta"), [(1000.0, 1e-5), (1e6, 1e-5), (1.0, 0.1), (1.0, 1e-15), (1e-6, 1e-5)])
def test_budgets_that_no_accountant_can_answer_are_refused_at_once(epsilon, delta):
    with pytest.raises(UsageError, match="No noise can be chosen"):
        noise_multiplier_for(epsilon, delta, sample_rate=0.0625, steps=20)


@pytest.mark.parametrize(("delta", "rows"), [(0.01, 100), (0.005, 256)])
def test_a_delta_that_would_let_a_whole_row_out_is_refused(delta, rows):
    with pytest.raises(UsageError, match="a whole example could be published"):
        plan_noise(PrivacyArguments(epsilon=1.0, delta=delta, batch_size=4), rows, 20)


def test_the_stated_rate_tells_the_number_of_rows_to_a_tenth_only():
    rates = {coarse_rate(16 / rows) for rows in range(250, 263)}
    assert rates == {0.0625}
    for rows in range(16, 5000, 7):
        assert 2 ** (-1 / 8) * (1 - 1e-9) <= coarse_rate(16 / rows) / (16 / rows) <= 2 ** (1 / 8) * (1 + 1e-9)
    assert coarse_rate(20 / 16) == 1


def test_very_many_steps_are_accounted_for_in_bounded_time():
    plan = plan_noise(PrivacyArguments(epsilon=1.0, delta=1e-5, batch_size=16), 1600, 10**6)
    assert plan.accountant == "rdp" and plan.epsilon <= 1.0


def test_layers_without_gradients_of_single_examples_are_refused():
    with pytest.raises(RecipeError):
        check_trainable(torch.nn.Sequential(torch.nn.Embedding(3, 2)))


def test_without_noise_there_is_no_statement(model, tmp_path):
    trainer = make_trainer(model, tmp_path / "t")
    trainer.train()
    with pytest.raises(UsageError, match="no privacy bound"):
        trainer.privacy_statement()


# The client


@pytest.fixture
def client(root, tmp_path):
    TOKENIZER.save_pretrained(tmp_path / "base")
    tokenizer = LoraDeltaTokenizer(root, recipe=RECIPE.replace(max_steps=5).to_dict())
    rows = [{"prompt": f"?1 ?2 {i:06d} >", "completion": f"{i * 7 % 10**6:06d}"} for i in range(12)]
    return tokenizer, rows


@pytest.mark.parametrize("place", ["rows", "eval_rows"])
def test_tokens_beyond_the_embedding_are_refused_before_the_first_step(client, tmp_path, place):
    tokenizer, rows = client
    longer = make_lab_tokenizer()
    longer.add_tokens([f"<new{i}>" for i in range(64)])
    longer.save_pretrained(tmp_path / "base")
    odd = [*rows, {"prompt": "?1 <new63> >", "completion": "1"}]
    privacy = PrivacyArguments(**NO_NOISE, batch_size=4, allow_early_stopping=True)
    given = {"rows": rows, "eval_rows": rows, "early_stopping_patience": 1, place: odd}
    with pytest.raises(DataError, match="Row 12 has a token that the base model does not know"):
        finetune_client_privately(tokenizer, output_dir=tmp_path / "out", privacy=privacy, **given)


def test_a_client_writes_its_bound_into_metadata_and_card(client, tmp_path):
    tokenizer, rows = client
    adapter, result, statement = finetune_client_privately(
        tokenizer,
        rows,
        tmp_path / "out",
        privacy=PrivacyArguments(epsilon=6.0, delta=1e-3, batch_size=4, accountant="rdp"),
    )
    assert len(result.losses) == 5
    # 4 of 12 rows, told no more exactly than to a fourth root of two; and it does not say how many rows there were.
    assert 5.9 < statement.epsilon <= 6.0 and statement.sample_rate == 2**-1.5
    assert statement.random_generator == "aes-256-ctr"
    assert statement_of(adapter.metadata) == statement
    stored = json.loads((tmp_path / "out" / "grad_transformer.json").read_text())
    assert "num_examples" not in stored and stored["differential_privacy"]["adjacency"] == "add_or_remove_one_example"
    assert statement.statement() in (tmp_path / "out" / "README.md").read_text()
    assert tokenizer.delta(tmp_path / "out").norm() > 0


def test_a_client_resumes_from_its_checkpoints(client, tmp_path):
    tokenizer, rows = client
    privacy = PrivacyArguments(noise_multiplier=1.0, delta=1e-3, batch_size=4, accountant="rdp")
    arguments = {"privacy": privacy, "checkpoint_dir": tmp_path / "checkpoints"}
    finetune_client_privately(tokenizer, rows, tmp_path / "a", **arguments)
    _, result, statement = finetune_client_privately(tokenizer, rows, tmp_path / "b", **arguments)
    assert statement.steps == 5 and result.losses == []
    # Its own spending is not counted again where it delivers a second time.
    _, _, statement = finetune_client_privately(tokenizer, rows, tmp_path / "b", **arguments)
    assert statement.earlier_epsilon == 0
    # Other rows, or another budget, are another run.
    with pytest.raises(UsageError, match="another fine-tune") as caught:
        finetune_client_privately(tokenizer, rows[:-1], tmp_path / "c", **arguments)
    assert "rows" in str(caught.value.found)
    other = {**arguments, "privacy": dataclasses.replace(privacy, max_grad_norm=0.1)}
    with pytest.raises(UsageError, match="another fine-tune"):
        finetune_client_privately(tokenizer, rows, tmp_path / "c", **other)
    assert not any(row["completion"] in (tmp_path / "checkpoints" / "run.json").read_text() for row in rows)
    assert not (tmp_path / "c").exists()


def test_a_second_private_run_into_a_folder_adds_up_and_a_plain_one_takes_the_card_away(client, tmp_path):
    tokenizer, rows = client
    privacy = PrivacyArguments(noise_multiplier=1.0, delta=1e-3, batch_size=4, accountant="rdp")
    _, _, first = finetune_client_privately(tokenizer, rows, tmp_path / "out", privacy=privacy)
    with pytest.raises(UsageError, match="unusual") as caught:
        finetune_client_privately(tokenizer, rows, tmp_path / "out", privacy=privacy)
    assert "same folder" in caught.value.found
    asked = []
    adapter, _, total = finetune_client_privately(
        tokenizer, rows, tmp_path / "out", privacy=privacy, accept_recipe=lambda terms: not asked.append(terms.text())
    )
    assert f"in total ({2 * first.epsilon:.4g}, 0.002)" in asked[0]
    assert total.epsilon == pytest.approx(2 * first.epsilon) and total.delta == pytest.approx(2e-3)
    assert statement_of(adapter.metadata) == total and total.unusual_terms == ("spent_before",)
    assert "was spent by earlier fine-tunes" in (tmp_path / "out" / "README.md").read_text()
    finetune_client(tokenizer, rows, tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()
    assert LoraAdapter.from_pretrained(tmp_path / "out").metadata["differential_privacy"] is None
    # A bound after it says that there was one without: what that one tells of the same rows is in no bound.
    with pytest.raises(UsageError, match="unusual") as caught:
        finetune_client_privately(tokenizer, rows, tmp_path / "out", privacy=privacy)
    assert "without a bound" in caught.value.found


def test_the_exact_number_of_rows_never_leaves_beside_a_bound(client, tmp_path):
    tokenizer, rows = client
    privacy = PrivacyArguments(noise_multiplier=1.0, delta=1e-3, batch_size=4, accountant="rdp")
    with pytest.raises(UsageError, match="does not say how many rows"):
        finetune_client_privately(tokenizer, rows, tmp_path / "out", privacy=privacy, state_num_examples=True)


def test_a_token_that_the_base_model_does_not_know_is_a_typed_error(client, tmp_path):
    tokenizer, rows = client
    text_tokenizer = make_lab_tokenizer()
    text_tokenizer.add_tokens([f"<new{index}>" for index in range(64)])
    text_tokenizer.save_pretrained(tmp_path / "base")
    privacy = PrivacyArguments(noise_multiplier=1.0, delta=1e-3, batch_size=4, accountant="rdp")
    rows = [{**row, "completion": "<new63>"} for row in rows]
    with pytest.raises(DataError, match="a token that the base model does not know"):
        finetune_client_privately(tokenizer, rows, tmp_path / "out", privacy=privacy)


def test_a_known_seed_repeats_the_run_and_states_no_bound(client, tmp_path):
    tokenizer, rows = client
    privacy = PrivacyArguments(noise_multiplier=1.0, delta=1e-3, batch_size=4, known_seed=3, accountant="rdp")
    runs = [finetune_client_privately(tokenizer, rows, tmp_path / name, privacy=privacy) for name in "ab"]
    assert torch.equal(runs[0][0].flat(), runs[1][0].flat())
    assert [statement for _, _, statement in runs] == [None, None]
    assert runs[0][0].metadata["differential_privacy"] is None and not (tmp_path / "a" / "README.md").exists()
    secret = dataclasses.replace(privacy, known_seed=None)
    runs = [finetune_client_privately(tokenizer, rows, tmp_path / name, privacy=secret) for name in "cd"]
    assert not torch.equal(runs[0][0].flat(), runs[1][0].flat())


def test_rows_of_a_group_are_protected_together(client, tmp_path):
    tokenizer, rows = client
    rows = [{**row, "patient": f"p{index // 2}"} for index, row in enumerate(rows)]
    privacy = PrivacyArguments(
        noise_multiplier=1.0, delta=1e-3, batch_size=2, accountant="rdp", group_column="patient", max_rows_per_group=1
    )
    adapter, _, statement = finetune_client_privately(tokenizer, rows, tmp_path / "out", privacy=privacy)
    assert statement.unit == "group" and statement.max_rows_per_group == 1
    # Two of six groups, not of twelve rows.
    assert statement.sample_rate == 2**-1.5
    assert "one group (all rows that share one value" in statement.statement()
    assert statement_of(adapter.metadata) == statement
    text = (tmp_path / "out" / "grad_transformer.json").read_text()
    assert not any(row["patient"] in text for row in rows) and "patient" not in json.loads(text)


def test_the_command_says_epsilon_and_refuses_half_a_budget(client, tmp_path, run_cli, monkeypatch):
    tokenizer, rows = client
    tokenizer.save_pretrained(tmp_path / "mapper" / "source")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("client", "--mapper", tmp_path / "mapper", "--data", data, "--output_dir", tmp_path / "out", "--json")
    outcome = run_cli(*common, "--dp_epsilon", 6, "--dp_delta", 1e-3, "--dp_batch_size", 4, "--dp_accountant", "rdp")
    assert outcome.code == 0, outcome.stderr
    assert 5.9 < outcome.json["privacy"]["epsilon"] <= 6
    assert run_cli(*common, "--dp_epsilon", 6).json["error"] == "UsageError"
    assert run_cli(*common, "--dp_delta", 1e-3).json["error"] == "UsageError"
    stopping = ("--early_stopping_patience", 1, "--eval_data", data)
    refused = run_cli(
        *common, "--dp_epsilon", 6, "--dp_delta", 1e-3, "--dp_accountant", "rdp", "--accept_recipe", *stopping
    )
    assert refused.json["error"] == "UsageError" and "Early stopping" in refused.json["message"]
