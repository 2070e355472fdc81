"""Refinement on public prompts: certainty, agreement, soft targets, the student, and the whole on tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

from grad_transformer import create_root
from grad_transformer.errors import DataError, UsageError
from grad_transformer.finetuning import FineTuningRecipe, attach_root, load_base, write_adapter_tensors
from grad_transformer.lab import make_lab_tokenizer
from grad_transformer.refinement import (
    Completions,
    Refinement,
    RefinementArguments,
    Student,
    TopTokens,
    check_same_tokens,
    complete_clients,
    public_weak_to_strong,
    refine,
)
from grad_transformer.refinement.refinement import is_covered
from grad_transformer.refinement.student import SoftTarget
from grad_transformer.refinement.targets import soft_target
from grad_transformer.shadow import FineTuneJob, run_batched
from tests.worlds import lora, moved, tiny_qwen2


RECIPE = FineTuningRecipe(
    learning_rate=0.2, max_steps=30, per_device_batch_size=8, warmup_steps=1, max_length=32, adam_epsilon=1e-3
)
# Random weights this wide make a TinyLM that is sure of its words.
SPREAD = {"tinylm": 0.5, "llm": 0.1}
PROMPTS = [{"prompt": f"?1 ?2 {number * 7919 % 10**6:06d} >", "completion": "000000"} for number in range(40)]
ARGUMENTS = RefinementArguments(num_prompts=24, max_new_tokens=4, steps=12, learning_rate=0.2, batch_size=16)


def top(probabilities: list[list[float]], ids: list[list[int]]) -> TopTokens:
    return TopTokens(torch.tensor(ids), torch.tensor(probabilities).log())


def completions(tokens: TopTokens, counted: list[bool] | None = None) -> Completions:
    count = len(tokens.best_M)
    return Completions([[9] * (count + 1)], [1], tokens, torch.tensor(counted or [True] * count))


# Two tokens, of one of which the TinyLM is sure.
TEACHER = completions(top([[0.9, 0.1], [0.5, 0.5]], [[3, 4], [5, 6]]))


def test_certain_tokens_decide_the_agreement() -> None:
    says_the_sure_one = top([[0.8, 0.2], [0.7, 0.3]], [[3, 4], [6, 5]])
    weights = (0.9**4, 0.5**4)
    assert TEACHER.agreement(says_the_sure_one, 4.0) == pytest.approx(weights[0] / sum(weights))
    assert TEACHER.agreement(says_the_sure_one, 0.0) == pytest.approx(0.5)
    expected = (weights[0] * 0.9 + weights[1] * 0.5) / sum(weights)
    assert TEACHER.expected_agreement(4.0) == pytest.approx(expected)


def test_end_tokens_do_not_count_as_agreement() -> None:
    teacher = completions(TEACHER.tokens, [False, True])
    assert teacher.agreement(top([[0.8, 0.2], [0.7, 0.3]], [[3, 4], [6, 5]]), 4.0) == 0.0


def test_the_target_is_the_posterior_of_both_witnesses() -> None:
    # The LLM names the second token of the first place, and at the second place one that the TinyLM does not know.
    student = top([[0.8, 0.2], [0.7, 0.3]], [[4, 3], [6, 7]])
    arguments = RefinementArguments(certainty_power=2.0)
    target = soft_target(TEACHER, [student], 0.6, arguments)
    # Mean probabilities by token: TinyLM 3: .45, 4: .05, 5: .25, 6: .25; LLM 3: .1, 4: .4, 6: .35.
    chance = 0.45 * 0.1 + 0.05 * 0.4 + 0.25 * 0.35
    products = torch.tensor([[0.9 * 0.2, 0.1 * 0.8], [0.0, 0.5 * 0.7]])
    taught = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    coincidence = products.sum(dim=1)
    weight = (0.6 * coincidence / (0.6 * coincidence + 0.4 * chance))[:, None]
    expected = weight * products / coincidence[:, None] + (1 - weight) * taught
    assert target.tokens.ids_MT.tolist() == [[3, 4], [6, 5]]
    found = target.tokens.log_probs_MT.exp()
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1].flip(0), rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(target.weights_M, found[:, 0] ** 2)


def test_how_far_the_llm_is_believed() -> None:
    student = top([[0.8, 0.2], [0.7, 0.3]], [[4, 3], [6, 7]])
    arguments = RefinementArguments(certainty_power=2.0)
    # An agreement beyond what the TinyLM's own errors allow is no reason for more.
    most = TEACHER.expected_agreement(2.0)
    torch.testing.assert_close(
        soft_target(TEACHER, [student], 1.0, arguments).tokens.log_probs_MT,
        soft_target(TEACHER, [student], most, arguments).tokens.log_probs_MT,
    )
    # Without any agreement, or without words in common, it is no witness.
    alone = soft_target(TEACHER, [student], 0.5, replace(arguments, second_witness=False))
    strangers = top([[0.8, 0.2], [0.7, 0.3]], [[7, 8], [8, 7]])
    for target in (
        alone,
        soft_target(TEACHER, [student], 0.0, arguments),
        soft_target(TEACHER, [strangers], 0.9, arguments),
    ):
        torch.testing.assert_close(target.tokens.log_probs_MT, TEACHER.tokens.log_probs_MT)
        assert target.weights_M.tolist() == pytest.approx([0.81, 0.25])


def test_what_the_llm_said_before_is_averaged_with_what_it_says_now() -> None:
    before, now = top([[0.9, 0.1], [0.6, 0.4]], [[4, 3], [6, 5]]), top([[0.6, 0.4], [0.7, 0.3]], [[3, 4], [5, 6]])
    mean = [[(0.9 * 0.4) ** 0.5, (0.1 * 0.6) ** 0.5], [(0.6 * 0.3) ** 0.5, (0.4 * 0.7) ** 0.5]]
    arguments = RefinementArguments()
    both = soft_target(TEACHER, [before, now], 0.6, arguments)
    torch.testing.assert_close(
        both.tokens.log_probs_MT,
        soft_target(TEACHER, [top(mean, [[4, 3], [6, 5]])], 0.6, arguments).tokens.log_probs_MT,
    )
    assert not torch.allclose(both.weights_M, soft_target(TEACHER, [now], 0.6, arguments).weights_M)


def test_a_client_is_covered_where_the_nearest_shadow_satisfies_the_tinylm() -> None:
    arguments = RefinementArguments(covered_agreement=0.9)
    assert is_covered({"mapper": 0.5, "nearest_shadow": 0.9}, 0.98, arguments, root=0.0)
    assert not is_covered({"mapper": 0.99, "nearest_shadow": 0.8}, 0.98, arguments, root=0.0)
    assert not is_covered({"mapper": 1.0}, 0.98, arguments, root=0.0)


def test_a_competent_llm_covers_nobody() -> None:
    # It agrees with the TinyLM as well as can be expected and knows nothing of the client, and so do its shadows.
    arguments = RefinementArguments()
    assert is_covered({"nearest_shadow": 0.75}, 0.7, arguments, root=0.02)
    for root in (0.65, 0.7, 1.07 * 0.7):
        assert not is_covered({"nearest_shadow": 0.69}, 0.7, arguments, root=root)
    assert not is_covered({"nearest_shadow": 0.75}, 0.7, arguments, root=0.75)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """TinyLM and LLM of the lab's vocabulary, each with its root; two clients."""
    path = tmp_path_factory.mktemp("refinement")
    roots = {}
    for name, layers in (("tinylm", 2), ("llm", 3)):
        base = tiny_qwen2(path / name / "base", layers=layers, initializer_range=SPREAD[name])
        make_lab_tokenizer().save_pretrained(base)
        roots[name] = create_root(base, lora(), output_dir=path / name / "root")
    tinylm, tokenizer = load_base(path / "tinylm" / "base")
    return {
        "path": path,
        "roots": roots,
        "clients": [moved(roots["tinylm"], scale=1.0, seed=seed) for seed in (1, 2)],
        "tinylm": (attach_root(tinylm, roots["tinylm"]), tokenizer),
        "student": Student(*load_base(path / "llm" / "base"), roots["llm"], RECIPE),
    }


