"""The clean store: what is planted is found, what is kept fits, and a kill costs nothing."""

import json
import random

import pytest
from builders import context

from mmphi.errors import DataError, SettingsError, StoreError
from mmphi.pipeline.stage import Result
from mmphi.stages import STAGES, load_settings
from mmphi.stages.textgen import STAGE
from mmphi.textgen.corpus_store import CorpusManifest, CorpusStore, floors, stored
from mmphi.textgen.prompts import Prompts
from mmphi.textgen.quality import Quality
from mmphi.textgen.shards import Document
from mmphi.textgen.stop_criteria import CorpusStopCriteria, parse_corpus_stop

WORDS = """
river mountain letter window garden winter teacher kitchen station morning evening doctor village street
market bridge island engine forest picture story number question answer reason summer school office
valley harbor
""".split()  # noqa: SIM905  # A list of words is read better so.
FRENCH = "Le petit chat dort sur la chaise pendant que les enfants jouent dehors avec un ballon rouge. "


def prose(seed, sentences=12):
    """English of a kind, unlike that of any other seed."""
    draw = random.Random(seed)
    lines = []
    for _ in range(sentences):
        words = [draw.choice(("the", "that", "a", "of the", "with a", "and", draw.choice(WORDS))) for _ in range(4)]
        middle = [x for word in words for x in (word, draw.choice(WORDS) + draw.choice(("", "s", "like", "er")))]
        lines.append(
            " ".join([draw.choice(WORDS).capitalize(), *middle, str(draw.randint(2, 999)), draw.choice(WORDS)]) + "."
        )
    return " ".join(lines)


def document(number, text, **changes):
    given = {
        "prompt": "",
        "seed": 0,
        "generator": "writer",
        "digest": "d",
        "logprob": -30.0,
        "tokens": 20,
        "ended": True,
    }
    return Document(id=f"s/{number}", text=text, **(given | changes))


def store(folder, limit=10_000_000):
    return CorpusStore(folder, limit, Quality(20, 5000))


def nearly(text):
    """The same but for one word."""
    words = text.split()
    words[len(words) // 2] = "altogether"
    return " ".join(words)


def test_planted_copies_spam_binary_and_foreign_texts_are_all_found(tmp_path):
    """Through the stage, from a file of documents."""
    good = [prose(seed) for seed in range(40)]
    bad = {
        "copies": good[:5],
        "near": [nearly(text) for text in good[5:11]],
        "short": ["too short"] * 1,
        "binary": ["\x00\x01\x02\x03" * 100, "the \ufffd\ufffd and \ufffd" * 30],
        "foreign": [FRENCH * 6, FRENCH.upper() * 7],
        "spam": ["buy now and win! " * 60, "### $$$ 1234 !!! " * 60],
    }
    rows = [*good, *(text for texts in bad.values() for text in texts)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows) + "no json\n")
    settings = load_settings(
        "tiny", {"textgen.store_only": "true", "corpus.sources": f'["{path}"]', "store.min_words": "20"}
    )
    ctx = context(STAGE, tmp_path / "run", settings)
    STAGE.check(ctx.settings)
    figures = STAGE.run(ctx)
    kept = stored(tmp_path / "run/store/data")
    assert [each.text for each in kept] == good
    dropped = {row["reason"]: row["documents"] for row in ctx.tracker.tables["dropped"]}
    assert dropped.pop("the same text") == len(bad["copies"])
    assert dropped.pop("nearly the same text") == len(bad["near"])
    assert dropped.pop("not text") == len(bad["binary"])
    assert dropped.pop("a row that is no JSON") == 1
    assert dropped.pop("gopher_short_doc") == len(bad["short"])
    assert sum(dropped.values()) == len(bad["foreign"]) + len(bad["spam"])
    assert figures["textgen/documents"] == len(good)
    assert figures["textgen/dropped"] == len(rows) - len(good) + 1
    sheet = (tmp_path / "run/store/README.md").read_text()
    assert "40 of 59" in sheet
    assert "copy of texts.jsonl/0" in sheet


def test_the_digest_is_of_the_documents_whenever_they_were_written(tmp_path):
    digests = set()
    for folder, every in (("one", 100), ("two", 2)):
        kept = store(tmp_path / folder)
        for number in range(8):
            kept.offer([document(number, prose(number))], "s", number + 1)
            if number % every == 1:
                kept.commit()
        kept.commit()
        digests.add(kept.manifest.digest)
    assert len(digests) == 1
    other = store(tmp_path / "other")
    other.offer([document(number, prose(number)) for number in range(7)], "s", 7)
    other.commit()
    assert other.manifest.digest not in digests


def test_what_was_no_document_is_counted_once_however_often_its_source_is_read(tmp_path):
    kept = store(tmp_path)
    for _ in range(2):
        kept.unread("a", {"a row that is no JSON": 2})
        kept.commit()
        kept = store(tmp_path)
    kept.unread("a", {"a row that is no JSON": 3, "empty": 1})
    kept.unread("b", {"empty": 1})
    assert kept.manifest.dropped == {"a row that is no JSON": 3, "empty": 2}


