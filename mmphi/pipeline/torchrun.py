"""Coordination of the processes started by torchrun: rank 0 owns the tracking store and sends work to the others.

Messages go through torchrun's key-value store. A process group cannot be used: only the training stage may open one,
and upstream stages run on rank 0 alone.
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

PATIENCE = timedelta(days=7)  # Other ranks wait this long, because rank 0 may build upstream stages first.
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK")


class RankCoordinator:
    """Rank of this process among those started by torchrun, and messages between them; rank 0 of 1 without torchrun."""

    _meetings = 0

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self._store: Any = None
        if self.count > 1:  # Builds on rank 0 alone do not count, so the prefix agrees on all ranks.
            RankCoordinator._meetings += 1
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._prefix = f"mmphi/{restart}/{RankCoordinator._meetings}"

    @classmethod
    def one(cls) -> RankCoordinator:
        """Returns a coordinator for this process alone, regardless of torchrun."""
        ranks = cls.__new__(cls)
        ranks.rank, ranks.count, ranks._store, ranks._prefix = 0, 1, None, ""
        return ranks

    @property
    def first(self) -> bool:
        """Whether this process is rank 0, which owns the tracking store."""
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

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to the other processes; does nothing in a single process."""
        if self.count > 1:
            self._shared().set("message", json.dumps(message))

    def share(self, context: Context, key: str, settings: Section) -> None:
        """Send the stage's resolved settings, folder and upstream results to the other processes, which then run it."""
        upstream = {each: as_json(result) for each, result in context.upstream.items()}
        models = {name: str(folder) for name, folder in context.models.items()}
        run = {"key": key, "run_id": context.tracker.run_id, "folder": str(context.folder)}
        self.send({**run, "upstream": upstream, "models": models, "settings": settings.model_dump()})

    def receive(self) -> dict[str, Any]:
        """Wait for the message of rank 0 and return it."""
        store = self._shared()
        store.wait(["message"], PATIENCE)
        return dict(json.loads(store.get("message")))

    def done(self) -> None:
        """On rank 0, wait until all other ranks are done; on the others, signal completion."""
        if self.count == 1:
            return
        if self.first:
            self._shared().wait([f"done/{rank}" for rank in range(1, self.count)], PATIENCE)
        else:
            self._shared().set(f"done/{self.rank}", "1")


@contextmanager
def without_torchrun() -> Iterator[None]:
    """Hide torchrun's environment variables, so that code in the block runs as a single process."""
    hidden = {name: os.environ.pop(name) for name in TORCHRUN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def as_json(result: Result) -> dict[str, Any]:
    """Converts a result to a JSON-serialisable dictionary for the other processes."""
    own = {"stage": result.stage, "key": result.key, "run_id": result.run_id}
    return {**own, "path": str(result.path), "metrics": dict(result.metrics)}


def _from_json(message: dict[str, Any]) -> Result:
    return Result(**{**message, "path": Path(message["path"])})


def run_follower(ranks: RankCoordinator, stage: Stage, settings: Section, resources: ProcessCache) -> Result:
    """Run a stage on a rank other than 0: on the files of rank 0, without recording or writing anything.

    Returns:
        The result; that of rank 0 if it reused one or built the stage alone.

    Raises:
        StoreError: If rank 0 failed, or its files do not exist on this host.
    """
    message = ranks.receive()
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
            f"{absent[0]} does not exist on the host of process {ranks.rank}",
            "the hosts of one torchrun must share the folder of the store",
        )
    view = SettingsView(type(settings)(**message["settings"]), stage.declared)
    metrics = dict(stage.run(Context(view, folder, upstream, SilentTracker(), resources, (), models, first=False)))
    ranks.done()
    return Result(stage.name, message["key"], message["run_id"], folder, metrics)
