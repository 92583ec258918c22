"""The pipeline stages, one file each, and their settings. Stages import heavy modules only when they run."""

from collections.abc import Mapping

from mmphi.config import DataSettings, LanguageSettings, Section, VisionSettings, presets, setting
from mmphi.config.audio import AudioSettings
from mmphi.config.corpus import CorpusSettings
from mmphi.config.evaluate import EvaluateSettings
from mmphi.config.light_clip import LightClipSettings
from mmphi.config.pretrain import PretrainSettings
from mmphi.config.projector import ProjectorSettings
from mmphi.config.qlora import QloraSettings
from mmphi.config.speech import SpeechSettings
from mmphi.config.textgen import StoreSettings, TextgenSettings
from mmphi.pipeline.stage import Stage
from mmphi.stages import (
    embed,
    evaluate,
    export,
    light_clip,
    listen,
    merge,
    pretrain,
    projector,
    qlora,
    scenes,
    speech,
    textgen,
    tokens,
    transcribe,
)
from mmphi.stages.embed import EmbedSettings
from mmphi.stages.export import ExportSettings
from mmphi.stages.listen import ListenSettings
from mmphi.stages.merge import MergeSettings
from mmphi.stages.scenes import ScenesSettings
from mmphi.stages.transcribe import TranscribeSettings

STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE
    for module in (
        scenes,
        textgen,
        tokens,
        pretrain,
        light_clip,
        embed,
        projector,
        evaluate,
        qlora,
        merge,
        export,
        transcribe,
        listen,
        speech,
    )
}


class Settings(Section):
    """All sections of one experiment."""

    name: str = setting("tiny", "name of the preset or experiment", affects_key=False)
    scenes: ScenesSettings = ScenesSettings()
    data: DataSettings = DataSettings()
    vision: VisionSettings = VisionSettings()
    language: LanguageSettings = LanguageSettings()
    textgen: TextgenSettings = TextgenSettings()
    store: StoreSettings = StoreSettings()
    corpus: CorpusSettings = CorpusSettings()
    pretrain: PretrainSettings = PretrainSettings()
    light_clip: LightClipSettings = LightClipSettings()
    embed: EmbedSettings = EmbedSettings()
    projector: ProjectorSettings = ProjectorSettings()
    qlora: QloraSettings = QloraSettings()
    merge: MergeSettings = MergeSettings()
    export: ExportSettings = ExportSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    audio: AudioSettings = AudioSettings()
    transcribe: TranscribeSettings = TranscribeSettings()
    listen: ListenSettings = ListenSettings()
    speech: SpeechSettings = SpeechSettings()


def load_settings(
    preset: str, overrides: Mapping[str, str] | None = None, stage: str = "", *, expand: bool = True
) -> Settings:
    """Settings of a preset or YAML file with overrides applied; see :func:`mmphi.config.presets.load`."""
    return presets.load(Settings, preset, overrides, stage, expand=expand)
