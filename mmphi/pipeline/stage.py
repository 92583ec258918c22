"""What a stage is and what it is given. Everything here is light to import.

A stage is a function: settings and upstream results in, files and metrics out.
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
    """A finished stage: where its files lie, and the run that is the proof.

    Attributes:
        stage: Its name.
        key: What it was found by.
        run_id: The run.
        path: Its files.
        metrics: Its figures, and those of the stages that were asked for at its end.
        after: Results of these stages.
    """

    stage: str
    key: str
    run_id: str
    path: Path
    metrics: Mapping[str, float] = field(default_factory=dict)
    after: tuple[Result, ...] = ()


@dataclass(frozen=True)
class Context:
    """What a stage's function is given.

    Attributes:
        settings: The settings that the stage declares; reading another raises.
        folder: Where to write. Holds what an interrupted call left: resume from it.
        upstream: Results by stage name, as :attr:`Stage.upstream` asked for them.
        tracker: The run to record in.
        resources: Models and data that this process already has.
        earlier: Finished results of the same key that do not cover what is asked for, newest first.
        models: Folders of the models that settings name, by dotted setting name.
        first: Whether this process is the one that writes files; others only compute.
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
    """What a stage would take, estimated before it starts.

    Attributes:
        disk_bytes: Bytes written.
        seconds: Time on this machine; ``None`` where it cannot be known.
        memory_bytes: GPU memory, at most; 0 where it cannot be known or is small.
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
        name: ``scenes``, ``projector``, ...
        version: Raised whenever the same settings would give another result.
        help: One line for ``mmphi --help``.
        reads: Dotted names of the settings that decide what the result is, its own section first. They stand in the
            key; a name covers all below it, an item of a list is called ``N``.
        run: The work. Imports what is heavy itself. Returns its final metrics.
        upstream: Names of the stages whose results it needs, given the settings; their keys stand in its key.
        unused: Of ``reads``, what has no effect with these settings: it is not recorded as parameters of the run.
        requests: Settings that it may read and that do not decide what any of its result is: not in the key.
        request_upstream: Stages whose results say how much is asked for: not in the key either.
        covers: Whether a finished result of the key holds all that is asked for; ``None`` where it always does.
        check: Raises where the settings cannot work together; called before anything is built.
        cost: Estimate of what running it takes, from all settings, because it stands in no key.
        then: Stages asked for at its end, such as its evaluation.
        asking: From the settings to those that the stages at its end are asked for with.
        verifies: Whether it checks each file that it finds in its folder, and so may go on from a damaged result.
        trains: Whether it may run in several processes at once; others run once, in the first process.
        talks: Whether it ends in a model that answers questions, which is logged as one of MLflow's.
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
        """All settings that it may read."""
        return self.reads + self.requests
