"""From several clients to one adapter: orders, rules, privacy, shift."""

from __future__ import annotations

import json
import math

import pytest
import torch

from grad_transformer import GradTransformer
from grad_transformer.adapters import ShiftReference
from grad_transformer.adapters.privacy import STATEMENT_KEY
from grad_transformer.errors import AdapterFormatError, RecipeError, UsageError
from tests.adapters.test_privacy import STATEMENT
from tests.test_modeling import build, tokenizers  # noqa: F401 - a fixture
from tests.worlds import moved


@pytest.fixture
def mapper(tokenizers):  # noqa: F811
    return build(tokenizers)


@pytest.fixture
def clients(mapper):
    return [moved(mapper.tokenizers()[0].root, seed=seed) for seed in range(5)]


def test_map_first_aggregates_the_mapped_deltas(mapper, clients):
    source, target = mapper.tokenizers()
    deltas = torch.stack([source.delta(client) for client in clients])
    expected = mapper.generate_deltas(deltas).median(dim=0).values
    adapter = mapper.generate_adapter(clients, aggregation="median", order="map_first")
    torch.testing.assert_close(adapter.flat() - target.root.adapter.flat(), expected, rtol=1e-4, atol=1e-5)
    assert adapter.metadata["generated"]["order"] == "map_first"


@pytest.mark.parametrize("order", ["aggregate_first", "map_first"])
def test_every_rule_works_in_both_orders_and_changes_no_client(mapper, clients, order):
    before = [client.flat() for client in clients]
    for aggregation, extra in {
        "exact_mean": {},
        "norm_clipping": {},
        "trimmed_mean": {"num_dishonest": 1},
        "krum": {},
        "multi_krum": {"num_dishonest": 1},
        "fltrust": {"reference": clients[0]},
    }.items():
        adapter = mapper.generate_adapter(clients, aggregation=aggregation, order=order, **extra)
        assert torch.isfinite(adapter.flat()).all()
        assert ("remaining_error" in adapter.metadata["generated"]) == (aggregation == "exact_mean")
    assert all(torch.equal(client.flat(), values) for client, values in zip(clients, before, strict=True))
    with pytest.raises(UsageError):
        mapper.generate_adapter(clients, order="sideways")


def test_the_generated_adapter_says_what_privacy_its_clients_leave_it(mapper, clients):
    assert mapper.generate_adapter(clients).metadata[STATEMENT_KEY] is None
    for client in clients:
        client.metadata[STATEMENT_KEY] = STATEMENT.to_dict()
    joint = mapper.generate_adapter(clients, disjoint_clients=True).metadata[STATEMENT_KEY]
    assert joint["epsilon"] == STATEMENT.epsilon and joint["composition"] == "parallel"
    summed = mapper.generate_adapter(clients).metadata[STATEMENT_KEY]
    assert summed["epsilon"] == pytest.approx(5 * STATEMENT.epsilon)
    clients[0].metadata[STATEMENT_KEY] = {"epsilon": "none of your business"}
    with pytest.raises(AdapterFormatError):
        mapper.generate_adapter(clients)


def with_reference(mapper, folder):
    """The mapper saved with a record of shadows like the clients, and loaded again."""
    mapper.save_pretrained(folder)
    source = mapper.tokenizers()[0]
    shadows = torch.stack([source.delta(moved(source.root, seed=seed)) for seed in range(100, 150)])
    ShiftReference.fit(shadows[:30], shadows[30:], layout=source.layout).save_pretrained(folder)
    return GradTransformer.from_pretrained(folder)


def test_one_adapter_under_several_names_counts_once(mapper, clients):
    several = [*clients, clients[1], clients[1]]
    for aggregation in ("mean", "krum", "median"):
        once = mapper.generate_adapter(clients, aggregation=aggregation)
        again = mapper.generate_adapter(several, aggregation=aggregation)
        torch.testing.assert_close(once.flat(), again.flat())
    facts = again.metadata["generated"]
    assert (facts["num_clients"], facts["num_counted"]) == (7, 5)
    assert [check["duplicate_of"] for check in facts["checks"]] == [None] * 5 + [1, 1]
    told = mapper.generate_adapter(several, allow_duplicates=True)
    assert not torch.allclose(told.flat(), mapper.generate_adapter(clients).flat())
    assert told.metadata["generated"]["num_counted"] == 7
    weighted = mapper.generate_adapter(several, aggregation="weighted", weights=[1, 2, 3, 4, 5, 60, 70])
    torch.testing.assert_close(
        weighted.flat(), mapper.generate_adapter(clients, aggregation="weighted", weights=[1, 2, 3, 4, 5]).flat()
    )
    for client in clients:
        client.metadata[STATEMENT_KEY] = STATEMENT.to_dict()
    with pytest.raises(UsageError, match="not disjoint"):
        mapper.generate_adapter(several, disjoint_clients=True)
    # A copy that states nothing takes nothing from the others' statements, and cannot make the bound better.
    assert mapper.generate_adapter(several).metadata[STATEMENT_KEY]["num_clients"] == 7


