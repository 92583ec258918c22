"""The graph of stages: their keys, their finished results, and which stages are missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.config.declared_view import SettingsView, covered
from mmphi.config.fields import field_of, leaves
from mmphi.config.former_names import current_metrics
from mmphi.config.presets import files_of_settings
from mmphi.config.section import Section
from mmphi.data.content_hash import Digests
from mmphi.pipeline.cache_key import key_of, key_parts
from mmphi.pipeline.resolve import resolved
from mmphi.pipeline.stage import Result, Stage

if TYPE_CHECKING:
    from mlflow.entities import Run

    from mmphi.tracking.run_writer import TrackingStore

METRICS, KEY = "metrics.json", "key.json"


class StageGraph:
    """Stages and their results in one store; builds nothing.

    Args:
        stages: Stages by name.
        store: Tracking store with the results; by default the configured one, opened on first use.
    """

    def __init__(self, stages: Mapping[str, Stage], store: TrackingStore | None = None) -> None:
        self.stages = stages
        self._store = store
        self._digests = Digests()
        self._known: dict[Path, str] = {}

    @property
    def store(self) -> TrackingStore:
        """The tracking store."""
        if self._store is None:
            from mmphi.tracking.run_writer import TrackingStore

            self._store = TrackingStore()
        return self._store

    def view(self, name: str, settings: Section) -> SettingsView:
        """The settings, restricted to those that a stage may read."""
        return SettingsView(settings, self.stages[name].declared)

    def upstream(self, name: str, settings: Section) -> tuple[str, ...]:
        """Names of the stages whose results a stage receives."""
        stage, view = self.stages[name], self.view(name, settings)
        return tuple(dict.fromkeys([*stage.upstream(view), *stage.request_upstream(view)]))

    def order(self, name: str, settings: Section) -> list[str]:
        """Names of a stage and all its upstream stages in build order, upstream first."""
        names: dict[str, None] = {}
        for upstream in self.upstream(name, settings):
            names.update(dict.fromkeys(self.order(upstream, settings)))
        return [*names, name]

    def resolved(self, name: str, settings: Section) -> Section:
        """Settings with precision and revisions resolved, for a stage and all its upstream stages."""
        return resolved(settings, {d for each in self.order(name, settings) for d in self.stages[each].declared})

    def input_digests(self, stage: Stage, settings: Section) -> dict[str, str]:
        """Digest of every external file, folder and model that a stage reads, by the setting that names it.

        Raises:
            SettingsError: If one is missing.
        """
        digests = {}
        for name, path in files_of_settings(settings, stage.declared).items():
            if path not in self._known:
                self._known[path] = self._digests.of(path)
            digests[name] = self._known[path]
        digests |= self._recordings(settings, list(digests))
        for name, folder in self.models(stage, settings).items():
            from mmphi.models.checkpoint import checkpoint_digest

            digests[name] = checkpoint_digest(folder)
        return {name: digest for name, digest in sorted(digests.items()) if covered(name, stage.reads)}

    def _recordings(self, settings: Section, known: Iterable[str]) -> dict[str, str]:
        """Digests of recordings in the folder of their CSV file, if no other folder is set."""
        values, found = dict(leaves(settings)), {}
        for name in known:
            section = name.removesuffix(".path")
            if section != name and values.get(f"{section}.recordings") == "":
                from mmphi.data.speech_dataset import recordings_digest

                found[f"{section}.recordings"] = recordings_digest(
                    Path(values[name]), values[f"{section}.audio_column"], self._digests
                )
        return found

    def models(self, stage: Stage, settings: Section) -> dict[str, Path]:
        """Folders of the models that a stage's settings name, by dotted setting name."""
        folders = {}
        for name, value in leaves(settings):
            field = field_of(type(settings), name)
            if field and field.file == "model" and value and covered(name, stage.declared):
                folders[name] = self.store.model_folder(value)
        return folders

    def parts(self, name: str, settings: Section) -> dict[str, Any]:
        """Parts of the cache key of a stage; ``settings`` must be resolved."""
        stage = self.stages[name]
        upstream = {each: self.key(each, settings) for each in stage.upstream(self.view(name, settings))}
        return key_parts(stage, settings, self.input_digests(stage, settings), upstream)

    def key(self, name: str, settings: Section) -> str:
        """Cache key of a stage."""
        return key_of(self.parts(name, self.resolved(name, settings)))

    def results(self, name: str, settings: Section) -> Iterator[Result]:
        """Finished results of a stage's key, newest first, whether or not they cover the request."""
        key = self.key(name, settings)
        for run in self.store.results(key):
            yield self._result(name, key, run)

    def _result(self, name: str, key: str, run: Run) -> Result:
        path = self.store.fetch(run)
        metrics = current_metrics(json.loads((path / METRICS).read_text()))
        return Result(name, key, str(run.info.run_id), path, metrics)

    def result(self, name: str, settings: Section) -> Result | None:
        """The newest finished result of a stage that covers the request; ``None`` if there is none."""
        return next((found for found in self.results(name, settings) if self._covers(found, settings)), None)

    def _covers(self, result: Result, settings: Section) -> bool:
        stage, view = self.stages[result.stage], self.view(result.stage, settings)
        if stage.covers is None:
            return True
        upstream = {}
        for each in stage.request_upstream(view):
            there = self.result(each, settings)
            if there is None:
                return False
            upstream[each] = there
        return stage.covers(view, upstream, result.path)

    def missing(self, name: str, settings: Section) -> list[str]:
        """Names of the stages that must be built for a stage, itself included, upstream first."""
        if self.result(name, settings):
            return []
        names: dict[str, None] = {}
        for upstream in self.upstream(name, settings):
            names.update(dict.fromkeys(self.missing(upstream, settings)))
        return [*names, name]
