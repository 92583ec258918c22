"""The report of pretrainings, from runs written straight into a store."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import pytest
from mlflow.entities import Metric, Param, RunTag
from test_scaling import curve

from mmphi.cli import main
from mmphi.errors import DataError, SettingsError
from mmphi.tracking.run_writer import TrackingStore
from reports import references
from reports.commands import report
from reports.extrapolation_text import ReferenceDistance
from reports.pretraining import pretraining_report
from reports.pretraining_query import load_pretrainings
from reports.references import original_run, phi2_budget, prices, reference_of
from reports.scaling import Outlook

PARAMS = {
    "pretrain.size": "10M",
    "pretrain.batch_tokens": "8192",
    "pretrain.context": "512",
    "pretrain.lr_scheduler": "constant",
    "pretrain.warmup_ratio": "0.02",
    "pretrain.decay": "0.2",
    "pretrain.stop": "tokens 3M",
    "pretrain.eval_text": "/somewhere/wikitext2-raw-test.txt",
    "corpus.sources.0.path": "/somewhere/book.txt",
    "corpus.sources.1.path": "/somewhere/b/",
}


EARLIER = {"pretrain.lr_scheduler": "pretrain.schedule", "pretrain.warmup_ratio": "pretrain.warmup"}


def run(
    name: str, status: str = "FINISHED", steps: int = 400, public: float = 4.3, earlier: bool = False, **metrics: float
) -> str:
    """A pretraining of a planted law."""
    store, made = TrackingStore(), curve("constant", steps=steps)
    tags = {"mmphi.stage": "pretrain", "mmphi.key": name, "mmphi.git_commit": "c0ffee", "mmphi.cpu": "a | cpu"}
    tracker = store.begin(name, {**tags, "mmphi.preset": "text"})
    values = {
        "pretrain/initial_loss": 10.8,
        "pretrain/tokens": steps * 8192.0,
        "pretrain/seconds": 1200.0,
        "pretrain/parameters": 10_097_280.0,
        "pretrain/schedule_steps": steps,
        "pretrain/flops_per_token": 6e7,
        "pretrain/corpus_tokens": 3e6,
        "train/mfu": 0.61,
        "val/loss": 4.1,
        "val/bits_per_byte": 1.4,
        "public/bits_per_byte": 1.5,
        "reached/initial-1/tokens": 8192.0 * 9,
        "reached/initial-1/seconds": 40.0,
        "reached/initial-1/steps": 9.0,
        **metrics,
    }
    if public:
        values["public/loss"] = public
    points = [Metric("train/step_loss", loss, 1, step) for step, loss in zip(made.steps, made.losses, strict=True)]
    points += [Metric(name, value, 2, steps) for name, value in values.items()]
    for first in range(0, len(points), 500):
        store.client.log_batch(tracker.run_id, metrics=points[first : first + 500])
    params = [Param(EARLIER.get(name, name) if earlier else name, value) for name, value in PARAMS.items()]
    store.client.log_batch(tracker.run_id, params=params, tags=[RunTag("mmphi.peak", "2 threads")])
    tracker.table(
        "samples",
        [{"step": 10, "prompt": "The", "text": "The old"}, {"step": steps, "prompt": "The", "text": "The\nnew"}],
    )
    if status == "FINISHED":
        store.client.set_terminated(tracker.run_id, status)
    return tracker.run_id


def test_verdict_first_then_what_it_stands_on(empty_store, tmp_path, capsys):
    run_id = run("mine")
    assert report(["pretraining", "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    first = text.split("\n\n")[1]
    assert first.startswith(
        f"**The 10M Phi of run {run_id[:6]} reached 4.300 nats/token on WikiText-2 (raw, test split);"
        " microsoft/phi-2 has 2.273.**"
    )
    assert "`initial - 1` (10.800 - 1) after 73,728 tokens, 40.0 s and 9 updates" in first
    assert "How much more: no extrapolation:" in first
    assert capsys.readouterr().out.startswith(f"The 10M Phi of run {run_id[:6]} reached 4.300")
    assert "https://github.com/casper-hansen/AutoAWQ/pull/496" in text
    assert "**Not quite the same protocol**" in text
    assert "Phi-2 was trained on 1.4e+12 tokens with 2.33e+22 FLOPs" in text
    assert "The\nnew" not in text
    assert "*The*: The new" in text  # The last, not the first.
    assert "a \\| cpu" in text
    assert f"mmphi report pretraining --runs {run_id[:12]}" in text
    assert "mmphi pretrain --preset text --corpus '[book.txt, b]' --size '10M' --stop 'tokens 3M'" in text
    with (tmp_path / "out" / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 130  # Each of the first 100 updates, then means of ten.
    assert rows[3]["tokens"] == str(4 * 8192)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert ".png" not in page
    logged = {f.path for f in TrackingStore().client.list_artifacts(run_id, "report")}
    assert {"report/report.md", "report/report.html", "report/curves.png"} <= logged


@pytest.mark.slow
def test_the_same_store_gives_the_same_bytes(empty_store, tmp_path):
    run("mine")
    made = [pretraining_report(load_pretrainings(TrackingStore()), reference_of()).files() for _ in range(2)]
    assert made[0] == made[1]


@pytest.mark.slow
def test_generated_text_stands_apart_with_its_floor(empty_store):
    stream = {"stream/tokens": 5e5, "stream/times_seen": 2.5, "stream/trainer_busy": 0.8, "stream/generators_busy": 0.9}
    run("files")
    run("stream", **stream, **{"floor/loss": 3.25})
    run("cut", **stream)
    document = pretraining_report(load_pretrainings(TrackingStore(), ["all"]), reference_of())
    text = document.files()["report.md"].decode()
    lines = [line for line in text.splitlines() if "that it did not see" in line]
    assert len(lines) == 2
    (floor,) = [line for line in lines if "3.250" in line]
    assert "4.100 nats per token" in floor
    assert "0.850 less" in floor
    assert "seen 2.50 times" in floor
    (other,) = [line for line in lines if line != floor]
    assert "is unknown" in other


@pytest.mark.slow
def test_the_command_says_who_wrote(empty_store):
    made = run("stream")
    TrackingStore().client.log_param(made, "pretrain.source", "stream")
    TrackingStore().client.log_param(made, "textgen.model", "/somewhere/writer")
    text = pretraining_report(load_pretrainings(TrackingStore()), reference_of()).files()["report.md"].decode()
    assert "mmphi pretrain --preset text --source stream --textgen.model writer --size '10M'" in text


@pytest.mark.slow
def test_without_generated_text_nothing_is_said_of_it(empty_store):
    run("files")
    assert (
        "per token on generated text"
        not in pretraining_report(load_pretrainings(TrackingStore()), reference_of()).files()["report.md"].decode()
    )


@pytest.mark.slow
def test_an_answer_comes_with_time_and_money(empty_store):
    run("mine", public=0.0)
    (found,) = load_pretrainings(TrackingStore())
    distance = ReferenceDistance(found, reference_of(), Outlook.of(found.curve()))
    object.__setattr__(distance, "targets", lambda: {"near": 3.9, "the reference": 2.273})
    row, beyond = distance.table().rows
    assert beyond[1].startswith("is not known")
    tokens = float(row[1].split(" ")[0].replace(",", ""))
    hours = float(row[2].split(" ")[0].replace(",", ""))
    assert hours == pytest.approx(tokens / (400 * 8192 / 1200) / 3600, rel=0.02)
    price = prices()["accelerators"]["H100"]
    seconds = tokens * 6e7 / (price["bf16_tflops"] * 1e12 * 0.4)
    dollars = float(row[4].split("H100: ")[1].split(" ")[0])
    assert dollars == pytest.approx(seconds / 3600 * price["dollars_per_hour"], rel=0.02)
    assert "was not scored on" in distance.verdict()


@pytest.mark.slow
def test_another_text_is_not_taken_for_the_references(empty_store, monkeypatch):
    monkeypatch.setitem(PARAMS, "pretrain.eval_text", "/somewhere/lambada.txt")
    run("mine", public=1.0)
    found = load_pretrainings(TrackingStore())
    distance = ReferenceDistance(found[0], reference_of(), Outlook.of(found[0].curve()))
    assert not distance.comparable
    assert "was not scored on WikiText-2" in distance.verdict()
    assert "none." not in distance.more()
    assert "No run was scored on WikiText-2" in pretraining_report(found, reference_of()).markdown()


@pytest.mark.slow
def test_what_was_reached_is_not_foretold(empty_store):
    run("mine", public=2.1)
    (found,) = load_pretrainings(TrackingStore())
    distance = ReferenceDistance(found, reference_of(), Outlook.of(found.curve()))
    assert distance.more() == "none."
    assert [row[1] for row in distance.table().rows] == ["reached", "reached"]


@pytest.mark.slow
def test_any_set_of_runs(empty_store, tmp_path):
    one, two = run("one"), run("two", public=4.0)
    run("three", status="RUNNING")
    assert [r.run_id for r in load_pretrainings(TrackingStore())] == [two]
    assert {r.run_id for r in load_pretrainings(TrackingStore(), ["all"])} == {one, two}
    assert [r.run_id for r in load_pretrainings(TrackingStore(), [two[:8], one])] == [two, one]
    assert report(["pretraining", "--runs", f"{one},{two}", "--out", str(tmp_path), "--no-log"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert f"- **The 10M Phi of run {two[:6]} reached 4.000" in text
    assert f"### the 10M Phi of run {one[:6]}" in text


def test_what_is_not_there(empty_store, capsys):
    with pytest.raises(SettingsError, match="no pretraining on a corpus"):
        load_pretrainings(TrackingStore())
    run("three", status="RUNNING")
    with pytest.raises(SettingsError, match="no pretraining has finished"):
        load_pretrainings(TrackingStore())
    with pytest.raises(SettingsError, match="0 pretrainings"):
        load_pretrainings(TrackingStore(), ["nowhere"])
    assert main(["report", "ablation"]) == 2
    assert "--study NAME" in capsys.readouterr().err


def test_references_have_their_sources(tmp_path):
    phi2 = reference_of()
    assert phi2.loss == pytest.approx(math.log(9.705), abs=1e-3)
    assert phi2.source.startswith("https://")
    assert phi2_budget()["flops"] == pytest.approx(6 * phi2_budget()["parameters"] * phi2_budget()["tokens"], rel=0.01)
    assert prices()["source"]
    assert len(original_run()) == 31
    with pytest.raises(DataError, match="no reference loss of x"):
        reference_of("x")
    (tmp_path / "losses.yaml").write_text("- model: x")
    with pytest.raises(DataError, match="cannot be read"):
        references.references(tmp_path)


def test_a_model_is_measured_and_found(tmp_path, monkeypatch, capsys):
    """`mmphi reference` on a model of one's own: the same loss as its protocol says, kept with all that repeats it."""
    from builders import byte_tokenizer, tiny_language

    from mmphi.config import LanguageSettings
    from mmphi.evaluation.perplexity import PerplexityProtocol, text_loss
    from mmphi.models.device import this_device
    from mmphi.models.language.language_model import load_language_model

    folder = tmp_path / "mine"
    tiny_language().model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 40)
    out = tmp_path / "reference" / "measured"
    words = ["--lm", str(folder), "--text", str(text), "--window", "32", "--stride", "16", "--out", str(out)]
    assert main(["reference", *words]) == 0
    assert "nats/token" in capsys.readouterr().out
    (file,) = out.glob("*.json")
    found = json.loads(file.read_text())
    language = load_language_model(LanguageSettings(model=str(folder)), None, this_device())
    wanted = text_loss(language.model, language.tokenizer, text.read_text(), PerplexityProtocol(32, 16))
    assert found["loss_nats_per_token"] == pytest.approx(wanted.loss)
    assert str(tmp_path) not in file.read_text()
    (tmp_path / "reference" / "losses.yaml").write_text("[]")
    assert reference_of("mine", "text.txt", tmp_path / "reference").measured
    assert main(["reference", "--lm", str(folder), "--text", str(tmp_path / "gone.txt")]) == 2
    assert main(["reference", *words[:4], "--window", "1"]) == 2