def test_a_reference_is_mapped_as_the_clients_are(mapper, clients):
    source, target = mapper.tokenizers()
    directions = torch.randn(target.layout.numel, source.layout.numel, generator=torch.Generator().manual_seed(0))
    asked = []

    def predict(deltas_NP):
        asked.append(len(deltas_NP))
        return deltas_NP @ directions.T * 1e-3

    settings = {"aggregation": "fltrust", "order": "map_first", "predict": predict}
    found = mapper.generate_adapter(clients, reference=clients[0], **settings).flat() - target.root.adapter.flat()
    norm = float(predict(source.delta(clients[0])[None]).norm())
    assert asked == [6, 1]
    # FLTrust's result is no longer than the reference, and one client is the reference itself.
    assert 0.2 * norm < float(found.norm()) <= 1.001 * norm


def test_a_mapper_whose_answer_is_not_finite_makes_no_adapter(mapper, clients):
    target = mapper.tokenizers()[1]
    broken = torch.zeros(target.layout.numel)
    broken[3] = math.nan
    with pytest.raises(AdapterFormatError, match="not finite"):
        mapper.generate_adapter(clients, predict=lambda deltas_NP: broken[None])


def test_other_recipes_are_refused_in_python_too(mapper, clients):
    source = mapper.tokenizers()[0]
    source.recipe = {"learning_rate": 0.01, "max_steps": 10}
    clients[2].metadata["recipe"] = {"learning_rate": 0.1, "max_steps": 10}
    with pytest.raises(RecipeError) as caught:
        mapper.generate_adapter(clients)
    assert caught.value.path == "client 3"
    allowed = mapper.generate_adapter(clients, allow_other_recipe=True).metadata["generated"]["checks"]
    assert allowed[2]["recipe_differences"] == ["learning_rate: 0.1, the mapper's 0.01"]
    assert allowed[0]["recipe_differences"] is None


def test_the_record_of_the_shadows_travels_with_the_mapper_and_far_clients_are_refused(mapper, clients, tmp_path):
    assert mapper.shift_reference is None
    loaded = with_reference(mapper, tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    again = GradTransformer.from_pretrained(tmp_path / "second")
    facts = again.generate_adapter(clients).metadata["generated"]
    assert facts["shift"] == loaded.generate_adapter(clients).metadata["generated"]["shift"]
    source = again.tokenizers()[0]
    specs = {
        spec.key: torch.full(spec.shape, 15.0 if spec.side == "B" else 1.0) for spec in source.layout.tensor_specs()
    }
    longer = source.delta(clients[0]) * source.layout.flatten(specs)
    far = source.root.adapter.with_values(source.root.adapter.flat() + longer)
    with pytest.raises(UsageError, match="too far"):
        again.generate_adapter([*clients, far])
    assert again.generate_adapter([*clients, far], max_shift=math.inf) is not None


def test_generate_says_what_was_found_of_each_client(mapper, clients, tmp_path, run_cli):
    mapper.save_pretrained(tmp_path / "mapper")
    paths = [client.save_pretrained(tmp_path / f"client-{index}") for index, client in enumerate(clients)]
    command = ("generate", "--mapper", tmp_path / "mapper", "--adapters", *paths, "--output_dir", tmp_path / "out")
    outcome = run_cli(*command, "--json")
    assert outcome.json["shift"] is None and "not known" in outcome.json["verdict"]
    assert run_cli(*command, "--max_shift", 1).code == 2
    assert run_cli(*command, "--max_shift", "inf").code == 0

    with_reference(mapper, tmp_path / "mapper")
    outcome = run_cli(*command, "--json", "--max_shift", 4)
    assert outcome.code == 0 and all(0 < report["shift"] < 3 for report in outcome.json["shift"])
    assert [check["client"] for check in outcome.json["checks"]] == [str(path) for path in paths]
    stored = json.loads((tmp_path / "out" / "grad_transformer.json").read_text())["generated"]
    assert stored["shift"] == outcome.json["shift"] and len(stored["checks"]) == 5
    # Where the adapters lay is nobody's business.
    assert str(tmp_path) not in json.dumps(stored["checks"])
    shown = run_cli(*command[:4], *paths, paths[0], *command[9:]).stdout.splitlines()
    assert "1 of 6 adapters were sent before." in shown[0]
    assert shown[1].startswith(f"  1. {paths[0]}: ") and "held-out shadow runs" in shown[1]
    assert "the same adapter as client 1" in shown[6]
    refused = run_cli(*command, "--json", "--max_shift", 0.01)
    assert refused.code == 2 and "too far" in refused.json["message"]
