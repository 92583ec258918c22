from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path

import pytest
import toys

from mmphi.config.fields import all_fields, leaves
from mmphi.config.presets import files_of_settings
from mmphi.data.content_hash import Digests
from mmphi.errors import SettingsError
from mmphi.pipeline import resolve
from mmphi.pipeline.build import Pipeline
from mmphi.pipeline.cache_key import difference, key_parts
from mmphi.pipeline.resolve import hub_revision
from mmphi.pipeline.stage import Stage
from mmphi.stages import STAGES, Settings, load_settings


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Pipeline(toys.TOYS)


def key(pipeline: Pipeline, name: str, **overrides: str) -> str:
    return pipeline.key(name, load_settings("tiny", {k.replace("__", "."): v for k, v in overrides.items()}))


@pytest.mark.parametrize(
    ("name", "overrides", "changes"),
    [
        ("train", {"projector.layers": "3"}, True),
        ("train", {"projector.log_every": "7"}, False),
        ("train", {"name": "other"}, False),
        ("train", {"projector.seed": "1"}, True),
        ("train", {"pretrain.layers": "1"}, False),
        ("train", {"scenes.image_size": "64"}, True),  # By way of what it is built on.
        ("draw", {"projector.layers": "3"}, False),
        ("draw", {"scenes.image_size": "64"}, True),
    ],
)
def test_key_changes_with_what_matters_alone(
    pipeline: Pipeline, name: str, overrides: dict[str, str], changes: bool
) -> None:
    before = pipeline.key(name, load_settings("tiny"))
    assert (pipeline.key(name, load_settings("tiny", overrides)) != before) == changes


def test_key_changes_with_the_version(pipeline: Pipeline) -> None:
    newer = {**toys.TOYS, "draw": dataclasses.replace(toys.TOYS["draw"], version=2)}
    settings = load_settings("tiny")
    assert Pipeline(newer).key("train", settings) != pipeline.key("train", settings)


def test_key_goes_by_content_and_not_by_place(tmp_path: Path, pipeline: Pipeline) -> None:
    here, there, other = (tmp_path / name for name in ("a.txt", "b.txt", "c.txt"))
    here.write_text("one"), there.write_text("one"), other.write_text("two")
    keys = [key(pipeline, "read", corpus__sources=f"[{path}]") for path in (here, there, other)]
    assert keys[0] == keys[1] != keys[2]


def test_missing_file_is_told_with_its_key_and_the_nearest(tmp_path: Path, pipeline: Pipeline) -> None:
    (tmp_path / "corpus.txt").write_text("one")
    with pytest.raises(SettingsError) as error:
        key(pipeline, "read", corpus__sources=f"[{tmp_path / 'korpus.txt'}]")
    assert "corpus.sources.0.path" in error.value.what
    assert str(tmp_path / "corpus.txt") in error.value.hint


def test_digest_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a").write_text("a")
    digests = Digests(tmp_path / "memory.sqlite")
    before = digests.of(folder)
    (folder / "inner" / "a").rename(folder / "inner" / "b")
    renamed = digests.of(folder)
    (folder / "inner" / "b").write_text("c")
    assert len({before, renamed, digests.of(folder)}) == 3


def test_digest_is_remembered_while_the_file_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, memory = tmp_path / "file", tmp_path / "memory.sqlite"
    path.write_text("one")
    long_ago = time.time() - 100
    os.utime(path, (long_ago, long_ago))
    first = Digests(memory).of(path)
    with monkeypatch.context() as patched:
        patched.setattr("mmphi.data.content_hash.file_digest", lambda _: pytest.fail("was read again"))
        assert Digests(memory).of(path) == first
    path.write_text("two")
    assert Digests(memory).of(path) != first


def test_digest_of_a_fresh_file_is_not_trusted(tmp_path: Path) -> None:
    path, memory = tmp_path / "file", tmp_path / "memory.sqlite"
    path.write_text("one")
    stat = path.stat()
    first = Digests(memory).of(path)
    path.write_text("two")
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))  # Written within the same tick of the clock.
    assert Digests(memory).of(path) != first


