"""Stage ``tokens``: tokenises a corpus into memory-mapped shards, once for all trainings."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.config.corpus import CorpusSettings, TextSourceSettings
from mmphi.config.declared_view import SettingsView
from mmphi.config.pretrain import PretrainSettings
from mmphi.errors import DataError, SettingsError
from mmphi.pipeline.stage import Context, Cost, Stage

if TYPE_CHECKING:
    from mmphi.data.text_sources import TextPiece, TextReport

READ = ("path", "name", "kind", "column", "separator", "encoding", "split", "revision")
TOKENIZER = "tokenizer"
BPE_CHARACTERS = 20_000_000  # At most this many characters are used to train a BPE tokenizer.


def check(settings: SettingsView) -> None:
    """Check that text sources exist and that each path is unambiguously a file, a folder or a dataset name."""
    from mmphi.data.text_sources import check_sources

    sources = settings(CorpusSettings).sources
    if settings(PretrainSettings).source == "store":
        return
    if not sources:
        raise SettingsError("no text sources are set", "set them: --corpus.sources '[book.txt, folder/]'")
    for source in sources:
        if "/" not in source.path and "." not in source.path and Path(source.path).exists():
            raise SettingsError(f"{source.path} may be a folder or a dataset name", f"write ./{source.path}")
    check_sources([source.path for source in sources])


def upstream(settings: SettingsView) -> tuple[str, ...]:
    """``textgen`` if the model is trained on the store of generated text."""
    return ("textgen",) if settings(PretrainSettings).source == "store" else ()


def sources_of(ctx: Context) -> list[TextSourceSettings]:
    """Text sources: the store of generated text if ``textgen`` is upstream, else ``corpus.sources``."""
    if "textgen" in ctx.upstream:
        return [
            TextSourceSettings(path=str(ctx.upstream["textgen"].path / "store" / "data"), kind="jsonl", name="store")
        ]
    return ctx.settings(CorpusSettings).sources


def cost(settings: SettingsView) -> Cost:
    """Disk space of the shards: two bytes per token, and one token per four bytes of text."""
    paths = [Path(source.path) for source in settings(CorpusSettings).sources]
    files = (f for p in paths if p.exists() for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file())
    return Cost(sum(f.stat().st_size for f in files) * 2 // 4)


def run(ctx: Context) -> Mapping[str, float]:
    """Tokenise all texts; existing intact shards are kept."""
    from tqdm.auto import tqdm

    from mmphi.data.text_sources import TextReport
    from mmphi.data.token_shards import INDEX, ShardTokenizer

    chosen = ctx.settings(CorpusSettings)
    tokenizer, sources = tokenizer_of(ctx, chosen), sources_of(ctx)
    reports = {_title(source): TextReport() for source in sources}
    readers = {_title(s): reader(s, reports[_title(s)]) for s in sources}
    with tqdm(desc="tokens", unit="tok", unit_scale=True) as bar:
        writing = ShardTokenizer(
            ctx.folder,
            readers,
            tokenizer,
            is_held_out=partial(is_validation, chosen.split_seed, chosen.validation_share),
            say=ctx.tracker.say,
            progress=bar.update,
        )
        shards = writing()
    counts = {name: [sum(s.counts[name][i] for s in shards) for i in (0, 1)] for name in readers}
    sizes = {name: sum(s.bytes[name] for s in shards) for name in readers}
    ctx.tracker.table("texts_read", [_row(n, reports[n], counts[n], sizes[n]) for n in readers])
    for name, report in reports.items():
        for line in report.lines():
            ctx.tracker.say(f"{name}: {line}")
    empty = next((name for name, (train, _) in counts.items() if not train), None)
    if empty is not None:
        raise DataError(f"{empty} has no text to train on", "see the run's table texts_read, or remove the source")
    if not any(held for _, held in counts.values()):
        raise DataError("no text was held out for validation", "add text, or raise corpus.validation_share")
    index = {
        "vocabulary": _rows_of(tokenizer),
        "end": tokenizer.eos_token_id,
        "sources": {name: {"train": c[0], "validation": c[1], "bytes": sizes[name]} for name, c in counts.items()},
        "shards": [shard.name for shard in shards],
    }
    (ctx.folder / INDEX).write_text(json.dumps(index, indent=1))
    total, skipped = sum(map(sum, counts.values())), sum(r.skipped.total() for r in reports.values())
    bytes_per_token = sum(sizes.values()) / total
    return {"tokens/tokens": total, "tokens/bytes_per_token": bytes_per_token, "tokens/skipped": skipped}


def _title(source: TextSourceSettings) -> str:
    return source.name or source.path.rstrip("/").rpartition("/")[2]


def _row(name: str, report: TextReport, counts: list[int], size: int) -> dict[str, Any]:
    reasons = "; ".join(report.lines())
    figures = {"documents": report.documents, "bytes": size, "train tokens": counts[0], "validation tokens": counts[1]}
    return {"source": name, **figures, "skipped": report.skipped.total(), "why": reasons}


def _rows_of(tokenizer: Any) -> int:
    from mmphi.models.language.phi import PHI2_VOCABULARY

    return PHI2_VOCABULARY if len(tokenizer) > PHI2_VOCABULARY - 2048 else len(tokenizer)


def is_validation(seed: int, share: float, source: int, piece: int, place: int) -> bool:
    """Whether a token block is held out for validation.

    The decision depends only on the block's position in the corpus, so rebuilt shards are identical.
    """
    digest = hashlib.blake2b(f"{seed}/{source}/{piece}/{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def reader(source: TextSourceSettings, report: TextReport) -> Callable[[], Iterable[TextPiece]]:
    """Returns a function that reads a source from the start; each call resets ``report``."""
    from mmphi.data.text_sources import TextReport, read_texts

    def read() -> Iterable[TextPiece]:
        report.__dict__.update(TextReport().__dict__)
        options = {name: getattr(source, name) for name in READ if name not in ("path", "name")}
        return read_texts(source.path, report, **options)

    return read


def tokenizer_of(ctx: Context, chosen: CorpusSettings) -> Any:
    """Phi-2's tokenizer, or a BPE trained on the corpus if ``corpus.vocabulary`` is set; saved next to the shards."""
    from transformers import AutoTokenizer

    from mmphi.data.text_sources import TextReport
    from mmphi.text.tokenizer import phi2_tokenizer, train_bpe

    folder, proof = ctx.folder / TOKENIZER, ctx.folder / f"{TOKENIZER}.sha256"
    if folder.exists() and proof.exists() and proof.read_text() == _digest(folder):
        return AutoTokenizer.from_pretrained(folder)
    shutil.rmtree(folder, ignore_errors=True)
    if chosen.vocabulary:
        tokenizer = train_bpe(_sample([reader(s, TextReport()) for s in sources_of(ctx)]), chosen.vocabulary)
    else:
        tokenizer = phi2_tokenizer()
    part = ctx.folder / f".{TOKENIZER}"
    tokenizer.save_pretrained(part)
    part.rename(folder)
    proof.write_text(_digest(folder))
    return tokenizer


def _digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.iterdir()))).hexdigest()


def _sample(readers: list[Callable[[], Iterable[TextPiece]]]) -> Iterable[str]:
    """Yield text from the start of each source, ``BPE_CHARACTERS`` in total."""
    for read in readers:
        left = BPE_CHARACTERS // len(readers)
        for piece in read():
            yield piece.text
            left -= len(piece.text)
            if left <= 0:
                break


STAGE = Stage(
    name="tokens",
    version=1,
    help="tokenise a corpus once, into memory-mapped shards",
    reads=(
        *(f"corpus.sources.N.{name}" for name in READ),
        "corpus.vocabulary",
        "corpus.validation_share",
        "corpus.split_seed",
        "pretrain.source",
    ),
    run=run,
    upstream=upstream,
    verifies=True,
    check=check,
    cost=cost,
)
