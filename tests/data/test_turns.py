"""Conversations in the forms that files have in the field: read, or dropped with a reason that can be counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sources import llava_row, photo_folder, settings, write

from mmphi.data.dataset_builder import read_examples
from mmphi.data.schema import Turn
from mmphi.errors import DataError

ONE = (Turn("what?", "a thing"),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photo_folder(tmp_path)


def chat(*pairs: tuple[str, Any], name: str = "messages", role: str = "role", text: str = "content") -> dict[str, Any]:
    return {name: [{role: who, text: what} for who, what in pairs]}


def read(folder: Path, *rows: Any) -> tuple[list[Any], Any]:
    return read_examples(settings(folder, write(folder, list(rows)), max_bad_share=1.0), None)


PARTS = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "what?"}]
FORMS = {
    "roles": {"image": "0.png", **chat(("user", "<image>\nwhat?"), ("assistant", "a thing"))},
    "from user": {
        "image": "0.png",
        **chat(("user", "what?"), ("assistant", "a thing"), name="conversations", role="from", text="value"),
    },
    "a list of images": {"images": ["0.png"], **chat(("user", "<image>what?"), ("assistant", "a thing"))},
    "images with paths": {
        "images": [{"path": "0.png", "bytes": None}],
        **chat(("user", "what?"), ("assistant", "a thing")),
    },
    "one image as images": {"images": "0.png", **chat(("user", "what?"), ("assistant", "a thing"))},
    "parts": chat(("user", PARTS), ("assistant", [{"type": "text", "text": "a thing"}])),
    "parts, named beside": {
        "images": ["0.png"],
        **chat(("user", [{"type": "image"}, PARTS[1]]), ("assistant", "a thing")),
    },
    "an URL of a file": chat(
        ("user", [{"type": "image_url", "image_url": {"url": "0.png"}}, PARTS[1]]), ("assistant", "a thing")
    ),
    "backslashes": {"image": ".\\0.png", **chat(("user", "what?"), ("assistant", "a thing"))},
    "an empty system message": {"image": "0.png", **chat(("system", ""), ("user", "what?"), ("assistant", "a thing"))},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_usual_forms_are_one_conversation(folder: Path, form: str) -> None:
    (example,), report = read(folder, FORMS[form])
    assert example.turns == ONE
    assert [image.id for image in example.images] == ["llava/0.png"]
    assert not report.dropped


def test_a_leading_system_message_begins_the_first_question(folder: Path) -> None:
    (example,), _ = read(
        folder, {"image": "0.png", **chat(("system", "Be brief."), ("user", "what?"), ("assistant", "a thing"))}
    )
    assert example.turns == (Turn("Be brief.\nwhat?", "a thing"),)


def test_turns_that_cannot_be_used_are_counted_and_the_others_kept(folder: Path) -> None:
    examples, report = read(
        folder,
        {"image": "0.png", **chat(("user", "a"), ("assistant", "b"), ("assistant", "lost"))},
        {"image": "1.png", **chat(("user", "a"), ("assistant", "b"), ("user", "never answered"))},
        {"image": "2.png", **chat(("assistant", "welcome"), ("user", "a"), ("assistant", "b"))},
        {"image": "3.png", **chat(("user", "a"), ("user", "c"), ("assistant", "b"))},
    )
    assert [example.turns for example in examples] == [*[(Turn("a", "b"),)] * 3, (Turn("a\nc", "b"),)]
    notes = {text: count for (_, text), count in report.notes.items()}
    assert notes == {"an answer without its question is left out": 2, "a question without its answer is left out": 1}


def test_rows_that_would_lose_something_are_dropped(folder: Path) -> None:
    rows = [
        chat(("user", "<image>\nwhat?"), ("assistant", "a thing")),
        {"image": "0.png", **chat(("user", "<image> and <image>?"), ("assistant", "a thing"))},
        {"images": ["0.png", "1.png"], **chat(("user", "<image>\nwhat?"), ("assistant", "a thing"))},
        {"image": "https://example.org/0.png", **chat(("user", "what?"), ("assistant", "a thing"))},
        {"image": "0.png", **chat(("user", "what?"), ("tool", "a thing"))},
        {
            "image": "0.png",
            **chat(("user", "what?"), ("assistant", "a"), ("system", "b"), ("user", "c"), ("assistant", "d")),
        },
        {"image": "0.png", **chat(("user", [{"type": "video"}]), ("assistant", "a thing"))},
        {"image": {"bytes": "x"}, **chat(("user", "what?"), ("assistant", "a thing"))},
        {"id": 1, "prompt": "what?", "response": "a thing"},
    ]
    examples, report = read(folder, *rows)
    assert examples == []
    assert Counter(each.reason for each in report.dropped) == {
        "<image> in a row without an image": 1,
        "another number of <image> than images": 2,
        "the image is a URL": 1,
        "unknown role 'tool'": 1,
        "a system message after the first question": 1,
        "a part of an unknown type 'video'": 1,
        "malformed image": 1,
        "no list called conversations or messages (it has id, prompt, response)": 1,
    }


def test_images_stay_with_their_questions(folder: Path) -> None:
    """What is left out takes its images along, and an image is never shown before what comes earlier."""
    shown = [{"type": "image", "image": "1.png"}, {"type": "text", "text": "what is it?"}]
    rows = [
        chat(("user", "hi"), ("assistant", "hello"), ("user", shown)),
        {"images": ["0.png", "1.png"], **chat(("user", "q"), ("assistant", "x"), ("user", "<image><image> compare"))},
        {"images": ["0.png", "1.png"], **chat(("user", "<image>q"), ("assistant", "x"), ("user", "<image> what?"))},
        {
            "images": ["0.png", "1.png"],
            **chat(("user", "<image>q"), ("assistant", "x"), ("user", "<image>"), ("assistant", "y")),
        },
        {"images": ["0.png", "1.png"], **chat(("user", "compare"), ("assistant", "x"))},
        chat(("user", "draw"), ("assistant", shown)),
        {"images": ["0.png"], **chat(("user", "draw"), ("assistant", "<image>"))},
        {"images": ["0.png"], **chat(("user", shown), ("assistant", "x"))},
    ]
    examples, report = read(folder, *rows)
    found = [([image.path.stem for image in e.images], [turn.question for turn in e.turns]) for e in examples]
    assert found == [
        ([], ["hi"]),
        ([], ["q"]),
        (["0"], ["q"]),
        (["0", "1"], ["<image>q", "<image>"]),
        (["0", "1"], ["compare"]),
    ]
    assert [each.reason for each in report.dropped] == [
        "an image in an answer",
        "an image in an answer",
        "images are named by the row and by its messages",
    ]


def test_the_word_in_a_text_of_a_row_without_image_stays(folder: Path) -> None:
    (example,), _ = read(folder, chat(("user", "what does <image> mean in HTML?"), ("assistant", "nothing")))
    assert example.turns == (Turn("what does <image> mean in HTML?", "nothing"),)


def test_json_lines_and_utf_16_are_read(folder: Path) -> None:
    path, rows = folder / "rows.jsonl", [llava_row(1), llava_row(2)]
    source = {"kind": "llava", "path": str(path)}
    lines = "\n".join(map(json.dumps, rows)) + "\n"
    for content in (lines.encode(), lines.encode("utf-16"), b"\xef\xbb\xbf" + lines.encode()):
        path.write_bytes(content)
        assert len(read_examples(settings(folder, source), None)[0]) == 2
    wrong = folder / "rows.json"
    wrong.write_text(lines)
    assert len(read_examples(settings(folder, {"kind": "llava", "path": str(wrong)}), None)[0]) == 2
    path.write_text('{"id": 1}\n{"id": }\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2, column 8"):
        read_examples(settings(folder, source), None)
    with pytest.raises(DataError, match="is a folder"):
        read_examples(settings(folder, {"kind": "llava", "path": str(folder / "images")}), None)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_columns_of_captions_may_be_divided_otherwise(folder: Path, delimiter: str) -> None:
    path = folder / "c.csv"
    text = f"image{delimiter}caption\n0.png{delimiter}a dog\n"
    for encoding in ("utf-8", "utf-16"):
        path.write_text(text, encoding=encoding)
        (example,), _ = read_examples(settings(folder, {"kind": "captions", "path": str(path)}), None)
        assert example.turns == (Turn("", "a dog"),)


@pytest.mark.parametrize("name", ["é" * 120 + ".jpg", "가" * 60 + ".jpg"])
def test_a_name_that_is_too_long_in_another_form_is_a_missing_image(folder: Path, name: str) -> None:
    examples, report = read(folder, {"image": name, **chat(("user", "what?"), ("assistant", "a thing"))})
    assert examples == []
    assert [each.reason for each in report.dropped] == ["missing image"]


def test_file_names_in_another_unicode_form_are_found(folder: Path) -> None:
    (folder / "images" / "0.png").rename(folder / "images" / "cafe\u0301.png")
    (example,), report = read(folder, {"image": "caf\u00e9.png", **chat(("user", "what?"), ("assistant", "a thing"))})
    assert example.images[0].path.name == "cafe\u0301.png"
    assert [text for _, text in report.notes] == ["images found as a name in the Unicode form NFD"]