def test_a_run_that_points_at_an_earlier_one_is_that_one(empty_store):
    """As the second `mlflow run -e pretrain` leaves it: without parameters of its own."""
    first = run("mine")
    tags = {"mmphi.stage": "pretrain", "mmphi.reuses": first, "mmphi.preset": "text"}
    tracker = TrackingStore().begin("pretrain text (reused)", tags)
    tracker.metrics({"pretrain/initial_loss": 10.8, "val/loss": 4.1})
    tracker.flush()
    TrackingStore().client.set_terminated(tracker.run_id, "FINISHED")
    for chosen in ((), ("all",), (tracker.run_id[:8],), (first, tracker.run_id)):
        assert [found.run_id for found in load_pretrainings(TrackingStore(), chosen)] == [first]
    assert pretraining_report(load_pretrainings(TrackingStore()), reference_of()).files()


@pytest.mark.parametrize(
    ("path", "same"),
    [
        ("/somewhere/wikitext2-raw-test.txt", True),
        ("/data/wikitext-2-raw/wiki.test.raw", True),
        ("/data/wikitext-2-raw/wiki.train.raw", False),
        ("/somewhere/wikitext2-raw-train.txt", False),
        ("/somewhere/wikitext2.txt", False),  # Of which split?
        ("/tests/lambada.txt", False),
        ("", False),
    ],
)
def test_only_the_same_split_is_compared(empty_store, monkeypatch, path, same):
    monkeypatch.setitem(PARAMS, "pretrain.eval_text", path)
    run("mine")
    (found,) = load_pretrainings(TrackingStore())
    assert found.scored_on("WikiText-2 (raw, test split)") is same


def test_what_a_model_wrote_is_shown_as_text(empty_store):
    run_id = run("mine")
    samples = [{"step": 400, "prompt": "<b>", "text": "<script>alert(1)</script> ![x](http://x/y.png) | *a*"}]
    (found,) = load_pretrainings(TrackingStore(), [run_id])
    document = pretraining_report([replace(found, samples=samples)], reference_of())
    page = document.page()
    assert "<script>" not in page
    assert "http://x/y.png&quot;" not in page
    assert '<img src="http' not in page
    assert "<em>&lt;b&gt;</em>: &lt;script&gt;alert(1)&lt;/script&gt; ![x](http://x/y.png) | *a*" in page


def test_a_run_of_an_earlier_version_has_its_schedule(empty_store: str) -> None:
    (one,) = load_pretrainings(TrackingStore(), [run("now")])
    (two,) = load_pretrainings(TrackingStore(), [run("earlier", earlier=True)])
    assert one.schedule == two.schedule
    assert one.params == two.params
