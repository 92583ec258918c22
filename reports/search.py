"""The report of a search, from the tracking store alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmphi.errors import StoreError
from reports import figures
from reports.ablation_text import command
from reports.paired_tests import interval
from reports.render import ReportDocument, ReportTable
from reports.study_query import StudyData, Trial
from reports.tables import environment, run_link
from reports.verdict import format_number, interval_text, join_names

PRUNED = "Pruned:"
SHOWN = 8  # Number of trials in the table of the best.
NO_VERDICT = (
    "A search gives no verdict: poor trials are ended early, so budgets differ; the value of the best of many trials is"
    " biased by its selection; and it was selected on the validation split. Compare the proposed settings with others"
    " in a study."
)


@dataclass(frozen=True)
class SearchTrial:
    """One trial of a search: its settings and its objective values.

    Attributes:
        name: Name of the trial.
        params: Searched settings, as strings.
        values: Values of each objective in order of seed, for the finished seeds.
        runs: MLflow runs of the trial.
        pruned: Why the trial ended early or failed; empty otherwise.
    """

    name: str
    params: Mapping[str, str]
    values: Mapping[str, Sequence[float]]
    runs: Sequence[Trial]
    pruned: str = ""

    def mean(self, objective: str) -> float:
        """Mean of an objective over the finished seeds; NaN if there are none."""
        found = self.values[objective]
        return float(np.mean(found)) if found else float("nan")


def search_trials(data: StudyData) -> list[SearchTrial]:
    """Trials of a search with at least one ended run, in order of number."""
    objectives, space = list(data.declaration["objectives"]), list(data.declaration["space"])
    seeds = len(data.declaration["seeds"])
    runs: dict[str, list[Trial]] = {}
    for trial in data.trials:
        if trial.phase == "search" and not trial.went_on and trial.status != "RUNNING":
            runs.setdefault(trial.level, []).append(trial)
    found = []
    for name in sorted(runs, key=lambda name: int(name.rpartition(" ")[2])):
        by_seed = {t.seed: t for t in runs[name] if t.finished and all(o in t.metrics for o in objectives)}
        values = {o: [t.metrics[o] for _, t in sorted(by_seed.items())] for o in objectives}
        early = next((t.reason for t in runs[name] if t.reason.startswith(PRUNED)), "")
        failed = next((t.reason for t in runs[name] if t.status == "FAILED"), "")
        if not early and 0 < len(by_seed) < seeds and not failed:
            early = f"ended after {len(by_seed)} of {seeds} seeds"
        params = {setting: runs[name][0].params.get(setting, "?") for setting in space}
        found.append(SearchTrial(name, params, values, runs[name], early or failed))
    return found


def search_report(data: StudyData) -> ReportDocument:
    """Create the report of a search.

    Args:
        data: The search.

    Raises:
        StoreError: If no trial has ended normally with all objectives.
    """
    objectives: dict[str, str] = data.declaration["objectives"]
    trials = search_trials(data)
    whole = [t for t in trials if not t.pruned and all(t.values[o] for o in objectives)]
    if not whole:
        raise StoreError(
            f"no trial of the search {data.name} is finished", f"mmphi ablate {data.name} continues with it"
        )
    first = next(iter(objectives))
    sign = 1.0 if objectives[first] == "minimize" else -1.0
    ranked = sorted(whole, key=lambda t: sign * t.mean(first))
    on_front = pareto(whole, objectives)
    shown = [t for t in ranked if t in on_front] if len(objectives) > 1 else ranked
    document = ReportDocument(
        "search.md.j2",
        f"Search {data.name}",
        {
            "question": data.declaration["question"],
            "best": _best(shown, objectives, data),
            "no_verdict": NO_VERDICT,
            "importance": "",
            "ended": f"{len(whole)} of {len(trials)} trials ran to their end.",
            "held": _held(data),
            "command": command(data),
        },
    )
    document.tables["best"] = _table(data, shown[:SHOWN], objectives)
    document.tables["trials"] = _table(data, trials, objectives)
    document.tables["environment"] = environment(data)
    document.figures["history"] = figures.png(
        figures.history([(t.name, t.mean(first)) for t in whole], first, sign > 0)
    )
    if len(objectives) == 2:
        second = list(objectives)[1]
        points = {t.name: (t.mean(second), t.mean(first)) for t in whole}
        signs = {name: 1.0 if direction == "minimize" else -1.0 for name, direction in objectives.items()}
        best = [t.name for t in sorted(on_front, key=lambda t: t.mean(second))]
        document.figures["front"] = figures.png(figures.pareto(points, best, second, first, signs))
    sentence, table = importance(whole, data, first)
    document.values = {**document.values, "importance": sentence}
    if table:
        document.tables["importance"] = table
    return document


def pareto(trials: Sequence[SearchTrial], objectives: Mapping[str, str]) -> list[SearchTrial]:
    """Pareto-optimal trials: no other trial is at least as good in all objectives and better in one."""
    signs = np.array([1.0 if direction == "minimize" else -1.0 for direction in objectives.values()])
    points = np.array([[t.mean(o) for o in objectives] for t in trials]) * signs
    kept = []
    for place, point in enumerate(points):
        beaten = np.all(points <= point, axis=1) & np.any(points < point, axis=1)
        if not beaten.any():
            kept.append(trials[place])
    return kept


def _best(shown: Sequence[SearchTrial], objectives: Mapping[str, str], data: StudyData) -> str:
    if len(objectives) > 1:
        names = join_names([f"`{o}`" for o in objectives])
        return f"{len(shown)} trials that no other beats in both {names} (the Pareto front):"
    (objective,) = objectives
    best = shown[0]
    settings = ", ".join(f"`{name}` = {value}" for name, value in best.params.items())
    seeds = len(best.values[objective])
    around = interval_text(interval(best.values[objective])) if seeds > 1 else "one seed"
    return (
        f"Best of {len(shown)} whole trials: {settings}, with {objective} {format_number(best.mean(objective), 4)}"
        f" {data.declaration['unit']} ({around}, {seeds} seed{'s' if seeds > 1 else ''})."
    )


def _table(data: StudyData, trials: Sequence[SearchTrial], objectives: Mapping[str, str]) -> ReportTable:
    rows = []
    for t in trials:
        links = " ".join(run_link(data, run) for run in t.runs)
        values = [format_number(t.mean(o), 4) for o in objectives]
        seeds = max(len(v) for v in t.values.values())
        rows.append([t.name, *t.params.values(), *values, seeds, t.pruned or "-", links])
    means = [f"mean {o}" for o in objectives]
    return ReportTable(["trial", *data.declaration["space"], *means, "seeds", "ended early", "runs"], rows)


def importance(trials: Sequence[SearchTrial], data: StudyData, objective: str) -> tuple[str, ReportTable | None]:
    """Importance of each setting and of the seed, as a sentence and a table.

    Settings by Optuna's fANOVA (Hutter, Hoos, Leyton-Brown 2014) on the means of the trials; the seed by the share of
    the variance of all runs that is within trials.

    Returns:
        The sentence, and the table; ``None`` for the table if there are too few trials.
    """
    import optuna

    if len(trials) < 4 or len({t.mean(objective) for t in trials}) < 2:
        return "Too few trials ran to their end to say which setting mattered.", None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    values = {name: [_number(t.params[name]) for t in trials] for name in data.declaration["space"]}
    varied = {name: of for name, of in values.items() if len(set(of)) > 1}
    study = optuna.create_study()
    for place, t in enumerate(trials):
        study.add_trial(
            optuna.create_trial(
                params={name: of[place] for name, of in varied.items()},
                distributions={name: _distribution(of) for name, of in varied.items()},
                value=t.mean(objective),
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
        )
    every = [list(t.values[objective]) for t in trials]
    total = float(np.var(np.concatenate(every)))
    within = float(np.mean([np.var(v) for v in every])) / total if total else 0.0
    sentence = (
        "Shares of what the trials' means differ by (fANOVA, by Optuna), and of what all runs differ by within trials:"
        f" {within:.0%} lies between the seeds of the same settings."
    )
    return sentence, ReportTable(["setting", "share"], [[name, f"{share:.0%}"] for name, share in found.items()])


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _distribution(values: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(isinstance(v, float) for v in values):
        return FloatDistribution(min(values), max(values))
    return CategoricalDistribution(sorted(set(map(str, values))))


def _held(data: StudyData) -> str:
    fixed = ", ".join(f"`{name}` = {value}" for name, value in data.declaration["fixed"].items())
    return f"Preset `{data.declaration['preset']}`, with {fixed or 'nothing changed'} in all trials."
