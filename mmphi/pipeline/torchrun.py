"""Several processes on one stage, as torchrun starts them: the first owns the store, the others are told what to do.

What they tell one another goes through torchrun's own key-value store, because a process group may only be opened by
the stage that trains: whatever is built before it is built by the first process alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from mmphi.config.declared_view import SettingsView
from mmphi.config.section import Section
from mmphi.errors import StoreError
from mmphi.pipeline.process_cache import ProcessCache
from mmphi.pipeline.stage import Context, Result, Stage
from mmphi.tracking.tracker import SilentTracker

PATIENCE = timedelta(days=7)  # What the first process builds meanwhile may take long.
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK")


class RankCoordinator:
    """This process among those that torchrun started; one alone without torchrun."""

    _meetings = 0

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self._store: Any = None
        if self.count > 1:  # The first process builds more, on its own, which the others know nothing of.
            RankCoordinator._meetings += 1
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._prefix = f"mmphi/{restart}/{RankCoordinator._meetings}"

    @classmethod
    def one(cls) -> RankCoordinator:
        """This process alone, whatever torchrun started."""
        ranks = cls.__new__(cls)
        ranks.rank, ranks.count, ranks._store, ranks._prefix = 0, 1, None, ""
        return ranks

    @property
    def first(self) -> bool:
        """Whether this process owns the store."""
        return self.rank == 0

    def _shared(self) -> Any:
        if self._store is None:
            import torch.distributed as dist

            distributed: Any = dist  # Its stub does not list the stores.
            hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            server = distributed.TCPStore(
                address,
                port,
                is_master=self.first and not hosted,
                timeout=PATIENCE,
                wait_for_workers=False,
                multi_tenant=True,
            )
            self._store = distributed.PrefixStore(self._prefix, server)
        return self._store

    def tell(self, message: dict[str, Any]) -> None:
        """Tell the other processes; does nothing where there are none."""
        if self.count > 1:
            self._shared().set("message", json.dumps(message))

    def share(self, context: Context, key: str, settings: Section) -> None:
        """Tell the other processes to do the same stage with the same resolved settings on the same files."""
        upstream = {each: as_json(result) for each, result in context.upstream.items()}
        models = {name: str(folder) for name, folder in context.models.items()}
        run = {"key": key, "run_id": context.tracker.run_id, "folder": str(context.folder)}
        self.tell({**run, "upstream": upstream, "models": models, "settings": settings.model_dump()})

    def hear(self) -> dict[str, Any]:
        """Wait for what the first process tells."""
        store = self._shared()
        store.wait(["message"], PATIENCE)
        return dict(json.loads(store.get("message")))

    def done(self) -> None:
        """Wait, on the first process, until the others are done too; say so on the others."""
        if self.count == 1:
            return
        if self.first:
            self._shared().wait([f"done/{rank}" for rank in range(1, self.count)], PATIENCE)
        else:
            self._shared().set(f"done/{self.rank}", "1")


@contextmanager
def without_torchrun() -> Iterator[None]:
    """Hide torchrun's variables, so that what runs inside does not wait for the other processes."""
    hidden = {name: os.environ.pop(name) for name in TORCHRUN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def as_json(result: Result) -> dict[str, Any]:
    """A result as it is told to other processes."""
    own = {"stage": result.stage, "key": result.key, "run_id": result.run_id}
    return {**own, "path": str(result.path), "metrics": dict(result.metrics)}


def _from_json(message: dict[str, Any]) -> Result:
    return Result(**{**message, "path": Path(message["path"])})


def run_follower(ranks: RankCoordinator, stage: Stage, settings: Section, resources: ProcessCache) -> Result:
    """What the processes after the first do: the same stage on the same files, recording and writing nothing.

    Raises:
        StoreError: If the first process failed, or its files are not there.
    """
    message = ranks.hear()
    if "error" in message:
        raise StoreError(f"the first process ended: {message['error']}")
    if "result" in message:
        return _from_json(message["result"])
    upstream = {name: _from_json(result) for name, result in message["upstream"].items()}
    models = {name: Path(folder) for name, folder in message["models"].items()}
    folder = Path(message["folder"])
    absent = [path for path in (folder, *(result.path for result in upstream.values())) if not path.exists()]
    if absent:
        raise StoreError(
            f"{absent[0]} is not there for process {ranks.rank}",
            "the hosts of one torchrun must share the folder of the store",
        )
    view = SettingsView(type(settings)(**message["settings"]), stage.declared)
    metrics = dict(stage.run(Context(view, folder, upstream, SilentTracker(), resources, (), models, first=False)))
    ranks.done()
    return Result(stage.name, message["key"], message["run_id"], folder, metrics)
