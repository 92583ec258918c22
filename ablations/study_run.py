"""Study run: the MLflow run that holds a study's declaration and the changes made while it ran."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ablations.study import BEFORE
from mmphi.config.fields import field_of
from mmphi.config.former_names import with_current_names
from mmphi.errors import SettingsError, StoreError
from mmphi.stages import Settings

if TYPE_CHECKING:
    from mlflow.entities import Run

    from mmphi.tracking.run_writer import TrackingStore

STUDY, RECORD, CHANGE = "mmphi.study", "mmphi.study_record", "mmphi.change."
DECLARATION = "study.json"
SHOWN, NONE = ("question", "costs", "also", "leaves_open"), object()
TUNING = ("tuning_seeds", "tuning_extensions", "tuning_tokens", "tuning_metric")  # No effect without `nuisance`.


@dataclass(frozen=True)
class StudyChange:
    """A change that a user made while the study ran.

    Attributes:
        what: ``stop`` or ``add`` for a level, or ``seeds`` for the number of seeds.
        name: Name of the level; empty for ``seeds``.
        value: Value of the level, or the number of seeds.
        at: Time of the change in UTC, as ``YYYY-MM-DD HH:MM:SS``.
    """

    what: str
    name: str
    value: Any
    at: str


class StudyRun:
    """The MLflow run that holds a study's declaration.

    Args:
        store: Tracking store.
        name: Name of the study.
        run: The MLflow run.
    """

    def __init__(self, store: TrackingStore, name: str, run: Run) -> None:
        self.store, self.name, self.run_id = store, name, str(run.info.run_id)

    @classmethod
    def find(cls, store: TrackingStore, name: str) -> StudyRun | None:
        """The newest study run of a name; ``None`` if the store has none."""
        found = next(store.search(study_record=name), None)
        return cls(store, name, found) if found else None

    @classmethod
    def open(
        cls, store: TrackingStore, name: str, declaration: Mapping[str, Any], run: str = "", command: str = ""
    ) -> StudyRun:
        """Find the study run of a name, or create it.

        Args:
            store: Tracking store.
            name: Name of the study.
            declaration: Current declaration of the study.
            run: Id of an MLflow run that already exists for the study; empty creates one.
            command: Command line that started the study, recorded so that it can be repeated.

        Raises:
            SettingsError: If the existing study has a different declaration; the message lists the differences.
        """
        with FileLock(store.locks / f"study-{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"):
            known = cls.find(store, name)
            if known is None:
                begun = cls._begun(store, name, declaration, run, command)
                known = cls.find(store, name)
                if begun is not None:
                    return begun
        assert known is not None
        different = differences(*comparable(known.declaration(), declaration))
        if different:
            raise SettingsError(
                f"the study {name} was begun with other settings: {'; '.join(different)}",
                f"give this one another name: --name {name}2; levels and seeds of a study that runs are changed by"
                f" `mmphi studies {name} --add | --stop | --seeds`",
            )
        if run and run != known.run_id:
            store.client.set_tag(run, "mmphi.reuses", known.run_id)
        store.client.update_run(known.run_id, status="RUNNING")
        return known

    @classmethod
    def _begun(
        cls, store: TrackingStore, name: str, declaration: Mapping[str, Any], run: str, command: str
    ) -> StudyRun | None:
        """Create a study run; ``None`` if a driver on another machine created one at the same time, but earlier."""
        described = {"mmphi.question": str(declaration["question"]), "mmphi.command": command}
        tracker = store.begin(f"study {name}", {RECORD: name, **described}, run)
        tracker.text(DECLARATION, json.dumps(declaration, indent=1))
        others = [each for each in store.search(study_record=name) if each.info.run_id != tracker.run_id]
        first = min(others, key=lambda each: (each.info.start_time, each.info.run_id), default=None)
        own = store.run(tracker.run_id)
        if first and (first.info.start_time, first.info.run_id) < (own.info.start_time, own.info.run_id):
            store.client.delete_run(tracker.run_id)
            return None
        from mmphi.pipeline.provenance import code_tags, hardware_tags, installed_packages

        tracker.text("packages.txt", installed_packages())
        tags, diff = code_tags()
        tracker.tags({**tags, **hardware_tags()})
        if diff:
            tracker.text("uncommitted.diff", diff)
        return cls(store, name, own)

    def declaration(self) -> dict[str, Any]:
        """Declaration with which the study was started, with current names of settings and metrics.

        Raises:
            StoreError: If the run has no declaration.
        """
        found = self.store.json_of(self.store.run(self.run_id), DECLARATION)
        if not found:
            raise StoreError(
                f"run {self.run_id} of the study {self.name} has no {DECLARATION}", "restore its artifacts"
            )
        current: dict[str, Any] = with_current_names(found)
        return current

    def changes(self) -> list[StudyChange]:
        """Changes made while the study ran, in order."""
        tags = self.store.run(self.run_id).data.tags
        found = (json.loads(tags[name]) for name in sorted(tags) if name.startswith(CHANGE))
        return [StudyChange(**with_current_names(change)) for change in found]

    def change(self, what: str, name: str = "", value: Any = None) -> StudyChange:
        """Record a change; the driver applies it before its next trial."""
        made = StudyChange(what, name, value, time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()))
        number = len(self.changes())
        self.store.client.set_tag(self.run_id, f"{CHANGE}{number:04d}", json.dumps(made.__dict__))
        if self.store.run(self.run_id).info.status == "FINISHED":  # The change may add trials.
            self.store.client.update_run(self.run_id, status="SCHEDULED")
        return made

    def finish(self, status: str) -> None:
        """Set the status of the run: ``FINISHED``, ``KILLED`` or ``FAILED``."""
        self.store.client.set_terminated(self.run_id, status)


def comparable(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Reduce two declarations to the parts that must agree for the later one to reuse the earlier one's results.

    Left out are attributes that only the report shows, tuning attributes of studies without nuisance settings, and
    settings and attributes that are newer than the study and have the value that earlier results were built with.
    """
    idle = TUNING if not before.get("nuisance") and not after.get("nuisance") else ()
    before = {name: value for name, value in before.items() if name not in (*SHOWN, *idle)}
    after = {name: value for name, value in after.items() if name not in (*SHOWN, *idle)}
    after = {name: v for name, v in after.items() if name in before or v != BEFORE.get(name, NONE)}
    known = before.get("settings", {})

    def is_new(name: str, value: Any) -> bool:
        field = field_of(Settings, name)
        return name not in known and field is not None and value == field.legacy_default

    settings = {name: value for name, value in after.get("settings", {}).items() if not is_new(name, value)}
    return before, {**after, "settings": settings} if "settings" in after else after


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Differences between two declarations, one message per setting or attribute."""
    one, other = _flat(before), _flat(after)
    return [
        f"{name} is {other.get(name, 'not there')}, was {one.get(name, 'not there')}"
        for name in sorted(set(one) | set(other))
        if one.get(name) != other.get(name)
    ]


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{before}{name}.")
        else:
            flat[before + name] = value
    return flat
