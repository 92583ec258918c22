"""Output of the command line: the settings of a stage, the graph of stages, and the summary of a finished stage."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.config.declared_view import SettingsView, covered
from mmphi.config.fields import all_fields, canonical, leaves
from mmphi.errors import SettingsError
from mmphi.pipeline.graph import StageGraph
from mmphi.pipeline.manifest import total_bytes
from mmphi.pipeline.stage import Cost, Result
from mmphi.stages import STAGES, Settings
from mmphi.stages.estimates import to_fetch, to_hash
from mmphi.tracking.status_reader import StatusReader, status_reader

if TYPE_CHECKING:
    from mmphi.tracking.run_store import RunStore as Store

STATUS_HELP = """usage: mmphi status [--preset NAME] [--KEY VALUE ...]

The stages as a graph: finished with run, time and size; or running, stopped (the same command resumes it) or missing,
with what building would cost."""


LEAST_GPU_BYTES = 0.5e9  # Less fits on any GPU and is not shown.
CAPTIONS = "Captions of held-out images (=: as the reference; otherwise the reference follows in brackets):"

# The most frequently changed settings of some stages; for other stages, help lists all settings.
MOST_CHANGED: Mapping[str, tuple[str, ...]] = {
    "projector": (
        *("projector.kind", "projector.layers", "projector.steps", "projector.batch_size"),
        *("projector.learning_rate", "projector.seed"),
        *("vision.model", "vision.pool", "language.model", "data.max_images", "evaluate.max_images"),
    ),
    "qlora": (
        *("qlora.rank", "qlora.alpha", "qlora.steps", "qlora.batch_size", "qlora.learning_rate", "qlora.seed"),
        *("qlora.base_precision", "qlora.questions", "qlora.model", "evaluate.max_images"),
    ),
    "pretrain": (
        *("pretrain.size", "pretrain.stop", "pretrain.steps", "pretrain.batch_tokens", "pretrain.optimizer"),
        *("pretrain.learning_rate", "pretrain.seed", "pretrain.source", "pretrain.eval_text"),
        "corpus.sources.N.path",
    ),
    "evaluate": (
        *("evaluate.model", "evaluate.stage", "evaluate.split", "evaluate.max_images", "evaluate.max_new_tokens"),
        *("evaluate.yes_no", "evaluate.long_answers", "evaluate.candidates", "evaluate.checkpoint"),
        "evaluate.batch_size",
    ),
    "light_clip": (
        *("light_clip.steps", "light_clip.batch_size", "light_clip.learning_rate", "light_clip.seed"),
        *("light_clip.from_nothing", "light_clip.width", "light_clip.layers", "data.max_images"),
    ),
    "speech": (
        *(
            "speech.path",
            "speech.audio_input",
            "speech.model",
            "speech.steps",
            "speech.batch_size",
            "speech.learning_rate",
        ),
        *("speech.seed", "audio.whisper", "language.model"),
    ),
    "textgen": (
        *("textgen.model", "textgen.stop", "textgen.generators", "textgen.prompted", "textgen.max_tokens"),
        *("textgen.temperature", "textgen.spool", "textgen.seed", "store.megabytes", "corpus.sources.N.path"),
    ),
}


def stage_help(name: str, settings: Settings, *, everything: bool = False, only: str = "") -> str:
    """Returns the settings of a stage, with type, value, unit and meaning.

    Args:
        name: Name of the stage.
        settings: Settings whose values are shown.
        everything: Whether to list all settings that the stage or its upstream stages may read, in place of those
            changed most.
        only: Filter of these: a section, or a text in the name or description.

    Raises:
        SettingsError: If no setting matches ``only``.
    """
    stage, plan = STAGES[name], StageGraph(STAGES)
    order = plan.order(name, settings)
    # Follow-up stages, such as the evaluation, are built with these settings, too.
    declared = [*stage.declared, *(d for each in (*reversed(order), *stage.then) for d in STAGES[each].declared)]
    sections = dict.fromkeys([name, *(d.partition(".")[0] for d in declared)])
    lines = [
        f"mmphi {name}: {stage.help}",
        f"built on: {', '.join(each for each in order if each != name) or 'nothing'}",
        "",
        f"Values in brackets are those of the preset {settings.name}. Settings marked * do not affect results or keys.",
        "--preset, --force, --no-build and --smoke: see mmphi --help.",
    ]
    if name in MOST_CHANGED and not everything:
        wanted = MOST_CHANGED[name]
        rows = _rows(name, settings, wanted, declared)
        count = sum(len(_rows(section, settings, (), declared, section == name)) for section in sections)
        others = (
            f"{count - len(rows)} further settings: mmphi {name} --help-all;"
            f" to search them: mmphi {name} --help-all TEXT"
        )
        return "\n".join([*lines, "", "changed most:", *_aligned(rows), "", others])
    count = 0
    for section in sections:
        own = section == name
        rows = [
            row
            for row in _rows(section, settings, (), declared, own)
            if only.lower() == section or only.lower() in f"{row[0].rpartition('.')[2]} {row[3]}".lower()
        ]
        count += len(rows)
        if rows:  # Some stages have no section.
            title = f"{section} (the prefix may be omitted):" if own else f"{section}:"
            lines += ["", title, *_aligned(rows)]
        if any(row[0].startswith("--data.sources.N.kind") for row in rows):
            lines += ["", "values of data.sources.N.kind:", *_readers()]
    if only and not count:
        elsewhere = dict.fromkeys(
            key.partition(".")[0]
            for key, field in all_fields(type(settings)).items()
            if only.lower() in f"{key} {field.help}".lower() and key.partition(".")[0] in STAGES
        )
        hint = f"`mmphi {name} --help-all` lists all"
        if elsewhere:
            hint = "; ".join(f"see `mmphi {each} --help-all {only}`" for each in elsewhere)
        raise SettingsError(f"no setting of {name} contains {only!r}", hint)
    return "\n".join(lines)


Row = tuple[str, str, str, str]  # An option, its type, its value, its meaning.


def _rows(section: str, settings: Settings, only: Collection[str], declared: list[str], own: bool = True) -> list[Row]:
    """The settings of a section, or the named ones, in order.

    Args:
        section: Section to list; if ``own``, its name is omitted from the options.
        settings: Settings whose values are shown.
        only: Full names; if empty, the settings of the section.
        declared: Names that the stage may read.
        own: Whether it is the stage's section.
    """
    values, fields = settings.model_dump(), all_fields(type(settings))
    rows = []
    for name in only or fields:
        if not only and (name.partition(".")[0] != section or not (own or covered(name, declared))):
            continue
        field, item = fields[name], ".N." in name
        shown = field.default if item else _value(values, name)
        bracket = f"[{_shown(shown)}{f' {field.unit}' if field.unit else ''}]"
        option = f"--{name.removeprefix(f'{section}.') if own else name}{'' if field.affects_key else ' *'}"
        rows.append((option, field.type_name, bracket, field.help))
    return rows


def _aligned(rows: Sequence[Row]) -> list[str]:
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    return [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:<14} {d}" for a, b, c, d in rows]


def _readers() -> list[str]:
    """A line for each data reader: what it reads, the kind of file, and the settings of a source that it uses."""
    from mmphi.data.readers import READERS

    width = max(map(len, READERS))
    return [
        f"  {kind:<{width}}  {reader.help} (file: {reader.file}; uses {', '.join(reader.settings) or 'none of these'})"
        for kind, reader in READERS.items()
    ]


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
    """Returns the stages as a graph: finished ones with run and time, others with the cost of building them."""
    plan, looked = StageGraph(STAGES), status_reader()
    drawn: set[str] = set()
    rows: list[tuple[str, str]] = []
    missing: dict[str, str] = {}  # Missing files, by the setting that names them.
    states = {name: _state(plan, looked, name, settings, missing) for name in STAGES}
    shown = relevant(plan, settings, states)

    def draw(name: str, before: str, branch: str) -> None:
        rows.append((f"{before}{branch}{name}", "(above)" if name in drawn else states[name].text))
        if name in drawn:
            return
        drawn.add(name)
        inner = before + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        upstream = plan.upstream(name, settings)
        for each in upstream:
            draw(each, inner, "└─ " if each == upstream[-1] else "├─ ")

    needed = {each for name in shown for each in plan.upstream(name, settings)}
    for name in sorted(shown, key=lambda name: name in needed):
        if name not in drawn:
            draw(name, "", "")
    width = max(len(name) for name, _ in rows)
    lines = [f"{settings.name}, in {looked.uri}", "", *(f"{a:<{width}}  {b}" for a, b in rows)]
    lines += ["", total([states[name] for name in drawn])]
    if others := [name for name in STAGES if name not in drawn]:
        lines.append(f"other stages, not required by these: {', '.join(others)}")
    lines += (
        ["", "missing:", *(f"  {name} = {what}{_unset(what)}" for name, what in missing.items())] if missing else []
    )
    view = plan.view("projector", settings)
    for title, names in (("downloads", list(to_fetch(view))), ("files to hash once", list(to_hash(view)))):
        lines += ["", f"{title}:", *(f"  {name}" for name in names)] if names else []
    return "\n".join(lines)


@dataclass(frozen=True)
class StageState:
    """Status of a stage.

    Attributes:
        text: Description in a line.
        begun: Whether the store has a run of the stage.
        disk_bytes: Estimated disk space for building the stage; 0 if it is finished.
        seconds: Estimated time for building the stage; None if unknown, 0 if it is finished.
    """

    text: str
    begun: bool
    disk_bytes: float
    seconds: float | None


def _state(
    plan: StageGraph, looked: StatusReader, name: str, settings: Settings, missing: dict[str, str]
) -> StageState:
    cost = STAGES[name].cost(SettingsView(settings, type(settings).model_fields))  # Part of no key: may read all.
    try:
        for each in plan.order(name, settings):  # Detects missing files before the hub is queried for revisions.
            plan.input_digests(STAGES[each], settings)
        key = plan.key(name, settings)
    except SettingsError as error:
        setting, _, what = error.what.partition(" = ")
        missing.setdefault(setting, what or error.what)
        text = _joined("missing", _would_take(cost, f"needs {setting}"))
        return StageState(text, False, cost.disk_bytes, cost.seconds)
    result = looked.result(key)
    if result:
        disk = f", {size(total_bytes(result.folder))}" if result.folder else ""
        took = f", took {duration(result.seconds)}" if result.seconds is not None else ""
        text = f"finished  run {result.run_id}, {ago(result.ended_ms)}{disk}{took}"
        return StageState(text, True, 0, 0.0)
    past, run_status = looked.seconds(name, settings.name), looked.run_status(key)
    seconds = past if past is not None else cost.seconds
    took = f"about {duration(seconds)}{' as last time' if past is not None else ''}" if seconds is not None else ""
    text = _joined({"": "missing", "RUNNING": "running"}.get(run_status, "stopped"), _would_take(cost, took))
    return StageState(text, bool(run_status), cost.disk_bytes, seconds)


def relevant(plan: StageGraph, settings: Settings, states: Mapping[str, StageState]) -> list[str]:
    """Returns the stages of a preset: those that train and evaluate its models, and those with runs.

    Args:
        plan: Graph of all stages.
        settings: All settings.
        states: State of every stage.
    """
    named = [name for name in ("speech", "transcribe") if getattr(settings, name).path]
    if settings.corpus.sources or settings.pretrain.size != "custom":
        named.append("pretrain")
        goals = named
    else:
        goals = ["evaluate", "qlora", *named] if not settings.speech.path else named
    ordered = {each for goal in goals for each in plan.order(goal, settings)}
    return [name for name in STAGES if name in ordered or states[name].begun]


def _unset(text: str) -> str:
    """Note on the environment variables in a text that are not set; empty if there are none."""
    names = [name for name in dict.fromkeys(re.findall(r"\$\{(\w+)\}", text)) if name not in os.environ]
    return f" ({', '.join(names)} is not set)" if names else ""


def total(states: Sequence[StageState]) -> str:
    """Returns the total cost of building all missing stages, as text."""
    unknown = sum(state.seconds is None for state in states)
    known = sum(state.seconds or 0 for state in states)
    if not any(state.disk_bytes or state.seconds is None or state.seconds for state in states):
        return "nothing is missing"
    time_text = f"about {duration(known)}" if known or not unknown else "no time known"
    more = f", and {unknown} more stage{'s' * (unknown != 1)} of unknown duration" if unknown and known else ""
    return f"in all: {size(sum(state.disk_bytes for state in states))} of disk, {time_text}{more}"


def _joined(state: str, cost: str) -> str:
    return f"{state:<8}  {cost}".rstrip()


def _would_take(cost: Cost, more: str) -> str:
    """Disk space, GPU memory and other known costs of a stage that is not built, as text."""
    parts = [f"would take {size(cost.disk_bytes)} of disk"] if cost.disk_bytes else []
    parts += [f"GPU memory up to {size(cost.memory_bytes)}"] if cost.memory_bytes >= LEAST_GPU_BYTES else []
    return ", ".join([*parts, *([more] if more else [])])


def ago(milliseconds: int) -> str:
    """Returns how long ago a time was, given in milliseconds since the epoch."""
    return f"{duration(max(0.0, time.time() - milliseconds / 1000))} ago"


def duration(seconds: float) -> str:
    """Returns a duration as text."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def size(count: float) -> str:
    """Returns a number of bytes as text."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def ending(result: Result, store: Store) -> str:
    """Returns the summary of a finished stage: metrics, predictions, run, and commands to view and use it."""
    lines = ["", *(f"  {name:<34} {value:.4g}" for name, value in sorted(result.metrics.items()))]
    tables = [each.path / "test_predictions.json" for each in (result, *result.after)]
    for table in (path for path in tables if path.exists()):
        lines += ["", CAPTIONS, *predictions(json.loads(table.read_text()))]
    server = store.uri.startswith("http")
    command = f"MLFLOW_TRACKING_URI={shlex.quote(store.uri)} {program()}"
    opens = [] if server else [f"pages      {command} ui"]
    asks = []
    if STAGES[result.stage].talks and (image := test_image(result, store)):
        question = shlex.quote(trained_question(result.path))
        asks = [f"ask it     {command} ask --model {result.run_id} --image {shlex.quote(str(image))} {question}"]
    return "\n".join(
        [
            *lines,
            "",
            f"{result.stage}  run {result.run_id}",
            f"files in   {result.path}",
            f"page at    {store.address(result.run_id)}",
            *opens,
            *asks,
        ]
    )


def trained_question(folder: Path) -> str:
    """Returns a question that a model was trained on; empty if images had no question."""
    try:
        questions = json.loads((folder / "mmphi.json").read_text()).get("questions", ())
    except (OSError, ValueError):
        return ""
    return str(questions[0]) if questions else ""


def program() -> str:
    """Returns the command that runs mmphi in this environment, even if it is not on the PATH."""
    if shutil.which("mmphi"):
        return "mmphi"
    own = Path(sys.executable).with_name("mmphi")
    if not own.exists():
        return f"{shlex.quote(sys.executable)} -m mmphi"
    here = Path.cwd()
    return shlex.quote(str(own.relative_to(here) if own.is_relative_to(here) else own))


def test_image(result: Result, store: Store) -> Path | None:
    """Returns a held-out image of a model's data: from the drawn scenes, else from the table of its evaluation."""
    scenes = store.run(result.run_id).data.tags.get("mmphi.upstream.scenes", "")
    run = store.run_if_there(scenes) if scenes else None
    folder = store.local_folder(run) if run else None
    if folder and (images := sorted((folder / "images" / "test").glob("*.png"))[:1]):
        return images[0]
    for each in result.after:
        table = each.path / "test_predictions.json"
        content = json.loads(table.read_text()) if table.exists() else {}
        if "image" in content.get("columns", ()) and content["data"]:
            shown = content["data"][0][content["columns"].index("image")]
            if isinstance(shown, dict) and (each.path / shown["filepath"]).exists():
                return each.path / str(shown["filepath"])
    return None


def predictions(table: dict[str, Any], count: int = 6) -> list[str]:
    """Returns the lines of a table of predictions; ``=`` marks those equal to their reference."""
    columns = table["columns"]
    prediction, reference = columns.index("prediction"), columns.index("reference")
    lines = []
    for row in table["data"][:count]:
        same = row[prediction] == row[reference]
        lines += [f"  {'=' if same else ' '} {row[prediction]}", *([] if same else [f"      ({row[reference]})"])]
    return lines
