"""The pretraining report, from the tracking store alone: distance of each run to a reference, and extrapolated cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reports import figures
from reports.extrapolation_text import ReferenceDistance
from reports.pretraining_query import Pretraining
from reports.references import Reference, original_run
from reports.render import ReportDocument, ReportTable, plain
from reports.scaling import Outlook
from reports.verdict import join_names

TARGETS = {"initial-1": "initial - 1", "7": "7 nats", "5": "5 nats", "reference-plus-1": "reference + 1"}
SHOWN = (
    *(
        f"pretrain.{name}"
        for name in ("size", "context", "batch_tokens", "optimizer", "lr_scheduler", "warmup_ratio", "decay")
    ),
    *(f"pretrain.{name}" for name in ("weight_decay", "beta2", "max_grad_norm", "precision", "stop", "seed")),
)
PLACES = {"commit": "mmphi.git_commit", "uncommitted changes": "mmphi.git_dirty", "processor": "mmphi.cpu"}
PLACES |= {
    "cores": "mmphi.cores",
    "GPU": "mmphi.gpu",
    "memory, GB": "mmphi.memory_gb",
    "peak that MFU divides by": "mmphi.peak",
}


def pretraining_report(runs: Sequence[Pretraining], reference: Reference) -> ReportDocument:
    """Create the pretraining report.

    Args:
        runs: At least one run; the headline is about the first.
        reference: Reference that the runs are compared with.
    """
    distances = [ReferenceDistance(run, reference, Outlook.of(run.curve())) for run in runs]
    chosen = ",".join(run.run_id[:12] for run in runs)
    document = ReportDocument(
        "pretraining.md.j2",
        "Pretraining, and the distance to Phi-2",
        {
            "headline": distances[0].verdict(),
            "sentences": [d.verdict() for d in distances[1:]],
            "protocol": _protocol(runs, reference),
            "reference": _named(reference),
            "distances": [
                {"name": d.run.title, "table": d.table().markdown(), "notes": list(d.notes()), "phi2": d.phi2()}
                for d in distances
            ],
            "original": _original(),
            "generated": [_generated(run) for run in runs if "stream/tokens" in run.metrics],
            "samples": _samples(runs[0]),
            "command": f"mmphi report pretraining --runs {chosen}",
            "made_by": [_made_by(run) for run in runs],
        },
    )
    document.tables |= {
        "runs": _runs(runs),
        "milestones": _milestones(runs),
        "more": ReportTable(
            ["run", *distances[0].table().columns],
            [[d.run.title, *row] for d in distances for row in d.table().rows],
        ),
        "settings": _settings(runs),
        "environment": _environment(runs),
        "curves": _curves(runs),
    }
    named = {run.title: run for run in runs}
    document.figures |= {
        "curves": figures.png(figures.losses_over_tokens(named, reference)),
        "updates": figures.png(figures.losses_over_updates(named, original_run())),
    }
    first = distances[0]
    if first.outlook.law is not None:
        document.figures["law"] = figures.png(figures.law(first.outlook))
    return document


def _protocol(runs: Sequence[Pretraining], reference: Reference) -> str:
    if not any(run.scored_on(reference.text) for run in runs):
        return f"No run was scored on {reference.text}: `--eval_text FILE` of `mmphi pretrain` does so."
    contexts = sorted({int(run.params["pretrain.context"]) for run in runs})
    windows = sorted({int(run.params.get("pretrain.eval_windows", "0")) for run in runs})
    own = f"windows of {join_names([f'{min(c, 2048):,}' for c in contexts])} tokens, the longest that these models read"
    few = "" if windows == [0] else f", the first {join_names([str(w) for w in windows])} of them"
    same = contexts == [2048] and windows == [0]
    if same:
        return f"Scored by the same protocol: {reference.protocol}."
    return (
        f"**Not quite the same protocol**: the reference is of {reference.protocol}; here {own}{few}. Shorter windows"
        " make a loss larger, not smaller."
    )


def _named(reference: Reference) -> str:
    how = "measured by" if reference.measured else "published,"
    loss = f"{reference.model} on {reference.text}: {reference.loss:.3f} nats/token"
    return f"{loss} ({reference.protocol}; {how} {reference.source})"


def _original() -> str:
    rows = original_run()
    late = [row["loss_nats_per_token"] for row in rows[-10:]]
    peak = max(row["learning_rate"] for row in rows)
    return (
        f"The original run (learning rate up to {peak:g}, a tiny batch) began at {rows[0]['loss_nats_per_token']:.2f}"
        f" and ended at a mean of {sum(late) / len(late):.2f} nats over its last {len(late)} readings, after"
        f" {rows[-1]['optimizer_step']:.0f} updates: `reports/reference/original_run.csv`."
    )


def _made_by(run: Pretraining) -> str:
    """Command line that repeats a run; file and model paths are shortened to their last part."""
    paths = [run.params[name] for name in sorted(run.params) if name.endswith(".path") and name.startswith("corpus.")]
    texts = ", ".join(path.rstrip("/").rpartition("/")[2] for path in paths)
    words, source = [f"--preset {run.tags.get('mmphi.preset', 'text')}"], run.params.get("pretrain.source", "files")
    if source == "files":
        words.append(f"--corpus '[{texts}]'")
    else:
        writer = run.params.get("textgen.model", "").rstrip("/").rpartition("/")[2]
        words.append(f"--source {source} --textgen.model {writer}")
    words += [
        f"--{name} '{run.params[f'pretrain.{name}']}'" for name in ("size", "stop") if f"pretrain.{name}" in run.params
    ]
    if public := run.params.get("pretrain.eval_text", "").rpartition("/")[2]:
        words.append(f"--eval_text '{public}'")
    return "mmphi pretrain " + " ".join(words)


def _samples(run: Pretraining) -> list[dict[str, str]]:
    last = max((int(row["step"]) for row in run.samples), default=0)
    shown = [row for row in run.samples if int(row["step"]) == last]
    return [{"prompt": plain(str(row["prompt"])), "text": plain(str(row["text"]))} for row in shown]


def _generated(run: Pretraining) -> str:
    """Comparison of a run on generated text with the models that generated it."""
    of = run.metrics
    held = of.get("val/loss", math.nan)
    sentence = f"{run.title}: {held:.3f} nats per token on generated text that it did not see; "
    if run.floor is None:
        sentence += "the loss of its generators on it is unknown, because their sampling distribution was modified"
    else:
        sentence += (
            f"the loss of its generators on that text, a lower bound for any student, is {run.floor:.3f},"
            f" {held - run.floor:.3f} less"
        )
    return sentence + (
        f". {of['stream/tokens']:,.0f} tokens came, each was seen {of['stream/times_seen']:.2f} times; the training was"
        f" busy for {of['stream/trainer_busy']:.0%} of its time, the generators for {of['stream/generators_busy']:.0%}."
    )


def _runs(runs: Sequence[Pretraining]) -> ReportTable:
    columns = ["run", "parameters", "tokens", "seconds", "tokens/s", "MFU", "first loss", "held-out", "bits/byte"]
    rows = []
    for run in runs:
        of = run.metrics
        rows.append(
            [
                f"[{run.title}]({run.link})",
                f"{of.get('pretrain/parameters', math.nan):,.0f}",
                f"{run.tokens:,.0f}",
                f"{run.seconds:,.0f}",
                f"{run.tokens_per_s:,.0f}",
                f"{of.get('train/mfu', math.nan):.1%}",
                f"{run.initial:.3f}",
                f"{of.get('val/loss', math.nan):.3f}",
                f"{of.get('val/bits_per_byte', math.nan):.3f}",
                f"{of['public/loss']:.3f}" if "public/loss" in of else "-",
                f"{of['public/bits_per_byte']:.3f}" if "public/bits_per_byte" in of else "-",
            ]
        )
    return ReportTable([*columns, "public text", "bits/byte of it"], rows)


def _milestones(runs: Sequence[Pretraining]) -> ReportTable:
    rows = []
    for run in runs:
        cells = []
        for name in TARGETS:
            found = run.reached(name)
            cells.append(
                f"{found[0]:,.0f} tokens, {found[1]:,.1f} s, {found[2]:.0f} updates" if found else "not reached"
            )
        rows.append([f"[{run.title}]({run.link})", *cells])
    return ReportTable(["run", *TARGETS.values()], rows)


def _settings(runs: Sequence[Pretraining]) -> ReportTable:
    rows = [[name, *(run.params.get(name, "-") for run in runs)] for name in SHOWN]
    for title, metric in (
        ("learning rate, peak", "pretrain/learning_rate"),
        ("learning rate of Muon, peak", "pretrain/muon_learning_rate"),
        ("updates that the schedule is laid over", "pretrain/schedule_steps"),
    ):
        rows.append([title, *(f"{run.metrics.get(metric, math.nan):.4g}" for run in runs)])
    return ReportTable(["setting", *(run.title for run in runs)], rows)


def _environment(runs: Sequence[Pretraining]) -> ReportTable:
    rows = []
    for title, tag in PLACES.items():
        if any(tag in run.tags for run in runs):
            rows.append([title, *(run.tags.get(tag, "-") for run in runs)])
    inputs = sorted({tag for run in runs for tag in run.tags if tag.startswith(("mmphi.data.", "mmphi.upstream."))})
    rows += [[tag.removeprefix("mmphi."), *(run.tags.get(tag, "-") for run in runs)] for tag in inputs]
    return ReportTable(["what", *(run.title for run in runs)], rows)


def _curves(runs: Sequence[Pretraining]) -> ReportTable:
    rows = [[run.run_id, step, step * run.batch_tokens, f"{loss:.4f}"] for run in runs for step, loss in run.losses]
    return ReportTable(["run", "update", "tokens", "loss_nats_per_token"], rows)
