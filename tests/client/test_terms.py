"""What a client agrees to before its fine-tune, and where the adapter may go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grad_transformer.client import output
from grad_transformer.client.arguments import NoisePlan, PrivacyArguments
from grad_transformer.client.output import Spent, check_outside, disk_errors, spent_before
from grad_transformer.client.terms import ClientTerms, agree
from grad_transformer.errors import AdapterFormatError, OutputError, RecipeError, UsageError
from grad_transformer.finetuning import BasePreview, FineTuningRecipe
from tests.worlds import moved, tiny_root


RECIPE = FineTuningRecipe(max_steps=120, per_device_batch_size=16)


def terms(recipe: FineTuningRecipe = RECIPE, *, rate: float = 0.0625, **changes: Any) -> ClientTerms:
    privacy = PrivacyArguments(epsilon=1.0, delta=1e-5, batch_size=16)
    noise = NoisePlan(rate, 16, 2.8, recipe.max_steps, "prv", 0.997)
    fields = {"privacy": privacy, "noise": noise, "num_units": 256, **changes}
    fields = {"base": BasePreview("acme/tiny", "abc", "cache"), "named_by_mapper": True, **fields}
    return ClientTerms(recipe=recipe, num_rows=256, **fields)


def test_the_terms_say_all_that_decides_what_happens_to_the_rows() -> None:
    text = terms().text()
    for fact in (
        "acme/tiny at abc",
        "120 of 16 rows",
        "7.5 passes",
        "0.0003",
        "512",
        "0.997",
        "1e-05",
        "2.8",
        "0.0625",
    ):
        assert fact in text
    assert terms().unusual == ()
    assert "only --dp_epsilon bounds" in terms(privacy=None, noise=None).text()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"max_steps": 1, "warmup_steps": 0}, "few_steps"),
        ({"max_steps": 50_000}, "many_steps"),
        ({"learning_rate": 1.0}, "large_learning_rate"),
        ({"per_device_batch_size": 64, "gradient_accumulation_steps": 64}, "large_batch"),
        ({"max_length": 10**5}, "long_rows"),
    ],
)
def test_an_unusual_recipe_needs_a_yes(changes: dict[str, Any], code: str) -> None:
    unusual = terms(RECIPE.replace(**changes))
    assert unusual.unusual == (code,)
    with pytest.raises(UsageError, match="were not accepted"):
        agree(unusual, False)
    with pytest.raises(UsageError, match="were not accepted"):
        agree(unusual, lambda shown: False)
    agree(unusual, True)
    agree(unusual, lambda shown: "unusual:" in shown.text())


def test_batches_of_all_rows_and_spent_budget_are_unusual() -> None:
    assert terms(rate=1.0).unusual == ("whole_batch",)
    spent = terms(earlier=Spent(2.0, 1e-5))
    assert spent.unusual == ("spent_before",) and "in total (2.997, 2e-05)" in spent.text()
    assert terms(earlier=Spent(unbounded=True)).unusual == ("unbounded_before",)
    assert terms(earlier=Spent(unbounded=True), privacy=None, noise=None).unusual == ()


def test_an_adapter_without_a_bound_in_the_folder_is_known(tmp_path: Path) -> None:
    assert spent_before(tmp_path) == Spent()
    # A process was killed between the weights and what is said of them.
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert spent_before(tmp_path) == Spent(unbounded=True)
    (tmp_path / "grad_transformer.json").write_text('{"format_version": 1}')
    assert spent_before(tmp_path) == Spent(unbounded=True)


def test_a_base_model_that_only_the_mapper_names_is_downloaded_after_a_yes() -> None:
    base = BasePreview("acme/tiny", "abc", "hub")
    unconfirmed = terms(base=base)
    assert "acme/tiny at abc, to be downloaded from the Hub, as the mapper names it" in unconfirmed.text()
    with pytest.raises(UsageError, match="base model that the mapper names") as caught:
        agree(unconfirmed, False)
    assert "--base_model acme/tiny" in str(caught.value)
    agree(unconfirmed, True)
    assert unconfirmed.unusual == ()  # nothing that whoever receives the adapter must know
    agree(terms(base=base, named_by_mapper=False), False)


@pytest.mark.parametrize(
    "changes", [{"max_steps": 10**7}, {"max_steps": 200_000}, {"learning_rate": 50.0}, {"max_length": 10**9}]
)
def test_a_recipe_that_exhausts_a_client_is_refused_whoever_accepts_it(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        terms(RECIPE.replace(**changes))


# The output folder


def test_checkpoints_never_lie_in_the_folder_that_leaves(tmp_path: Path) -> None:
    for inside in (tmp_path / "out", tmp_path / "out" / "checkpoints"):
        with pytest.raises(UsageError, match="Checkpoints are private"):
            check_outside(inside, tmp_path / "out")
    check_outside(tmp_path / "checkpoints", tmp_path / "out")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("[enforce fail] PytorchStreamWriter failed")]
)
def test_a_full_disk_is_a_typed_error(error: Exception) -> None:
    with pytest.raises(OutputError), disk_errors():
        raise error
    with pytest.raises(RuntimeError, match="shapes"), disk_errors():
        raise RuntimeError("shapes do not fit")


def test_what_was_spent_is_read_from_the_folder(tmp_path: Path) -> None:
    assert spent_before(tmp_path) == (0.0, 0.0)
    (tmp_path / "grad_transformer.json").write_text('{"differential_privacy": {"epsilon": 1}}')
    with pytest.raises(AdapterFormatError):
        spent_before(tmp_path)


def test_killed_at_any_moment_no_new_weights_stand_beside_an_old_statement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny_root(tmp_path / "world")
    old, new = moved(root), moved(root, seed=1)
    old.metadata, new.metadata = {"differential_privacy": "old"}, {"differential_privacy": None}
    output.write_adapter(old, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("the old bound")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("grad_transformer.adapters.adapter.save_tensors_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        output.write_adapter(new, tmp_path / "out")
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["grad_transformer.json"]
    assert "old" not in (tmp_path / "out" / "grad_transformer.json").read_text()
