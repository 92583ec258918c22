from __future__ import annotations

import pytest

from mmphi.evaluation.wer import WordErrors, normalized, total_errors, word_errors


@pytest.mark.parametrize(
    ("said", "heard", "expected"),
    [
        ("A dog runs.", "a dog runs", WordErrors(3)),
        ("Mr. Smith's colour", "mister smith is color", WordErrors(4)),
        ("two dogs", "2 dogs", WordErrors(2)),
        ("a b c d", "a x c", WordErrors(2, 1, 1)),
        ("a b", "a b c d", WordErrors(2, insertions=2)),
        ("", "you", WordErrors(insertions=1)),
        ("", "", WordErrors()),
        ("a dog", "", WordErrors(deletions=2)),
    ],
)
def test_words_are_counted_as_whisper_compares_them(said: str, heard: str, expected: WordErrors) -> None:
    assert word_errors(said, heard) == expected


def test_the_rate_of_all_is_that_of_all_words() -> None:
    each = [WordErrors(9, 1), WordErrors(0, 1)]
    assert [w.rate for w in each] == [pytest.approx(0.1), 1]
    assert total_errors(each).rate == pytest.approx(2 / 11)
    assert WordErrors(insertions=3).rate == 3
    assert WordErrors().rate == 0


def test_other_languages_are_only_cleaned() -> None:
    assert normalized("Zwei Hunde, die laufen!", "de") == "zwei hunde die laufen"
