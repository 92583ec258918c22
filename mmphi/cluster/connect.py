"""Connection to a Ray cluster."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from typing import Any

from mmphi.errors import SettingsError
from mmphi.extras import source

ANSWER_S = 5.0


@dataclass(frozen=True)
class Machines:
    """Resources of a cluster.

    Attributes:
        nodes: Number of live machines.
        cpus: Total number of cores.
        gpus: Total number of GPUs.
    """

    nodes: int
    cpus: int
    gpus: int

    def places(self, cores: int = 1) -> int:
        """Returns the number of concurrent tasks: one per GPU if there are any, else one per ``cores`` cores."""
        return self.gpus or max(1, self.cpus // cores)

    def share(self, cores: int = 1) -> dict[str, float]:
        """Returns the resources of one task, as options of ``ray.remote``."""
        return {"num_gpus": 1, "num_cpus": 0} if self.gpus else {"num_cpus": cores}

    def __str__(self) -> str:
        return f"{self.nodes} machines, {self.cpus} cores, {self.gpus} GPUs"


def import_ray() -> Any:
    """Returns the module Ray as ``Any``, because its types lack options that are passed by name.

    Raises:
        SettingsError: If Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise SettingsError("Ray is not installed", f"pip install '{source()}[ray]', on every machine") from error
    return ray


def join_cluster(address: str) -> Machines:
    """Join a cluster and return its resources; a process that has joined stays in that cluster.

    Args:
        address: ``host:port`` of the head, ``auto`` for the cluster of this machine, ``local`` for a new cluster that
            ends with this process.

    Raises:
        SettingsError: If Ray is not installed, or the cluster cannot be reached.
    """
    ray = import_ray()
    if not ray.is_initialized():
        try:
            _reached(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"there is no Ray cluster at {address!r}: {error}",
                "`ray start --head` begins one, `ray start --address HEAD:6379` joins it",
            ) from error
    has = ray.cluster_resources()
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    return Machines(nodes, int(has.get("CPU", 0)), int(has.get("GPU", 0)))


def _reached(address: str) -> None:
    """Connect to the head's port once: Ray itself would retry for five minutes.

    Raises:
        OSError: If there is no response.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()


def error_reason(error: Exception) -> str:
    """Returns why a task failed, in a line: the last line of an error in the task, else the first of Ray's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["it wrote nothing"]
    there = type(error).__name__ == "RayTaskError" or hasattr(error, "cause")
    return f"{type(error).__name__}: {lines[-1] if there else lines[0]}"
