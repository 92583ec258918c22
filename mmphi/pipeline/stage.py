"""The interface of a stage: a function from settings and upstream results to files and metrics.

This module imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmphi.config.declared_view import SettingsView
from mmphi.config.section import Section
from mmphi.pipeline.process_cache import ProcessCache
from mmphi.tracking.tracker import Tracker


@dataclass(frozen=True)
class Result:
    """Result of a finished stage.

    Attributes:
        stage: Name of the stage.
        key: Cache key.
        run_id: ID of the run that built it.
        path: Folder of its files.
        metrics: Metrics of the stage and of its follow-up stages.
        after: Results of the follow-up stages.
    """

    stage: str
    key: str
    run_id: str
    path: Path
    metrics: Mapping[str, float] = field(default_factory=dict)
    after: tuple[Result, ...] = ()


@dataclass(frozen=True)
class Context:
    """Input of a stage's ``run`` function.

    Attributes:
        settings: View of the settings; reading one that the stage does not declare raises.
        folder: Output folder. It may hold files of an interrupted run, from which the stage resumes.
        upstream: Results of :attr:`Stage.upstream` and :attr:`Stage.request_upstream`, by stage name.
        tracker: Tracker of the run.
        resources: Process cache of loaded models and data.
        earlier: Finished results of the same key that do not cover the request, newest first.
        models: Folders of the models that settings name, by dotted setting name.
        first: Whether this process writes files; the others only compute.
    """

    settings: SettingsView
    folder: Path
    upstream: Mapping[str, Result]
    tracker: Tracker
    resources: ProcessCache = field(default_factory=ProcessCache)
    earlier: Sequence[Result] = ()
    models: Mapping[str, Path] = field(default_factory=dict)
    first: bool = True


@dataclass(frozen=True)
class Cost:
    """Estimated cost of running a stage.

    Attributes:
        disk_bytes: Bytes written.
        seconds: Time on this machine; ``None`` if unknown.
        memory_bytes: Upper bound on GPU memory; 0 if unknown or small.
    """

    disk_bytes: int
    seconds: float | None = None
    memory_bytes: int = 0


def _nothing(_: SettingsView) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        name: Unique name, such as ``projector``.
        version: Version of the stage, part of the key; increase it when the same settings give another result.
        help: One-line description for ``mmphi --help``.
        reads: Dotted names of the settings that determine the result, the stage's own section first; part of the key.
            A name covers all settings below it; ``N`` stands for any item of a list.
        run: Builds the result in ``Context.folder`` and returns the final metrics. Imports heavy modules itself.
        upstream: Maps settings to the names of required stages; their keys are part of the key.
        unused: Maps settings to those of ``reads`` that have no effect; they are not recorded as run parameters.
        requests: Dotted names of further settings that it may read. They do not change the content of a result and are
            not part of the key.
        request_upstream: Maps settings to the stages whose results determine the request; not part of the key.
        covers: Whether a finished result of the key contains everything requested, given the settings, the results of
            ``request_upstream`` and the result's folder. ``None`` means that it always does.
        check: Raises if the settings are inconsistent; called before anything is built.
        cost: Estimates the cost of a run. It may read all settings, because it does not affect the key.
        then: Names of follow-up stages, such as the evaluation.
        asking: Maps this stage's settings to those of its follow-up stages.
        verifies: Whether it verifies each file in its folder, and can therefore resume from a damaged result.
        trains: Whether it may run in several processes; other stages run in the first process only.
        talks: Whether its result is a model that answers questions, which is logged as an MLflow model.
    """

    name: str
    version: int
    help: str
    reads: tuple[str, ...]
    run: Callable[[Context], Mapping[str, float]]
    upstream: Callable[[SettingsView], tuple[str, ...]] = _nothing
    unused: Callable[[SettingsView], tuple[str, ...]] = _nothing
    requests: tuple[str, ...] = ()
    request_upstream: Callable[[SettingsView], tuple[str, ...]] = _nothing
    covers: Callable[[SettingsView, Mapping[str, Result], Path], bool] | None = None
    check: Callable[[SettingsView], None] = lambda _: None
    cost: Callable[[SettingsView], Cost] = lambda _: Cost(0)
    then: tuple[str, ...] = ()
    asking: Callable[[Section], Section] = lambda settings: settings
    verifies: bool = False
    trains: bool = False
    talks: bool = False

    @property
    def declared(self) -> tuple[str, ...]:
        """Dotted names of all settings that the stage may read."""
        return self.reads + self.requests
