"""Results on data that was read by earlier rules are not taken for results by these."""

from __future__ import annotations

from mmphi.config import DataSettings, SourceSettings


def test_own_data_has_the_version_of_its_rules_in_its_keys_and_scenes_have_not() -> None:
    assert DataSettings().reading == DataSettings(sources=[SourceSettings(kind="scenes")]).reading == 1
    own = SourceSettings(kind="captions", path="c.csv", images="images")
    assert DataSettings(sources=[own]).reading == 2
    assert DataSettings(sources=[own], reading=1).reading == 2