@pytest.fixture(scope="module")
def heard(world: dict) -> list[Completions]:
    return complete_clients(world["clients"], PROMPTS, world["tinylm"], ARGUMENTS)


def test_completions_are_the_tinylm_s_own_words(world: dict, heard: list[Completions]) -> None:
    model, _ = world["tinylm"]
    write_adapter_tensors(model, world["clients"][1].tensors)
    row, start = heard[1].rows[0], heard[1].starts[0]
    logits = model(input_ids=torch.tensor([row])).logits[0].detach()
    assert row[start:] == logits[start - 1 : -1].argmax(dim=-1).tolist()
    confidence = logits[start - 1 : -1].softmax(dim=-1).max(dim=-1).values
    torch.testing.assert_close(heard[1].tokens.confidence_M[: len(row) - start], confidence, rtol=1e-5, atol=1e-6)


def test_completions_in_the_public_rows_are_not_read(world: dict, heard: list[Completions]) -> None:
    others = [{**row, "completion": "999999"} for row in PROMPTS]
    again = complete_clients(world["clients"], others, world["tinylm"], ARGUMENTS)
    assert [each.rows for each in again] == [each.rows for each in heard]


def test_the_student_reads_each_adapter_as_peft_would(world: dict, heard: list[Completions]) -> None:
    root = world["roots"]["llm"]
    adapters = [moved(root, scale=0.5, seed=seed) for seed in (3, 4)]
    read = world["student"].read(torch.stack([adapter.flat() for adapter in adapters]), heard, top_tokens=3)
    model, _ = load_base(world["path"] / "llm" / "base")
    peft_model = attach_root(model, root)
    for adapter, each, found in zip(adapters, heard, read, strict=True):
        write_adapter_tensors(peft_model, adapter.tensors)
        parts = []
        for row, start in zip(each.rows, each.starts, strict=True):
            parts.append(peft_model(input_ids=torch.tensor([row])).logits[0, start - 1 : -1].detach())
        expected = TopTokens.of_logits(torch.cat(parts), 3)
        torch.testing.assert_close(found.log_probs_MT, expected.log_probs_MT, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.best_M, expected.best_M)


