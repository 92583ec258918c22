"""What the command line says: every setting of a stage, the graph of stages, how a stage ended."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from mmphi.errors import SettingsError
from mmphi.pipeline.manifest import total_bytes
from mmphi.pipeline.plan import Plan
from mmphi.pipeline.stage import Cost, Result
from mmphi.settings.fields import all_fields, canonical, leaves
from mmphi.settings.view import covered
from mmphi.stages import STAGES, Settings
from mmphi.stages.estimates import to_fetch, to_hash
from mmphi.tracking.glance import Glance, glance

if TYPE_CHECKING:
    from mmphi.tracking.search import RunStore as Store

STATUS_HELP = """usage: mmphi status [--preset NAME] [--KEY VALUE ...]

The stages as a graph: finished with run, time and size, or missing with what building would cost."""


def stage_help(name: str, settings: Settings) -> str:
    """Every setting that a stage or what it is built on may read, with type, value, unit and meaning."""
    stage, plan = STAGES[name], Plan(STAGES)
    order = plan.order(name, settings)
    declared = [*stage.declared, *(d for each in reversed(order) for d in STAGES[each].declared)]
    sections = dict.fromkeys([name, *(d.partition(".")[0] for d in declared)])
    lines = [
        f"mmphi {name}: {stage.help}",
        f"built on: {', '.join(each for each in order if each != name) or 'nothing'}",
        "",
        f"Values in brackets are those of the preset {settings.name}. Settings marked * change no result, and no key.",
        "--preset, --force and --no-build: see mmphi --help.",
    ]
    for section in sections:
        own = section == name
        if rows := _lines(section, settings, declared, own):  # Not every stage has a section of its own.
            title = f"{section}, its own section, which may be left out:" if own else f"{section}:"
            lines += ["", title, *rows]
    return "\n".join(lines)


def _lines(section: str, settings: Settings, declared: list[str], own: bool = False) -> list[str]:
    values = settings.model_dump()
    rows = []
    for name, field in all_fields(type(settings)).items():
        if name.partition(".")[0] != section or not (own or covered(name, declared)):
            continue
        item = ".N." in name
        shown = field.default if item else _value(values, name)
        bracket = f"[{_shown(shown)}{f' {field.unit}' if field.unit else ''}]"
        option = f"--{name.removeprefix(f'{section}.') if own else name}{'' if field.matters else ' *'}"
        rows.append((option, field.type_name, bracket, field.help))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    return [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:<14} {d}" for a, b, c, d in rows]


def _value(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        fields = all_fields(Settings)
        changed = [
            f"{k}={v}"
            for k, v in leaves(value, "")
            if (f := fields.get(canonical(f"data.sources{k}"))) and v != f.default
        ]
        return ", ".join(changed) if value and isinstance(value[0], dict) else json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def status(settings: Settings) -> str:
    """The stages as a graph: finished with run and time, or missing with what building would cost."""
    plan, looked = Plan(STAGES), glance()
    drawn: set[str] = set()
    rows: list[tuple[str, str]] = []

    def draw(name: str, before: str, branch: str) -> None:
        rows.append((f"{before}{branch}{name}", "(above)" if name in drawn else _state(plan, looked, name, settings)))
        if name in drawn:
            return
        drawn.add(name)
        inner = before + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        upstream = plan.upstream(name, settings)
        for each in upstream:
            draw(each, inner, "└─ " if each == upstream[-1] else "├─ ")

    needed = {each for name in STAGES for each in plan.upstream(name, settings)}
    for name in sorted(STAGES, key=lambda name: name in needed):
        if name not in drawn:
            draw(name, "", "")
    width = max(len(name) for name, _ in rows)
    lines = [f"{settings.name}, in {looked.uri}", "", *(f"{a:<{width}}  {b}" for a, b in rows)]
    view = plan.view("projector", settings)
    for title, names in (("fetched", list(to_fetch(view))), ("hashed once", list(to_hash(view)))):
        lines += ["", f"would be {title}:", *(f"  {name}" for name in names)] if names else []
    return "\n".join(lines)


def _state(plan: Plan, looked: Glance, name: str, settings: Settings) -> str:
    try:
        key = plan.key(name, settings)
    except SettingsError as error:
        return f"missing {_would_take(STAGES[name].cost(plan.view(name, settings)))}; {error.what}"
    result = looked.result(key)
    if result:
        disk = f", {size(total_bytes(result.folder))}" if result.folder else ""
        took = f", took {duration(result.seconds)}" if result.seconds is not None else ""
        return f"finished  run {result.run_id}, {ago(result.ended_ms)}{disk}{took}"
    cost = STAGES[name].cost(plan.view(name, settings))
    past = looked.seconds(name, settings.name)
    seconds = past if past is not None else cost.seconds
    took = f", about {duration(seconds)}{' as last time' if past is not None else ''}" if seconds is not None else ""
    return f"{'begun' if looked.begun(key) else 'missing':<8}{_would_take(cost)}{took}"


def _would_take(cost: Cost) -> str:
    return f"  would take {size(cost.disk_bytes)}"


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
    tables = [each.path / "test_predictions.json" for each in (result, *result.after)]
    for table in (path for path in tables if path.exists()):
        lines += ["", "What it now says of held-out images:", *predictions(json.loads(table.read_text()))]
    server = store.uri.startswith("http")
    opens = [] if server else [f"opened by  MLFLOW_TRACKING_URI={store.uri} mmphi ui"]
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
    prediction, reference = columns.index("prediction"), columns.index("reference")
    lines = []
    for row in table["data"][:count]:
        same = row[prediction] == row[reference]
        lines += [f"  {'=' if same else ' '} {row[prediction]}", *([] if same else [f"      ({row[reference]})"])]
    return lines
