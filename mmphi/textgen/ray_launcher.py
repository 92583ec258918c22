"""Generators in a Ray cluster, which send their shards to this machine's shard queue.

Only this machine needs access to the queue, and no shared folder is needed.
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

CORES = 2  # Per generator, in clusters without GPUs.
ASK_S = 1.0


class ShardCollector:
    """Receives the shards of a cluster's generators, on the machine of the shard queue.

    Args:
        url: URL of the shard queue.
        limit: Maximum number of bytes that wait in the queue.
    """

    def __init__(self, url: str, limit: int) -> None:
        self._statuses: dict[str, GeneratorStatus] = {}
        self._ending = threading.Event()
        self._one = threading.Lock()
        self.spool = ShardQueue(url, limit, stopping=self._ending.is_set)

    def put(self, name: ShardName, content: bytes) -> bool:
        """Write a shard as soon as there is room; one at a time, because the check and the write are separate steps."""
        with self._one:
            return self.spool.put(name, content)

    def tell(self, stream: str, status: GeneratorStatus) -> None:
        """Store a generator's status."""
        self._statuses[stream] = status

    def statuses(self) -> dict[str, GeneratorStatus]:
        """Returns the last status of each generator, by stream."""
        return self._statuses

    def stop(self) -> None:
        """Request all generators to stop."""
        self._ending.set()

    def stopping(self) -> bool:
        """Whether the generators should stop."""
        return self._ending.is_set()


class RemoteSink:
    """Connection of a generator to :class:`ShardCollector`; a :class:`mmphi.textgen.generator.ShardSink`.

    Args:
        post: Actor of the collector.
        stream: Stream of the generator.
    """

    def __init__(self, post: Any, stream: str) -> None:
        self.post, self.stream, self.waited_s = post, stream, 0.0
        self._checked_at, self._ending = 0.0, False

    def put(self, name: ShardName, content: bytes) -> bool:
        """Write a shard as soon as there is room; returns False if stopped before."""
        ray = import_ray()

        begun = time.monotonic()
        written = bool(ray.get(self.post.put.remote(name, content)))
        self.waited_s += time.monotonic() - begun
        return written

    def tell(self, status: GeneratorStatus) -> None:
        """Report the generator's progress."""
        ray = import_ray()

        ray.get(self.post.tell.remote(self.stream, status))

    def stopping(self) -> bool:
        """Whether the generator should stop; queried at most once per second."""
        ray = import_ray()

        if time.monotonic() - self._checked_at > ASK_S:
            self._checked_at, self._ending = time.monotonic(), bool(ray.get(self.post.stopping.remote()))
        return self._ending


def run_generator(order: dict[str, Any], post: Any) -> None:
    """Run one generator on a machine of the cluster."""
    from mmphi.textgen.backends import choose_backend

    backend, _ = choose_backend(order["settings"]["backend"])  # Chosen on the machine that runs it.
    write_shards(GeneratorConfig(**order | {"backend": backend}), RemoteSink(post, order["stream"]))


class RayLauncher:
    """Generators as tasks in a Ray cluster; by default one per GPU, or per two cores without GPUs.

    Args:
        settings: Text generation settings.
        spool: URL of the shard queue, as seen by this machine.
        say: Receives a message with the resources of the cluster.

    Raises:
        SettingsError: If Ray is not installed, or the cluster is not found.
    """

    def __init__(self, settings: TextgenSettings, spool: str, say: Callable[[str], None] = print) -> None:
        machines = join_cluster(settings.ray)
        ray = import_ray()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.settings = settings
        self.count = settings.generators if settings.generators >= 0 else machines.places(CORES)
        say(f"Ray cluster with {machines}: running {self.count} generators")
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
    """A generator run by Ray; a :class:`mmphi.textgen.launchers.RunningGenerator`.

    Args:
        task: Reference to the result of its task.
        post: Actor that receives its status.
        stream: Stream that it writes.
    """

    def __init__(self, task: Any, post: Any, stream: str) -> None:
        self.task, self.post, self.stream = task, post, stream

    def why_ended(self) -> str | None:
        """Returns why it ended, in one line; ``None`` while it runs."""
        ray = import_ray()

        if not self.wait(0):
            return None
        try:
            ray.get(self.task)
        except ray.exceptions.RayError as error:
            return error_reason(error)
        return "its task ended without an error"

    def wait(self, seconds: float) -> bool:
        """Wait at most ``seconds``; returns whether it ended."""
        ray = import_ray()

        return bool(ray.wait([self.task], timeout=seconds)[0])

    def kill(self) -> None:
        """Terminate it immediately."""
        ray = import_ray()

        ray.cancel(self.task, force=True)

    def last_status(self) -> GeneratorStatus:
        """Returns the last reported status."""
        ray = import_ray()

        found: GeneratorStatus = ray.get(self.post.statuses.remote()).get(self.stream, GeneratorStatus())
        return found
