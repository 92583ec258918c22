"""Figures of reports: 800 px wide, in the colour-blind-safe palette of Okabe and Ito (2008)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter

from reports.comparison import Comparison
from reports.paired_tests import Interval, VarianceShares
from reports.pretraining_query import Pretraining
from reports.references import Reference
from reports.scaling import Outlook
from reports.verdict import JudgedMetric

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = "osD^vPX*"
WIDTH, HEIGHT, DPI = 8.0, 4.0, 100  # 800 px.
GREY, BAND = "#666666", "#dddddd"
LABEL_CHARACTERS, LOG_FROM = 18, 5  # Longest name drawn next to its point; ratio from which an axis is logarithmic.


def png(figure: Figure) -> bytes:
    """Render a figure to PNG; equal figures give equal bytes."""
    content = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    return content.getvalue()


def _figure(height: float = HEIGHT, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False).flat)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=10)
    return figure, axes


def _label(metric: JudgedMetric) -> str:
    return f"{metric.name}, {metric.unit} ({'less' if metric.less else 'more'} is better)"


def effects(comparisons: Sequence[Comparison], baseline: str, metric: JudgedMetric) -> Figure:
    """Plot the differences to the baseline with their intervals, and the margin of equivalence."""
    figure, (axes,) = _figure(1.6 + 0.5 * len(comparisons))
    if metric.margin:
        axes.axvspan(-metric.margin, metric.margin, color=BAND, label=f"within the margin, {metric.margin:g}")
    axes.axvline(0, color=GREY, linewidth=1)
    marks = {
        "different": ("o", COLOURS[0], "different"),
        "equivalent": ("s", COLOURS[2], "the same within the margin"),
        "open": ("D", COLOURS[5], "not decided"),
        "interim": ("x", GREY, "too few seeds yet"),
    }
    labelled: set[str] = set()
    for row, comparison in enumerate(comparisons):
        marker, colour, words = marks[comparison.verdict]
        label = None if comparison.verdict in labelled else words
        labelled.add(comparison.verdict)
        if comparison.interval:
            axes.plot([comparison.interval.low, comparison.interval.high], [row, row], color=colour, linewidth=2)
        axes.plot(comparison.difference, row, marker, color=colour, markersize=9, label=label, linestyle="none")
    axes.set_yticks(range(len(comparisons)), [c.level for c in comparisons], fontsize=11)
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    better = "left" if metric.less else "right"
    axes.set_xlabel(
        f"difference to {baseline}, {metric.unit}\n(further {better} is better; line: 95 % interval)", fontsize=11
    )
    figure.legend(fontsize=9, frameon=False, loc="outside upper center", ncols=4)
    return figure


def seeds(
    values: Mapping[str, Mapping[int, float]], intervals: Mapping[str, Interval | None], metric: JudgedMetric
) -> Figure:
    """Plot the value of each seed, joined across levels, and the mean of each level with its interval."""
    figure, (axes,) = _figure()
    levels = list(values)
    numbers = sorted({seed for of_level in values.values() for seed in of_level})
    for seed in numbers:
        there = [(place, values[level][seed]) for place, level in enumerate(levels) if seed in values[level]]
        axes.plot(*zip(*there, strict=True), color="#aaaaaa", linewidth=0.8, marker="o", markersize=4, zorder=1)
    for place, level in enumerate(levels):
        if not values[level]:
            continue
        mean, around = float(np.mean(list(values[level].values()))), intervals[level]
        shifted = place + 0.12  # The interval must not hide the points of the seeds.
        if around:
            axes.plot([shifted, shifted], [around.low, around.high], color=COLOURS[0], linewidth=3, zorder=2)
        axes.plot(shifted, mean, "D", color=COLOURS[0], markersize=8, zorder=3)
    axes.set_xticks(range(len(levels)), levels, fontsize=11)
    axes.set_xlim(-0.5, len(levels) - 0.5)
    axes.set_ylabel(_label(metric), fontsize=10)
    axes.set_title("grey: seeds, joined; blue: mean and 95 % interval", fontsize=10, color=GREY, loc="left")
    return figure


def curves(
    curves_of: Mapping[str, Sequence[Sequence[tuple[int, float]]]], baseline: str, name: str, unit: str
) -> Figure:
    """Plot a metric over the training: mean and range over the seeds of each level, the baseline black and thick.

    If levels take different numbers of steps for the same tokens, the x axis is the share of the training in percent.
    """
    figure, (axes,) = _figure()
    ends = [max(dict(run)) for runs in curves_of.values() for run in runs if run]
    relative = bool(ends) and max(ends) > 1.1 * min(ends)
    for place, (level, runs) in enumerate(curves_of.items()):
        steps = sorted(set.intersection(*(set(dict(run)) for run in runs))) if runs else []
        if not steps:
            continue
        grid = np.array([[dict(run)[step] for step in steps] for run in runs])
        base = level == baseline
        colour = "#000000" if base else COLOURS[place % 7]
        line: dict[str, Any] = {
            "linewidth": 2.6 if base else 1.6,
            "marker": MARKERS[place % len(MARKERS)],
            "markersize": 5 if len(steps) <= 20 else 0,
        }
        places = np.array(steps) / (steps[-1] / 100 if relative else 1)
        axes.plot(places, grid.mean(axis=0), color=colour, label=f"{level}{' (baseline)' if base else ''}", **line)
        axes.fill_between(places, grid.min(axis=0), grid.max(axis=0), color=colour, alpha=0.08, linewidth=0)
    axes.set_yscale("log")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 1)))
    axes.set_xlabel("share of the training, %" if relative else "optimiser steps", fontsize=11)
    axes.set_ylabel(f"{name}, {unit}", fontsize=11)
    axes.set_title("mean over seeds; shaded: range", fontsize=10, color=GREY, loc="left")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=10, frameon=False)
    return figure


def front(points: Mapping[str, tuple[float, float]], less: bool) -> list[str]:
    """Levels on the Pareto front of cost and metric, cheapest first.

    Args:
        points: Cost and metric by level; lower cost is better.
        less: Whether lower values of the metric are better.
    """
    sign = 1.0 if less else -1.0
    kept = [
        name
        for name, (cost, value) in points.items()
        if not any(
            other_cost <= cost and sign * other <= sign * value and (other_cost < cost or sign * other < sign * value)
            for other_cost, other in points.values()
        )
    ]
    return sorted(kept, key=lambda name: points[name])


def tradeoffs(costs: Mapping[str, Mapping[str, tuple[float, float]]], metric: JudgedMetric) -> Figure:
    """Plot the metric against each cost, with the Pareto front.

    Args:
        costs: Cost and metric of every level, by title of the cost.
        metric: The judged metric.
    """
    figure, all_axes = _figure(columns=max(1, len(costs)))
    names = list(dict.fromkeys(name for points in costs.values() for name in points))
    long_names = max(map(len, names)) > LABEL_CHARACTERS  # Long names would overlap.
    for axes, (cost, points) in zip(all_axes, costs.items(), strict=False):
        best = front(points, metric.less)
        axes.plot(*zip(*(points[name] for name in best), strict=True), color=COLOURS[2], linewidth=1.5, zorder=1)
        for place, (name, (x, y)) in enumerate(points.items()):
            colour = COLOURS[2] if name in best else COLOURS[5]
            axes.plot(x, y, MARKERS[place % len(MARKERS)], color=colour, markersize=8, zorder=2)
            if not long_names:
                axes.annotate(name, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=9)
        axes.set_xlabel(cost, fontsize=10)
        heights = [y for _, y in points.values()]
        if min(heights) > 0 and max(heights) > LOG_FROM * min(heights):
            axes.set_yscale("log")
        axes.margins(x=0.2, y=0.15)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 4))
    all_axes[0].set_ylabel(_label(metric), fontsize=10)
    if long_names:
        marks = [
            Line2D([], [], marker=MARKERS[i % len(MARKERS)], color=GREY, linestyle="none", label=name)
            for i, name in enumerate(names)
        ]
        figure.legend(handles=marks, fontsize=9, frameon=False, loc="outside lower center", ncols=2)
    figure.suptitle(
        "green: no other level is better in both (Pareto front)", fontsize=10, color=GREY, x=0.01, ha="left"
    )
    return figure


def importance(parts: VarianceShares) -> Figure:
    """Plot the shares of the variance: factor, seed and rest."""
    figure, (axes,) = _figure(1.9)
    begun = 0.0
    for share, name, colour in (
        (parts.factor, "factor", COLOURS[0]),
        (parts.seed, "seed", COLOURS[1]),
        (parts.rest, "interaction", BAND),
    ):
        axes.barh(0, share, left=begun, color=colour, height=0.5, label=f"{name} {share:.0%}")
        begun += share
    axes.set_xlim(0, 1)
    axes.set_yticks([])
    axes.set_xlabel("share of the variance between all trials", fontsize=10)
    axes.legend(fontsize=10, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.35))
    return figure


def history(trials: Sequence[tuple[str, float]], name: str, less: bool) -> Figure:
    """Plot the value of each trial in order, and the best so far."""
    figure, (axes,) = _figure()
    values = np.array([value for _, value in trials])
    best = np.minimum.accumulate(values) if less else np.maximum.accumulate(values)
    axes.plot(range(len(values)), values, "o", color=COLOURS[0], markersize=6, label="trial")
    axes.step(range(len(values)), best, where="post", color=COLOURS[5], linewidth=1.6, label="best so far")
    axes.set_xlabel("trials that ran to their end", fontsize=11)
    axes.set_ylabel(name, fontsize=11)
    axes.legend(fontsize=10, frameon=False)
    return figure


def pareto(
    points: Mapping[str, tuple[float, float]], best: Sequence[str], across: str, up: str, signs: Mapping[str, float]
) -> Figure:
    """Plot two objectives of all trials, with the Pareto front.

    Args:
        points: Values of the objectives on the x and y axes, by name of the trial.
        best: Names of the trials on the front, in the order in which they are joined.
        across: Name of the objective on the x axis.
        up: Name of the objective on the y axis.
        signs: 1 for objectives that are minimised and -1 for those that are maximised, by name.
    """
    figure, (axes,) = _figure()
    axes.plot(*zip(*points.values(), strict=True), "o", color="#aaaaaa", markersize=6, linestyle="none", label="trials")
    front_points = [points[name] for name in best]
    axes.plot(*zip(*front_points, strict=True), "D-", color=COLOURS[2], markersize=8, label="Pareto front")
    for name in best:
        axes.annotate(name, points[name], xytext=(5, 5), textcoords="offset points", fontsize=9)
    for set_label, objective in ((axes.set_xlabel, across), (axes.set_ylabel, up)):
        set_label(f"{objective} ({'less' if signs[objective] > 0 else 'more'} is better)", fontsize=11)
    axes.legend(fontsize=10, frameon=False)
    return figure


def losses_over_tokens(runs: Mapping[str, Pretraining], reference: Reference) -> Figure:
    """Plot training losses over tokens on a log axis, with losses on public and generated text, and the targets."""
    figure, (axes,) = _figure(4.6)
    for place, (name, run) in enumerate(runs.items()):
        colour = COLOURS[place % 6]
        steps, losses = np.array(run.losses, dtype=float).T
        axes.plot(steps * run.batch_tokens, losses, color=colour, linewidth=1.4, label=f"{name}, training")
        if run.public:
            at, public = np.array(run.public, dtype=float).T
            label = f"{name}, {reference.text if run.scored_on(reference.text) else 'public text'}"
            axes.plot(at * run.batch_tokens, public, "D--", color=colour, markersize=6, linewidth=1, label=label)
        if run.floor is not None:
            at, held = np.array(run.held, dtype=float).T
            axes.plot(at * run.batch_tokens, held, "o-", color=colour, markersize=5, label=f"{name}, generated text")
            axes.axhline(run.floor, color=colour, linewidth=1.6, linestyle="-.")
            under: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "top"}
            words = f"the generator on that text, {run.floor:.3f}"
            axes.annotate(words, (0.99, run.floor), fontsize=9, ha="right", color=colour, **under)
        axes.axhline(run.initial - 1, color=colour, linewidth=0.9, linestyle=":")
        place_of: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "bottom"}
        axes.annotate("initial - 1", (0.99, run.initial - 1), fontsize=9, ha="right", color=colour, **place_of)
    axes.axhline(reference.loss, color="#000000", linewidth=1.6, linestyle="--")
    where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "bottom"}
    axes.annotate(f"{reference.model}, {reference.loss:.3f}", (0.01, reference.loss), fontsize=10, **where)
    axes.set_xscale("log")
    floors = [run.floor - 0.3 for run in runs.values() if run.floor is not None]
    axes.set_ylim(bottom=min(2.0, reference.loss - 0.3, *floors))
    axes.set_xlabel("tokens trained on", fontsize=11)
    axes.set_ylabel("loss, nats per token", fontsize=11)
    axes.legend(fontsize=9, edgecolor="none", loc="lower left", bbox_to_anchor=(0, 0.1))
    return figure


def losses_over_updates(runs: Mapping[str, Pretraining], original: Sequence[Mapping[str, float]]) -> Figure:
    """Plot training losses over updates, together with the original run's."""
    figure, (axes,) = _figure()
    there = [(row["optimizer_step"], row["loss_nats_per_token"]) for row in original]
    axes.plot(*zip(*there, strict=True), "o-", color=GREY, markersize=4, linewidth=1, label="the original run")
    for place, (name, run) in enumerate(runs.items()):
        axes.plot(*zip(*run.losses, strict=True), color=COLOURS[place % 6], linewidth=1.4, label=name)
    axes.set_xlabel("updates", fontsize=11)
    axes.set_ylabel("loss, nats per token", fontsize=11)
    axes.legend(fontsize=10, frameon=False)
    return figure


def law(outlook: Outlook) -> Figure:
    """Plot a binned loss curve and the law fitted to it, over the sum of the learning rates."""
    figure, (axes,) = _figure()
    total, cooled, losses, _ = outlook.curve.points()
    axes.plot(total, losses, "o", color=COLOURS[0], markersize=5, label="training loss, binned")
    if outlook.law is not None:
        axes.plot(total, outlook.law(total, cooled), color=COLOURS[5], linewidth=1.6, label="its law")
        spread = np.array([drawn(total, cooled) for drawn in outlook.resampled])
        if len(spread):
            low, high = np.quantile(spread, [0.025, 0.975], axis=0)
            axes.fill_between(
                total, low, high, color=COLOURS[5], alpha=0.2, linewidth=0, label="95 % of laws of simulated curves"
            )
    axes.set_xscale("log")
    axes.set_xlabel("S: sum of the learning rates, as shares of the peak (updates at full rate)", fontsize=11)
    axes.set_ylabel("loss, nats per token", fontsize=11)
    axes.legend(fontsize=10, frameon=False)
    return figure
