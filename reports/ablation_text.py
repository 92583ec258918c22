"""Text of an ablation report apart from its verdicts: design, budgets, costs, warnings and notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from reports.study_query import StudyData
from reports.study_results import StudyResults
from reports.tables import failed_at, mean_of, order_of, tried_at, used_at
from reports.verdict import JudgedMetric, join_names

SAME_TOKENS = 0.02  # Budgets that differ by more than this share are reported.
EDGE = "the best value is at the edge of the tried values; a better one may be outside"
STATISTICS = (
    "Intervals are 95 % intervals of the mean: Student's t of fewer than 12 values, else scipy's bootstrap (9,999"
    " resamples, expanded for small samples as in Hesterberg 2015). p is the larger of two exact sign-flip permutation"
    " tests of the differences at the same seeds, of their values and of their signed ranks (Wilcoxon), corrected by"
    " Holm's method over the comparisons of this study. Both tests assume that differences are symmetric about their"
    " centre. Runs that diverged (10 standard deviations, as the better half of all runs shows them, from the median of"
    " their level) or gave no number are left out and tested separately. Equivalence is judged by two one-sided tests"
    " of the same kind."
)
COSTS_NOTE = (
    "Medians over the seeds. Seconds and memory are those of the training on these machines, under their load at the"
    " time; a resumed trial counts only its last part, and is left out of the seconds."
)
FIRST_TOKEN = " The first token is that of an answer about a photograph of 640 x 480 px, vision encoder included."


def costs_note(data: StudyData, noisy: Sequence[str] = ()) -> str:
    """Note on how costs were measured.

    Args:
        data: The study.
        noisy: Titles of the costs in which levels do not differ beyond their noise.
    """
    note = COSTS_NOTE + FIRST_TOKEN * ("cost/first_token_s" in data.declaration["costs"])
    if noisy:
        note += (
            f" Not drawn, because the levels differ by less than twice their spread over seeds: {join_names(noisy)}."
        )
    return note


def design(data: StudyData) -> str:
    """Description of the design: seeds, budget, metric, and what is and is not repeated over seeds."""
    declared = data.declaration
    settings = declared["seed_settings"]
    shifted = [level for level, shift in declared.get("shifts", {}).items() if shift]
    paired = (
        f"The seeds of {join_names(shifted)} intentionally differ from those of their pairs."
        if shifted
        else "Trials with the same seed use the same batches in the same order and start from the same random state"
        " wherever shapes allow."
    )
    tokens = declared["tokens"]
    budget = f"{tokens:,} supervised tokens" if tokens else "the preset's number of steps"
    upstream = {tag.removeprefix("mmphi.upstream.") for trial in data.trials for tag in trial.tags}
    drawn = [f"{stage}.seed" for stage in ("scenes", "pretrain", "light_clip", "projector") if stage in upstream]
    split = "corpus.split_seed" if "tokens" in upstream else "data.split_seed"
    fixed = [name for name in (*drawn, split) if name not in settings]
    level = f"{seeds_of(data)}, in rounds, {budget} each, nothing pruned"
    judged = f"judged by `{declared['metric']}`{_split_of(data)}"
    replicate = list(declared.get("replicate", []))
    fixed = [name for name in fixed if name not in replicate]
    repeated, stands = (join_names([f"`{name}`" for name in names]) for names in ([*settings, *replicate], fixed))
    if draws := int(declared.get("replicates", 0)) if replicate else 0:
        replicated = join_names([f"`{name}`" for name in replicate])
        repeated += f" ({replicated} in {draws} draws, which are the units that are judged)"
    if not fixed:
        return (
            f"Preset `{declared['preset']}`, stage `{declared['stage']}`: {level}; {judged}. {paired} Varied with"
            f" the seed: {repeated}. The verdict is about new draws of all of these."
        )
    return (
        f"Preset `{declared['preset']}`, stage `{declared['stage']}`: {level}; {judged}. {paired} Varied with the"
        f" seed: {repeated}. **Not varied**, so not part of the uncertainty: {stands}. The verdict is about new draws"
        " of the varied settings, with the others fixed."
    )


def _split_of(data: StudyData) -> str:
    """Phrase about the split of the judged metric, derived from its prefix; empty for other prefixes."""
    metric = data.declaration["metric"]
    if metric.startswith("test/"):
        return " on the test split, which neither training nor tuning used"
    if metric.startswith("val/"):
        chosen = ", **on which the nuisance values were chosen, too**" if data.declaration.get("nuisance") else ""
        return f" on the validation split{chosen}"
    return ""


def seeds_of(data: StudyData) -> str:
    """Phrase about the number of paired seeds of the levels."""
    counts = {level: len(of) for level, of in data.results("verdict", data.declaration["metric"]).items()}
    fewest, most = min(counts.values()), max(counts.values())
    if fewest == most:
        return f"every level at {most} paired seed{'s' * (most != 1)}"
    return f"levels at {fewest} to {most} paired seeds"


def missing_trials(data: StudyData) -> str:
    """Sentence about trials that have not ended; empty if there are none."""
    lost = data.lost()
    missing = [(level, n) for level, n in data.missing() if n not in lost[level]]
    if not missing:
        return ""
    total = len([level for level in data.levels if level not in data.stopped]) * data.seeds
    return f"Partial report: {total - len(missing)} of {total} trials have ended."


def exploratory(found: StudyResults) -> str:
    """Explanation of results over more seeds than declared; empty if there are none."""
    if not found.exploratory:
        return ""
    return (
        f"The study declared {found.data.planned} seeds, and more were added after results were seen. Over all of them,"
        " without a verdict, because adding seeds until a difference appears is not a valid test:"
    )


def warnings(data: StudyData, metric: JudgedMetric) -> Iterator[str]:
    """Warnings that limit the validity of the results."""
    if data.seeds < data.looks[0]:
        yield (
            f"The seeds were lowered to {data.seeds} while it ran, and it is judged at {data.looks[0]}: there is no"
            f" verdict. `mmphi studies {data.name} --seeds {data.looks[0]}` raises them."
        )
    if missing := data.missing():
        cells = join_names([f"{level} seed {n}" for level, n in missing[:12]])
        more = f" and {len(missing) - 12} more" if len(missing) > 12 else ""
        yield f"{len(missing)} trials that were asked for have no result: {cells}{more}. Their pairs are left out."
    for level, seeds in data.lost().items():
        if seeds and len(seeds) < data.seeds:
            yield f"{level} failed at {len(seeds)} of {data.seeds} seeds: its mean is that of the trials that did not."
    found = [t for t in data.trials if t.phase == "verdict" and t.finished and metric.name in t.metrics]
    cells_found = [(t.level, t.seed) for t in found]
    if twice := sorted({cell for cell in cells_found if cells_found.count(cell) > 1}):
        cells = join_names([f"{level} seed {n}" for level, n in twice])
        yield f"{len(twice)} cells have more than one finished run; the oldest counts: {cells}."
    if data.stopped:
        yield f"Stopped before their last seed: {join_names(data.stopped)}."
    commits = {t.tags.get("mmphi.git_commit", "unknown") for t in found}
    if len(commits) > 1:
        names = join_names(sorted(commit[:12] for commit in commits))
        yield f"The trials were run by {len(commits)} commits of the code: {names}."


def budget(data: StudyData, metric: JudgedMetric) -> str:
    """Sentence on whether all levels were trained on the same number of supervised tokens."""
    name = f"{data.declaration['stage']}/supervised_tokens"
    counts = {level: mean_of(of, name) for level, of in data.results("verdict", metric.name).items() if of}
    known = {level: count for level, count in counts.items() if count is not None}
    if not known:
        return "Budgets were not checked: no run records its supervised tokens."
    least, most = min(known.values()), max(known.values())
    if most - least > SAME_TOKENS * most:
        return f"**Budgets differ**: from {least:,.0f} to {most:,.0f} supervised tokens a trial."
    tokens = f"{least:,.0f}" if round(least) == round(most) else f"{least:,.0f} to {most:,.0f}"
    return f"Budgets are equal: {tokens} supervised tokens per trial at every level."


def held_fixed(data: StudyData) -> str:
    """Sentences about the settings that differ between levels, and those held fixed in addition to the preset."""
    fixed = data.declaration["fixed"]
    shared = ", ".join(f"`{name}` = {value}" for name, value in fixed.items())
    fields = data.declaration.get("fields") or [data.declaration["factor"]]
    return (
        f"Between levels differ: {join_names([f'`{f}`' for f in fields])}. Held fixed in addition to the preset"
        f" `{data.declaration['preset']}`: {shared or 'nothing'}. All settings of a run are in its `settings.yaml`."
    )


def failures(data: StudyData) -> str:
    """Numbers of runs without a result, and of interrupted runs that were resumed, in words."""
    failed, went_on = data.failed(), [t for t in data.trials if t.went_on]
    first = f"{len(failed)} runs ended without a result." if failed else "None: every trial begun has a result."
    resumed = f" {len(went_on)} interrupted runs were resumed from their checkpoints." if went_on else ""
    return first + resumed


def importance_text(factor: float, seed: float, rest: float) -> str:
    """Sentence about the shares of the variance."""
    return (
        f"Of the variance between all trials the factor explains {factor:.0%}, the seed alone {seed:.0%}, and"
        f" {rest:.0%} is their interaction (functional ANOVA, exact on a full grid)."
    )


def command(data: StudyData) -> str:
    """Command lines that repeat the study and its report."""
    base, _, preset = data.name.partition(".")
    extra = f" --preset {preset}" if preset else ""
    many = (
        f"--trials {data.declaration['trials']}"
        if data.declaration.get("kind") == "search"
        else f"--seeds {data.seeds}"
    )
    plain = f"mmphi ablate {base}{extra} {many} --tokens {data.declaration.get('tokens', 0)}"
    return f"{data.tags.get('mmphi.command') or plain}\nmmphi report ablation --study {data.name}"


def tuning_notes(data: StudyData) -> Iterator[str]:
    """Notes on levels whose nuisance value is at the edge of the tried values, or that used several values."""
    limit = int(data.declaration.get("tuning_extensions", 0))
    for level in data.levels:
        tried, used = tried_at(data, level), used_at(data, level)
        if len(used) > 1:
            yield f"{level}: {len(used)} values were used, {join_names([', '.join(values) for values in used])}."
        for place, (name, declared) in enumerate(data.declaration["nuisance"].items()):
            # Failed values count as tried: the best value next to one is not at an edge.
            everything = {values[place] for values, _ in tried} | {values[place] for values in failed_at(data, level)}
            values = sorted(everything, key=lambda v: order_of([v]))
            numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in declared)
            edges = {values[0], values[-1]} if len(values) > 1 and numbers else set()
            if len(values) == 2 and not limit:
                yield f"{level}, `{name}`: only two values were tried, so that a better one may lie outside of them."
            elif at_edge := sorted({each[place] for each in used} & edges):
                added = len(values) - len(set(declared))
                reached = f", after {added} values that were added" if limit and added > 0 else ""
                yield f"{level}, `{name}` = {' and '.join(at_edge)}: {EDGE}{reached}."
