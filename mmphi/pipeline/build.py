"""Builds a stage and its upstream stages, each as a separate run; finished results are reused."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.allocator import release_memory
from mmphi.config.section import Section
from mmphi.errors import MmphiError, Stopped, StoreError, disk_is_full
from mmphi.logs import LOGGER, show_log
from mmphi.pipeline.background_build import BackgroundBuilder
from mmphi.pipeline.cache_key import difference, key_of
from mmphi.pipeline.graph import KEY, METRICS, StageGraph
from mmphi.pipeline.process_cache import PROCESS, ProcessCache
from mmphi.pipeline.stage import Context, Result, Stage
from mmphi.pipeline.threads import restore_thread_count
from mmphi.pipeline.torchrun import RankCoordinator, as_json, run_follower, without_torchrun
from mmphi.pipeline.warning_filters import install_filters
from mmphi.tracking.tags import FOR_STUDY, STUDY

if TYPE_CHECKING:
    from mmphi.tracking.run_tracker import RunTracker, Watch
    from mmphi.tracking.run_writer import TrackingStore


@dataclass(frozen=True)
class Request:
    """Options for building a stage.

    Attributes:
        force: Rebuild even if a result exists; upstream results are reused.
        run: ID of an existing run to record in, as ``mlflow run`` creates it; empty creates a run.
        label: Text after stage and preset in the run's name.
        title: Full name of the run; replaces stage, preset and label.
        tags: Additional tags of the run.
        watch: Called with the metrics and step of every record in the run; may raise to end the run.
        after: Whether follow-up stages (:attr:`Stage.then`) are built too.
        ranks: Coordinator of the processes that run the stage.
    """

    force: bool = False
    run: str = ""
    label: str = ""
    title: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    watch: Watch | None = None
    after: bool = True
    ranks: RankCoordinator = field(default_factory=RankCoordinator.one)


class Pipeline(StageGraph):
    """Builds stages and records them in one store.

    Args:
        stages: Stages by name.
        store: Tracking store for the results; by default the configured one, opened on first use.
        resources: Cache of loaded models and data; by default that of the process.
        helper: Module of the helper process that :class:`BackgroundBuilder` may start; empty for none.
    """

    def __init__(
        self,
        stages: Mapping[str, Stage],
        store: TrackingStore | None = None,
        resources: ProcessCache | None = None,
        helper: str = "",
    ) -> None:
        super().__init__(stages, store)
        self.resources = resources or PROCESS
        self.helper = helper

    def build(
        self,
        name: str,
        settings: Section,
        *,
        force: bool = False,
        no_build: bool = False,
        label: str = "",
        title: str = "",
        run: str = "",
        tags: Mapping[str, str] | None = None,
        watch: Watch | None = None,
        after: bool = True,
    ) -> Result:
        """Returns the result of a stage from the store, or builds it with its upstream stages.

        Args:
            name: Name of the stage.
            settings: All settings.
            force: Rebuild even if a result exists; upstream results are reused.
            no_build: Only look up results and build nothing.
            label: Text after stage and preset in the run's name.
            title: Full name of the run; replaces stage, preset and label.
            run: ID of an existing run, as ``mlflow run`` creates it: it becomes the result, or refers to a reused one.
            tags: Additional tags of the run.
            watch: Called with the metrics and step of every record in the run; may raise to end the run.
            after: Whether follow-up stages, such as the evaluation, are built too.

        Returns:
            The result, with the metrics of follow-up stages added.

        Raises:
            SettingsError: If a file that the settings name is missing; raised before anything is built.
            StoreError: If a result is missing under ``no_build``, or the store cannot be used.
            Stopped: If the build was interrupted by a signal; the same call resumes.
        """
        install_filters()
        show_log()
        ranks = RankCoordinator()
        if not ranks.first:
            return run_follower(ranks, self.stages[name], settings, self.resources)
        try:
            request = Request(force, run, label, title, tags or {}, watch, after, ranks)
            result = self._lead(name, settings, request, no_build)
        except BaseException as error:
            ranks.send({"error": str(error)})
            if disk_is_full(error) and not isinstance(error, MmphiError):
                raise full_disk_message(self.store.locks.parent) from error  # Writing the store's database failed.
            raise
        return result

    def _lead(self, name: str, settings: Section, request: Request, no_build: bool) -> Result:
        settings = self.resolved(name, settings)
        if request.run:
            self.store.record_in_experiment_of(request.run, title_of(name, settings, request.label))
        for each in self.order(name, settings):  # Reports missing files before anything heavy starts.
            self.input_digests(self.stages[each], settings)
        result = None if request.force else self.result(name, settings)
        if result:
            LOGGER.info(f"{name}: reusing run {result.run_id}, which has the same settings, data and code version")
            self.store.note_use(result.run_id, own=STUDY not in request.tags)
            request.ranks.send({"result": as_json(result)})
        elif no_build:
            lacking = [name] if request.force else self.missing(name, settings)
            raise StoreError(f"not built for these settings: {', '.join(lacking)}", "leave out --no-build")
        else:
            for each in self.order(name, settings):
                self.stages[each].check(self.view(each, settings))
            helper = self.helper if request.ranks.count == 1 else ""
            with without_torchrun(), BackgroundBuilder(self, name, settings, helper) as background:
                study = {FOR_STUDY: request.tags[STUDY]} if STUDY in request.tags else {}
                done = self._ready(self.upstream(name, settings), settings, background, study)
            result = self._run(name, settings, done, request)
            if STUDY not in request.tags:  # A study's trial may have built it while this command waited.
                self.store.note_use(result.run_id, own=True)
        result = self._followed(result, settings, request, no_build)
        if request.run and request.run != result.run_id:
            self.store.point(request.run, result, settings_name(settings))
        return result

    def _followed(self, result: Result, settings: Section, request: Request, no_build: bool) -> Result:
        """Build the follow-up stages and add their metrics to the result; ``force`` rebuilds them too."""
        metrics, results = dict(result.metrics), []
        stage = self.stages[result.stage]
        for name in stage.then if request.after else ():
            with without_torchrun():
                after = self.build(name, stage.asking(settings), force=request.force, no_build=no_build)
            self.store.add_metrics(result.run_id, after, metrics)
            metrics |= after.metrics
            results.append(after)
        return replace(result, metrics=metrics, after=tuple(results))

    def _ready(
        self, names: Sequence[str], settings: Section, background: BackgroundBuilder, tags: Mapping[str, str]
    ) -> dict[str, Result]:
        """Results of upstream stages; missing ones are built with the additional tags."""
        done: dict[str, Result] = {}
        for name in names:
            background.wait(name)
            result = self.result(name, settings)
            if result:
                LOGGER.info(f"{name}: reusing run {result.run_id}")
                self.store.note_use(result.run_id)
            else:
                upstream = self._ready(self.upstream(name, settings), settings, background, tags)
                background.before(name)
                result = self._run(name, settings, upstream, Request(tags=tags))
            done[name] = result
        return done

    def _run(self, name: str, settings: Section, upstream: Mapping[str, Result], request: Request) -> Result:
        """Build a stage, or reuse the result of another process that built the same key in the meantime."""
        stage, parts = self.stages[name], self.parts(name, settings)
        key = key_of(parts)

        def waiting(holder: str) -> None:
            LOGGER.info(f"{name}: {holder} is building the same result; waiting for it (Ctrl-C to stop waiting)")

        tags = {"mmphi.stage": name, "mmphi.key": key, "mmphi.preset": settings_name(settings), **request.tags}
        title = request.title or title_of(name, settings, request.label)
        with self.store.building(key, title, tags, request.run, waiting) as (tracker, waited):
            ready = self.result(name, settings) if waited and not request.force else None
            if ready:
                LOGGER.info(f"{name}: reusing run {ready.run_id}, finished meanwhile")
                self.store.discard(tracker, request.run)
                request.ranks.send({"result": as_json(ready)})
                return ready
            LOGGER.info(f"{name}: building{' again, as asked' if request.force else self._why(name, parts, settings)}")
            tracker.watch = request.watch
            with _recorded(self.store, tracker):
                return self._work(stage, settings, parts, upstream, tracker, request)

    def _work(
        self,
        stage: Stage,
        settings: Section,
        parts: Mapping[str, Any],
        upstream: Mapping[str, Result],
        tracker: RunTracker,
        request: Request,
    ) -> Result:
        from mmphi.pipeline import provenance

        key, source = key_of(parts), ""
        if request.force:
            self.store.clear(tracker)
        elif source := self.store.adopt(tracker, key, damaged=stage.verifies):
            LOGGER.info(f"{stage.name}: resuming from what run {source} left")
        provenance.record_provenance(tracker, stage, settings, parts, upstream)
        earlier = () if request.force or stage.covers is None else tuple(self.results(stage.name, settings))
        context = Context(
            self.view(stage.name, settings),
            tracker.folder,
            upstream,
            tracker,
            self.resources,
            earlier,
            self.models(stage, settings),
        )
        begun = time.perf_counter()
        if stage.trains:
            request.ranks.share(context, key, settings)
            from mmphi.tracking.system_metrics import system_metrics

            with restore_thread_count(self.store, tracker, source), system_metrics(tracker.run_id, self.store.uri):
                metrics = dict(stage.run(context))
            request.ranks.done()
        else:
            with without_torchrun():
                metrics = dict(stage.run(context))
        release_memory()
        tracker.watch = None  # Final values must not trigger the watch: the training has ended.
        tracker.final_metrics({**metrics, "seconds": time.perf_counter() - begun})
        tracker.text(METRICS, json.dumps(metrics))
        if stage.talks:
            from mmphi.tracking.logged_model import write_mlmodel

            write_mlmodel(tracker.folder, sees=(tracker.folder / "projector.json").exists())
        result = Result(stage.name, key, tracker.run_id, self.store.finish(tracker), metrics)
        if stage.talks:
            self.store.log_model(result)
        if not stage.trains:
            request.ranks.send({"result": as_json(result)})
        return result

    def _why(self, name: str, parts: Mapping[str, Any], settings: Section) -> str:
        """Reason for a build: how the newest result of the stage differs from the request."""
        newest = self.store.newest(name)
        if newest is None:
            return " (nothing of this stage is finished yet)"
        changed = difference(parts, self.store.json_of(newest, KEY), settings)
        if self.stages[name].covers and not changed:
            return f" (what run {newest.info.run_id} does not hold)"
        what = f"{changed}, compared with" if changed else "files do not match the manifest of"
        return f" ({what} run {newest.info.run_id})"


def title_of(stage: str, settings: Section, label: str) -> str:
    """Readable name of a run: stage, preset and label."""
    return " ".join(filter(None, (stage, settings_name(settings), label)))


def settings_name(settings: Section) -> str:
    """Name of the preset or experiment."""
    return str(getattr(settings, "name", ""))


@contextmanager
def _recorded(store: TrackingStore, tracker: RunTracker) -> Iterator[None]:
    """Mark the run as KILLED or FAILED if the block raises."""
    try:
        yield
    except KeyboardInterrupt as error:
        store.fail(tracker, "KILLED", str(error) or "interrupted")
        raise Stopped(str(error) or "interrupted; the same command resumes from there") from error
    except BaseException as error:
        store.fail(tracker, "FAILED", f"{type(error).__name__}: {error}")
        if disk_is_full(error) and not isinstance(error, StoreError):
            raise full_disk_message(tracker.folder) from error
        raise


def full_disk_message(folder: Path) -> StoreError:
    """Error for a full disk, with its free space in MB."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    return StoreError(
        f"the disk of {folder} is full: {free / 1e6:.0f} MB are free", "make room; the same command resumes from there"
    )
