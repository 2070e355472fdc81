from __future__ import annotations

import numpy as np
import pytest
import torch

from grad_transformer.errors import UsageError
from grad_transformer.lab import PRESETS, LabPreset, LabWorld
from grad_transformer.lab.tokenizer import TOKEN_IDS


SEEDS = [0, 1, 2, 17]
QUESTION = np.array([3, 1, 4, 1, 5, 9])


def digits(row: dict[str, str]) -> str:
    return row["prompt"].split()[2]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_36_tasks_are_distinct_functions(seed: int):
    world = LabWorld(seed)
    questions = np.random.default_rng(0).integers(10, size=(40, 6))
    answers = {task(questions).tobytes() for task in world.tasks}
    assert len(world.tasks) == len({task.name for task in world.tasks}) == len(answers) == 36
    assert len(world.shadow_tasks) == 28 and len(world.held_out_tasks) == 8


@pytest.mark.parametrize("seed", SEEDS)
def test_every_permutation_and_every_digit_map_is_seen_but_not_the_held_out_pairs(seed: int):
    world = LabWorld(seed)
    assert {task.permutation_index for task in world.shadow_tasks} == set(range(6))
    assert {task.digit_map_index for task in world.shadow_tasks} == set(range(6))
    pairs = {(task.permutation_index, task.digit_map_index) for task in world.held_out_tasks}
    assert pairs == {*((i, i) for i in range(6)), (0, 3), (3, 0)}
    assert (world.tasks[0](QUESTION) == QUESTION).all()


def test_the_first_world_is_the_documented_one():
    world = LabWorld(0)
    assert world.to_dict() == {
        "seed": 0,
        "permutations": ["copy", "reverse", "rotate2", "swap", "rotate3", "interleave"],
        "digit_maps": ["a1b0", "a1b3", "a3b0", "a9b9", "a7b2", "a1b6"],
    }
    assert world.task("reverse|a3b0")(QUESTION).tolist() == [7, 5, 3, 2, 3, 9]


def test_another_seed_is_another_world_with_other_rows():
    first, second = LabWorld(1), LabWorld(2)
    assert first.to_dict()["permutations"] != second.to_dict()["permutations"]
    assert first.to_dict()["digit_maps"] != second.to_dict()["digit_maps"]
    identity = first.tasks[0].name
    assert first.task_rows(identity, 20) != second.task_rows(identity, 20)


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_public_rows_show_each_shadow_task_and_no_held_out_task(seed: int):
    world = LabWorld(seed)
    rows = world.public_rows(30)
    counts = {task.name: sum(row["task"] == task.name for row in rows) for task in world.tasks}
    assert counts == {task.name: 0 if task.held_out else 30 for task in world.tasks}


def test_rows_ask_with_hidden_instructions_and_hold_the_right_answer(mini_world: LabWorld):
    for row in mini_world.public_rows(5):
        first, second, question, arrow = row["prompt"].split()
        assert (first, second, arrow) == ("?1", "?2", ">")
        answer = mini_world.task(row["task"])(np.array([int(digit) for digit in question]))
        assert row["completion"] == "".join(map(str, answer))


