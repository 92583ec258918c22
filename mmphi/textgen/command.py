"""``mmphi generators``: generators without a reader, which fill a shard queue from any number of machines."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

from mmphi.config.textgen import TextgenSettings
from mmphi.errors import SettingsError

USAGE = """usage: mmphi generators --spool URL [--model NAME] [--generators N] [--stop 'time 2h'] [--KEY VALUE ...]

Generate text into a shard queue (spool) until Ctrl-C, SIGTERM or the condition of --stop. The reader runs elsewhere:
  mmphi textgen --spool URL --generators 0                fills a store from it
  mmphi pretrain --source stream --textgen.spool URL --textgen.generators 0 ...   trains on it
With --ray HOST:PORT the generators run in that cluster and send their shards to this machine.
Settings are those of `mmphi textgen --help`. Any number of machines may write into one spool.
"""
LOOK_S = 1.0


def run_generators(settings: TextgenSettings) -> int:
    """Run generators until a signal or the stop criteria end them; open shards are then written.

    Raises:
        SettingsError: If no shard queue is given, or ``generators`` is 0.
    """
    from mmphi.textgen.corpus_store import CorpusManifest
    from mmphi.textgen.generator_pool import GeneratorPool, backend_of
    from mmphi.textgen.live_table import LiveTable
    from mmphi.textgen.shard_queue import ShardQueue
    from mmphi.textgen.stop_criteria import parse_corpus_stop

    if not settings.spool:
        raise SettingsError(
            "mmphi generators need a spool, which a reader empties", "give --spool FOLDER, or the URL of a bucket"
        )
    if settings.generators == 0:
        raise SettingsError("--generators 0 writes nothing", "give a positive number, or leave it out")
    enough = parse_corpus_stop(settings.stop)
    backend = backend_of(settings)
    signalled = threading.Event()

    def end(_: int, __: FrameType | None) -> None:
        signalled.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    spool = ShardQueue(settings.spool)
    try:
        with tempfile.TemporaryDirectory(prefix="mmphi-generators-") as folder:
            pool = GeneratorPool(settings, settings.spool, Path(folder), backend)
            limit = settings.spool_mb
            with pool, LiveTable(pool.rows, lambda: f"spool {spool.size() / 1e6:.2f} of {limit:.0f} MB") as table:
                begun = time.monotonic()
                while not signalled.wait(LOOK_S):
                    pool.watch()
                    table.show()
                    rows = pool.rows()
                    written = CorpusManifest(
                        documents=sum(r["documents"] for r in rows), tokens=sum(r["tokens"] for r in rows)
                    )
                    if enough.reached(written, time.monotonic() - begun):
                        break
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0
