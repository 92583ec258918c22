"""Generators anywhere in a Ray cluster: what they write comes to this machine, which has the spool.

No machine needs to reach the spool but this one, and none needs a folder that all of them see.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from mmphi.cluster.connect import error_reason, import_ray, join_cluster
from mmphi.config.textgen import TextgenSettings
from mmphi.textgen.generator import GeneratorConfig, GeneratorStatus, write_shards
from mmphi.textgen.shard_queue import ShardQueue
from mmphi.textgen.shards import ShardName

CORES = 2  # Of a generator, where there are no GPUs.
ASK_S = 1.0


class ShardCollector:
    """Takes what generators of a cluster write, on the machine of the spool.

    Args:
        url: Of the spool.
        limit: Bytes that may wait in it.
    """

    def __init__(self, url: str, limit: int) -> None:
        self._told: dict[str, GeneratorStatus] = {}
        self._ending = threading.Event()
        self._one = threading.Lock()
        self.spool = ShardQueue(url, limit, stopping=self._ending.is_set)

    def put(self, name: ShardName, content: bytes) -> bool:
        """Write a shard as soon as there is room; one at a time, as the room is counted before it is taken."""
        with self._one:
            return self.spool.put(name, content)

    def tell(self, stream: str, status: GeneratorStatus) -> None:
        """Take a generator's state."""
        self._told[stream] = status

    def told(self) -> dict[str, GeneratorStatus]:
        """What each generator told last, by its stream."""
        return self._told

    def stop(self) -> None:
        """Tell all of them to end."""
        self._ending.set()

    def stopping(self) -> bool:
        """Whether they shall end."""
        return self._ending.is_set()


class RemoteSink:
    """A generator's way to :class:`ShardCollector`, as :class:`mmphi.textgen.generator.ShardSink` describes it.

    Args:
        post: The actor.
        stream: What is written.
    """

    def __init__(self, post: Any, stream: str) -> None:
        self.post, self.stream, self.waited_s = post, stream, 0.0
        self._asked, self._ending = 0.0, False

    def put(self, name: ShardName, content: bytes) -> bool:
        """Write a shard as soon as there is room for it."""
        ray = import_ray()

        begun = time.monotonic()
        written = bool(ray.get(self.post.put.remote(name, content)))
        self.waited_s += time.monotonic() - begun
        return written

    def tell(self, status: GeneratorStatus) -> None:
        """Say how far it is."""
        ray = import_ray()

        ray.get(self.post.tell.remote(self.stream, status))

    def stopping(self) -> bool:
        """Whether it shall end; asked once a second."""
        ray = import_ray()

        if time.monotonic() - self._asked > ASK_S:
            self._asked, self._ending = time.monotonic(), bool(ray.get(self.post.stopping.remote()))
        return self._ending


def run_generator(order: dict[str, Any], post: Any) -> None:
    """One generator, on a machine of the cluster."""
    from mmphi.textgen.backends import choose_backend

    backend, _ = choose_backend(order["settings"]["backend"])  # What that machine has, and not this one.
    write_shards(GeneratorConfig(**order | {"backend": backend}), RemoteSink(post, order["stream"]))


class RayLauncher:
    """Places in a cluster: one per GPU where there are any, else one for two cores.

    Args:
        settings: Of the writing.
        spool: URL of the spool, as this machine sees it.
        say: Told what the cluster has.

    Raises:
        SettingsError: If Ray is not installed, or there is no cluster.
    """

    def __init__(self, settings: TextgenSettings, spool: str, say: Callable[[str], None] = print) -> None:
        machines = join_cluster(settings.ray)
        ray = import_ray()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.settings = settings
        self.count = settings.generators if settings.generators >= 0 else machines.places(CORES)
        say(f"Ray has {machines}: {self.count} generators")
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(ShardCollector).options(
            num_cpus=0, max_concurrency=2 * self.count + 4, scheduling_strategy=here
        )
        self.post = actor.remote(spool, int(settings.spool_mb * 1e6))
        self._work = ray.remote(max_retries=0, **machines.share(CORES))(run_generator)

    def start(self, stream: str, number: int) -> RayGenerator:
        """See :class:`mmphi.textgen.launchers.Launcher`."""
        order = GeneratorConfig(self.settings.model_dump(), stream, "auto", 0)
        return RayGenerator(self._work.remote(asdict(order), self.post), self.post, stream)

    def stop(self) -> None:
        """See :class:`mmphi.textgen.launchers.Launcher`."""
        ray = import_ray()

        ray.get(self.post.stop.remote())


class RayGenerator:
    """A generator that Ray runs, as :class:`mmphi.textgen.launchers.RunningGenerator` describes it.

    Args:
        task: What it gives when it ends.
        post: Where it tells its state.
        stream: What it writes.
    """

    def __init__(self, task: Any, post: Any, stream: str) -> None:
        self.task, self.post, self.stream = task, post, stream

    def why_ended(self) -> str | None:
        """Why it ended, in a line; ``None`` while it runs."""
        ray = import_ray()

        if not self.wait(0):
            return None
        try:
            ray.get(self.task)
        except ray.exceptions.RayError as error:
            return error_reason(error)
        return "it came to an end"

    def wait(self, seconds: float) -> bool:
        """Whether it ended within so many seconds."""
        ray = import_ray()

        return bool(ray.wait([self.task], timeout=seconds)[0])

    def kill(self) -> None:
        """End it at once."""
        ray = import_ray()

        ray.cancel(self.task, force=True)

    def told(self) -> GeneratorStatus:
        """What it told last."""
        ray = import_ray()

        found: GeneratorStatus = ray.get(self.post.told.remote()).get(self.stream, GeneratorStatus())
        return found
