"""Names of settings in earlier versions, to read stored runs and studies."""

from __future__ import annotations

from collections.abc import Mapping

from mmphi.config.audio import AudioSettings
from mmphi.config.fields import former_names
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
}
# Current dotted names by former ones.
FORMER_NAMES: Mapping[str, str] = {
    f"{section}.{former}": f"{section}.{name}"
    for section, kind in SECTIONS.items()
    for former, name in former_names(kind).items()
}
