"""Statements of differential privacy: facts, words, and how several add up."""

from __future__ import annotations

import dataclasses
import json

import pytest

from grad_transformer.adapters.privacy import PrivacyStatement, compose_statements, statement_of
from grad_transformer.errors import AdapterFormatError


STATEMENT = PrivacyStatement(
    epsilon=0.987,
    delta=1e-5,
    accountant="prv",
    epsilon_rdp=1.2,
    noise_multiplier=2.85,
    max_grad_norm=0.5,
    sample_rate=0.0625,
    expected_batch_size=16,
    steps=120,
    planned_steps=120,
    target_epsilon=1.0,
    random_generator="aes-256-ctr",
)


def test_statement_survives_json_and_its_words_are_never_taken_over():
    data = json.loads(json.dumps(STATEMENT.to_dict()))
    data["statement"] = "trust me"
    assert PrivacyStatement.from_dict(data) == STATEMENT
    assert statement_of({"differential_privacy": data}) == STATEMENT
    assert statement_of({"differential_privacy": None}) is None


def test_words_say_every_fact_that_a_reader_must_sign():
    text = STATEMENT.to_markdown()
    for fact in ("0.987", "1e-05", "0.0625", "120", "2.85", "0.5", "PRV", "adding or removing one example", "AES-256"):
        assert fact in text
    for limit in ("trying several", "Other releases", "Several examples of one person"):
        assert limit in text
    assert "Early stopping" not in text
    stopped = dataclasses.replace(STATEMENT, early_stopping_on_private_data=True)
    assert "Early stopping on private rows" in stopped.to_markdown()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", -1.0),
        ("epsilon", float("inf")),
        ("epsilon", 10**400),
        ("epsilon", "1"),
        ("epsilon", None),
        ("delta", 1.0),
        ("sample_rate", 2.0),
        ("steps", 1.5),
        ("steps", True),
        ("accountant", "x" * 100),
    ],
)
def test_a_malformed_statement_is_refused(name, value):
    with pytest.raises(AdapterFormatError):
        PrivacyStatement.from_dict({**STATEMENT.to_dict(), name: value})


def test_disjoint_clients_compose_in_parallel_and_others_in_sequence():
    other = dataclasses.replace(STATEMENT, epsilon=3.0, delta=1e-6)
    parallel = compose_statements([STATEMENT, other], disjoint_clients=True)
    assert (parallel["epsilon"], parallel["delta"], parallel["composition"]) == (3.0, 1e-5, "parallel")
    sequential = compose_statements([STATEMENT, other])
    assert sequential["epsilon"] == pytest.approx(3.987) and sequential["delta"] == pytest.approx(1.1e-5)
    assert "post-processing" in sequential["statement"] and "not verified" in sequential["statement"]


def test_one_client_without_a_statement_leaves_no_bound():
    assert compose_statements([None, None]) is None
    mixed = compose_statements([STATEMENT, None], disjoint_clients=True)
    assert mixed["epsilon"] is None and "No bound" in mixed["statement"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_multiplier", 0.0),
        ("steps", 0),
        ("max_grad_norm", 0.0),
        ("delta", 0.5),
        ("sampling", "shuffled"),
        ("adjacency", "whatever"),
        ("random_generator", "dice"),
        ("known_seed", 0),
        ("unusual_terms", ["all is well"]),
        ("unusual_terms", "few_steps"),
        ("earlier_epsilon", 2.0),
    ],
)
def test_facts_that_are_no_mechanism_are_refused(name, value):
    with pytest.raises(AdapterFormatError):
        PrivacyStatement.from_dict({**STATEMENT.to_dict(), name: value})


def test_a_claim_below_what_its_facts_give_is_not_passed_on():
    assert STATEMENT.supported_epsilon() == STATEMENT.epsilon
    claimed = dataclasses.replace(STATEMENT, epsilon=0.01)
    composed = compose_statements([claimed, STATEMENT], disjoint_clients=True)
    assert composed["epsilon"] == pytest.approx(STATEMENT.epsilon, rel=0.02)
    assert composed["clients"][0]["claimed_epsilon"] == 0.01
    assert composed["clients"][0]["epsilon"] == pytest.approx(STATEMENT.epsilon, rel=0.02)
    loose = dataclasses.replace(STATEMENT, epsilon=5.0)
    assert loose.supported_epsilon() == 5.0


def test_older_statements_say_that_their_noise_can_be_guessed():
    data = STATEMENT.to_dict()
    del data["random_generator"], data["max_rows_per_group"], data["earlier_epsilon"], data["unusual_terms"]
    older = PrivacyStatement.from_dict(data)
    assert older.random_generator == "torch.Generator"
    assert "the bound is void" in older.to_markdown()
    assert "torch's generator" in compose_statements([older])["statement"]
    assert "the bound is void" not in STATEMENT.to_markdown()


def test_groups_are_named_and_bound_single_examples_too():
    group = dataclasses.replace(STATEMENT, adjacency="add_or_remove_one_group", max_rows_per_group=4)
    assert PrivacyStatement.from_dict(json.loads(json.dumps(group.to_dict()))) == group
    assert (
        "at most 4 of them" in group.statement() and "Someone whose rows are in several groups" in group.to_markdown()
    )
    assert "one group," in compose_statements([group])["statement"]
    assert "one example," in compose_statements([group, STATEMENT], disjoint_clients=True)["statement"]


def test_unusual_terms_and_earlier_spending_are_said():
    told = dataclasses.replace(
        STATEMENT, unusual_terms=("few_steps", "spent_before"), earlier_epsilon=0.5, earlier_delta=1e-6
    )
    assert PrivacyStatement.from_dict(json.loads(json.dumps(told.to_dict()))) == told
    assert "accepted unusual terms: so few noisy steps" in told.statement()
    assert "(0.5, 1e-06) was spent by earlier" in told.statement()