def test_the_store_ends_at_its_size_and_says_so(tmp_path):
    kept = store(tmp_path, limit=6000)
    for number in range(60):
        kept.offer([document(number, prose(number))], "s", number + 1)
    kept.commit()
    assert kept.manifest.full
    assert 3000 < kept.manifest.bytes <= 6000
    assert sum(path.stat().st_size for path in tmp_path.glob("*.zst")) == kept.manifest.bytes
    texts = [each.text for each in stored(tmp_path)]
    assert texts == [prose(number) for number in range(len(texts))]
    assert CorpusStopCriteria().reached(kept.manifest, 0.0)


def test_a_killed_store_goes_on_from_its_ledger_and_has_the_same(tmp_path):
    straight, killed = store(tmp_path / "straight"), store(tmp_path / "killed")
    documents = [document(number, prose(number // 2)) for number in range(40)]
    for place in range(0, 40, 4):
        straight.offer(documents[place : place + 4], "s", place + 4)
    straight.commit()
    for place in range(0, 24, 4):
        killed.offer(documents[place : place + 4], "s", place + 4)
        if place == 12:
            killed.commit()
    (tmp_path / "killed/000001.jsonl.zst").write_bytes(b"what was being written")
    again = store(tmp_path / "killed")
    assert again.committed == {"s": 16}
    for place in range(again.committed["s"], 40, 4):
        again.offer(documents[place : place + 4], "s", place + 4)
    again.commit()
    assert [d.id for d in stored(tmp_path / "killed")] == [d.id for d in stored(tmp_path / "straight")]
    assert again.manifest.dropped == straight.manifest.dropped == {"the same text": 20}


def test_a_store_that_was_changed_is_refused(tmp_path):
    kept = store(tmp_path)
    kept.offer([document(0, prose(0))], "s", 1)
    kept.commit()
    (tmp_path / "000000.jsonl.zst").write_bytes(b"other")
    with pytest.raises(StoreError, match="was changed after it was written"):
        store(tmp_path)


def test_the_generators_loss_is_told_by_kind_and_only_where_it_is_one(tmp_path):
    kept = store(tmp_path)
    kept.offer([document(0, prose(0)), document(1, prose(1), prompt="Write.", logprob=-10.0)], "s", 2)
    kept.offer([document(2, prose(2), logprob=None)], "s", 3)
    kept.commit()
    assert floors(kept.manifest) == {"free": 1.5, "prompted": 0.5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("store", CorpusStopCriteria()),
        ("documents 1.5k, time 20m", CorpusStopCriteria(documents=1500, seconds=1200)),
        ("tokens 2M", CorpusStopCriteria(tokens=2e6)),
        ("90s", CorpusStopCriteria(seconds=90)),
    ],
)
def test_when_it_is_enough_can_be_said(text, expected):
    assert parse_corpus_stop(text) == expected
    assert not expected.reached(CorpusManifest(), 0.0)


@pytest.mark.parametrize("text", ["", "much", "tokens", "tokens 0", "documents -3", "1..5 m"])
def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(SettingsError, match=r"textgen\.stop"):
        parse_corpus_stop(text)


def test_nothing_worth_keeping_is_an_error_that_says_why(tmp_path):
    (tmp_path / "texts.txt").write_text("short")
    settings = load_settings("tiny", {"textgen.store_only": "true", "corpus.sources": f'["{tmp_path / "texts.txt"}"]'})
    with pytest.raises(DataError, match="gopher_short_doc"):
        STAGE.run(context(STAGE, tmp_path / "run", settings))


def test_no_source_is_refused_before_anything_is_done(tmp_path):
    with pytest.raises(SettingsError, match="name them"):
        STAGE.check(context(STAGE, tmp_path, load_settings("tiny", {"textgen.store_only": "true"})).settings)


def test_there_are_ten_thousand_prompts_and_no_two_are_the_same():
    prompts = Prompts("a")
    asked = [prompts[number] for number in range(len(prompts))]
    assert len(set(asked)) == len(asked) > 10_000
    assert [Prompts("a")[n] for n in range(5)] == asked[:5] != [Prompts("b")[n] for n in range(5)]


def test_a_language_model_is_trained_on_the_store(tmp_path):
    """``pretrain --source store``: the texts that were kept, and those alone, as tokens."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*map(prose, range(60)), "short", prose(0)]))
    changes = {
        "pretrain.source": "store",
        "textgen.store_only": "true",
        "corpus.sources": f'["{path}"]',
        "corpus.vocabulary": "300",
        "corpus.validation_share": "0.1",
        "store.min_words": "20",
    }
    settings = load_settings("tiny", changes)
    view = context(STAGE, tmp_path / "textgen", settings)
    STAGE.run(view)
    store_result = Result("textgen", "key", "run", tmp_path / "textgen")
    tokens = STAGES["tokens"]
    ctx = context(tokens, tmp_path / "tokens", settings, upstream={"textgen": store_result})
    tokens.check(ctx.settings)
    tokens.run(ctx)
    assert tokens.upstream(ctx.settings) == ("textgen",)
    assert STAGES["pretrain"].upstream(context(STAGES["pretrain"], tmp_path, settings).settings) == ("tokens",)
    (read,) = ctx.tracker.tables["texts_read"]
    assert (read["source"], read["documents"], read["skipped"]) == ("store", 60, 0)
