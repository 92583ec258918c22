"""Notes about settings that are valid but may give unexpected results."""

from __future__ import annotations

from collections.abc import Iterator

from mmphi.config.projector import KIND_SETTINGS, ProjectorSettings
from mmphi.config.shared import DataSettings, uses_scenes
from mmphi.pipeline.graph import StageGraph
from mmphi.stages import STAGES, Settings


def advice(name: str, settings: Settings) -> list[str]:
    """Returns notes to show before a stage is built with these settings.

    Args:
        name: Name of the stage.
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
    if any(each.startswith("data.") for stage in needed for each in STAGES[stage].declared):
        lines += _unused_by_readers(settings.data)
    if "projector" in needed:
        lines += _unused_by_kind(settings.projector)
    return lines


def _unused_by_readers(data: DataSettings) -> Iterator[str]:
    """A line for each setting of a source that its reader does not use."""
    from mmphi.data.readers import READERS, unused_settings

    for number, source in enumerate(data.sources):
        for setting in unused_settings(source):
            kinds = [kind for kind, reader in READERS.items() if setting in reader.settings]
            yield (
                f"note: data.sources.{number}.{setting} has no effect:"
                f" the reader of kind {source.kind} does not use it;\n      the kinds that do: {', '.join(kinds)}"
            )


def _unused_by_kind(chosen: ProjectorSettings) -> Iterator[str]:
    """A line for each setting of another projector kind."""
    changed = {name: getattr(chosen, name) for name in KIND_SETTINGS}
    changed = {name: value for name, value in changed.items() if value != type(chosen).model_fields[name].default}
    if not changed:
        return
    from mmphi.models.projector_kinds import KINDS  # Imports torch.

    for name, value in changed.items():
        if name not in KINDS[chosen.kind].uses:
            kinds = [kind for kind, layers in KINDS.items() if name in layers.uses]
            yield (
                f"note: projector.{name} = {value} has no effect: a projector of kind {chosen.kind} does not use it;\n"
                f"      the kinds that do: {', '.join(kinds)}"
            )
