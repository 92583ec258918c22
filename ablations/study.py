"""Studies: one question, one factor, its levels, and the settings that are held equal across them."""

from __future__ import annotations

import importlib.util
import json
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import ablations.studies
from mmphi.config.fields import leaves
from mmphi.config.former_names import with_current_names
from mmphi.config.messages import did_you_mean
from mmphi.config.presets import from_caller
from mmphi.errors import SettingsError
from mmphi.stages import STAGES, Settings, load_settings

Changes = Mapping[str, Any]
# Validates often enough for a curve, without generated captions, which cost more than the loss. No alignment warm-up,
# because the token budget does not count its steps.
CURVES: Changes = {
    "projector.eval_every": 50,
    "projector.sample_images": 0,
    "projector.alignment_steps": 0,
    "evaluate.yes_no": 0,
    "evaluate.held_out_phrasings": False,
}
# Costs of every trial, by metric name: title in the report. No verdict depends on them.
COSTS: Mapping[str, str] = {
    "projector/parameters": "parameters",
    "seconds": "training seconds",
    "train/memory_gb": "peak memory, GB",
    "projector/feature_bytes_per_image": "bytes of features an image",
    "cost/first_token_s": "seconds to the first token",
}
LISTS = ("fields", "tuning_seeds", "seed_settings", "looks", "replicate")
# Values of studies that were declared before these attributes existed.
BEFORE: Mapping[str, Any] = {"tuning_extensions": 0, "looks": [], "replicate": [], "replicates": 0, "also": {}}