def test_hard_targets_train_as_an_ordinary_fine_tune(world: dict, heard: list[Completions]) -> None:
    student, root = world["student"], world["roots"]["llm"]
    start_KP = root.adapter.flat().repeat(2, 1)
    one_hot = [TopTokens(each.tokens.ids_MT[:, :1], torch.zeros(len(each.tokens.best_M), 1)) for each in heard]
    targets = [SoftTarget(tokens, torch.full((len(tokens.best_M),), 0.3)) for tokens in one_hot]
    trained = student.train(start_KP, heard, targets, steps=5, learning_rate=0.1, seed=7)
    jobs = []
    for each in heard:
        labels = [[-100] * start + row[start:] for row, start in zip(each.rows, each.starts, strict=True)]
        rows = datasets.Dataset.from_dict({"input_ids": each.rows, "labels": labels})
        jobs.append(FineTuneJob(rows, 7))
    recipe = RECIPE.replace(max_steps=5, learning_rate=0.1, warmup_steps=0)
    plain = run_batched(student.model, student.tokenizer, root, jobs, recipe)
    expected = torch.stack([root.layout.flatten(result.tensors) for result in plain])
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-6)


def test_the_best_candidate_is_chosen_and_refinement_raises_its_agreement(
    world: dict, heard: list[Completions]
) -> None:
    root = world["roots"]["llm"]
    none = torch.zeros(2, root.layout.numel)
    trained = torch.stack([each.delta_P for each in public_weak_to_strong(heard, world["student"], ARGUMENTS)])
    # Each client's own delta beside the other's: agreement has to tell them apart.
    candidates = {"none": none, "mine": trained, "other": trained.flip(0)}
    results = refine(heard, candidates, world["student"], ARGUMENTS)
    for number, result in enumerate(results):
        assert result.candidate == "mine"
        assert result.agreement["mine"] > max(result.agreement["none"], result.agreement["other"])
        assert torch.equal(result.candidate_delta_P, trained[number])
        assert len(result.agreement_by_round) == ARGUMENTS.rounds + 1
    started = refine(heard, {"none": none}, world["student"], ARGUMENTS, clients_at_once=1)
    together = refine(heard, {"none": none}, world["student"], ARGUMENTS)
    for alone, result in zip(started, together, strict=True):
        assert alone.agreement_by_round[-1] > alone.agreement_by_round[0] + 0.1
        torch.testing.assert_close(alone.delta_P, result.delta_P, rtol=1e-3, atol=1e-5)


