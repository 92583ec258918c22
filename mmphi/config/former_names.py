"""Names of settings and metrics in earlier versions, to read stored runs and studies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmphi.config.audio import AudioSettings
from mmphi.config.evaluate import EvaluateSettings
from mmphi.config.fields import current_item, former_names, renamed
from mmphi.config.pretrain import PretrainSettings
from mmphi.config.projector import ProjectorSettings
from mmphi.config.qlora import QloraSettings
from mmphi.config.section import Section
from mmphi.config.shared import TrainingSettings
from mmphi.config.speech import SpeechSettings
from mmphi.config.textgen import StoreSettings

SECTIONS: Mapping[str, type[Section]] = {
    "pretrain": PretrainSettings,
    "light_clip": TrainingSettings,
    "projector": ProjectorSettings,
    "qlora": QloraSettings,
    "speech": SpeechSettings,
    "audio": AudioSettings,
    "store": StoreSettings,
    "evaluate": EvaluateSettings,
}
# Current dotted names by former ones.
FORMER_NAMES: Mapping[str, str] = {
    f"{section}.{former}": f"{section}.{name}"
    for section, kind in SECTIONS.items()
    for former, name in former_names(kind).items()
}
# Current metric names without split, audio input and kind of row, by former ones.
FORMER_METRICS: Mapping[str, str] = {"ended": "eos_rate", "hearing_gain": "audio_gain"}
# A recorded metric: SPLIT/NAME, SPLIT/NAME/KIND or SPLIT/AUDIO_INPUT/NAME.
_RECORDED = re.compile(
    rf"(?P<before>(?:train|val|validation|test)/(?:(?:encoder|transcript|soft)/)?)(?P<name>{'|'.join(FORMER_METRICS)})"
    r"(?P<kind>/.+)?"
)


def current_metric(name: str) -> str:
    """Return the current name of a recorded metric; accepts names of earlier versions.

    Args:
        name: Recorded name with the split, such as ``test/ended`` or ``test/ended/conversation``.
    """
    found = _RECORDED.fullmatch(name)
    return f"{found['before']}{FORMER_METRICS[found['name']]}{found['kind'] or ''}" if found else name


def former_metric(name: str) -> str:
    """Return the name under which earlier versions recorded a metric; the same name if it was not renamed."""
    split, _, rest = name.partition("/")
    parts = rest.split("/")
    former = {current: before for before, current in FORMER_METRICS.items()}
    written = "/".join([split, *(former.get(part, part) for part in parts)])
    return written if current_metric(written) == name else name


def current_metrics(values: Mapping[str, float]) -> dict[str, float]:
    """Return recorded metrics under their current names; of a metric with both names, the current one is used."""
    return {current_metric(name): value for name, value in values.items()} | {
        name: value for name, value in values.items() if current_metric(name) == name
    }


def with_current_names(tree: Any) -> Any:
    """Return a copy of a tree, such as a study's declaration, with current names of settings and metrics.

    Args:
        tree: Tree of mappings, lists and texts; a text is replaced only if the whole text is a former name.
    """
    return renamed(tree, lambda name: current_metric(current_item(FORMER_NAMES, name)))
