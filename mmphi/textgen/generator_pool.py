"""Generators of a command: started, monitored, restarted when they die, and stopped."""

from __future__ import annotations

import json
import re
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmphi.config.textgen import TextgenSettings
from mmphi.errors import ModelError, SettingsError
from mmphi.textgen.backends import choose_backend
from mmphi.textgen.generator import GeneratorStatus
from mmphi.textgen.launchers import Launcher, ProcessLauncher, RunningGenerator
from mmphi.textgen.shard_queue import ShardQueue
from mmphi.textgen.shards import HOST

HOPELESS = 3  # Consecutive starts without output, after which the pool gives up.
END_S = 20.0
NOTES = "starts.json"


@dataclass
class PoolMember:
    """One place of the pool, with its current generator.

    Attributes:
        number: Number of the place.
        starts: Number of generators started in it.
        fruitless: Consecutive starts without output.
        stream: Stream of the current or last generator.
        running: The current generator.
        before: Total status of earlier generators of this place.
    """

    number: int
    starts: int = 0
    fruitless: int = 0
    stream: str = ""
    running: RunningGenerator | None = None
    before: GeneratorStatus = field(default_factory=GeneratorStatus)

    @property
    def written(self) -> GeneratorStatus:
        """Total status of all generators of this place."""
        return self.before if self.running is None else self.before + self.running.last_status()

    def ended(self) -> None:
        """Add the status of the current generator to ``before``, and clear the place."""
        self.before, self.running = self.written, None


class GeneratorPool:
    """A fixed number of generators.

    A crashed generator restarts with a new random stream, so that no text is drawn twice; only its unfinished shard is
    lost.

    Args:
        settings: Text generation settings.
        spool: URL of the shard queue.
        folder: Folder of the generators' status files.
        backend: Sampling backend.
        say: Receives a message for each generator that dies.
    """

    def __init__(
        self,
        settings: TextgenSettings,
        spool: str,
        folder: Path,
        backend: str = "transformers",
        say: Callable[[str], None] = print,
    ) -> None:
        self.settings, self.folder, self.say = settings, folder, say
        self.host = settings.host or "here"
        if not HOST.fullmatch(self.host):
            raise SettingsError(
                f"textgen.host = {self.host!r} has other characters than letters, digits, dots and underscores",
                "use a name such as gpu_1",
            )
        if settings.spool and not settings.host:  # Others may use the queue, and hostnames may be reused.
            own = self._own_id()
            self.host = f"{re.sub(r'[^A-Za-z0-9]', '_', socket.gethostname())}.{own}"
        self._found = (settings, spool, folder, backend)
        self._spool = ShardQueue(spool, say=say)
        self.places: Launcher | None = None
        self.members: list[PoolMember] = []
        self.begun = time.monotonic()

    def start(self) -> None:
        """Start all generators."""
        self.places = launcher_of(*self._found, say=self.say)
        self.members = [PoolMember(number) for number in range(self.places.count)]
        for member in self.members:
            self._fill(member)

    def watch(self) -> None:
        """Restart the generators that have died.

        Raises:
            ModelError: If a generator dies repeatedly without writing anything.
        """
        for member in self.members:
            if member.running is None or (why := member.running.why_ended()) is None:
                continue
            member.fruitless = 0 if member.running.last_status().shards else member.fruitless + 1
            self.say(f"generator {member.number} has died: {why}")
            if member.fruitless >= HOPELESS:
                raise ModelError(f"generator {member.number} died {HOPELESS} times before it wrote anything: {why}")
            member.ended()
            self._fill(member)

    def stop(self) -> None:
        """Stop all generators; open shards are written if there is room."""
        if self.places is None:
            return
        self.places.stop()
        until = time.monotonic() + END_S
        for member in self.members:
            if member.running is None:
                continue
            if not member.running.wait(max(0.1, until - time.monotonic())):
                member.running.kill()
            member.ended()

    def __enter__(self) -> GeneratorPool:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def rows(self) -> list[dict[str, Any]]:
        """Returns each generator's progress: documents, tokens, rates, busy share, waiting time, starts and drops."""
        found = []
        age = max(time.monotonic() - self.begun, 1e-9)
        for member in self.members:
            all_ = member.written
            found.append(
                {
                    "generator": member.number,
                    "documents": all_.documents,
                    "tokens": all_.tokens,
                    "documents/s": all_.documents / age,
                    "tokens/s": all_.drawn / max(all_.busy_s, 1e-9) if all_.drawn else 0.0,
                    "busy": all_.busy_s / age,
                    "waited s": all_.waited_s,
                    "starts": member.starts,
                    "dropped": sum(all_.dropped.values()),
                }
            )
        return found

    def _notes(self) -> dict[str, Any]:
        """Contents of the notes file in the folder."""
        path = self.folder / NOTES
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def _own_id(self) -> str:
        """Random ID that distinguishes machines of the same hostname; stored in the folder."""
        notes = self._notes()
        if "id" not in notes:
            notes["id"] = secrets.token_hex(4)
            self.folder.mkdir(parents=True, exist_ok=True)
            part = (self.folder / NOTES).with_suffix(".part")
            part.write_text(json.dumps(notes))
            part.replace(self.folder / NOTES)
        return str(notes["id"])

    def _fill(self, member: PoolMember) -> None:
        """Start a generator in a place, with a new stream."""
        assert self.places is not None
        member.starts += 1
        # Earlier versions stored the number of starts in the notes file.
        member.stream = self._spool.begin_stream(
            f"{self.host}-{member.number}", after=int(self._notes().get(str(member.number), 0))
        )
        member.running = self.places.start(member.stream, member.number)


def launcher_of(
    settings: TextgenSettings, spool: str, folder: Path, backend: str, say: Callable[[str], None] = print
) -> Launcher:
    """Returns the launcher that the settings select.

    Raises:
        SettingsError: If a Ray cluster is named, and Ray is not installed or the cluster is not found.
    """
    if not settings.ray:
        return ProcessLauncher(settings, spool, folder, backend)
    from mmphi.textgen.ray_launcher import RayLauncher

    return RayLauncher(settings, spool, say)


def backend_of(settings: TextgenSettings, say: Callable[[str], None] = print) -> str:
    """Returns the sampling backend for this machine, and reports it; in a cluster each machine chooses its own.

    Raises:
        SettingsError: If vLLM is asked for and not installed.
    """
    if settings.ray:
        say("each machine of the cluster chooses its own sampling backend")
        return settings.backend
    backend, why = choose_backend(settings.backend)
    say(f"sampling backend: {backend} ({why})")
    return backend
