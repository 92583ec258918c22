"""A stage's key, its cached result, and its upstream stages; knows no stage by name.

The key is a digest of everything that can change a result: the stage and its version, the settings that matter to it,
the content of the files it reads, and the keys of what it is built on.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from mmphi.errors import DataError, SettingsError, Stopped, StoreError
from mmphi.settings import Settings
from mmphi.stage import Context, Result, Stage

if TYPE_CHECKING:
    from mmphi.tracking import RunTracker, Store


def mattering(model: BaseModel) -> dict[str, Any]:
    """The values of a section that can change a result."""
    kept = {}
    for name, field in type(model).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and not extra.get("matters", True):
            continue
        value = getattr(model, name)
        kept[name] = (
            [mattering(v) if isinstance(v, BaseModel) else v for v in value] if isinstance(value, list) else value
        )
    return kept


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names.

    Raises:
        DataError: If there is no such path.
    """
    if not path.exists():
        raise DataError(f"{path} is not there", "check the path in the settings")
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


class Pipeline:
    """Stages over one store.

    Args:
        stages: By name.
        store: Where results are; opened when first needed.
    """

    def __init__(self, stages: Mapping[str, Stage], store: Store | None = None) -> None:
        self.stages = stages
        self._store = store
        self._digests: dict[Path, str] = {}

    @property
    def store(self) -> Store:
        """The tracking store."""
        if self._store is None:
            from mmphi.tracking import Store

            self._store = Store()
        return self._store

    def input_digests(self, stage: Stage, settings: Settings) -> dict[str, str]:
        """Digest of every outside file a stage reads, by setting.

        Raises:
            SettingsError: If one is missing.
        """
        found = {}
        for key, path in stage.inputs(settings).items():
            if not path.exists():
                raise SettingsError(f"{key} = {path}: there is no such file or folder", "correct the path")
            path = path.resolve()
            if path not in self._digests:
                self._digests[path] = content_digest(path)
            found[key] = self._digests[path]
        return found

    def key(self, stage: Stage, settings: Settings) -> str:
        """What a result of these settings is found by, 32 hexadecimal digits."""
        chosen: dict[str, Any] = {name: mattering(getattr(settings, name)) for name in stage.sections}
        digests = self.input_digests(stage, settings)
        for dotted, digest in digests.items():
            place: Any = chosen
            *parents, last = dotted.split(".")
            for part in parents:
                place = place[int(part)] if isinstance(place, list) else place[part]
            place[int(last) if isinstance(place, list) else last] = digest
        content = {
            "stage": stage.name,
            "version": stage.version,
            "seed": settings.seed,
            "settings": chosen,
            "upstream": {name: self.key(self.stages[name], settings) for name in stage.upstream(settings)},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def order(self, name: str, settings: Settings) -> list[str]:
        """A stage and all it is built on, upstream first."""
        found: dict[str, None] = {}
        for upstream in self.stages[name].upstream(settings):
            found.update(dict.fromkeys(self.order(upstream, settings)))
        return [*found, name] if name not in found else list(found)

    def result(self, name: str, settings: Settings) -> Result | None:
        """The finished result of a stage, if there is one."""
        key = self.key(self.stages[name], settings)
        run = self.store.result(key)
        return Result(name, key, run.info.run_id, self.store.fetch(run), dict(run.data.metrics)) if run else None

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
            StoreError: If something is missing under ``no_build``, or another process is building it.
        """
        for each in self.order(name, settings):  # Bad paths are told before anything heavy starts.
            self.input_digests(self.stages[each], settings)
        together = int(os.environ.get("WORLD_SIZE", "1")) > 1
        upstream: dict[str, Result] = {}
        for each in self.order(name, settings):
            asked = each == name
            found = None if asked and force else self.result(each, settings)
            if found:
                print(f"{each}: reusing run {found.run_id}", flush=True)
                if asked and os.environ.get("MLFLOW_RUN_ID"):
                    self._point(found, settings)
            elif no_build or (together and not asked):
                why = "torchrun trains one stage: build what it needs first" if together else "leave out --no-build"
                raise StoreError(f"{each} is not built for these settings", f"{why} (`mmphi {each}`)")
            else:
                needed = {n: upstream[n] for n in self.stages[each].upstream(settings)}
                found = self._run(self.stages[each], settings, needed, asked=asked, label=label, force=asked and force)
            upstream[each] = found
        return upstream[name]

    def _point(self, found: Result, settings: Settings) -> None:
        """Let the run that ``mlflow run`` began point at the result it stands for."""
        tags = {"mmphi.stage": found.stage, "mmphi.reused": found.run_id}
        tracker = self.store.start(
            f"{found.stage} {settings.name} (reused)", {**tags, "mmphi.key": ""}, continue_given=True
        )
        tracker.metrics({k: v for k, v in found.metrics.items() if not k.startswith("train/")})

    def _run(
        self, stage: Stage, settings: Settings, upstream: Mapping[str, Result], *, asked: bool, label: str, force: bool
    ) -> Result:
        from mmphi import tracking

        key = self.key(stage, settings)
        tags = {"mmphi.stage": stage.name, "mmphi.key": key, "mmphi.preset": settings.name}
        tags |= {f"mmphi.upstream.{n}": r.run_id for n, r in upstream.items()}
        tags |= {f"mmphi.data.{n}": d[:16] for n, d in self.input_digests(stage, settings).items()}
        name = " ".join(filter(None, (stage.name, settings.name, label if asked else "")))
        print(
            f"{stage.name}: building (nothing with key {key[:8]} is finished)"
            if not force
            else f"{stage.name}: building anew"
        )
        tracker = self.store.start(name, tags, continue_given=asked)
        with tracking.locked(tracker.folder) as free:
            if not free:
                raise StoreError(f"another process is building {stage.name} with these settings", "wait for it")
            if not force:
                self.store.adopt(tracker, key)
            elif tracker.remote:
                tracking.clear(tracker.folder)
            self._describe(tracker, stage, settings)
            context = Context(settings, tracker.folder, upstream, tracker)
            begun = time.perf_counter()
            try:
                metrics = dict(stage.run(context))
            except KeyboardInterrupt as error:
                tracker.fail("KILLED", str(error) or "interrupted")
                raise Stopped(str(error) or "interrupted; the same command goes on from the last checkpoint") from error
            except BaseException as error:
                tracker.fail("FAILED", f"{type(error).__name__}: {error}")
                raise
            tracker.metrics({**metrics, "seconds": time.perf_counter() - begun})
            tracker.finish()
        return Result(stage.name, key, tracker.run_id, tracker.folder, metrics)

    def _describe(self, tracker: RunTracker, stage: Stage, settings: Settings) -> None:
        """Record settings, code, machine and packages."""
        from mmphi import lineage

        resolved = settings.model_dump()
        tracker.yaml("settings.yaml", resolved)
        tracker.params({"seed": settings.seed})
        for section in stage.sections:
            tracker.params({f"{section}.{k}": v for k, v in resolved[section].items()})
        tags, diff = lineage.code()
        tracker.tags({**tags, **lineage.hardware()})
        tracker.text("packages.txt", lineage.packages())
        if diff:
            tracker.text("uncommitted.diff", diff)


def when(milliseconds: int) -> str:
    """A time of the store in words."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
