"""Searches: Optuna samples settings from a space to find good ones. A search gives no verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from ablations.study import Changes, plan_order, settings_of
from mmphi.config.fields import all_fields, leaves
from mmphi.errors import SettingsError
from mmphi.stages import STAGES, Settings

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both included.

    Attributes:
        low: Lower bound.
        high: Upper bound.
        log: Whether to sample on a log scale.
    """

    low: float
    high: float
    log: bool = False


Space = Mapping[str, Range | Sequence[Any]]


@dataclass(frozen=True)
class Search:
    """A search for settings.

    Attributes:
        question: The question of the search, one sentence.
        space: Range or choices of each searched setting, by dotted name.
        objectives: Direction of each objective metric, by name; several objectives give a Pareto front.
        trials: Number of trials.
        seeds: Seeds of every trial; the value of a trial is its mean over them.
        sampler: Optuna sampler: ``tpe``, ``random``, or ``nsga2`` for several objectives.
        pruner: ``wilcoxon`` ends a trial after its first seeds when a signed-rank test finds the best trial so far
            better at them; ``hyperband`` ends a training early by its validation curve; empty ends none.
        reports: Metric that ``hyperband`` uses.
        sampler_seed: Random seed of the sampler.
        preset: Preset that all trials modify.
        stage: Stage that is trained.
        fixed: Settings that differ from the preset, the same in all trials.
        seed_settings: Settings that are set to the seed of a training.
        tokens: Budget of one training in supervised tokens; 0 uses the preset's number of steps.
        unit: Unit of the first objective.
    """

    question: str
    space: Space
    objectives: Mapping[str, Direction] = field(default_factory=lambda: {"val/loss": "minimize"})
    trials: int = 20
    seeds: tuple[int, ...] = (0, 1, 2)
    sampler: Literal["tpe", "random", "nsga2"] = "tpe"
    pruner: Literal["", "wilcoxon", "hyperband"] = "wilcoxon"
    reports: str = "val/loss"
    sampler_seed: int = 0
    preset: str = "tiny"
    stage: str = "projector"
    fixed: Changes = field(default_factory=dict)
    seed_settings: tuple[str, ...] = ("projector.seed",)
    tokens: int = 0
    unit: str = "nats/token"

    def summary(self) -> str:
        """One-line description: number of trials, searched settings and pruner."""
        how = f", pruned by {self.pruner}" if self.pruner else ""
        return f"search of {self.trials} trials over {', '.join(self.space)}{how}"

    def check(self) -> None:
        """Validate the search before anything is trained.

        Raises:
            SettingsError: If the search is invalid.
        """
        if self.trials < 1 or not self.seeds:
            raise SettingsError("a search of no trials finds nothing", "give one trial and one seed at least")
        if len(self.objectives) > 1 and self.pruner:
            raise SettingsError(
                f"{self.pruner} cannot prune by {len(self.objectives)} objectives at once", "leave `pruner` empty"
            )
        if self.pruner == "wilcoxon" and len(self.seeds) < 2:
            raise SettingsError("wilcoxon compares trials over paired seeds, and there is one", "give three or more")
        self.settings({name: self._first(name) for name in self.space}, self.seeds[0])

    def _first(self, name: str) -> Any:
        choices = self.space[name]
        if not isinstance(choices, Range):
            return choices[0]
        return int(choices.low) if self.whole(name) else choices.low

    def whole(self, name: str) -> bool:
        """Whether a setting is an integer."""
        declared = all_fields(Settings).get(name)
        return declared is not None and declared.kind == "int"

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna distribution of each searched setting."""
        found: dict[str, BaseDistribution] = {}
        for name, values in self.space.items():
            if not isinstance(values, Range):
                found[name] = CategoricalDistribution(list(values))
            elif self.whole(name):
                found[name] = IntDistribution(int(values.low), int(values.high), log=values.log)
            else:
                found[name] = FloatDistribution(values.low, values.high, log=values.log)
        return found

    def made_sampler(self) -> optuna.samplers.BaseSampler:
        """Create the Optuna sampler."""
        if self.sampler == "random":
            return optuna.samplers.RandomSampler(seed=self.sampler_seed)
        if self.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=self.sampler_seed)
        return optuna.samplers.TPESampler(seed=self.sampler_seed)

    def made_pruner(self) -> optuna.pruners.BasePruner:
        """Create the Optuna pruner."""
        if self.pruner == "hyperband":
            return optuna.pruners.HyperbandPruner()
        if self.pruner == "wilcoxon":
            import warnings

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna marks WilcoxonPruner as experimental.
                return optuna.pruners.WilcoxonPruner(n_startup_steps=2)
        return optuna.pruners.NopPruner()

    def settings(self, values: Changes, seed: int) -> Settings:
        """Settings of one training.

        Raises:
            SettingsError: If a setting does not exist or its value is invalid.
        """
        budget = {f"{self.stage}.supervised_tokens": self.tokens} if self.tokens else {}
        changes = {**self.fixed, **budget, **values, **dict.fromkeys(self.seed_settings, seed)}
        return settings_of(self.preset, changes, self.stage)

    def declaration(self) -> dict[str, Any]:
        """Full declaration as JSON types: the search, the settings held equal, and the versions of the stages."""
        settings = self.settings({name: self._first(name) for name in self.space}, self.seeds[0])
        versions = {name: STAGES[name].version for name in plan_order(self.stage, settings)}
        varied = {*self.space, *self.seed_settings}
        held = {name: value for name, value in leaves(settings) if name not in varied}
        whole = {**asdict(self), "kind": "search", "settings": held, "versions": versions}
        return dict(json.loads(json.dumps(whole, default=str)))