@dataclass(frozen=True)
class Study:
    """A comparison of the levels of one factor, over paired seeds.

    Attributes:
        question: The question of the study, one sentence.
        factor: Dotted name of the setting that differs, or a label for several settings that vary together.
        levels: Value of the factor, or of each of ``fields``, by level name.
        baseline: Level that all others are compared with.
        fields: Settings that the levels change, if the factor is not itself a setting.
        preset: Preset that all levels modify.
        stage: Stage that is trained.
        fixed: Settings that differ from the preset, the same at all levels.
        nuisance: Values to try for settings whose best value may differ between levels, by dotted name. Each level is
            judged at its own best value, chosen on the validation split with seeds that no verdict uses.
        tuning_seeds: Seeds of the tuning trials.
        tuning_extensions: Maximum number of values added beyond each end of a nuisance setting's values, in geometric
            progression, while the best value is at that end.
        tuning_tokens: Budget of a tuning trial in supervised tokens; 0 uses ``tokens``.
        tuning_metric: Metric that the best value minimises.
        tokens: Budget of a trial in supervised tokens, the same for all; 0 uses the preset's number of steps.
        seeds: Number of seeds; 0, 1, 2, ... are paired across the levels. Seeds added later are exploratory.
        looks: Numbers of seeds, below ``seeds``, at which the study may be judged early; p values are corrected for
            them.
        seed_settings: Settings that are set to the seed of a trial.
        replicate: Upstream settings (``pretrain.seed``, ``data.split_seed``) that also vary over the seeds, so that a
            verdict is not about one draw of them alone.
        replicates: Number of draws of ``replicate``; 0 uses one per seed. With fewer draws than seeds, the draw is the
            unit of the tests.
        shifts: Offset added to the seeds of a level, by level, so that its trials share nothing with their pairs.
        metric: Name of the judged metric, as recorded by the stage or its evaluation.
        unit: Unit of the metric.
        direction: Whether a lower or a higher value is better.
        margin: Smallest difference of practical relevance, in ``unit``; margin of the equivalence test. 0 for none.
        costs: Titles of the cost metrics, by metric name.
        also: Titles of quality metrics that are not judged, by metric name.
        leaves_open: Limitations of the study, one or two sentences; shown in its report.
    """

    question: str
    factor: str
    levels: Mapping[str, Any]
    baseline: str
    fields: tuple[str, ...] = ()
    preset: str = "tiny"
    stage: str = "projector"
    fixed: Changes = field(default_factory=dict)
    nuisance: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tuning_seeds: tuple[int, ...] = (1000, 1001, 1002)
    tuning_extensions: int = 3
    tuning_tokens: int = 0
    tuning_metric: str = "val/loss"
    tokens: int = 0
    seeds: int = 8
    looks: tuple[int, ...] = ()
    seed_settings: tuple[str, ...] = ("projector.seed",)
    replicate: tuple[str, ...] = ()
    replicates: int = 0
    shifts: Mapping[str, int] = field(default_factory=dict)
    metric: str = "test/loss"
    unit: str = "nats/token"
    direction: Literal["minimize", "maximize"] = "minimize"
    margin: float = 0.0
    costs: Mapping[str, str] = field(default_factory=lambda: dict(COSTS))
    also: Mapping[str, str] = field(default_factory=dict)
    leaves_open: str = ""

    def changes(self, level: str) -> dict[str, Any]:
        """Settings that a level changes, by dotted name.

        Raises:
            SettingsError: If the level changes settings outside the factor.
        """
        value = self.levels[level]
        if not self.fields:
            if isinstance(value, Mapping):
                raise SettingsError(
                    f"level {level!r} changes {', '.join(value)}: the factor is {self.factor} alone",
                    "a verdict is about one factor; settings that only mean something together are named in `fields`",
                )
            return {self.factor: value}
        given = dict(value) if isinstance(value, Mapping) else {}
        if set(given) - set(self.fields):
            others = ", ".join(sorted(set(given) - set(self.fields)))
            raise SettingsError(
                f"level {level!r} changes {others}, which the factor {self.factor} does not hold",
                f"its fields are {', '.join(self.fields)}; what all levels share belongs in `fixed`",
            )
        return given

    def seed(self, level: str, number: int) -> int:
        """Seed of a level in a round."""
        return number + self.shifts.get(level, 0)

    def draw(self, number: int) -> int:
        """Draw of the ``replicate`` settings in a round."""
        return number % self.replicates if self.replicates else number

    def overrides(self, level: str, seed: int, nuisance: Changes, tokens: int, draw: int = 0) -> dict[str, Any]:
        """All settings of a trial that differ from the preset, by dotted name."""
        budget = {f"{self.stage}.supervised_tokens": tokens} if tokens else {}
        seeds = dict.fromkeys(self.seed_settings, seed)
        return {
            **self.fixed,
            **budget,
            **nuisance,
            **self.changes(level),
            **seeds,
            **dict.fromkeys(self.replicate, draw),
        }

    def settings(
        self, level: str, seed: int = 0, nuisance: Changes | None = None, tokens: int = 0, draw: int = 0
    ) -> Settings:
        """Settings of a trial.

        Raises:
            SettingsError: If a setting does not exist or its value is invalid.
        """
        changes = self.overrides(level, seed, nuisance or {}, tokens or self.tokens, draw)
        return settings_of(self.preset, changes, self.stage)

    def check(self) -> None:
        """Validate the study before anything is trained.

        Raises:
            SettingsError: If the study is not a valid comparison.
        """
        if self.stage not in STAGES:
            raise SettingsError(f"there is no stage {self.stage!r}", f"there are {', '.join(STAGES)}")
        if self.baseline not in self.levels:
            raise SettingsError(
                f"the baseline {self.baseline!r} is not among the levels", f"these are {', '.join(self.levels)}"
            )
        for level in self.levels:
            check_name(level)
        if self.seeds < 1:
            raise SettingsError(f"{self.seeds} seeds: nothing would be run", "give one at least; 8 can show something")
        if len(self.levels) < 2:
            raise SettingsError("a study of one level compares nothing", "give two levels or more")
        taken = {self.seed(level, n) for level in self.levels for n in range(self.seeds)}
        if self.nuisance and taken & set(self.tuning_seeds):
            raise SettingsError(
                f"seeds {sorted(taken & set(self.tuning_seeds))} are for tuning and for the verdict",
                "tune with seeds that the verdict does not use, such as 1000",
            )
        if self.nuisance and (self.metric == self.tuning_metric or self.metric.startswith("val/")):
            raise SettingsError(
                f"{self.metric} is judged, and the nuisance settings are tuned on the validation split",
                "judge a metric of the test split, such as test/loss",
            )
        if list(self.looks) != sorted(set(self.looks)) or any(not 1 < look < self.seeds for look in self.looks):
            raise SettingsError(
                f"looks at {', '.join(map(str, self.looks))} seeds, of {self.seeds}",
                "give numbers between 1 and the number of seeds, each larger than the one before",
            )
        if self.nuisance and (not self.tuning_seeds or not all(self.nuisance.values())):
            raise SettingsError(
                "there are no tuning seeds, or no values to try", "give one at least: (1000, 1001, 1002)"
            )
        if self.replicates and self.looks:
            raise SettingsError(
                "looks are numbers of seeds, but with `replicates` the unit is the draw", "remove looks or replicates"
            )
        if self.tuning_extensions < 0 or self.replicates < 0:
            raise SettingsError("tuning_extensions and replicates must not be negative", "0 disables them")
        budget = f"{self.stage}.supervised_tokens"
        if budget in self.fixed:
            raise SettingsError(f"{budget} is the study's budget", "give it as `tokens`, on the command line --tokens")
        if seeds := set(self.seed_settings) & set(self.fixed):
            raise SettingsError(f"{', '.join(sorted(seeds))} takes the paired seeds", "give how many: --seeds 8")
        if self.tokens and f"{self.stage}.steps" in self.fixed:
            raise SettingsError(
                f"{self.stage}.steps = {self.fixed[f'{self.stage}.steps']}, but the budget is {self.tokens} tokens",
                "give --tokens, or --tokens 0 to count steps",
            )
        held = set(self.fields or (self.factor,))
        for what, names in (("fixed", self.fixed), ("nuisance", self.nuisance), ("replicate", self.replicate)):
            if both := held & set(names):
                raise SettingsError(
                    f"{', '.join(sorted(both))} is the factor and also in `{what}`", "remove it from one of them"
                )
        if both := set(self.replicate) & {*self.fixed, *self.nuisance, *self.seed_settings}:
            raise SettingsError(
                f"{', '.join(sorted(both))} is in `replicate` and elsewhere", "remove it from one of them"
            )
        for level in self.levels:
            settings = self.settings(level)
            self._check_nuisance(level, settings)
            self.check_stages(settings)

    def check_stages(self, settings: Settings) -> None:
        """Run the settings checks of the stage, its upstream stages and its follow-up stages.

        Raises:
            MmphiError: If a stage rejects the settings.
        """
        from mmphi.config.declared_view import SettingsView

        for name in {self.stage, *plan_order(self.stage, settings)}:
            STAGES[name].check(SettingsView(settings, STAGES[name].declared))

    def _check_nuisance(self, level: str, settings: Settings) -> None:
        """Reject nuisance settings that have no effect at a level."""
        values = dict(leaves(settings))
        for name in self.nuisance:
            section, _, field_name = name.rpartition(".")
            chosen = {n: values.get(f"{section}.{n}") for n in ("optimizer", "lr_scheduler")}
            # An optimizer or schedule that is itself tuned has no fixed value.
            optimizer, schedule = (None if f"{section}.{n}" in self.nuisance else chosen[n] for n in chosen)
            if field_name == "muon_learning_rate" and optimizer == "adamw":
                raise SettingsError(
                    f"{name} is tuned, and AdamW does not use it at level {level!r}",
                    f"tune {section}.learning_rate, or fix {section}.optimizer = muon",
                )
            if (
                field_name == "learning_rate"
                and optimizer == "muon"
                and f"{section}.muon_learning_rate" not in self.nuisance
            ):
                raise SettingsError(
                    f"{name} is tuned, and at level {level!r} Muon trains the matrices, which does not use it",
                    f"tune {section}.muon_learning_rate, or fix {section}.optimizer = adamw",
                )
            if field_name == "decay" and schedule is not None and schedule != "wsd":
                raise SettingsError(
                    f"{name} is tuned, and the schedule {schedule} does not use it at level {level!r}",
                    f"fix {section}.lr_scheduler = wsd",
                )

    @classmethod
    def declared(cls, declaration: Mapping[str, Any]) -> Study:
        """Create a study from its declaration; attributes that an older one lacks get the values of ``BEFORE``."""
        names = {each.name for each in fields(cls)}
        whole = {name: value for name, value in {**BEFORE, **declaration}.items() if name in names}
        given: dict[str, Any] = {name: tuple(v) if name in LISTS else v for name, v in whole.items()}
        return cls(**given)

    def declaration(self) -> dict[str, Any]:
        """Full declaration as JSON types: the study, all settings of its baseline, and the versions of the stages."""
        settings = self.settings(self.baseline)
        versions = {name: STAGES[name].version for name in plan_order(self.stage, settings)}
        whole = {**asdict(self), "settings": dict(leaves(settings)), "versions": versions}
        return dict(json.loads(json.dumps(whole, default=str)))


