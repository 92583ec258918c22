"""Every reader of the registry, whatever is added to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import datasets
import pytest
from PIL import Image
from sources import captions, llava_row, photo_folder, write

from mmphi.config.declared_view import SettingsView
from mmphi.config.shared import REGISTERED_KINDS, DataSettings, SourceKind, SourceSettings, source_kinds
from mmphi.data.dataset_builder import read_examples
from mmphi.data.images import ImageFolder
from mmphi.data.readers import EVERY_KIND, READERS, Reader, Source, register, unused_settings
from mmphi.data.schema import Example, ReadReport, Turn
from mmphi.describe import stage_help
from mmphi.errors import DataError, SettingsError
from mmphi.stages import load_settings
from mmphi.stages.shared_models import check_data, read

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "own-data.md"


def drawn(folder: Path) -> dict[str, str]:
    (folder / "scenes" / "images").mkdir(parents=True)
    for number, split in enumerate(["train", "validation", "test"]):
        Image.new("RGB", (8, 8), (0, number, 9)).save(folder / "scenes" / "images" / f"{number}.png")
        (folder / "scenes" / f"{split}.json").write_text(json.dumps([llava_row(number, f"{number}.png")]))
    return {"kind": "scenes"}


def karpathy(folder: Path) -> dict[str, str]:
    splits = ["train", "val", "test"]
    rows = [{"filename": f"{i}.png", "split": s, "sentences": [{"raw": "a thing"}]} for i, s in enumerate(splits)]
    (folder / "k.json").write_text(json.dumps({"images": rows}))
    return {"kind": "karpathy", "path": str(folder / "k.json")}


def saved(folder: Path) -> dict[str, str]:
    paths = [str(folder / "images" / f"{i}.png") for i in range(3)]
    rows = datasets.Dataset.from_dict({"image": paths, "caption": ["a thing"] * 3})
    rows.cast_column("image", datasets.Image()).save_to_disk(str(folder / "saved"))
    return {"kind": "datasets", "path": str(folder / "saved")}


# Writes three rows about three images, and returns the source that names them.
WRITING: dict[str, Callable[[Path], dict[str, str]]] = {
    "scenes": drawn,
    "llava": lambda folder: write(folder, [llava_row(i, f"{i}.png") for i in range(3)]),
    "captions": lambda folder: captions(folder, [(f"{i}.png", "a thing") for i in range(3)]),
    "karpathy": karpathy,
    "datasets": saved,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return photo_folder(tmp_path)


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(READERS)
    yield
    READERS.clear()
    READERS.update(before)
    REGISTERED_KINDS.clear()


def data_of(folder: Path, source: dict[str, Any], **changes: Any) -> DataSettings:
    kind = source["kind"]
    own = {"images": str(folder / "images")} if "images" in READERS[kind].settings else {}
    held = {"validation_images": 0, "test_images": 0, **changes}
    return DataSettings.model_validate({"sources": [{**own, **source}], **held})


def test_names_of_the_setting_are_those_of_the_registry() -> None:
    assert list(get_args(SourceKind)) == list(READERS) == list(source_kinds())
    assert set(WRITING) == set(READERS)


@pytest.mark.parametrize("kind", READERS)
def test_rows_are_read_counted_and_named_after_their_source(kind: str, folder: Path) -> None:
    chosen = data_of(folder, {**WRITING[kind](folder), "name": "mine"})
    examples, report = read_examples(chosen, folder / "scenes")
    assert len(examples) == 3
    assert report.kept == {"mine": 3}
    assert {e.source for e in examples} == {"mine"}
    assert all(e.images[0].id.startswith("mine/") and e.images[0].path.is_file() for e in examples)
    splits = ["train", "validation", "test"] if READERS[kind].brings_splits else ["train"] * 3
    assert [e.split for e in examples] == splits
    if READERS[kind].local:
        assert Path(chosen.sources[0].path).is_file()


@pytest.mark.parametrize("kind", READERS)
def test_a_setting_that_is_required_may_not_be_empty(kind: str, folder: Path) -> None:
    source = data_of(folder, WRITING[kind](folder)).sources[0].model_dump()
    for name in READERS[kind].required:
        chosen = DataSettings.model_validate({"sources": [{**source, name: ""}]})
        with pytest.raises(SettingsError, match=f"of kind {kind} has no {name}"):
            read_examples(chosen, folder / "scenes")


class Recording:
    """Settings of a source that record which of them are read."""

    def __init__(self, settings: SourceSettings) -> None:
        self.settings, self.seen = settings, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.seen.add(name)
        return getattr(self.settings, name)


@pytest.mark.parametrize("kind", READERS)
def test_exactly_the_declared_settings_are_used(kind: str, folder: Path) -> None:
    chosen: Any = Recording(data_of(folder, WRITING[kind](folder)).sources[0])
    assert len(list(READERS[kind].read(Source(chosen, "mine", ReadReport(), folder / "scenes")))) == 3
    assert chosen.seen == set(READERS[kind].settings)


def test_every_setting_of_a_source_is_used_by_a_reader() -> None:
    used = {name for reader in READERS.values() for name in reader.settings}
    assert used | set(EVERY_KIND) == set(SourceSettings.model_fields)


@pytest.mark.parametrize("kind", READERS)
def test_help_and_page_describe_every_reader(kind: str) -> None:
    reader, names = READERS[kind], READERS[kind].settings
    shown = stage_help("projector", load_settings("tiny", expand=False), everything=True)
    (line,) = [line for line in shown.splitlines() if line.startswith(f"  {kind} ")]
    assert reader.help in line
    assert reader.file in line
    assert all(name in line for name in names)
    settings = ", ".join(f"`{name}`" for name in names) or "none"
    assert f"| `{kind}` | {reader.help} | {reader.file} | {settings} |\n" in PAGE.read_text()


def test_readers_are_in_the_help_of_their_setting_only() -> None:
    tiny = load_settings("tiny", expand=False)
    assert "values of data.sources.N.kind" in stage_help("projector", tiny, everything=True, only="data")
    assert "values of data.sources.N.kind" not in stage_help("projector", tiny, everything=True, only="vision")
    assert "values of data.sources.N.kind" not in stage_help("pretrain", tiny, everything=True)


def test_errors_list_every_kind(registered: None) -> None:
    with pytest.raises(SettingsError) as wrong:
        load_settings("tiny", {"data.sources": json.dumps([{"kind": "cvs", "path": "x.csv"}])})
    assert f"one of {', '.join(READERS)}" in wrong.value.what
    with pytest.raises(ValueError, match=r"needs a kind: llava, captions, karpathy, datasets \["):
        SourceSettings(path="x.csv")
    register("mine", Reader(lambda _: iter(()), "nothing", "none"))
    with pytest.raises(ValueError, match=r"needs a kind: llava, captions, karpathy, datasets, mine \["):
        SourceSettings(path="x.csv")


def test_settings_that_a_reader_does_not_use_are_found() -> None:
    assert unused_settings(SourceSettings(kind="llava", path="x", images="y", weight=2.0, name="z")) == []
    assert unused_settings(SourceSettings(kind="llava", path="x", question="what?", split="test")) == [
        "split",
        "question",
    ]


def three(source: Source) -> Iterator[Example]:
    folder = ImageFolder(source.images, source.name)
    for number in range(3):
        source.report.keep(source.name)
        ref = folder.find(f"{number}.png")
        yield Example(str(number), (ref,), (Turn(source.settings.question, "a thing"),), source.name)


THREE = Reader(three, "three images", "none", required=("images",), optional=("question",))


def test_a_registered_reader_is_read_like_the_others(registered: None, folder: Path) -> None:
    with pytest.raises(ValueError, match="should be 'scenes'"):
        SourceSettings.model_validate({"kind": "three"})
    register("three", THREE)
    chosen = data_of(folder, {"kind": "three", "question": "what?"}, test_images=1)
    examples, report = read_examples(chosen, None)
    assert sorted(e.split for e in examples) == ["test", "train", "train"]
    assert {e.turns for e in examples} == {(Turn("what?", "a thing"),)}
    assert report.kept == {"three": 3}
    with pytest.raises(SettingsError, match="of kind three has no images"):
        read_examples(DataSettings.model_validate({"sources": [{"kind": "three"}]}), None)
    register("three", THREE)  # A cell of a notebook may run again.


def test_a_stage_refuses_a_registered_reader(registered: None, folder: Path) -> None:
    register("three", THREE)
    settings = load_settings(
        "tiny", {"data.sources": json.dumps([{"kind": "three", "images": str(folder / "images")}])}, "projector"
    )
    view = SettingsView(settings, ("data",))
    with pytest.raises(SettingsError, match="registered in this program only"):
        check_data(view)
    with pytest.raises(SettingsError, match="registered in this program only"):
        read(view, {})


def test_a_reader_cannot_replace_one_of_mmphi_or_use_unknown_settings(registered: None) -> None:
    with pytest.raises(SettingsError, match="mmphi has a reader of kind 'llava'"):
        register("llava", THREE)
    with pytest.raises(SettingsError, match=r"a source has no setting 'folder'(.|\n)*path, images"):
        register("three", Reader(three, "three images", "none", required=("folder",)))
    assert "three" not in READERS


def test_scenes_have_to_be_drawn() -> None:
    with pytest.raises(DataError, match="no scenes were drawn"):
        read_examples(DataSettings(), None)