def test_spoilt_memory_of_digests_is_only_slower(tmp_path: Path) -> None:
    path, memory = tmp_path / "file", tmp_path / "memory.sqlite"
    path.write_text("one")
    expected = Digests(memory).of(path)
    memory.write_text("{half")
    assert Digests(memory).of(path) == expected


def test_difference_names_what_changed() -> None:
    tiny = load_settings("tiny")
    assert difference({"a": 1, "b": 2}, {"a": 1, "b": 3}, tiny) == "b is 2, was 3"
    assert difference({"a": 1}, {"a": 1}, tiny) == ""
    assert difference(dict.fromkeys("abcde", 1), {}, tiny).endswith("and 3 more")
    # What is left out of a key has the value it was introduced with.
    assert difference({"projector.layers": 3}, {}, tiny) == "projector.layers is 3, was 2"


def read_vision(ctx):
    return {}


def test_setting_with_the_value_it_was_introduced_with_changes_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Today's default may be another: what counts is what earlier results were built with."""
    settings = load_settings("tiny")
    stage = Stage("see", 1, "see", ("vision",), read_vision)
    before = key_parts(stage, settings, {}, {})
    assert not any(name.startswith("vision") for name in before)
    changed = load_settings("tiny", {"vision.pool": "2"})
    assert key_parts(stage, changed, {}, {})["vision.pool"] == 2
    fields = dict(all_fields(Settings))
    fields["vision.pool"] = dataclasses.replace(
        fields["vision.pool"], legacy_default=2
    )  # As if 1 were a later default.
    monkeypatch.setattr("mmphi.config.fields.all_fields", lambda _: fields)
    assert key_parts(stage, settings, {}, {})["vision.pool"] == 1
    assert "vision.pool" not in key_parts(stage, changed, {}, {})


