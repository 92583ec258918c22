"""Settings that are valid and that a reader of their results may not expect, in a line each."""

from __future__ import annotations

from mmphi.config.shared import uses_scenes
from mmphi.pipeline.graph import StageGraph
from mmphi.stages import STAGES, Settings


def advice(name: str, settings: Settings) -> list[str]:
    """What to know before a stage is built with these settings.

    Args:
        name: Of the stage.
        settings: All settings.
    """
    needed = StageGraph(STAGES).order(name, settings)
    own_data = any(source.kind != "scenes" for source in settings.data.sources)
    lines = []
    if "pretrain" in needed and name != "pretrain" and settings.language.model == "pretrain":
        reads_scenes = settings.pretrain.source == "files" and not settings.corpus.sources
        if own_data and reads_scenes and not uses_scenes(settings.data):
            lines.append(
                "note: the data are your own, but the language model is trained here, on captions of drawn scenes;\n"
                "      name a pretrained one with language.model, or texts of your own with corpus.sources"
            )
    return lines
