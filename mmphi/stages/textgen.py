"""Stage ``textgen``: generates text with many processes and keeps the best in a corpus store of limited size."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mmphi.config.corpus import CorpusSettings
from mmphi.config.declared_view import SettingsView
from mmphi.config.textgen import StoreSettings, TextgenSettings
from mmphi.errors import DataError, SettingsError
from mmphi.pipeline.stage import Context, Cost, Stage

if TYPE_CHECKING:
    from mmphi.textgen.corpus_store import CorpusManifest, CorpusStore
    from mmphi.textgen.generator_pool import GeneratorPool
    from mmphi.textgen.shard_reader import ShardReader

LOOK_S = 1.0
METRICS_S = 10.0
STORE, DATA = "store", "data"  # Layout that `datasets` expects: README.md next to a data folder.
SPOOL, FLEET = "spool", "generators"


def check(settings: SettingsView) -> None:
    """Check the stop criteria, and that generators, a spool or text sources are given."""
    from mmphi.textgen.stop_criteria import parse_corpus_stop

    chosen = settings(TextgenSettings)
    parse_corpus_stop(chosen.stop)
    if chosen.generators == 0 and not chosen.spool and not chosen.store_only:
        raise SettingsError("textgen.generators = 0, but no external spool is set", "give --spool URL")
    if chosen.store_only:
        from mmphi.data.text_sources import check_sources

        sources = settings(CorpusSettings).sources
        if not sources:
            raise SettingsError("--store_only needs existing texts", "name them: --corpus '[...]'")
        check_sources([source.path for source in sources])


def cost(settings: SettingsView) -> Cost:
    """Disk space of the store and the spool."""
    spool = 0 if settings(TextgenSettings).store_only else settings(TextgenSettings).spool_mb
    return Cost(int((settings(StoreSettings).megabytes + spool) * 1e6))


def run(ctx: Context) -> Mapping[str, float]:
    """Fill the store and write its datasheet."""
    store = store_of(ctx.settings(StoreSettings), ctx.folder / STORE / DATA)
    begun = time.monotonic()
    if ctx.settings(TextgenSettings).store_only:
        _from_texts(ctx, store)
    else:
        _from_generators(ctx, store)
    manifest = store.manifest
    if not manifest.documents:
        why = max(manifest.dropped, key=lambda reason: manifest.dropped[reason], default="nothing was written")
        raise DataError(f"no document passed the filters: {why}", "see store.min_words and store.language")
    return write_datasheet(ctx, manifest, time.monotonic() - begun)


def store_of(chosen: StoreSettings, folder: Path) -> CorpusStore:
    """Open the corpus store that the settings describe; existing documents are kept."""
    from mmphi.textgen.corpus_store import CorpusStore
    from mmphi.textgen.quality import Quality

    quality = Quality(chosen.min_words, chosen.max_words, chosen.language)
    return CorpusStore(folder, int(chosen.megabytes * 1e6), quality, chosen.language)


def _from_texts(ctx: Context, store: CorpusStore) -> None:
    """Fill the store from files and datasets, in document order."""
    from tqdm.auto import tqdm

    from mmphi.data.text_sources import TextReport
    from mmphi.textgen.imported_texts import documents_of

    for source in ctx.settings(CorpusSettings).sources:
        report = TextReport()
        done = store.manifest.position.get(source.title, 0)
        with tqdm(desc=f"store: {source.title}", unit="doc", initial=done) as bar:
            for number, document in enumerate(documents_of(source, report)):
                if number < done:
                    continue
                store.offer([document], source.title, number + 1)
                bar.update()
                if store.manifest.full:
                    break
        for line in report.lines():
            ctx.tracker.say(f"{source.title}: {line}")
        store.unread(source.title, report.skipped)
        store.commit()


def _from_generators(ctx: Context, store: CorpusStore) -> None:
    """Fill the store from the spool while generators write to it."""
    from mmphi.textgen.generator_pool import GeneratorPool, backend_of
    from mmphi.textgen.live_table import LiveTable
    from mmphi.textgen.shard_queue import ShardQueue
    from mmphi.textgen.shard_reader import ShardReader
    from mmphi.textgen.stop_criteria import parse_corpus_stop

    chosen = ctx.settings(TextgenSettings)
    backend = backend_of(chosen, ctx.tracker.say)
    ctx.tracker.tags({"mmphi.backend": backend})
    url = chosen.spool or str(ctx.folder / SPOOL)
    reader = ShardReader(ShardQueue(url, say=ctx.tracker.say), store.committed, ctx.tracker.say)
    enough = parse_corpus_stop(chosen.stop)
    with GeneratorPool(chosen, url, ctx.folder / FLEET, backend, ctx.tracker.say) as pool:
        begun = noted = time.monotonic()
        with LiveTable(pool.rows, lambda: _below(reader, store.manifest, int(chosen.spool_mb * 1e6))) as table:
            while not enough.reached(store.manifest, time.monotonic() - begun):
                pool.watch()
                taken = False
                for name, documents in reader.everything():
                    store.offer(documents, name.stream, name.number + 1)
                    taken = True
                    if enough.reached(store.manifest, time.monotonic() - begun):
                        break
                reader.let_go_before(store.committed)
                table.show()
                if time.monotonic() - noted > METRICS_S:
                    noted = time.monotonic()
                    ctx.tracker.metrics(_metrics(pool, store.manifest), step=int(noted - begun))
                if not taken:
                    time.sleep(LOOK_S)
    if not enough.reached(store.manifest, seconds=0.0):  # After a time limit, shards closed on exit are read too.
        for name, documents in reader.everything():
            store.offer(documents, name.stream, name.number + 1)
            if enough.reached(store.manifest, seconds=0.0):
                break
    store.commit()
    reader.let_go_before(store.committed)
    for own in (SPOOL, FLEET):  # Their documents are in the store or were dropped.
        shutil.rmtree(ctx.folder / own, ignore_errors=True)
    ctx.tracker.table("generators", pool.rows())
    ctx.tracker.metrics({"textgen/broken_shards": reader.broken})


def _metrics(pool: GeneratorPool, manifest: CorpusManifest) -> dict[str, float]:
    rows = pool.rows()
    return {
        "textgen/documents": sum(row["documents"] for row in rows),
        "textgen/tokens": sum(row["tokens"] for row in rows),
        "textgen/tokens_per_s": sum(row["tokens/s"] for row in rows),
        "textgen/kept": manifest.documents,
        "textgen/store_mb": manifest.bytes / 1e6,
    }


def _below(reader: ShardReader, manifest: CorpusManifest, limit: int) -> str:
    """One-line summary of spool, store and dropped documents."""
    dropped = ", ".join(
        f"{reason} {count:,}" for reason, count in sorted(manifest.dropped.items(), key=lambda i: -i[1])
    )
    waits = reader.spool.size()
    return (
        f"spool {waits / 1e6:.2f} of {limit / 1e6:.0f} MB; store {manifest.documents:,} documents in"
        f" {manifest.bytes / 1e6:.2f} MB; dropped: {dropped or 'nothing'}"
    )


def write_datasheet(ctx: Context, manifest: CorpusManifest, seconds: float) -> dict[str, float]:
    """Write the datasheet of a store, record it, and return the store's metrics.

    Args:
        ctx: Context of the stage.
        manifest: Manifest of the store.
        seconds: Duration of filling the store.
    """
    from mmphi.textgen.corpus_store import floors
    from mmphi.textgen.datasheet import datasheet

    chosen = ctx.settings(TextgenSettings)
    sections = {"textgen": chosen.model_dump(), "store": ctx.settings(StoreSettings).model_dump()}
    settings = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    sheet = datasheet(manifest, settings, run_id=ctx.tracker.run_id, when=when)
    (ctx.folder / STORE / "README.md").write_text(sheet)
    ctx.tracker.text("datasheet.md", sheet)
    ctx.tracker.tags({"mmphi.store": manifest.digest})
    rows = [
        {"reason": reason, "documents": count, **(manifest.examples.get(reason) or [{}])[0]}
        for reason, count in sorted(manifest.dropped.items(), key=lambda item: -item[1])
    ]
    if rows:
        ctx.tracker.table("dropped", rows)
    figures = {
        "textgen/documents": float(manifest.documents),
        "textgen/dropped": float(sum(manifest.dropped.values())),
        "textgen/tokens": float(manifest.tokens),
        "textgen/store_mb": manifest.bytes / 1e6,
        "textgen/seconds": seconds,
    }
    for kind, loss in floors(manifest).items():
        figures[f"textgen/floor_{kind}"] = loss
    if not manifest.scored and not chosen.store_only:
        ctx.tracker.say(
            f"no loss floor: with temperature {chosen.temperature:g}, top-p {chosen.top_p:g}, top-k {chosen.top_k}, the"
            " text is not sampled from the generator's own distribution"
        )
    return figures


STAGE = Stage(
    name="textgen",
    version=1,
    help="generate text with a language model in many processes, and keep the best of it",
    reads=("textgen", "store", "corpus.sources"),
    run=run,
    check=check,
    cost=cost,
)