def test_precision_is_the_machines_before_it_is_in_a_key(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for has, precision in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr("mmphi.pipeline.resolve.gpu_has_bf16", lambda has=has: has)
        parts = pipeline.parts("train", pipeline.resolved("train", load_settings("tiny")))
        assert parts["projector.precision"] == precision
        keys.append(key(pipeline, "train"))
        assert key(pipeline, "train", projector__precision=precision) == keys[-1]
    assert keys[0] != keys[1]


def test_hub_model_stands_in_the_key_by_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    reference = tmp_path / "models--owner--name" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    stages = {"speak": Stage("speak", 1, "speak", ("language",), read_vision)}
    keys = []
    for commit in ("aaa", "bbb"):
        reference.write_text(commit)
        hub_revision.cache_clear()
        pipeline = Pipeline(stages)
        settings = load_settings("tiny", {"language.model": "owner/name"})
        assert pipeline.resolved("speak", settings).language.revision == commit
        keys.append(pipeline.key("speak", settings))
    pinned = load_settings("tiny", {"language.model": "owner/name", "language.revision": "aaa"})
    assert pipeline.key("speak", pinned) == keys[0] != keys[1]
    hub_revision.cache_clear()


def test_many_files_are_read_in_parallel_and_a_missing_one_is_left_out(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.bin" for i in range(40)]
    for i, path in enumerate(paths[:-1]):
        path.write_bytes(bytes([i]) * 100)
    digests = Digests(tmp_path / "memory.sqlite").of_files(paths)
    assert digests == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths[:-1]}


def test_folder_is_not_listed_again_while_nothing_was_added_or_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_text("a")
    long_ago = time.time() - 100
    os.utime(folder / "a.png", (long_ago, long_ago))
    os.utime(folder, (long_ago, long_ago))
    digests = Digests(tmp_path / "memory.sqlite")
    before = digests.of(folder)
    (folder / "a.png").write_text("b")  # Few files, as of a model: each is looked at.
    assert digests.of(folder) != before
    (folder / "a.png").write_text("a")
    os.utime(folder / "a.png", (long_ago, long_ago))
    assert digests.of(folder) == before
    monkeypatch.setattr("mmphi.data.content_hash.FEW", 0)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rglob", lambda *_: pytest.fail("was listed again"))
        assert digests.of(folder) == before
    (folder / "b.png").write_text("b")
    assert digests.of(folder) != before


def own_files(file: str) -> list[str]:
    """Settings that may name a file or folder in one of these ways."""
    return [f.name for f in all_fields(Settings).values() if f.file in file.split() and f.kind == "str"]


@pytest.mark.parametrize("name", own_files("path name weights"))
@pytest.mark.parametrize("folder", [False, True])
def test_a_bare_name_that_is_there_is_a_path_and_its_content_is_what_counts(
    name: str, folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is typed, and whatever its name ends with."""
    field = all_fields(Settings)[name]
    if folder and field.file == "weights":
        pytest.skip("weights are a file")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for place in (tmp_path, tmp_path / "elsewhere"):
        own = place / "mine.dat"
        if folder:
            own.mkdir()
            own /= "a"
        own.write_text(str(place))
    section, _, last = name.partition(".sources.N.")
    kind = {"kind": "captions"} if section == "data" else {}
    typed = {f"{section}.sources": json.dumps([{last: "mine.dat", **kind}])} if last else {name: "mine.dat"}
    here = load_settings("tiny", typed)
    written = name.replace(".N.", ".0.")
    assert files_of_settings(here, [name]) == {written: tmp_path / "mine.dat"}
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert files_of_settings(load_settings("tiny", typed), [name]) == {written: tmp_path / "elsewhere" / "mine.dat"}
    for word in field.names:
        (tmp_path / "elsewhere" / word).mkdir()
        kept = load_settings("tiny", {name: word})
        assert dict(leaves(kept))[name] == word
        assert files_of_settings(kept, [name]) == {}


def test_words_that_are_names_whatever_files_there_are() -> None:
    names = {f.name: f.names for f in all_fields(Settings).values() if f.names}
    assert names["language.model"] == ("pretrain",)
    assert names["vision.model"] == ("light_clip",)
    assert names["language.tokenizer"] == names["textgen.tokenizer"] == ("phi-2",)
    assert names["vision.pretrained"] == ("random",)
    import whisper

    assert set(names["audio.whisper"]) == set(whisper.available_models())


@pytest.mark.parametrize("stage", ["transcribe", "speech", "evaluate"])
def test_recordings_beside_their_csv_count_by_content(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    section = "transcribe" if stage == "transcribe" else "speech"
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.wav").write_bytes(b"one")
    (tmp_path / "list.csv").write_text("audio,transcript\nclips/a.wav,one\n")
    given = {f"{section}.path": str(tmp_path / "list.csv")}
    before = key(Pipeline(STAGES), stage, **given)
    (tmp_path / "clips" / "b.wav").write_bytes(b"is not named")
    assert key(Pipeline(STAGES), stage, **given) == before
    (tmp_path / "clips" / "a.wav").write_bytes(b"another")
    assert key(Pipeline(STAGES), stage, **given) != before


def test_a_generator_stands_in_the_key_by_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(STAGES)
    on_files = [key(pipeline, "pretrain", **{"pretrain.source": "files"})]
    keys = []
    for revision in "ab":
        monkeypatch.setattr(resolve, "hub_revision", lambda name, kind, now=revision: now if name else "")
        given = {"textgen.model": "owner/writer"}
        keys.append(key(pipeline, "textgen", **given))
        keys.append(key(pipeline, "pretrain", **given, **{"pretrain.source": "stream"}))
        on_files.append(key(pipeline, "pretrain", **{"pretrain.source": "files"}))
    assert len(set(keys)) == 4
    assert len(set(on_files)) == 1
