from __future__ import annotations

import pytest

from mmphi.config import DataSettings, LanguageSettings, VisionSettings
from mmphi.config.declared_view import SettingsView, UndeclaredError, covered
from mmphi.stages import load_settings


def view(*declared: str) -> SettingsView:
    return SettingsView(load_settings("tiny", {"data.sources": "[{kind: scenes, weight: 2}]"}), declared)


def test_declared_settings_are_read() -> None:
    assert view("vision")(VisionSettings).pool == 1
    assert view("vision.pool")(VisionSettings).pool == 1
    assert view("data.sources")(DataSettings).sources[0].weight == 2
    assert view("data.sources.N.weight")(DataSettings).sources[0].weight == 2


@pytest.mark.parametrize("declared", [(), ("vision",), ("language.tokenizer",)])
def test_other_sections_and_settings_raise(declared: tuple[str, ...]) -> None:
    with pytest.raises(UndeclaredError, match=r"language(\.model)? is read, but not declared"):
        view(*declared)(LanguageSettings).model  # noqa: B018 - to read it is the test


def test_other_settings_of_an_item_raise() -> None:
    (source,) = view("data.sources.N.kind")(DataSettings).sources
    assert source.kind == "scenes"
    with pytest.raises(UndeclaredError, match=r"data\.sources\.0\.weight is read"):
        source.weight  # noqa: B018 - to read it is the test
    with pytest.raises(AttributeError):
        source.nothing  # noqa: B018 - to read it is the test


def test_a_name_covers_what_is_below_it_alone() -> None:
    assert covered("data.sources.3.path", ["data"])
    assert covered("data.sources.3.path", ["data.sources.N.path"])
    assert not covered("data.sources.3.path", ["data.sources.N.paths", "dat"])
