"""The generators of this machine: started, watched, started anew when they die, and ended."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from mmphi.errors import ModelError
from mmphi.settings.textgen import TextgenSettings
from mmphi.textgen.generator import Order, Status

HOPELESS = 3  # Starts in a row that wrote nothing: it is not the machine then.
PAUSE_S = 2.0
END_S = 20.0


@dataclass
class Member:
    """One place in the fleet, whoever fills it now.

    Attributes:
        number: Of the place.
        starts: How often it was filled.
        fruitless: Starts in a row that wrote nothing.
        process: Who fills it.
        status: Where it tells its state.
        log: Where it writes what goes wrong.
        before: What earlier ones of this place wrote.
        born: When the present one was started.
    """

    number: int
    starts: int = 0
    fruitless: int = 0
    process: subprocess.Popen[bytes] | None = None
    status: Path = Path()
    log: Path = Path()
    before: Status = field(default_factory=Status)
    born: float = 0.0

    @property
    def now(self) -> Status:
        """What the present one told last."""
        return Status.read(self.status)


class Fleet:
    """Generators of this machine.

    Every start has a stream of its own, so that a text is never drawn twice: one that dies costs the shard it had
    open, and whoever takes its place goes on elsewhere.

    Args:
        settings: Of the writing.
        spool: URL of the spool.
        folder: Where they tell their state; streams go on after those that are noted here.
        backend: What draws the tokens.
        say: Told of those that die.
        options: Of the spool's file system.
    """

    def __init__(
        self,
        settings: TextgenSettings,
        spool: str,
        folder: Path,
        backend: str = "transformers",
        say: Callable[[str], None] = print,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.settings, self.spool, self.folder, self.backend, self.say = settings, spool, folder, backend, say
        self.options = options or {}
        self._notes = folder / "starts.json"  # How often each place was filled, over all calls.
        self.host = settings.host or "here"
        if settings.spool and not settings.host:  # Others may write there, too, and this machine may be another soon.
            self.host = (
                f"{re.sub(r'[^A-Za-z0-9]', '_', socket.gethostname())}.{self._noted('id', secrets.token_hex(4))}"
            )
        self.members = [Member(number) for number in range(count_of(settings))]
        self.begun = time.monotonic()

    def start(self) -> None:
        """Fill every place."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "stop").unlink(missing_ok=True)
        for member in self.members:
            self._fill(member)

    def watch(self) -> None:
        """Fill the places of those that have died.

        Raises:
            ModelError: If one dies again and again and writes nothing.
        """
        for member in self.members:
            process = member.process
            if process is None or process.poll() is None:
                continue
            last = member.now
            member.fruitless = 0 if last.shards else member.fruitless + 1
            why = _tail(member.log)
            self.say(f"generator {member.number} has died ({process.returncode}): {why or 'it said nothing'}")
            if member.fruitless >= HOPELESS:
                raise ModelError(
                    f"generator {member.number} died {HOPELESS} times before it wrote anything: {why}",
                    f"its whole words are in {member.log}",
                )
            member.before = _sum(member.before, last)
            self._fill(member)

    def stop(self) -> None:
        """End all of them; what each has open is written, where there is room."""
        (self.folder / "stop").touch()
        until = time.monotonic() + END_S
        for member in self.members:
            if member.process is None:
                continue
            try:
                member.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()
            member.before = _sum(member.before, member.now)
            member.process, member.status = None, Path()

    def __enter__(self) -> Fleet:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def rows(self) -> list[dict[str, Any]]:
        """How far each is: documents, tokens, tokens a second, share of its time that it wrote, starts."""
        found = []
        for member in self.members:
            both = _sum(member.before, member.now)
            age = max(time.monotonic() - self.begun, 1e-9)
            found.append(
                {
                    "generator": member.number,
                    "documents": both.documents,
                    "tokens": both.tokens,
                    "documents/s": both.documents / age,
                    "tokens/s": both.tokens / max(both.busy_s, 1e-9) if both.tokens else 0.0,
                    "busy": both.busy_s / age,
                    "waited s": both.waited_s,
                    "starts": member.starts,
                    "dropped": sum(both.dropped.values()),
                }
            )
        return found

    def _noted(self, name: str, value: Any, *, anew: bool = False) -> Any:
        """What is noted under a name, over all calls; the value given where nothing is, or where it is to be."""
        notes = json.loads(self._notes.read_text()) if self._notes.exists() else {}
        if name not in notes or anew:
            notes[name] = value
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self._notes.with_suffix(".part")
            part.write_text(json.dumps(notes))
            part.replace(self._notes)
        return notes[name]

    def _fill(self, member: Member) -> None:
        """Start whoever fills a place now, under a stream that nobody had."""
        start = self._noted(str(member.number), 0) + 1
        self._noted(str(member.number), start, anew=True)  # Before it begins, so that no two starts have one number.
        member.starts += 1
        stream = f"{self.host}-{member.number}-{start}"
        member.status, member.log = self.folder / f"{stream}.json", self.folder / f"{stream}.log"
        threads = max(1, (os.cpu_count() or 1) // max(1, len(self.members)))
        order = Order(
            self.settings.model_dump(),
            self.spool,
            stream,
            str(member.status),
            self.backend,
            threads,
            os.getpid(),
            self.options,
        )
        written = self.folder / f"{stream}.order"
        written.write_text(json.dumps(asdict(order)))
        log: IO[bytes] = member.log.open("wb")
        with log:
            member.process = subprocess.Popen(
                [sys.executable, "-m", "mmphi.textgen.generator", str(written)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment(member, threads),
                start_new_session=True,  # Ctrl-C is for whoever watches; they are told to end, and close their shards.
            )
        member.born = time.monotonic()

    def _environment(self, member: Member, threads: int) -> dict[str, str]:
        import torch

        own = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if gpus := torch.cuda.device_count():
            own["CUDA_VISIBLE_DEVICES"] = str(member.number % gpus)
        return os.environ | own


def count_of(settings: TextgenSettings) -> int:
    """Generators of this machine: as many as asked for, else one per GPU, else one for two cores."""
    import torch

    if settings.generators >= 0:
        return settings.generators
    return torch.cuda.device_count() or max(1, (os.cpu_count() or 1) // 2)


def _sum(one: Status, other: Status) -> Status:
    dropped = dict(one.dropped)
    for reason, count in other.dropped.items():
        dropped[reason] = dropped.get(reason, 0) + count
    return Status(
        one.documents + other.documents,
        one.tokens + other.tokens,
        one.shards + other.shards,
        dropped,
        one.ready_s + other.ready_s,
        one.busy_s + other.busy_s,
        one.waited_s + other.waited_s,
    )


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""