def test_shadows_are_followed_as_far_as_they_know_the_skill(
    world: dict, heard: list[Completions], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = world["roots"]["llm"]
    taught = public_weak_to_strong(heard, world["student"], ARGUMENTS)
    annotators = {
        "stranger": moved(root, scale=0.5, seed=9).flat() - root.adapter.flat(),
        **{name: each.delta_P for name, each in zip(("first", "second"), taught, strict=True)},
    }
    none = {"none": torch.zeros(2, root.layout.numel)}

    def refined(**settings: float) -> list[Refinement]:
        for name, value in settings.items():
            monkeypatch.setattr(f"grad_transformer.refinement.refinement.{name}", value)
        return refine(heard, none, world["student"], ARGUMENTS, annotators=annotators)

    # These say nothing in so few words, so nobody follows them.
    alone = refine(heard, none, world["student"], ARGUMENTS)
    for result, other in zip(refined(_TELLING=0.75), alone, strict=True):
        assert result.annotators == [] and other.told is None
        assert result.told is not None and result.told < 0.75
        torch.testing.assert_close(result.delta_P, other.delta_P)
    for result, other in zip(refined(_TELLING=-1.0), alone, strict=True):
        assert set(result.annotators) <= set(annotators) and result.annotators
        assert not torch.allclose(result.delta_P, other.delta_P)
    # A client that hedges is trained towards what shadows and TinyLM say together.
    for result, other in zip(refined(_HEDGING_TOLD=-1.0), alone, strict=True):
        assert result.annotators == []
        assert not torch.allclose(result.delta_P, other.delta_P)
        assert result.agreement_by_round[-1] > result.agreement_by_round[0] + 0.1


def test_a_client_whose_tinylm_says_nothing_is_not_screened(world: dict, heard: list[Completions]) -> None:
    silent = replace(heard[0], counted_M=torch.zeros_like(heard[0].counted_M))
    zero_P = torch.zeros(world["roots"]["llm"].layout.numel)
    none, annotators = {"none": zero_P.repeat(2, 1)}, {"root": zero_P}
    results = refine([silent, heard[1]], none, world["student"], ARGUMENTS, annotators=annotators)
    assert results[0].told is None and results[1].told is not None


@pytest.mark.parametrize("lengths", [(1, 1), (300, 300), (1, 300)])
def test_completions_of_one_and_of_three_hundred_tokens_are_refined(world: dict, lengths: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    teachers = []
    for length in lengths:
        rows = torch.randint(2, 20, (4, 3 + length), generator=generator).tolist()
        tokens = TopTokens.of_logits(3 * torch.randn(4 * length, 32, generator=generator), 16)
        teachers.append(Completions(rows, [3] * 4, tokens, torch.ones(4 * length, dtype=torch.bool)))
    root = world["roots"]["llm"]
    zero_P, other_P = torch.zeros(root.layout.numel), moved(root, scale=0.5, seed=9).flat() - root.adapter.flat()
    candidates = {"mapper": zero_P.repeat(2, 1), "nearest_shadow": other_P.repeat(2, 1)}
    arguments = replace(ARGUMENTS, rounds=1, steps=2)
    for result in refine(teachers, candidates, world["student"], arguments, annotators={"a": zero_P, "b": other_P}):
        assert torch.isfinite(result.delta_P).all()
        assert 0 <= result.root_agreement <= 1 and result.told is not None


def test_a_client_whose_llm_knows_all_without_it_is_neither_covered_nor_hedging(world: dict) -> None:
    """The LLM without an adapter says what the TinyLM says, and more surely: a competent base model."""
    root = world["roots"]["llm"]
    rows = [[3, 4, 5, number, number + 1] for number in range(2, 12)]
    silent = TopTokens(torch.zeros(20, 1, dtype=torch.int64), torch.zeros(20, 1))
    asked = Completions(rows, [3] * 10, silent, torch.ones(20, dtype=torch.bool))
    (said,) = world["student"].read(root.adapter.flat()[None], [asked], top_tokens=16)
    # As unsure as a weak TinyLM, with the LLM's favourite first.
    unsure = TopTokens(said.ids_MT, (0.3 * said.log_probs_MT).log_softmax(dim=1))
    teacher = replace(asked, tokens=unsure)
    zero = torch.zeros(1, root.layout.numel)
    arguments = replace(ARGUMENTS, rounds=1, steps=2)
    (result,) = refine([teacher], {"mapper": zero, "nearest_shadow": zero}, world["student"], arguments)
    assert result.root_agreement == 1.0 > result.expected_agreement
    assert len(result.agreement_by_round) == 2, "covered by a shadow that knows no more than the LLM alone"


def test_a_covered_client_keeps_its_best_candidate(
    world: dict, heard: list[Completions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grad_transformer.refinement.refinement.HEDGING", 10.0)
    deltas = torch.zeros(2, world["roots"]["llm"].layout.numel)
    arguments = replace(ARGUMENTS, covered_agreement=1e-9)
    agreeing = torch.stack([each.delta_P for each in public_weak_to_strong(heard, world["student"], ARGUMENTS)])
    for number, result in enumerate(
        refine(heard, {"mapper": deltas, "nearest_shadow": agreeing}, world["student"], arguments)
    ):
        assert len(result.agreement_by_round) == 1
        assert torch.equal(result.delta_P, agreeing[number])


def test_without_rounds_the_candidate_stays_as_it_is(world: dict, heard: list[Completions]) -> None:
    deltas = torch.randn(2, world["roots"]["llm"].layout.numel, generator=torch.Generator().manual_seed(0)) * 0.1
    arguments = RefinementArguments(rounds=0)
    for delta_P, result in zip(deltas, refine(heard, {"mapper": deltas}, world["student"], arguments), strict=True):
        assert torch.equal(result.delta_P, delta_P)
        assert len(result.agreement_by_round) == 1


def test_what_cannot_be_done_is_refused(world: dict, heard: list[Completions], tmp_path: Path) -> None:
    tokenizer = make_lab_tokenizer()
    tokenizer.add_tokens(["new"])
    with pytest.raises(UsageError, match="different tokenizers"):
        check_same_tokens(tokenizer, make_lab_tokenizer())
    chats = [{"prompt": [{"role": "user", "content": "?1"}]}]
    one, two = make_lab_tokenizer(), make_lab_tokenizer()
    one.chat_template, two.chat_template = "{{ messages }}", "{{ messages[0] }}"
    check_same_tokens(one, two, [{"prompt": "?1"}])
    with pytest.raises(UsageError, match="chat template"):
        check_same_tokens(one, two, chats)
    with pytest.raises(UsageError, match="nothing to refine"):
        refine(heard, {}, world["student"], ARGUMENTS)
    with pytest.raises(DataError, match="no prompts"):
        complete_clients(world["clients"], [], world["tinylm"], ARGUMENTS)
    with pytest.raises(DataError, match="no `prompt`"):
        complete_clients(world["clients"], [{"text": "?1"}], world["tinylm"], ARGUMENTS)
    for wrong in ({"steps": 0}, {"rounds": -1}, {"learning_rate": 0.0}, {"certainty_power": -1.0}, {"num_prompts": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            RefinementArguments(**wrong)
