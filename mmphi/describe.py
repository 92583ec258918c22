"""What the command line says: every setting of a stage, the graph of stages, how a stage ended."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from mmphi.fields import all_fields, field_of, leaves
from mmphi.manifest import total_bytes
from mmphi.pipeline import Pipeline
from mmphi.settings import Settings
from mmphi.stage import Result
from mmphi.stages import STAGES

if TYPE_CHECKING:
    from mlflow.entities import Run

    from mmphi.tracking import Store

STATUS_HELP = """usage: mmphi status [--preset NAME] [--KEY VALUE ...]

The stages as a graph: finished with run, time and size, or missing with what building would cost."""


def stage_help(name: str, settings: Settings) -> str:
    """Every setting that matters to a stage or to what it is built on, with type, value, unit and meaning."""
    stage = STAGES[name]
    order = Pipeline(STAGES).order(name, settings)
    sections = list(dict.fromkeys([*stage.sections, *(s for each in reversed(order) for s in STAGES[each].sections)]))
    lines = [
        f"mmphi {name}: {stage.help}",
        f"built on: {', '.join(each for each in order if each != name) or 'nothing'}",
        "",
        f"Values in brackets are those of the preset {settings.name}. Settings marked * change no result, and no key.",
        "--preset, --force and --no-build: see mmphi --help.",
        "",
        *_lines("seed", settings),
    ]
    for section in sections:
        own = section == name
        lines += ["", f"{section}, its own section, which may be left out:" if own else f"{section}:"]
        lines += _lines(section, settings, own)
    return "\n".join(lines)


def _lines(section: str, settings: Settings, own: bool = False) -> list[str]:
    values = settings.model_dump()
    rows = []
    for name, field in all_fields().items():
        if name.partition(".")[0] != section:
            continue
        item = ".N." in name
        shown = field.default if item else _value(values, name)
        bracket = f"[{_shown(shown)}{f' {field.unit}' if field.unit else ''}]"
        option = f"--{name.removeprefix(f'{section}.') if own else name}{'' if field.matters else ' *'}"
        rows.append((option, field.type_name, bracket, field.help))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:<14} {d}" for a, b, c, d in rows]


def _value(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        set_here = [f"{k}={v}" for k, v in leaves(value, "") if (f := field_of(f"data.sources{k}")) and v != f.default]
        return ", ".join(set_here) if value and isinstance(value[0], dict) else json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def status(settings: Settings) -> str:
    """The stages as a graph: finished with run and time, or missing with what building would cost."""
    pipeline = Pipeline(STAGES)
    drawn: set[str] = set()
    rows: list[tuple[str, str]] = []

    def draw(name: str, before: str, branch: str) -> None:
        rows.append((f"{before}{branch}{name}", "(above)" if name in drawn else _state(pipeline, name, settings)))
        if name in drawn:
            return
        drawn.add(name)
        inner = before + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        upstream = STAGES[name].upstream(settings)
        for each in upstream:
            draw(each, inner, "└─ " if each == upstream[-1] else "├─ ")

    needed = {each for stage in STAGES.values() for each in stage.upstream(settings)}
    for name in STAGES:
        if name not in needed:
            draw(name, "", "")
    for name in STAGES:
        if name not in drawn:  # Nothing here needs it.
            draw(name, "", "")
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"{settings.name}, in {pipeline.store.uri}", "", *(f"{a:<{width}}  {b}" for a, b in rows)])


def _state(pipeline: Pipeline, name: str, settings: Settings) -> str:
    store, key = pipeline.store, pipeline.key(name, settings)
    run = store.result(key)
    if run:
        return f"finished  run {run.info.run_id}, {ago(run.info.end_time)}{_took(run, store)}"
    cost = STAGES[name].cost(settings)
    past = _seconds_before(store, name, settings.name)
    seconds = past if past is not None else cost.seconds
    took = f", about {duration(seconds)}{' as last time' if past is not None else ''}" if seconds is not None else ""
    begun = any(store.search(key=key))
    return f"{'begun' if begun else 'missing':<8}  would take {size(cost.disk_bytes)}{took}"


def _seconds_before(store: Store, stage: str, preset: str) -> float | None:
    """How long the newest finished run of a stage took under a preset's name."""
    runs = store.search(stage=stage, preset=preset)
    took = (run.data.metrics.get("seconds") for run in runs if run.info.status == "FINISHED")
    return next((seconds for seconds in took if seconds is not None), None)


def _took(run: Run, store: Store) -> str:
    folder = store.local_folder(run)
    disk = f", {size(total_bytes(folder))}" if folder else ""
    seconds = run.data.metrics.get("seconds")
    return f"{disk}, took {duration(seconds)}" if seconds is not None else disk


def ago(milliseconds: int) -> str:
    """How long ago a time of the store was."""
    return f"{duration(max(0.0, time.time() - milliseconds / 1000))} ago"


def duration(seconds: float) -> str:
    """A duration in words."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def ending(result: Result, store: Store) -> str:
    """How a stage ended: its metrics, what it predicts, its run, and where to look at it."""
    lines = ["", *(f"  {name:<34} {value:.4g}" for name, value in sorted(result.metrics.items()))]
    table = result.path / "test_predictions.json"
    if table.exists():
        lines += ["", "What it now says of held-out images:", *predictions(json.loads(table.read_text()))]
    server = store.uri.startswith("http")
    opens = [] if server else [f"opened by  mlflow ui --backend-store-uri {store.uri} --host 127.0.0.1"]
    return "\n".join(
        [
            *lines,
            "",
            f"{result.stage}  run {result.run_id}",
            f"files in   {result.path}",
            f"page at    {store.address(result.run_id)}",
            *opens,
        ]
    )


def predictions(table: dict[str, Any], count: int = 6) -> list[str]:
    """What a table of predictions says, as lines; ``=`` marks those equal to their reference."""
    columns = table["columns"]
    said, true = columns.index("prediction"), columns.index("reference")
    lines = []
    for row in table["data"][:count]:
        same = row[said] == row[true]
        lines += [f"  {'=' if same else ' '} {row[said]}", *([] if same else [f"      ({row[true]})"])]
    return lines
