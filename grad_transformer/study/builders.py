"""From a spec to stages: which work a mapper, a client's adapter or a score needs. Nothing runs here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..finetuning import FineTuningRecipe
from ..lab.presets import PRESETS, BaseModelPreset
from ..refinement import RefinementArguments
from .spec import StudySpec
from .stages import Stage


Client = dict[str, Any]
LAB_PRESET = PRESETS["quick"]


class StudyBuilder:
    """The stages of one seed.

    Args:
        spec ([`StudySpec`]): filled.
        seed (`int`): of the world and of everything drawn in it.
    """

    def __init__(self, spec: StudySpec, seed: int):
        self.spec, self.seed = spec, seed
        self.world: dict[str, Any] = {"kind": spec.world, "seed": seed}
        if spec.world == "text":
            self.world.update(tasks=spec.tasks, data=spec.data)

    # Base models and what they are fine-tuned into

    def base(self, role: str, name: str) -> Stage:
        """A base model: `role` is `tinylm` or `llm`, `name` one of the spec's."""
        settings = (self.spec.tinylms if role == "tinylm" else self.spec.llms)[name]
        if self.spec.world == "text":
            return Stage("hub_base", {"model": settings["model"], "revision": settings.get("revision")})
        sizes = asdict(lab_model(role, settings))
        # How it is fine-tuned says nothing about the base model.
        sizes = {key: value for key, value in sizes.items() if not key.startswith("fine_tuning")}
        return Stage("lab_base", {"seed": self.seed, "role": role, "sizes": sizes})

    def root(self, role: str, name: str) -> Stage:
        return Stage("root", {"lora": self.spec.lora, "seed": self.seed}, {"base": self.base(role, name)})

    def recipe(self, role: str, *, checkpoints: int = 1) -> dict[str, Any]:
        own = self.spec.tinylm_recipe if role == "tinylm" else self.spec.llm_recipe
        return FineTuningRecipe.from_dict({**self.spec.recipe, **own, "snapshot_last": checkpoints}).to_dict()

    def shadows(self, role: str, name: str, *, rows_per_run: int | None = None, num_runs: int | None = None) -> Stage:
        """The shadow runs of one base model; those of another with the same numbers have the same subsets."""
        shadows = self.spec.shadows
        params = {
            "world": self.world,
            "recipe": self.recipe(role, checkpoints=shadows["checkpoints"]),
            "num_runs": num_runs or shadows["num_runs"],
            "rows_per_run": rows_per_run or shadows["rows_per_run"],
            **{key: shadows[key] for key in ("strategy", "validation_fraction", "test_fraction", "public_rows")},
        }
        return Stage("shadows", params, {"root": self.root(role, name)}, self._how())

    # Mappers

    def mapper(
        self,
        tinylm: str | None = None,
        llm: str | None = None,
        *,
        train_runs: int | None = None,
        checkpoints: int | None = None,
        partition: str = "block",
        rows_per_run: int | None = None,
        num_runs: int | None = None,
        **arguments: Any,
    ) -> Stage:
        """A mapper between two base models.

        Args:
            tinylm, llm (`str`, *optional*): default: the study's.
            train_runs (`int`, *optional*): only the first so many training runs.
            checkpoints (`int`, *optional*): pairs of each run, from its last steps; default: the spec's.
            partition (`str`, *optional*, defaults to `"block"`): see `partition.PARTITIONS`.
            rows_per_run, num_runs (`int`, *optional*): of the shadow runs.
            arguments: of mapper or training, instead of the spec's.
        """
        tinylm, llm = tinylm or self.spec.tinylm, llm or self.spec.llm
        training = {key: arguments.pop(key) for key in ("source_noise", "mixup_alpha") if key in arguments}
        inputs = {
            "source": self.shadows("tinylm", tinylm, rows_per_run=rows_per_run, num_runs=num_runs),
            "target": self.shadows("llm", llm, rows_per_run=rows_per_run, num_runs=num_runs),
        }
        params = {
            "train_runs": train_runs,
            "checkpoints": checkpoints or self.spec.shadows["pairs_per_run"],
            "partition": partition,
            "mapper": {**self.spec.mapper, **arguments},
            "training": {**self.spec.training, **training},
            "seed": self.seed,
        }
        return Stage("mapper", params, inputs)

    # Clients

    def clients(self, role: str, name: str, clients: Sequence[Client], *, pooled: bool = False) -> Stage:
        """One base model fine-tuned on every client's rows, or once on all of them together."""
        params = {
            "world": self.world,
            "clients": list(clients),
            "recipe": self.recipe(role),
            "pooled": pooled,
            "seed": self.seed,
        }
        return Stage("clients", params, {"root": self.root(role, name)}, self._how())

    def private_clients(self, name: str, clients: Sequence[Client], epsilon: float) -> Stage:
        """The TinyLM fine-tuned on every client's rows with DP-SGD."""
        privacy = {key: value for key, value in self.spec.privacy.items() if key not in ("rows", "clients")}
        params = {
            "world": self.world,
            "clients": list(clients),
            "recipe": self.recipe("tinylm"),
            "privacy": {**privacy, "epsilon": epsilon},
        }
        return Stage("private_clients", params, {"root": self.root("tinylm", name)}, self._how())

    def labels(self, clients: Stage, *, public: bool = False) -> Stage:
        """What every client's TinyLM says to other rows of its own, or to public ones."""
        params = {"world": self.world, "public": public, "public_rows": self.spec.shadows["public_rows"]}
        return Stage("labels", params, {"clients": clients, "root": clients.inputs["root"]}, self._how())

    def baseline(self, method: str, llm: str, clients: Stage, *, public: bool = False, pooled: bool = False) -> Stage:
        """The LLM fine-tuned on weak labels, for every client, or once on those of all together."""
        params = {"method": method, "recipe": self.recipe("llm"), "pooled": pooled, "seed": self.seed}
        inputs = {"labels": self.labels(clients, public=public), "root": self.root("llm", llm)}
        return Stage("baseline", params, inputs, self._how())

    # What the mapper makes of clients, and scores

    def generated(self, mapper: Stage, clients: Stage, *, mode: str = "each", reversed_at_use: bool = False) -> Stage:
        """LLM deltas from the clients' TinyLM deltas, and those of every control.

        Args:
            mode (`str`, *optional*, defaults to `"each"`): `each` client by itself, or the clients' `mean` mapped.
            reversed_at_use (`bool`, *optional*, defaults to `False`): hand the blocks over in reversed order.
        """
        params = {"mode": mode, "reversed_at_use": reversed_at_use, "seed": self.seed}
        inputs = {"mapper": mapper, "clients": clients, **mapper.inputs}
        return Stage("generated", params, inputs)

    def refined(self, generated: Stage, llm: str) -> Stage:
        """Generated deltas of every client refined on public prompts, from the best of several candidates."""
        clients = generated.inputs["clients"]
        params = {
            "world": self.world,
            "public_rows": self.spec.shadows["public_rows"],
            "recipe": self.recipe("llm"),
            # With their defaults, so that a default that changes makes another stage.
            "arguments": {
                name: value
                for name, value in vars(RefinementArguments(**self.spec.refinement)).items()
                if name not in ("max_new_tokens", "seed")
            },
            "seed": self.seed,
        }
        inputs = {
            "generated": generated,
            "clients": clients,
            "source": generated.inputs["source"],
            "target": generated.inputs["target"],
            "source_root": clients.inputs["root"],
            "root": self.root("llm", llm),
        }
        return Stage("refined", params, inputs, self._how())

    def scores(
        self,
        root: Stage,
        deltas: Stage | None,
        clients: Sequence[Client],
        *,
        names: Sequence[str] | None = None,
        nll: bool = False,
    ) -> Stage:
        """Every test row of every client, answered with each of the deltas; without deltas by the bare base model."""
        params = {"world": self.world, "clients": list(clients), "names": None if names is None else list(names)}
        inputs = {"root": root} if deltas is None else {"root": root, "deltas": deltas}
        return Stage("scores", {**params, "nll": nll}, inputs, self._how())

    def _how(self) -> dict[str, Any]:
        shadows = self.spec.shadows
        how = {"engine": shadows["engine"], "adapters_per_batch": shadows["adapters_per_batch"]}
        return {**how, "loading": self.spec.loading if self.spec.world == "text" else {}}


def lab_model(role: str, settings: Mapping[str, Any]) -> BaseModelPreset:
    """A base model of the lab's quick preset with other sizes."""
    base = LAB_PRESET.tinylm if role == "tinylm" else LAB_PRESET.llm
    return BaseModelPreset(**{**asdict(base), **settings})