def test_the_same_seed_gives_the_same_rows_and_clients(mini_preset: LabPreset):
    first, second = LabWorld(3, mini_preset), LabWorld(3, mini_preset)
    assert first.public_rows() == second.public_rows()
    assert first.clients() == second.clients()
    batches = [world.pretraining_batch(np.random.default_rng(5), 32) for world in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


@pytest.mark.parametrize("preset", ["quick", "full"])
def test_clients_are_of_every_sort_and_test_rows_occur_nowhere_else(preset: str):
    world = LabWorld(1, preset)
    clients = world.clients()
    sizes = PRESETS[preset]
    expected = {
        "seen": sizes.seen_clients,
        "small": sizes.small_clients,
        "skewed": sizes.skewed_clients,
        "mixture": sizes.mixture_clients,
        "unseen": sizes.unseen_clients,
    }
    sorts = [client.id.split("-")[0] for client in clients]
    assert {sort: sorts.count(sort) for sort in expected} == expected
    assert len({client.id for client in clients}) == len(clients)
    public = {digits(row) for row in world.public_rows(200)}
    trained = public.union(*({digits(row) for row in client.train_rows} for client in clients))
    held_out = {task.name for task in world.held_out_tasks}
    for client, sort in zip(clients, sorts, strict=True):
        tested = {digits(row) for row in client.test_rows}
        assert len(tested) == len(client.test_rows) == sizes.test_rows
        assert len(client.train_rows) == (sizes.small_rows if sort == "small" else sizes.rows_per_subset)
        assert not tested & trained
        assert client.kind == (sort if sort in ("mixture", "unseen") else "seen")
        assert (client.task in held_out) == (client.kind == "unseen")


def test_the_first_six_seen_clients_cover_all_permutations():
    world = LabWorld(2, "quick")
    assert {world.task(client.task).permutation_index for client in world.clients()[:6]} == set(range(6))


def test_a_skewed_client_prefers_the_same_digits_in_training_and_test(mini_world: LabWorld):
    def frequencies(rows: tuple[dict[str, str], ...]) -> np.ndarray:
        text = "".join(digits(row) for row in rows)
        return np.array([text.count(str(digit)) for digit in range(10)]) / len(text)

    clients = {client.id: client for client in mini_world.clients()}
    skewed, plain = clients["skewed-0"], clients["seen-0"]
    train, test = frequencies(skewed.train_rows), frequencies(skewed.test_rows)
    assert train.argmax() == test.argmax()
    assert train.max() > 0.2 and frequencies(plain.train_rows).max() < 0.2


def test_a_mixture_holds_three_shadow_tasks_in_the_stated_proportions(mini_world: LabWorld):
    names = [task.name for task in mini_world.shadow_tasks[:3]]
    rows = mini_world.mixture_rows(dict(zip(names, (6, 3, 1), strict=True)), 2000)
    shares = [sum(row["task"] == name for row in rows) / 2000 for name in names]
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.05)
    client = next(client for client in mini_world.clients() if client.kind == "mixture")
    assert all(row["task"] in client.task for row in client.train_rows)
    assert client.task.count("|") == 3


def test_pretraining_scores_the_answer_alone_and_hides_some_instructions(mini_world: LabWorld):
    input_ids, labels = mini_world.pretraining_batch(np.random.default_rng(0), 4000)
    assert input_ids.shape == labels.shape == (4000, 16)
    assert (labels[:, :9] == -100).all() and torch.equal(labels[:, 9:], input_ids[:, 9:])
    hidden = [(input_ids[:, i] == TOKEN_IDS[f"?{i + 1}"]).float().mean().item() for i in range(2)]
    assert hidden == pytest.approx([0.15, 0.15], abs=0.02)
    named = (input_ids[:, :2] < TOKEN_IDS["?1"]).all(1)
    for row in input_ids[named][:50].tolist():
        task = mini_world.tasks[(row[0] - TOKEN_IDS["f0"]) * 6 + row[1] - TOKEN_IDS["g0"]]
        answer = task(np.array(row[2:8]) - TOKEN_IDS["0"]) + TOKEN_IDS["0"]
        assert row[8:] == [TOKEN_IDS[">"], *answer.tolist(), TOKEN_IDS["<eos>"]]


def test_what_cannot_be_asked_for_is_refused(mini_world: LabWorld):
    with pytest.raises(UsageError, match="preset"):
        LabWorld(0, "huge")
    with pytest.raises(UsageError, match="negative"):
        LabWorld(-1)
    with pytest.raises(UsageError, match="no such task"):
        mini_world.task_rows("fly|a0b0", 3)
    with pytest.raises(UsageError, match="distinct"):
        mini_world.task_rows(mini_world.tasks[0], 200_000, split="test")
    with pytest.raises(UsageError, match="weights"):
        mini_world.mixture_rows({}, 3)
