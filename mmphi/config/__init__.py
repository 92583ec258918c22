"""Declaration of settings, the sections that stages share, and loading of presets and command-line overrides."""

from mmphi.config.section import Section, setting
from mmphi.config.shared import DataSettings, LanguageSettings, SourceSettings, TrainingSettings, VisionSettings

__all__ = [
    "DataSettings",
    "LanguageSettings",
    "Section",
    "SourceSettings",
    "TrainingSettings",
    "VisionSettings",
    "setting",
]
