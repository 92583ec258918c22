"""Building a stage with all it needs, each as a run of its own; what is finished is reused."""

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
    """How a stage is to be built.

    Attributes:
        force: Anew, even if it is there; what it is built on is reused.
        run: Id of a run that was begun for it, as ``mlflow run`` does.
        label: Stands in the run's name after stage and preset.
        title: The run's whole name, in place of these.
        tags: Further tags of its run.
        watch: Told of every metric of its run as it is recorded; may raise to end the run.
        after: Whether the stages that are asked for at its end are built too.
        ranks: The processes it runs in.
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
    """Stages over one store.

    Args:
        stages: By name.
        store: Where results are; opened when first needed.
        resources: What this process has loaded.
        helper: Module of a process that may build stages beside this one, which :class:`BackgroundBuilder` starts.
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
        """The result of a stage, from the store or built now, with whatever it needs.

        Args:
            name: The stage.
            settings: All settings.
            force: Build it again even if it is there; what it is built on is reused.
            no_build: Build nothing.
            label: Stands in the run's name after stage and preset.
            title: The run's whole name, in place of these.
            run: Id of a run that was begun for it, as ``mlflow run`` does: it becomes the result, or points at it.
            tags: Further tags of its run.
            watch: Told of every metric of its run as it is recorded, and its step; may raise to end the run.
            after: Whether the stages that are asked for at its end, such as its evaluation, are built too.

        Returns:
            The result; where stages are asked for at its end, with their metrics beside its own.

        Raises:
            SettingsError: If a file that the settings name is missing; before anything is built.
            StoreError: If something is missing under ``no_build``, or the store cannot be used.
            Stopped: If a signal asked to stop; the same call resumes from there.
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
            ranks.tell({"error": str(error)})
            if disk_is_full(error) and not isinstance(error, MmphiError):
                raise full_disk_message(self.store.locks.parent) from error  # It was the store's own database.
            raise
        return result

    def _lead(self, name: str, settings: Section, request: Request, no_build: bool) -> Result:
        settings = self.resolved(name, settings)
        if request.run:
            self.store.record_beside(request.run, title_of(name, settings, request.label))
        for each in self.order(name, settings):  # Missing files are told before anything heavy starts.
            self.input_digests(self.stages[each], settings)
        result = None if request.force else self.result(name, settings)
        if result:
            LOGGER.info(f"{name}: reusing run {result.run_id}, which has the same settings, data and code version")
            self.store.note_use(result.run_id, own=STUDY not in request.tags)
            request.ranks.tell({"result": as_json(result)})
        elif no_build:
            lacking = [name] if request.force else self.missing(name, settings)
            raise StoreError(f"not built for these settings: {', '.join(lacking)}", "leave out --no-build")
        else:
            for each in self.order(name, settings):
                self.stages[each].check(self.view(each, settings))
            helper = self.helper if request.ranks.count == 1 else ""
            with without_torchrun(), BackgroundBuilder(self, name, settings, helper) as beside:
                study = {FOR_STUDY: request.tags[STUDY]} if STUDY in request.tags else {}
                done = self._ready(self.upstream(name, settings), settings, beside, study)
            result = self._run(name, settings, done, request)
            if STUDY not in request.tags:  # It may have been a trial's, which this command has waited for.
                self.store.note_use(result.run_id, own=True)
        result = self._followed(result, settings, request, no_build)
        if request.run and request.run != result.run_id:
            self.store.point(request.run, result, settings_name(settings))
        return result

    def _followed(self, result: Result, settings: Section, request: Request, no_build: bool) -> Result:
        """The same result with the metrics of the stages that are asked for at its end; of a forced one, again."""
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
        self, names: Sequence[str], settings: Section, beside: BackgroundBuilder, tags: Mapping[str, str]
    ) -> dict[str, Result]:
        """Results of upstream stages, built where they are missing, with these further tags."""
        done: dict[str, Result] = {}
        for name in names:
            beside.wait(name)
            result = self.result(name, settings)
            if result:
                LOGGER.info(f"{name}: reusing run {result.run_id}")
                self.store.note_use(result.run_id)
            else:
                upstream = self._ready(self.upstream(name, settings), settings, beside, tags)
                beside.before(name)
                result = self._run(name, settings, upstream, Request(tags=tags))
            done[name] = result
        return done

    def _run(self, name: str, settings: Section, upstream: Mapping[str, Result], request: Request) -> Result:
        """Build a stage, unless another process is about to, or has done so while this one waited for it."""
        stage, parts = self.stages[name], self.parts(name, settings)
        key = key_of(parts)

        def waiting(holder: str) -> None:
            LOGGER.info(f"{name}: {holder} is building the same; waiting for it (Ctrl-C to leave it alone)")

        tags = {"mmphi.stage": name, "mmphi.key": key, "mmphi.preset": settings_name(settings), **request.tags}
        title = request.title or title_of(name, settings, request.label)
        with self.store.building(key, title, tags, request.run, waiting) as (tracker, waited):
            ready = self.result(name, settings) if waited and not request.force else None
            if ready:
                LOGGER.info(f"{name}: reusing run {ready.run_id}, finished meanwhile")
                self.store.discard(tracker, request.run)
                request.ranks.tell({"result": as_json(ready)})
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
        tracker.watch = None  # Final values are no report of a training, which has ended.
        tracker.final_metrics({**metrics, "seconds": time.perf_counter() - begun})
        tracker.text(METRICS, json.dumps(metrics))
        if stage.talks:
            from mmphi.tracking.logged_model import write_mlmodel

            write_mlmodel(tracker.folder, sees=(tracker.folder / "projector.json").exists())
        result = Result(stage.name, key, tracker.run_id, self.store.finish(tracker), metrics)
        if stage.talks:
            self.store.log_model(result)
        if not stage.trains:
            request.ranks.tell({"result": as_json(result)})
        return result

    def _why(self, name: str, parts: Mapping[str, Any], settings: Section) -> str:
        """In what the newest result of a stage differs from what is asked for."""
        newest = self.store.newest(name)
        if newest is None:
            return " (nothing of this stage is finished yet)"
        changed = difference(parts, self.store.json_of(newest, KEY), settings)
        if self.stages[name].covers and not changed:
            return f" (what run {newest.info.run_id} does not hold)"
        what = f"{changed}, compared with" if changed else "its files are not what its manifest says:"
        return f" ({what} run {newest.info.run_id})"


def title_of(stage: str, settings: Section, label: str) -> str:
    """Readable name of a run."""
    return " ".join(filter(None, (stage, settings_name(settings), label)))


def settings_name(settings: Section) -> str:
    """Name of the preset or experiment."""
    return str(getattr(settings, "name", ""))


@contextmanager
def _recorded(store: TrackingStore, tracker: RunTracker) -> Iterator[None]:
    """Record how a run ended that did not finish."""
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
    """What to say of a disk that is full."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    return StoreError(
        f"the disk of {folder} is full: {free / 1e6:.0f} MB are free", "make room; the same command resumes from there"
    )
