"""A stage's cached result, and building what is missing with all it needs; knows no stage by name."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.config import files
from mmphi.errors import Stopped, StoreError
from mmphi.keys import Digests, difference, key_of, key_parts
from mmphi.ranks import Ranks, alone, as_json, follow
from mmphi.settings import Settings
from mmphi.stage import Context, Result, Stage

if TYPE_CHECKING:
    from mlflow.entities import Run

    from mmphi.tracking import RunTracker, Store

METRICS, KEY = "metrics.json", "key.json"


class Pipeline:
    """Stages over one store.

    Args:
        stages: By name.
        store: Where results are; opened when first needed.
    """

    def __init__(self, stages: Mapping[str, Stage], store: Store | None = None) -> None:
        self.stages = stages
        self._store = store
        self._remembered = Digests()
        self._digests: dict[Path, str] = {}

    @property
    def store(self) -> Store:
        """The tracking store."""
        if self._store is None:
            from mmphi.tracking import Store

            self._store = Store()
        return self._store

    def input_digests(self, stage: Stage, settings: Settings) -> dict[str, str]:
        """Digest of every outside file that a stage reads, by the setting that names it.

        Raises:
            SettingsError: If one is missing.
        """
        named = {**stage.inputs(settings), **files(settings, stage.sections)}
        for path in named.values():
            if path not in self._digests:
                self._digests[path] = self._remembered.of(path)
        return {name: self._digests[path] for name, path in sorted(named.items())}

    def parts(self, name: str, settings: Settings) -> dict[str, Any]:
        """What the key of a stage is made of."""
        stage = self.stages[name]
        upstream = {each: self.key(each, settings) for each in stage.upstream(settings)}
        return key_parts(stage, settings, self.input_digests(stage, settings), upstream)

    def key(self, name: str, settings: Settings) -> str:
        """What the result of a stage is found by."""
        return key_of(self.parts(name, settings))

    def order(self, name: str, settings: Settings) -> list[str]:
        """A stage and all it is built on, upstream first."""
        found: dict[str, None] = {}
        for upstream in self.stages[name].upstream(settings):
            found.update(dict.fromkeys(self.order(upstream, settings)))
        return [*found, name]

    def result(self, name: str, settings: Settings) -> Result | None:
        """The finished result of a stage, if there is one."""
        key = self.key(name, settings)
        run = self.store.result(key)
        if run is None:
            return None
        path = self.store.fetch(run)
        metrics = json.loads((path / METRICS).read_text())
        return Result(name, key, str(run.info.run_id), path, metrics)

    def missing(self, name: str, settings: Settings) -> list[str]:
        """What would have to be built for a stage, upstream first."""
        if self.store.result(self.key(name, settings)):
            return []
        found: dict[str, None] = {}
        for upstream in self.stages[name].upstream(settings):
            found.update(dict.fromkeys(self.missing(upstream, settings)))
        return [*found, name]

    def build(
        self, name: str, settings: Settings, *, force: bool = False, no_build: bool = False, label: str = ""
    ) -> Result:
        """The result of a stage, from the store or built now, with whatever it needs.

        Args:
            name: The stage.
            settings: All settings.
            force: Build it anew even if it is there; what it is built on is reused.
            no_build: Build nothing.
            label: Stands in the run's name after stage and preset.

        Raises:
            SettingsError: If a file that the settings name is missing; before anything is built.
            StoreError: If something is missing under ``no_build``, or the store cannot be used.
            Stopped: If a signal asked to stop; the same call goes on from there.
        """
        ranks = Ranks()
        if not ranks.first:
            return follow(ranks, self.stages[name], settings)
        try:
            return self._lead(ranks, name, settings, force, no_build, label)
        except BaseException as error:
            ranks.tell({"error": str(error)})
            raise

    def _lead(self, ranks: Ranks, name: str, settings: Settings, force: bool, no_build: bool, label: str) -> Result:
        for each in self.order(name, settings):  # Missing files are told before anything heavy starts.
            self.input_digests(self.stages[each], settings)
        found = None if force else self.result(name, settings)
        if found:
            _say(f"{name}: reusing run {found.run_id}, which has the same settings, data and code version")
            ranks.tell({"result": as_json(found)})
            self._point(found, settings)
            return found
        if no_build:
            lacking = [name] if force else self.missing(name, settings)
            raise StoreError(f"not built for these settings: {', '.join(lacking)}", "leave out --no-build")
        done: dict[str, Result] = {}
        with alone():
            for each in self.stages[name].upstream(settings):
                self._have(each, settings, done)
        return self._run(name, settings, done, ranks=ranks, asked=True, force=force, label=label)

    def _have(self, name: str, settings: Settings, done: dict[str, Result]) -> None:
        """See to it that ``done`` holds the result of an upstream stage."""
        if name in done:
            return
        found = self.result(name, settings)
        if found:
            _say(f"{name}: reusing run {found.run_id}")
        else:
            for each in self.stages[name].upstream(settings):
                self._have(each, settings, done)
            found = self._run(name, settings, done, ranks=Ranks())
        done[name] = found

    def _point(self, found: Result, settings: Settings) -> None:
        """Let the run that ``mlflow run`` began, if it did, point at the result it stands for."""
        given = self.store.given()
        if given and given.info.run_id != found.run_id:
            tags = {"mmphi.stage": found.stage, "mmphi.reuses": found.run_id, "mmphi.preset": settings.name}
            tracker = self.store.begin(f"{found.stage} {settings.name} (reused)", tags, given)
            tracker.metrics(found.metrics)
            tracker.flush()

    def _why(self, name: str, parts: Mapping[str, Any]) -> str:
        """In what the newest result of a stage differs from what is asked for."""
        earlier = [run for run in self.store.search(stage=name) if run.info.status == "FINISHED"]
        earlier = [run for run in earlier if "mmphi.key" in run.data.tags]
        if not earlier:
            return "nothing of this stage is finished yet"
        changed = difference(parts, self.store.json_of(earlier[0], KEY))
        what = f"{changed}, compared with" if changed else "its files are not what its manifest says:"
        return f"{what} run {earlier[0].info.run_id}"

    def _run(
        self,
        name: str,
        settings: Settings,
        upstream: Mapping[str, Result],
        *,
        ranks: Ranks,
        asked: bool = False,
        force: bool = False,
        label: str = "",
    ) -> Result:
        from mmphi import lineage

        stage, parts = self.stages[name], self.parts(name, settings)
        key = key_of(parts)

        def waiting(holder: str) -> None:
            _say(f"{name}: {holder} is building the same; waiting for it (Ctrl-C to leave it alone)")

        with self.store.lock(key, waiting) as waited:
            ready = self.result(name, settings) if waited and not force else None
            if ready:
                _say(f"{name}: reusing run {ready.run_id}, finished meanwhile")
                ranks.tell({"result": as_json(ready)})
                return ready
            _say(f"{name}: building anew, as asked" if force else f"{name}: building ({self._why(name, parts)})")
            given: Run | None = self.store.given() if asked else None
            title = " ".join(filter(None, (name, settings.name, label)))
            needed = {each: upstream[each] for each in stage.upstream(settings)}
            tags = {"mmphi.stage": name, "mmphi.key": key, "mmphi.preset": settings.name}
            tracker = self.store.begin(title, tags, given)
            with self._ending(tracker):
                source = "" if force else self.store.adopt(tracker, key)
                if force:
                    self.store.clear(tracker)
                if source:
                    _say(f"{name}: going on from what run {source} left")
                lineage.describe(tracker, stage, settings, parts, needed)
                shared = {each: as_json(result) for each, result in needed.items()}
                ranks.tell({"key": key, "run_id": tracker.run_id, "folder": str(tracker.folder), "upstream": shared})
                begun = time.perf_counter()
                metrics = dict(stage.run(Context(settings, tracker.folder, needed, tracker)))
                ranks.done()
                tracker.metrics({**metrics, "seconds": time.perf_counter() - begun})
                tracker.text(METRICS, json.dumps(metrics))
                path = self.store.finish(tracker)
        return Result(name, key, tracker.run_id, path, metrics)

    @contextmanager
    def _ending(self, tracker: RunTracker) -> Iterator[None]:
        """Record how a run ended that did not finish."""
        try:
            yield
        except KeyboardInterrupt as error:
            self.store.fail(tracker, "KILLED", str(error) or "interrupted")
            raise Stopped(str(error) or "interrupted; the same command goes on from there") from error
        except BaseException as error:
            self.store.fail(tracker, "FAILED", f"{type(error).__name__}: {error}")
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)
            if full:
                free = shutil.disk_usage(tracker.folder).free
                raise StoreError(
                    f"the disk of {tracker.folder} is full: {free / 1e6:.0f} MB are free",
                    "make room; the same command goes on from there",
                ) from error
            raise


def _say(line: str) -> None:
    print(line, flush=True)
