"""What a setting is, the sections that stages share, and how presets and command lines become checked settings."""

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
