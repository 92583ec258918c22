"""What the command line says: every setting of a stage, the graph of stages, how a stage ended."""

from __future__ import annotations

import json
import types
import typing
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mmphi.pipeline import Pipeline, when
from mmphi.settings import Settings
from mmphi.stage import Result
from mmphi.stages import STAGES


def stage_help(name: str, settings: Settings) -> str:
    """Every setting that matters to a stage or to what it is built on, with type, unit, value and meaning."""
    stage = STAGES[name]
    order = Pipeline(STAGES).order(name, settings)
    sections = list(dict.fromkeys([*stage.sections, *(s for each in reversed(order) for s in STAGES[each].sections)]))
    lines = [
        f"mmphi {name}: {stage.help}",
        f"needs: {', '.join(n for n in order if n != name) or 'nothing'}",
        "",
        f"Values in brackets are those of the preset {settings.name}. Settings marked * change no result, and no key.",
        "",
        "--preset NAME, --force, --no-build as in mmphi --help",
        "--seed [{}]  {}".format(settings.seed, Settings.model_fields["seed"].description),
    ]
    for section in sections:
        values = getattr(settings, section)
        own = section == name
        lines += ["", f"{section}" + (":" if not own else " (its own; the section may be left out):")]
        for key, field in type(values).model_fields.items():
            lines.append(_setting_line(key if own else f"{section}.{key}", field, getattr(values, key)))
    return "\n".join(lines)


def _setting_line(key: str, field: FieldInfo, value: Any) -> str:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    free = "" if extra.get("matters", True) else "*"
    unit = f" {extra['unit']}" if extra.get("unit") else ""
    shown = json.dumps(value, default=_plain) if isinstance(value, list) else value if value != "" else '""'
    kind = f"{_type_name(field.annotation)}{_bounds(field)}"
    return f"  --{key + free:<32} {kind:<28} [{shown}{unit}]  {field.description}"


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else str(value)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (list, types.UnionType, typing.Union):
        return "list"
    return getattr(annotation, "__name__", str(annotation))


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [f"{s}{getattr(m, name)}" for m in field.metadata for name, s in signs.items() if hasattr(m, name)]
    return f" {', '.join(found)}" if found else ""


def status_help() -> str:
    """Help of ``mmphi status``."""
    return (
        "usage: mmphi status [--preset NAME] [--KEY VALUE ...]\n\nWhat is built, what is missing, what it would cost."
    )


def status(settings: Settings) -> str:
    """The stages as a graph: finished with run and time, or missing with what building would cost."""
    pipeline = Pipeline(STAGES)
    drawn: list[str] = []
    lines = [f"{settings.name}, in {pipeline.store.uri}", ""]

    def draw(name: str, before: str, last: bool, top: bool = False) -> None:
        branch = "" if top else before + ("└─ " if last else "├─ ")
        known = name in drawn
        lines.append(f"{branch + name:<34}" + ("(above)" if known else _state(pipeline, name, settings)))
        if known:
            return
        drawn.append(name)
        upstream = STAGES[name].upstream(settings)
        for i, each in enumerate(upstream):
            draw(each, "" if top else before + ("   " if last else "│  "), i == len(upstream) - 1)

    draw("evaluate", "", True, top=True)
    return "\n".join(lines)


def _state(pipeline: Pipeline, name: str, settings: Settings) -> str:
    run = pipeline.store.result(pipeline.key(STAGES[name], settings))
    if run:
        seconds = run.data.metrics.get("seconds", 0.0)
        return f"finished  run {run.info.run_id}  {when(run.info.end_time)}  took {seconds:.0f} s"
    cost = STAGES[name].cost(settings)
    past = pipeline.store.seconds_of(name, settings.name)
    took = f", about {past:.0f} s as last time" if past else f", about {cost.seconds:.0f} s" if cost.seconds else ""
    return f"missing   would take {size(cost.disk_bytes)}{took}"


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def ending(result: Result, pipeline: Any) -> str:
    """How a stage ended: its metrics, its run, and where to look at it."""
    keep = ("train/", "system/")
    shown = {k: v for k, v in sorted(result.metrics.items()) if not k.startswith(keep)}
    lines = ["", *(f"  {name:<34} {value:.4g}" for name, value in shown.items())]
    table = result.path / "test_predictions.json"
    if table.exists():
        lines += ["", "Captions it now writes for held-out images:", *predictions(json.loads(table.read_text()))]
    return "\n".join(
        [
            *lines,
            "",
            f"{result.stage}: run {result.run_id}",
            f"files in {result.path}",
            f"look at it: mlflow ui --backend-store-uri {pipeline.store.uri} --host 127.0.0.1",
        ]
    )


def predictions(table: dict[str, Any], count: int = 6) -> list[str]:
    """What a table of predictions says, as lines."""
    columns = table["columns"]
    said, true = columns.index("prediction"), columns.index("reference")
    lines = []
    for row in table["data"][:count]:
        mark = "=" if row[said] == row[true] else " "
        lines += [f"  {mark} {row[said]}", *([] if mark == "=" else [f"      ({row[true]})"])]
    return lines
