"""From several clients to one adapter: orders, rules, privacy, shift."""

from __future__ import annotations

import pytest
import torch
from grad_transformer.evaluation.shift import ShiftReference

from grad_transformer.adapters.privacy import STATEMENT_KEY
from grad_transformer.errors import AdapterFormatError, UsageError
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


def test_generate_prints_and_stores_the_shift_and_max_shift_refuses(mapper, clients, tmp_path, run_cli):
    mapper.save_pretrained(tmp_path / "mapper")
    paths = [client.save_pretrained(tmp_path / f"client-{index}") for index, client in enumerate(clients)]
    command = ("generate", "--mapper", tmp_path / "mapper", "--adapters", *paths, "--output_dir", tmp_path / "out")
    assert run_cli(*command, "--json").json["shift"] is None
    assert "says nothing of its shadows" in run_cli(*command).stdout
    assert run_cli(*command, "--max_shift", 1).code == 2

    source = mapper.tokenizers()[0]
    shadows = torch.stack([source.delta(moved(source.root, seed=seed)) for seed in range(100, 130)])
    ShiftReference.fit(shadows[:20], shadows[20:], widths=source.layout.widths).save_pretrained(tmp_path / "mapper")
    outcome = run_cli(*command, "--json", "--max_shift", 3)
    assert outcome.code == 0 and all(0 < report["shift"] < 3 for report in outcome.json["shift"])
    stored = (tmp_path / "out" / "grad_transformer.json").read_text()
    assert '"mahalanobis"' in stored
    assert "held-out shadow runs" in run_cli(*command).stdout
    refused = run_cli(*command, "--json", "--max_shift", 0.01)
    assert refused.code == 2 and "too far" in refused.json["message"]