def check_name(name: str) -> None:
    """Validate the name of a study or level, which must fit into an MLflow filter string.

    Raises:
        SettingsError: If the name is empty or contains quotes or line breaks.
    """
    if not name.strip() or any(mark in name for mark in "'\"`\n"):
        raise SettingsError(
            f"{name!r} is not a valid name: it is empty or contains quotes or line breaks", "use another name"
        )


def plan_order(stage: str, settings: Settings) -> list[str]:
    """Names of a stage's upstream stages, the stage, and its follow-up stages, in build order."""
    from mmphi.pipeline.graph import StageGraph

    plan = StageGraph(STAGES)
    return list(dict.fromkeys([*plan.order(stage, settings), *STAGES[stage].then]))


def settings_of(preset: str, changes: Changes, stage: str) -> Settings:
    """Load the settings of a preset with changes, by dotted name."""
    typed = {name: v if isinstance(v, str) else json.dumps(v) for name, v in changes.items()}
    return load_settings(preset, typed, stage)


def names() -> list[str]:
    """Names of the studies that come with mmphi."""
    return sorted(module.name for module in pkgutil.iter_modules(ablations.studies.__path__))


def load(name: str, preset: str = "") -> tuple[str, Any]:
    """Load a study or search by name or file.

    Args:
        name: Name of a file in ``ablations/studies/``, or the path of a Python file that defines ``STUDY``.
        preset: Preset other than the study's own; the file's ``PRESETS`` may define a variant of the study for it.

    Returns:
        Name in the store, and the study or search.

    Raises:
        SettingsError: If the study does not exist or its file defines no ``STUDY``.
    """
    path = from_caller(Path(name).expanduser())
    if path.suffix == ".py":
        if not path.is_file():
            raise SettingsError(f"there is no study file {path}", "check the path")
    else:
        name = name.replace("-", "_")
        if name not in names():
            near = did_you_mean(name, names())
            raise SettingsError(
                f"there is no study {name!r}", f"did you mean {near}?" if near else f"there are {', '.join(names())}"
            )
        path = Path(ablations.studies.__path__[0]) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"ablations.studies.{path.stem}", path)
    if spec is None or spec.loader is None:
        raise SettingsError(f"{path} cannot be read as Python", "see ablations/studies/ for examples")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    study = getattr(module, "STUDY", None)
    if study is None:
        raise SettingsError(f"{path} defines no STUDY", "docs/how-to/studies.md shows one")
    if not preset or preset == study.preset:
        return path.stem, _with_current_names(study)
    there = getattr(module, "PRESETS", {}).get(preset)
    return f"{path.stem}.{Path(preset).stem}", _with_current_names(there or replace(study, preset=preset))


def _with_current_names(study: Any) -> Any:
    """Replace former names of settings and metrics in a study or search."""
    values = {each.name: getattr(study, each.name) for each in fields(study)}
    changed = {
        name: with_current_names(value)
        for name, value in values.items()
        if isinstance(value, str | Mapping | list | tuple)
    }
    return replace(study, **{name: value for name, value in changed.items() if value != values[name]})
