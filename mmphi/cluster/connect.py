"""The Ray cluster that work is given to."""

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
    """What a cluster has.

    Attributes:
        nodes: Machines that are there now.
        cpus: Their cores together.
        gpus: Their GPUs together.
    """

    nodes: int
    cpus: int
    gpus: int

    def places(self, cores: int = 1) -> int:
        """Pieces of work at a time: one per GPU where there are any, else one per so many cores."""
        return self.gpus or max(1, self.cpus // cores)

    def share(self, cores: int = 1) -> dict[str, float]:
        """What one piece of work takes of a machine."""
        return {"num_gpus": 1, "num_cpus": 0} if self.gpus else {"num_cpus": cores}

    def __str__(self) -> str:
        return f"{self.nodes} machines, {self.cpus} cores, {self.gpus} GPUs"


def import_ray() -> Any:
    """Ray, without its types, which do not know what is given by name.

    Raises:
        SettingsError: If it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise SettingsError("Ray is not installed", f"pip install '{source()}[ray]', on every machine") from error
    return ray


def join_cluster(address: str) -> Machines:
    """Join a cluster; once joined, a process stays in it.

    Args:
        address: ``host:port`` of its head, ``auto`` for the one that this machine is in, ``local`` for one that
            begins here and ends with this process.

    Raises:
        SettingsError: If Ray is not installed, or there is no cluster.
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
    """Try a head's port: Ray itself would try for five minutes.

    Raises:
        OSError: If nobody answers.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()


def error_reason(error: Exception) -> str:
    """Why a piece of work ended, in a line: of an error there, its own last line; of a machine's end, what Ray says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["it wrote nothing"]
    there = type(error).__name__ == "RayTaskError" or hasattr(error, "cause")
    return f"{type(error).__name__}: {lines[-1] if there else lines[0]}"
